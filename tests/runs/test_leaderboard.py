"""Ranking the jobs of a sweep from their run directories."""

import csv
from pathlib import Path

import pytest

from tlcli.runs import leaderboard
from tlcli.runs.run_dir import RunDir, read_json, write_json


def job(folder: Path, name: str, overrides: list[str], *, keep_best: str = "accuracy", **best: object) -> RunDir:
    """Write a finished job with these validation metrics."""
    run = RunDir(folder / name)
    run.start(command="tlcli train -m x", overrides=overrides, config="")
    run.update(best={"epoch": 2, **best}, keep_best=keep_best, seconds=4.0)
    run.end("done")
    return run


def test_the_copy_of_the_result_of_a_search_is_no_job(tmp_path: Path) -> None:
    for name in ("0", "best"):
        job(tmp_path, name, [], accuracy=0.5)
    (tmp_path / "tune.json").touch()
    assert [entry["name"] for entry in leaderboard.read(tmp_path)["jobs"]] == ["0"]


@pytest.mark.parametrize(("metric", "order"), [("accuracy", "10"), ("macro_f1", "01"), ("loss", "01")])
def test_ranked_by_the_metric_that_selects(metric: str, order: str, tmp_path: Path) -> None:
    job(tmp_path, "0", ["seed=0"], keep_best=metric, accuracy=0.7, macro_f1=0.8, loss=0.2)
    job(tmp_path, "1", ["seed=1"], keep_best=metric, accuracy=0.8, macro_f1=0.7, loss=0.3)
    board = leaderboard.read(tmp_path)
    assert ([job["name"] for job in board["jobs"]], board["figure"]) == (list(order), metric)


def test_different_metrics_are_compared_by_accuracy_and_test_metrics_do_not_rank(tmp_path: Path) -> None:
    for name, keep_best, accuracy, test in (("0", "loss", 0.9, 0.1), ("1", "accuracy", 0.8, 0.99)):
        run = job(tmp_path, name, [], keep_best=keep_best, accuracy=accuracy, loss=accuracy)
        write_json(run.test_file, {"accuracy": test, "accuracy_ci95": [0.0, 1.0]})
    board = leaderboard.read(tmp_path)
    assert board["figure"] == "accuracy"
    jobs = [(job["name"], job["rank"], job["test_accuracy"]) for job in board["jobs"]]
    assert jobs == [("0", 1, 0.1), ("1", 2, 0.99)]


def test_what_did_not_finish_comes_last_without_a_rank_by_number(tmp_path: Path) -> None:
    job(tmp_path, "10", [], accuracy=0.99).end("interrupted", "terminated")
    job(tmp_path, "1", [], accuracy=0.98).end("failed", "boom")
    job(tmp_path, "2", [], accuracy=0.1)
    (tmp_path / "3").mkdir()
    (tmp_path / "3" / "run.json").write_text("{")
    jobs = leaderboard.read(tmp_path)["jobs"]
    assert [(job["name"], job["rank"]) for job in jobs] == [("2", 1), ("1", None), ("3", None), ("10", None)]
    assert jobs[1]["error"] == "boom"
    assert "damaged" in jobs[2]["error"]


def test_both_files_have_the_jobs_and_the_keys_that_vary(tmp_path: Path) -> None:
    job(tmp_path, "0", ["name=a,b", "epochs=3", "+x=1"], accuracy=0.5)
    job(tmp_path, "1", ["name=c", "epochs=3"], accuracy=0.6)
    leaderboard.write(tmp_path)
    sweep = read_json(tmp_path / "sweep.json")
    assert (sweep["schema_version"], sweep["command"], sweep["keys"]) == (1, "tlcli train -m x", ["name", "x"])
    assert sweep["jobs"][1]["values"] == {"name": "a,b", "x": "1"}
    with (tmp_path / "leaderboard.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert [row["job"] for row in rows] == [job["name"] for job in sweep["jobs"]] == ["1", "0"]
    assert [row["name"] for row in rows] == ["c", "a,b"]
    assert [float(row["val_accuracy"]) for row in rows] == [job["validation"] for job in sweep["jobs"]]
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1", "sweep.json", "leaderboard.csv"}
