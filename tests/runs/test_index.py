"""The runs under a folder: each once, whatever is in their files."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tlcli.locks import host_digest
from tlcli.runs.index import Entry, read_entry, read_index
from tlcli.runs.run_dir import RunDir, write_json

BEST = {"epoch": 2, "accuracy": 0.9, "macro_f1": 0.8, "loss": 0.3}


def make_run(path: Path, *, accuracy: float | None = None, **facts: Any) -> Path:
    path.mkdir(parents=True)
    record = {"status": "done", "started": "2026-11-24T10:00:00+00:00", "backbone": "resnet18", "dataset": "digits"}
    write_json(path / "run.json", {**record, "freeze": "head", "best": BEST, "seconds": {"total": 90.0}, **facts})
    if accuracy is not None:
        write_json(path / "test.json", {"accuracy": accuracy, "accuracy_ci95": [accuracy - 0.1, accuracy + 0.1]})
    return path


def one(folder: Path) -> Entry:
    (entry,) = read_index(folder)[0]
    assert entry["kind"] == "run"
    return entry


def test_a_run_has_what_its_files_say(tmp_path: Path) -> None:
    make_run(tmp_path / "a" / "b", accuracy=0.75, seed=3)
    entry = one(tmp_path)
    assert (entry["status"], entry["dataset"], entry["backbone"], entry["freeze"], entry["seed"]) == (
        "done", "digits", "resnet18", "head", 3
    )  # fmt: skip
    assert (entry["val"], entry["test"], entry["minutes"]) == (0.9, 0.75, 1.5)
    assert entry["test_ci95"] == pytest.approx((0.65, 0.85))


def test_jobs_of_a_sweep_are_one_entry(tmp_path: Path) -> None:
    for job, loss in ((0, 0.5), (2, 0.1), (10, 0.3)):
        best = {"epoch": 1, "accuracy": 0.5 + loss, "loss": loss}
        make_run(tmp_path / "s" / str(job), accuracy=0.6, best=best, keep_best="loss", overrides=["a=1", f"b={job}"])
    make_run(tmp_path / "s" / "3", status="failed", best=None, freeze="none")
    (tmp_path / "s" / "multirun.yaml").touch()
    (sweep,) = read_index(tmp_path)[0]
    assert sweep["kind"] == "sweep"
    assert [job["path"].name for job in sweep["runs"]] == ["0", "2", "3", "10"]
    assert sweep["status"] == "failed"
    assert sweep["best_job"].name == "2", "they keep the epoch of the lowest loss"
    assert sweep["freeze"] == ("head", "none")
    assert sweep["minutes"] == 6.0


def test_a_job_that_failed_before_its_first_fold_is_one_of_its_sweep(tmp_path: Path) -> None:
    make_run(tmp_path / "s/0/best", status="failed", best=None)
    make_run(tmp_path / "s/1/best")
    make_run(tmp_path / "s/1/fold-0", overrides=["fold=0"])
    for folder in ("s", "s/0", "s/1"):
        (tmp_path / folder / "sweep.json").touch()
    (sweep,) = read_index(tmp_path)[0]
    assert (sweep["kind"], sweep["jobs"], sweep["jobs_by_status"]) == ("sweep", 2, {"failed": 1, "done": 1})


def test_a_fold_alone_is_a_run_without_its_refit_beside_it(tmp_path: Path) -> None:
    for i in range(2):
        make_run(tmp_path / f"s/fold-{i}", overrides=["folds=2", f"fold={i}"])
    assert sorted(run["path"].name for run in read_index(tmp_path)[0]) == ["fold-0", "fold-1"]
    make_run(tmp_path / "s/best", overrides=["folds=2"])
    assert one(tmp_path)["path"].name == "best"


def test_a_search_whose_best_is_a_copy_is_one_sweep_of_its_trials(tmp_path: Path) -> None:
    """As after `cp -rL`, which follows the link."""
    for name in ("0", "1", "best"):
        make_run(tmp_path / "s" / name)
    for name in ("sweep.json", "tune.json"):
        (tmp_path / "s" / name).touch()
    (sweep,) = read_index(tmp_path)[0]
    assert (sweep["kind"], [job["path"].name for job in sweep["runs"]]) == ("sweep", ["0", "1"])


@pytest.mark.parametrize("value", [None, 3, "x", [1], {"a": []}, True])
def test_values_of_other_types_do_no_harm(value: Any, tmp_path: Path) -> None:
    names = ["best", "seconds", "overrides", "started", "ended", "pid", "seed", "dataset", "backbone", "keep_best"]
    make_run(tmp_path / "run", **dict.fromkeys(names, value))
    write_json(tmp_path / "run" / "test.json", {"accuracy": value, "accuracy_ci95": value})
    assert one(tmp_path)["status"] == "done"
    assert one(tmp_path)["test"] is None


def test_the_time_of_a_run_is_with_its_folds(tmp_path: Path) -> None:
    make_run(tmp_path / "run", seconds={"total": 30.0}, cross_validation={"seconds": 60.0})
    assert one(tmp_path)["minutes"] == 1.5


def test_a_process_that_is_gone_died(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    run = make_run(tmp_path / "run", status="running", pid=gone.pid, host=host_digest())
    assert read_entry(run)["status"] == "died"
    assert read_entry(run)["minutes"] == 1.5, "as far as it had come"
    RunDir(run).update(host="another machine's")
    assert read_entry(run)["status"] == "running", "nobody can tell from here"
    RunDir(run).mark_resumed("tlcli train --resume run")
    assert one(run)["status"] == "running", "its process began after the run"
    RunDir(run).end("done")
    assert one(run)["status"] == "done"


def test_links_are_followed_and_may_loop(tmp_path: Path) -> None:
    make_run(tmp_path / "2026" / "run")
    (tmp_path / "2026" / "up").symlink_to(tmp_path)
    (tmp_path / "2026" / "again").symlink_to(tmp_path / "2026" / "run")
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    (tmp_path / "2025").mkdir()
    (tmp_path / "2025" / "next").symlink_to(tmp_path / "2026")
    assert one(tmp_path)["path"] == tmp_path / "2026" / "run"
    assert one(tmp_path / "2025")["path"] == tmp_path / "2025" / "next" / "run"


def test_runs_that_ended_early_are_known_by_their_config(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", status="interrupted", dataset=None, backbone=None, freeze=None)
    config = "dataset:\n  kind: imagefolder\n  name: imagefolder\n  root: '/data/photos/'\n"
    (run / "config.yaml").write_text(config + "backbone:\n  name: swin_t\nfreeze:\n  kind: norm\nepochs: 5\n")
    entry = one(tmp_path)
    assert (entry["dataset"], entry["data"]) == ("imagefolder", "photos")
    assert (entry["backbone"], entry["freeze"]) == ("swin_t", "norm")


@pytest.mark.parametrize("word", ["dataset.root='/data/my photos'", 'dataset.root="/data/my photos/"'])
def test_quotes_of_the_command_line_are_no_part_of_the_data(word: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", dataset="imagefolder", overrides=["dataset=imagefolder", word])
    (run / "config.yaml").write_text("dataset:\n  kind: imagefolder\n  root: /data/my photos\n")
    assert one(tmp_path)["data"] == "my photos"
