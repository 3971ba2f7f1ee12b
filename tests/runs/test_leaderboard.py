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


def names(folder: Path) -> list[str]:
    return [job.name for job in leaderboard.read(folder).jobs]


@pytest.mark.parametrize(
    ("figure", "order"), [("accuracy", ["1", "0"]), ("macro_f1", ["0", "1"]), ("loss", ["0", "1"])]
)
def test_ranked_by_the_figure_that_selects(figure: str, order: list[str], tmp_path: Path) -> None:
    job(tmp_path, "0", ["seed=0"], keep_best=figure, accuracy=0.7, macro_f1=0.8, loss=0.2)
    job(tmp_path, "1", ["seed=1"], keep_best=figure, accuracy=0.8, macro_f1=0.7, loss=0.3)
    assert names(tmp_path) == order
    assert leaderboard.read(tmp_path).figure == figure


def test_different_figures_are_compared_by_accuracy_and_test_figures_do_not_rank(tmp_path: Path) -> None:
    for name, keep_best, accuracy, test in (("0", "loss", 0.9, 0.1), ("1", "accuracy", 0.8, 0.99)):
        run = job(tmp_path, name, [], keep_best=keep_best, accuracy=accuracy, loss=accuracy)
        write_json(run.test_file, {"accuracy": test, "accuracy_ci95": [0.0, 1.0]})
    board = leaderboard.read(tmp_path)
    assert board.figure == "accuracy"
    assert [(job.name, job.rank, job.test_accuracy) for job in board.jobs] == [("0", 1, 0.1), ("1", 2, 0.99)]
    assert board.jobs[0].test_ci95 == (0.0, 1.0)


def test_what_did_not_finish_comes_last_without_a_rank(tmp_path: Path) -> None:
    job(tmp_path, "0", [], accuracy=0.99).end("interrupted", "terminated")
    job(tmp_path, "1", [], accuracy=0.98).end("failed", "boom")
    job(tmp_path, "2", [], accuracy=0.1)
    (tmp_path / "3").mkdir()
    (tmp_path / "3" / "run.json").write_text("{")
    jobs = leaderboard.read(tmp_path).jobs
    assert [(job.name, job.rank) for job in jobs] == [("2", 1), ("0", None), ("1", None), ("3", None)]
    assert jobs[2].error == "boom"
    assert "damaged" in str(jobs[3].error)


def test_jobs_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for number in (10, 2, 1):
        job(tmp_path, str(number), [], accuracy=0.5)
    assert names(tmp_path) == ["1", "2", "10"]


def test_keys_are_those_that_vary(tmp_path: Path) -> None:
    job(tmp_path, "0", ["freeze=head", "epochs=3", "+x=1"], accuracy=0.5)
    job(tmp_path, "1", ["freeze=none", "epochs=3"], accuracy=0.5)
    board = leaderboard.read(tmp_path)
    assert board.keys == ("freeze", "x")
    assert dict(board.jobs[0].values) == {"freeze": "head", "x": "1"}


def test_files_say_the_same(tmp_path: Path) -> None:
    job(tmp_path, "0", ["name=a,b"], accuracy=0.5)
    job(tmp_path, "1", ["name=c"], accuracy=0.6)
    leaderboard.write(tmp_path)
    sweep = read_json(tmp_path / "sweep.json")
    assert sweep["schema_version"] == 1 and sweep["command"] == "tlcli train -m x"
    with (tmp_path / "leaderboard.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert [row["job"] for row in rows] == [one["name"] for one in sweep["jobs"]] == ["1", "0"]
    assert [row["name"] for row in rows] == ["c", "a,b"]
    assert [float(row["val_accuracy"]) for row in rows] == [one["validation"] for one in sweep["jobs"]]
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1", "sweep.json", "leaderboard.csv"}


def test_values_of_wrong_types_are_left_out(tmp_path: Path) -> None:
    job(tmp_path, "0", ["seed=0"], accuracy="high").update(test={"accuracy": [1]}, error=3, overrides=3)
    job(tmp_path, "1", ["seed=1"], accuracy=0.9).update(best=[1], keep_best=None)
    for one in leaderboard.write(tmp_path).jobs:
        assert (one.validation, one.test_accuracy, one.error, one.rank) == (None, None, None, None)
