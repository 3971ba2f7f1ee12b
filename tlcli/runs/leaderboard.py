"""A sweep's leaderboard: its jobs ranked by validation, with the test metrics beside them.

Everything is read from the run directories of the jobs, so that it does not matter which process ran them.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tlcli.errors import UsageError
from tlcli.files import atomic_write
from tlcli.runs.index import read_entry
from tlcli.runs.run_dir import RunDir, read_json, write_json
from tlcli.text import csv_line, natural_order

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
    names = [file.parent.relative_to(folder).as_posix() for file in folder.rglob("run.json")]
    names.sort(key=natural_order)
    runs = [read_entry(folder / name) for name in names]
    # a + or ++ in front is no part of the key
    parts = [[word.lstrip("+").partition("=") for word in run.overrides] for run in runs]
    values = [{key: value for key, _, value in words} for words in parts]
    keys = [key for key in dict.fromkeys(key for own in values for key in own) if len({v.get(key) for v in values}) > 1]
    metrics = {run.keep_best for run in runs if run.keep_best}
    metric = metrics.pop() if len(metrics) == 1 else "accuracy"  # jobs that keep by different metrics
    jobs = []
    for name, run, own in zip(names, runs, values, strict=True):
        best = run.best or {}
        jobs.append(
            Job(
                rank=None,
                name=name,
                status=run.status,
                values={key: own[key] for key in keys if key in own},
                validation=best.get(metric),
                epoch=int(best["epoch"]) if "epoch" in best else None,
                test_accuracy=run.test,
                test_ci95=run.test_ci95,
                seconds=None if run.minutes is None else round(60 * run.minutes, 3),
                error=run.error,
            )
        )
    done = [job for job in jobs if job.status == "done" and job.validation is not None]
    done.sort(key=lambda job: job.validation or 0.0, reverse=metric != "loss")
    ranked = [replace(job, rank=rank) for rank, job in enumerate(done, start=1)]
    command = ""
    for run in runs:
        with suppress(UsageError):
            command = command or str(RunDir(run.path).info.get("command", ""))
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
    """Return the folder of the sweep whose sweep.json names this run: at most three levels above, as names of jobs may
    have slashes."""
    path = run.path.absolute()
    for folder in path.parents[:3]:
        with suppress(OSError, ValueError, KeyError, TypeError):
            jobs = read_json(folder / "sweep.json")["jobs"]
            if path.relative_to(folder).as_posix() in [job["name"] for job in jobs]:
                return folder
    return None
