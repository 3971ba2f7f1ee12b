"""A sweep's leaderboard: its jobs ranked by validation, with the test metrics beside them.

Everything is read from the run directories of the jobs, so that it does not matter which process ran them.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tlcli.files import atomic_write
from tlcli.runs.run_dir import RunDir, number, pair, read_json, text, write_json
from tlcli.text import csv_line

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Job:
    """One job. `values`: its value of each key that the sweep varies; `validation`: the metric it is ranked by."""

    rank: int | None
    name: str
    status: str
    values: Mapping[str, str]
    validation: float | None
    epoch: int | None
    test_accuracy: float | None
    test_ci95: tuple[float, float] | None
    seconds: float | None
    error: str | None


@dataclass(frozen=True)
class Leaderboard:
    """A sweep. `figure`: the validation metric that ranks; `keys`: the keys that vary; `jobs`: the best one first."""

    folder: Path
    command: str
    figure: str
    keys: tuple[str, ...]
    jobs: tuple[Job, ...]


def read(folder: Path) -> Leaderboard:
    """Return the leaderboard of the runs under a folder. A job that did not finish has no rank and comes last."""
    runs = [RunDir(path.parent) for path in folder.rglob("run.json")]
    runs.sort(key=lambda run: _natural_order(run.path.relative_to(folder).as_posix()))
    infos = [_read_info(run) for run in runs]
    # a + or ++ in front is no part of the key
    parts = [[str(word).lstrip("+").partition("=") for word in info.get("overrides", [])] for info in infos]
    values = [{key: value for key, _, value in words} for words in parts]
    keys = [key for key in dict.fromkeys(key for own in values for key in own) if len({v.get(key) for v in values}) > 1]
    metrics = {info["keep_best"] for info in infos if "keep_best" in info}
    metric = metrics.pop() if len(metrics) == 1 else "accuracy"  # jobs that keep by different metrics
    jobs = []
    for run, info, own in zip(runs, infos, values, strict=True):
        best = info.get("best") or {}
        # runs of tlcli 0.5 and earlier have the test metrics in test.json alone
        test = info["test"] if isinstance(info.get("test"), dict) else run.test()
        seconds = info.get("seconds")
        if isinstance(seconds, Mapping):
            seconds = seconds["total"] if "total" in seconds else sum(filter(None, map(number, seconds.values())))
        jobs.append(
            Job(
                rank=None,
                name=run.path.relative_to(folder).as_posix(),
                status=str(info.get("status", "failed")),
                values={key: own[key] for key in keys if key in own},
                validation=number(best.get(metric)),
                epoch=best.get("epoch"),
                test_accuracy=number(test.get("accuracy")),
                test_ci95=pair(test.get("accuracy_ci95")),
                seconds=number(seconds),
                error=text(info.get("error")),
            )
        )
    done = [job for job in jobs if job.status == "done" and job.validation is not None]
    done.sort(key=lambda job: job.validation or 0.0, reverse=metric != "loss")
    ranked = [replace(job, rank=rank) for rank, job in enumerate(done, start=1)]
    command = next((str(info["command"]) for info in infos if info.get("command")), "")
    return Leaderboard(folder, command, metric, tuple(keys), (*ranked, *(job for job in jobs if job not in done)))


def write(folder: Path) -> Leaderboard:
    """Write leaderboard.csv and sweep.json into a sweep's folder, each in one atomic step; return the leaderboard."""
    board = read(folder)
    own = {key: getattr(board, key) for key in ("command", "figure", "keys")}
    jobs = [asdict(job) for job in board.jobs]
    write_json(folder / "sweep.json", {"schema_version": SCHEMA_VERSION, **own, "jobs": jobs})
    head = ["rank", "job", "status", *board.keys, f"val_{board.figure}", "epoch"]
    rows: list[list[object]] = [[*head, "test_accuracy", "test_low", "test_high", "seconds", "error"]]
    for job in board.jobs:
        cells = [job.rank, job.name, job.status, *(job.values.get(key, "") for key in board.keys), job.validation]
        low, high = job.test_ci95 or (None, None)
        rows.append([*cells, job.epoch, job.test_accuracy, low, high, job.seconds, job.error])
    with atomic_write(folder / "leaderboard.csv") as file:
        file.write("".join(map(csv_line, rows)).encode())
    return board


def sweep_of(run: RunDir) -> Path | None:
    """Return the folder of the sweep whose sweep.json names this run: its parent or, if the job's name has slashes, a
    folder a few levels above."""
    path = run.path.absolute()
    for folder in path.parents[:3]:
        try:
            jobs = read_json(folder / "sweep.json")["jobs"]
            if path.relative_to(folder).as_posix() in [job["name"] for job in jobs]:
                return folder
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def _natural_order(name: str) -> list[tuple[int, str]]:
    """Return a sort key that has 2 before 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _read_info(run: RunDir) -> dict[str, Any]:
    """Return run.json, or a failed status with the reason if it is damaged."""
    try:
        info = read_json(run.info_file)
    except (OSError, ValueError) as exc:
        return {"status": "failed", "error": f"run.json is damaged: {exc}"}
    types = {"overrides": list, "best": dict, "keep_best": str}
    if wrong := [key for key, kind in types.items() if not isinstance(info.get(key, kind()), kind)]:
        return {"status": "failed", "error": f"run.json is damaged: its {wrong[0]}"}
    return info
