"""A sweep's leaderboard: its jobs ranked by validation, with the test figures beside them.

Everything is read from the run directories of the jobs, so that it does not matter which process ran them.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tlcli.files import atomic_write
from tlcli.runs.run_dir import RunDir, read_json, write_json
from tlcli.text import csv_line

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Job:
    """One job. `values`: its value of each key that the sweep varies; `validation`: the figure it is ranked by."""

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
    """A sweep. `figure`: the validation figure that ranks; `keys`: what varies; `jobs`: the best one first."""

    folder: Path
    command: str
    figure: str
    keys: tuple[str, ...]
    jobs: tuple[Job, ...]


def read(folder: Path) -> Leaderboard:
    """The leaderboard of the runs under a folder. A job that did not finish has no rank and comes last."""
    runs = [RunDir(path.parent) for path in folder.rglob("run.json")]
    runs.sort(key=lambda run: _natural(_name(run, folder)))
    records = [_record(run) for run in runs]
    overrides = [_by_key(record.get("overrides", [])) for record in records]
    figures = {record["keep_best"] for record in records if "keep_best" in record}
    figure = figures.pop() if len(figures) == 1 else "accuracy"  # jobs that keep by different figures: compare by one
    keys = _varied(overrides)
    jobs = [
        _job(run, record, figure, _name(run, folder), {key: own[key] for key in keys if key in own})
        for run, record, own in zip(runs, records, overrides, strict=True)
    ]
    command = next((str(record["command"]) for record in records if record.get("command")), "")
    return Leaderboard(folder, command, figure, keys, tuple(_ranked(jobs, figure)))


def write(folder: Path) -> Leaderboard:
    """Write leaderboard.csv and sweep.json into a sweep's folder, each in one atomic step; what they say."""
    board = read(folder)
    jobs = [asdict(job) | {"values": dict(job.values)} for job in board.jobs]
    write_json(
        folder / "sweep.json",
        {
            "schema_version": SCHEMA_VERSION,
            "command": board.command,
            "figure": board.figure,
            "keys": list(board.keys),
            "jobs": jobs,
        },
    )
    with atomic_write(folder / "leaderboard.csv") as file:
        file.write(_csv(board).encode())
    return board


def sweep_of(run: RunDir) -> Path | None:
    """The sweep that has this run among its jobs, by its sweep.json: the directory above the run's or, where the job's
    name has slashes, a few above."""
    run = RunDir(run.path.absolute())
    for folder in run.path.parents[:3]:
        try:
            jobs = read_json(folder / "sweep.json")["jobs"]
            if _name(run, folder) in [job["name"] for job in jobs]:
                return folder
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def _name(run: RunDir, folder: Path) -> str:
    return run.path.relative_to(folder).as_posix()


def _natural(name: str) -> list[tuple[int, str]]:
    """A sort key that has 2 before 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _record(run: RunDir) -> dict[str, Any]:
    """run.json, or what can be said where it is damaged."""
    try:
        record = read_json(run.info_file)
    except (OSError, ValueError) as exc:
        return {"status": "failed", "error": f"run.json is damaged: {exc}"}
    kinds = {"overrides": list, "best": dict, "keep_best": str}
    if wrong := [key for key, kind in kinds.items() if not isinstance(record.get(key, kind()), kind)]:
        return {"status": "failed", "error": f"run.json is damaged: its {wrong[0]}"}
    return record


def _by_key(overrides: Sequence[str]) -> dict[str, str]:
    """{key: value} of overrides; a + or ++ in front is no part of the key."""
    parts = (str(override).lstrip("+").partition("=") for override in overrides)
    return {key: value for key, _, value in parts}


def _varied(overrides: Sequence[Mapping[str, str]]) -> tuple[str, ...]:
    """The keys that do not have one value in all jobs, in the order of the command line."""
    keys = dict.fromkeys(key for own in overrides for key in own)
    return tuple(key for key in keys if len({own.get(key) for own in overrides}) > 1)


def _job(run: RunDir, record: Mapping[str, Any], figure: str, name: str, values: Mapping[str, str]) -> Job:
    """A job as its run directory has it, not ranked yet."""
    best = record.get("best") or {}
    test = _test(run)
    status = str(record.get("status", "failed"))
    ci95 = test.get("accuracy_ci95")
    return Job(
        rank=None,
        name=name,
        status=status,
        values=values,
        validation=best.get(figure),
        epoch=best.get("epoch"),
        test_accuracy=test.get("accuracy"),
        test_ci95=(ci95[0], ci95[1]) if ci95 else None,
        seconds=record.get("seconds") if isinstance(record.get("seconds"), int | float) else _total(record),
        error=record.get("error"),
    )


def _total(record: Mapping[str, Any]) -> float | None:
    """The seconds of a run that has them by phase: their `total`, or else their sum."""
    seconds = record.get("seconds")
    if not isinstance(seconds, Mapping):
        return None
    return float(seconds["total"]) if "total" in seconds else float(sum(seconds.values()))


def _test(run: RunDir) -> dict[str, Any]:
    try:
        return read_json(run.test_file)
    except (OSError, ValueError):
        return {}


def _ranked(jobs: Sequence[Job], figure: str) -> list[Job]:
    """The finished jobs by their validation figure, the best one first, then the others in their order."""
    done = [job for job in jobs if job.status == "done" and job.validation is not None]
    done.sort(key=lambda job: job.validation or 0.0, reverse=figure != "loss")
    ranked = [Job(**{**vars(job), "rank": rank}) for rank, job in enumerate(done, start=1)]
    return ranked + [job for job in jobs if job not in done]


def _csv(board: Leaderboard) -> str:
    """The leaderboard as CSV."""
    head = ["rank", "job", "status", *board.keys, f"val_{board.figure}", "epoch"]
    lines = [csv_line([*head, "test_accuracy", "test_low", "test_high", "seconds", "error"])]
    for job in board.jobs:
        low, high = job.test_ci95 or (None, None)
        own = [job.values.get(key, "") for key in board.keys]
        figures = [job.validation, job.epoch, job.test_accuracy, low, high, job.seconds]
        lines.append(csv_line([job.rank, job.name, job.status, *own, *figures, job.error]))
    return "".join(lines)
