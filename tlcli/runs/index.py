"""An index of the runs and sweeps under a folder. A list of 2,000 runs has to take a fraction of a second."""

import os
import re
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tlcli.errors import UsageError
from tlcli.files import is_dir
from tlcli.runs.run_dir import (
    FOLD,
    REFIT,
    STATE_FILE,
    SWEEP_FILES,
    RunDir,
    integer,
    mapping,
    number,
    pair,
    strings,
    text,
    total_seconds,
)
from tlcli.text import natural_order

# of a sweep: the first that a job has
WORST_FIRST = ("running", "died", "damaged", "failed", "interrupted", "done", "stopped")

Entry = dict[str, Any]
"""A run or a sweep, as `tlcli list --format json` prints it. What is not known is None.

`val` and `test` are accuracies; `data` names the folder or file with the images, or the dataset. A sweep has the
accuracies of its best job, and the distinct names of all its jobs, which are in `runs`.
"""


def rank(runs: Sequence[Entry]) -> tuple[str, list[Entry]]:
    """Return the metric that selected the epochs (accuracy if it varies), and finished runs but folds, best first."""
    metrics = {run["keep_best"] for run in runs if run["keep_best"]}
    metric = metrics.pop() if len(metrics) == 1 else "accuracy"
    done = [run for run in runs if run["status"] == "done" and not run["is_fold"] and metric in (run["best"] or {})]
    return metric, sorted(done, key=lambda run: run["best"][metric], reverse=metric != "loss")


def read_index(folder: Path) -> tuple[list[Entry], list[str]]:
    """Return the runs and sweeps at or under a folder, or behind links, unordered, and folders that cannot be read."""
    runs: list[Entry] = []
    jobs: dict[str, list[Entry]] = {}  # by the path of the sweep
    unreadable: list[str] = []
    visited: set[tuple[int, int]] = set()
    waiting: deque[tuple[str, str | None]] = deque([(str(folder), None)])
    while waiting:
        path, sweep = waiting.pop()
        try:
            status = os.stat(path)  # noqa: PTH116 - 2,000 Path objects cost more than the calls
            if (status.st_dev, status.st_ino) in visited:
                continue
            visited.add((status.st_dev, status.st_ino))
            with os.scandir(path) as scan:
                inside = {entry.name: entry for entry in scan}
        except OSError:
            unreadable.append(path)
            continue
        if "run.json" in inside:
            if not (run := read_entry(Path(path)))["is_fold"]:  # the refit stands for its folds
                (runs if sweep is None else jobs[sweep]).append(run)
            continue
        is_search = STATE_FILE in inside
        is_folds = REFIT in inside and inside[REFIT].is_dir(follow_symlinks=False) and not is_search
        if not inside.keys().isdisjoint(SWEEP_FILES) and not is_folds:
            sweep = path
            jobs[sweep] = []
        for name, entry in inside.items():
            if name.startswith(".") or (name == REFIT and is_search):  # a link to a job, or its copy
                continue
            if entry.is_dir(follow_symlinks=False):
                waiting.append((entry.path, sweep))
            elif entry.is_symlink() and is_dir(entry.path):
                waiting.appendleft((entry.path, sweep))  # last, so that a folder is found under its own path
    return [*runs, *(_sweep_entry(Path(path), found) for path, found in jobs.items() if found)], unreadable


def _sweep_entry(path: Path, jobs: Sequence[Entry]) -> Entry:
    runs = sorted(jobs, key=lambda job: natural_order(str(job["path"])))
    counts = Counter(job["status"] for job in runs)
    best = next(iter(rank(runs)[1]), {"val": None, "test": None, "path": None})
    if (link := path / REFIT).is_symlink():  # of a search, whose result may have a lower validation than a trial
        best = next((job for job in runs if job["path"] == path / link.readlink()), best)
    minutes = [job["minutes"] for job in runs if job["minutes"] is not None]
    names = ("dataset", "data", "backbone", "freeze")
    return {
        "kind": "sweep",
        "path": path,
        "status": next((status for status in WORST_FIRST if status in counts), "failed"),
        "started": min((job["started"] for job in runs if job["started"]), default=None),
        "val": best["val"],
        "test": best["test"],
        "minutes": sum(minutes) if minutes else None,
        **{key: tuple(dict.fromkeys(job[key] for job in runs if job[key] is not None)) for key in names},
        "best_job": best["path"],
        "jobs": len(runs),
        "jobs_by_status": dict(counts),
        "runs": runs,
    }


def read_entry(path: Path) -> Entry:
    """Return the run in a directory. Damaged files do not raise."""
    run = RunDir(path)
    try:
        info, status = run.info, run.status
    except UsageError as error:
        info, status = {"error": str(error)}, "damaged"
    overrides = strings(info.get("overrides"))
    # what is not in run.json is on the command line, otherwise in config.yaml, which takes long to read
    settings: dict[str, str | None] = dict(word.lstrip("+").partition("=")[::2] for word in overrides)
    is_fold = path.name == FOLD.format(settings.get("fold")) and (path.parent / REFIT).is_dir()
    is_folder = info.get("dataset") in ("imagefolder", "manifest", "parquet", "webdataset")
    places = [value for key in ("dataset.file", "dataset.root") if (value := settings.get(key))]
    if not info.get("backbone") or (is_folder and (not places or places[0].startswith(("'", '"')))):
        groups = {name: mapping(group) for name, group in run.config().items()}
        settings = {f"{name}.{key}": text(v) for name, group in groups.items() for key, v in group.items()}
    dataset = text(info.get("dataset")) or settings.get("dataset.name")
    place = settings.get("dataset.file") or settings.get("dataset.root") or ""
    started, ended = _time(info.get("started")), _time(info.get("ended"))
    seconds = total_seconds(info)
    if status == "running" or seconds is None:
        until = datetime.now(UTC) if status == "running" else ended
        seconds = (until - started).total_seconds() if started and until else None
    best = {key: share for key, value in mapping(info.get("best")).items() if (share := number(value)) is not None}
    test = mapping(info.get("test")) or run.test()  # tlcli 0.5 and earlier have the test metrics in test.json alone
    test_ci95 = pair(test.get("accuracy_ci95"))
    return {
        "kind": "run",
        "path": path,
        "status": status,
        "started": started,
        "val": best.get("accuracy"),
        "test": number(test.get("accuracy")) if test_ci95 else None,
        "minutes": None if seconds is None else seconds / 60,
        "name": text(info.get("name")),
        "dataset": dataset,
        "data": re.split(r"[/\\]", place.rstrip("/\\"))[-1] or dataset,
        "backbone": text(info.get("backbone")) or settings.get("backbone.name"),
        "freeze": text(info.get("freeze")) or settings.get("freeze.kind"),
        "seed": integer(info.get("seed")),
        "keep_best": text(info.get("keep_best")),
        "best": best or None,
        "test_ci95": test_ci95,
        "error": text(info.get("error")),
        "is_fold": is_fold,
        "overrides": overrides,
    }


def _time(value: Any) -> datetime | None:
    with suppress(ValueError, TypeError):
        time = datetime.fromisoformat(value)
        return time if time.tzinfo else time.replace(tzinfo=UTC)
    return None
