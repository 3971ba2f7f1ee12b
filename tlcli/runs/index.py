"""What runs and sweeps lie under a folder, read from their run.json and test.json alone, without torch.

A list of 2,000 runs has to come at once: a directory is not entered further once a run was found in it, and of
test.json only the beginning is read, where its accuracy stands; a confusion matrix of 1,000 classes lies behind.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tlcli.runs.run_dir import SWEEP_FILES, process_has_exited, read_json

NEVER_ENTERED = frozenset({"checkpoints", "plots"})

WORST_FIRST = ("running", "died", "damaged", "failed", "interrupted", "done")
"""The status of a sweep is the first of these that a job has."""

HEAD = 1024  # bytes of test.json, of which accuracy and its interval take a tenth
_NUMBER = rb"(-?[\d.]+(?:[eE][+-]?\d+)?)"
_ACCURACY = re.compile(
    rb'\{\s*"accuracy":\s*' + _NUMBER + rb',\s*"accuracy_ci95":\s*\[\s*' + _NUMBER + rb",\s*" + _NUMBER + rb"\s*\]"
)
_PLAIN_KEY = re.compile(r"^( {2})?(\w+):(?: (.*))?$", re.MULTILINE)


@dataclass(frozen=True)
class RunEntry:
    """One run. `validation` is the accuracy of its best epoch there, `best` every figure of that epoch; `data` is the
    name of the folder or file that the images are from, else that of the data set. What is not known is None.

    `status`: done, failed, interrupted or running as run.json has it; `died` where it says running and that process is
    gone, `damaged` where run.json cannot be read (`error` says why).
    """

    path: Path
    status: str
    started: datetime | None = None
    name: str | None = None
    dataset: str | None = None
    data: str | None = None
    backbone: str | None = None
    freeze: str | None = None
    seed: int | None = None
    keep_best: str | None = None
    best: Mapping[str, float] | None = None
    test: float | None = None
    test_ci95: tuple[float, float] | None = None
    minutes: float | None = None
    error: str | None = None
    overrides: tuple[str, ...] = ()

    @property
    def validation(self) -> float | None:
        return self.best.get("accuracy") if self.best else None


@dataclass(frozen=True)
class SweepEntry:
    """A sweep with its jobs, the first one first. What its jobs have in common is the sweep's, and so is what the best
    of them by validation reached; `minutes` are those of all."""

    path: Path
    jobs: tuple[RunEntry, ...]

    @property
    def counts(self) -> Counter[str]:
        """How many jobs have each status."""
        return Counter(job.status for job in self.jobs)

    @property
    def status(self) -> str:
        found = self.counts
        return next((status for status in WORST_FIRST if status in found), "failed")

    @property
    def started(self) -> datetime | None:
        return min((job.started for job in self.jobs if job.started), default=None)

    @property
    def top(self) -> RunEntry | None:
        """The finished job that is best on validation, by the figure that they keep their best epoch by."""
        figures = {job.keep_best for job in self.jobs if job.keep_best}
        figure = figures.pop() if len(figures) == 1 else "accuracy"
        done = [
            (job.best[figure], job) for job in self.jobs if job.status == "done" and job.best and figure in job.best
        ]
        if not done:
            return None
        return (min if figure == "loss" else max)(done, key=lambda pair: pair[0])[1]

    @property
    def validation(self) -> float | None:
        return self.top.validation if self.top else None

    @property
    def test(self) -> float | None:
        return self.top.test if self.top else None

    @property
    def minutes(self) -> float | None:
        known = [job.minutes for job in self.jobs if job.minutes is not None]
        return sum(known) if known else None

    def values(self, field: str) -> tuple[str, ...]:
        """The different values that jobs have of a field such as `backbone`, in their order."""
        return tuple(dict.fromkeys(value for job in self.jobs if (value := getattr(job, field)) is not None))

    def varied(self) -> frozenset[str]:
        """The overrides that not all jobs have."""
        jobs = Counter(word for job in self.jobs for word in set(job.overrides))
        return frozenset(word for word, n in jobs.items() if n < len(self.jobs))


Entry = RunEntry | SweepEntry


@dataclass(frozen=True)
class Index:
    """The runs and sweeps under a folder in no particular order, and the folders that could not be looked into."""

    entries: tuple[Entry, ...]
    unreadable: tuple[str, ...]


def read_index(folder: Path) -> Index:
    """All runs under a folder, which may be a run or a sweep itself. Links are followed, to each place once."""
    scan = _Scan()
    scan.look_into(str(folder), None)
    scan.follow_links()
    sweeps = [SweepEntry(Path(path), tuple(sorted(jobs, key=_job_order))) for path, jobs in scan.sweeps.items() if jobs]
    return Index((*scan.runs, *sweeps), tuple(scan.unreadable))


class _Scan:
    """One look at a tree of folders."""

    def __init__(self) -> None:
        self.runs: list[RunEntry] = []
        self.sweeps: dict[str, list[RunEntry]] = {}
        self.unreadable: list[str] = []
        self._seen: set[tuple[int, int]] = set()
        self._links: list[tuple[str, str | None]] = []

    def look_into(self, folder: str, sweep: str | None) -> None:
        """Find the runs in a folder and below; they are jobs where it is in the folder of a sweep."""
        waiting = [(folder, sweep)]
        while waiting:
            path, above = waiting.pop()
            try:
                if not self._is_new(path):
                    continue
                with os.scandir(path) as found:
                    inside = {entry.name: entry for entry in found}
            except OSError:
                self.unreadable.append(path)
                continue
            if "run.json" in inside:
                (self.runs if above is None else self.sweeps[above]).append(read_run(Path(path), "test.json" in inside))
                continue
            if not SWEEP_FILES.isdisjoint(inside):
                above = path
                self.sweeps.setdefault(path, [])
            waiting += ((entry.path, above) for entry in self._folders(inside.values(), above))

    def follow_links(self) -> None:
        """Look where links lead, after everything that is really here: it keeps its own path."""
        while self._links:
            self.look_into(*self._links.pop())

    def _folders(self, entries: Sequence[os.DirEntry[str]] | Any, above: str | None) -> Iterator[os.DirEntry[str]]:
        for entry in entries:
            if entry.name.startswith(".") or entry.name in NEVER_ENTERED:
                continue
            if entry.is_dir(follow_symlinks=False):
                yield entry
            elif entry.is_symlink() and Path(entry.path).is_dir():
                self._links.append((entry.path, above))

    def _is_new(self, path: str) -> bool:
        """Whether this folder was not looked into before, under whatever name."""
        found = os.stat(path)  # noqa: PTH116 - 2,000 Path objects cost more than the calls
        place = found.st_dev, found.st_ino
        new = place not in self._seen
        self._seen.add(place)
        return new


def read_run(path: Path, tested: bool = True) -> RunEntry:
    """A run's directory as an entry. Nothing in its files makes this fail."""
    try:
        record = read_json(_regular(path / "run.json"))
    except (OSError, ValueError, RecursionError) as error:
        return RunEntry(path, "damaged", error=f"run.json is damaged: {' '.join(str(error).split())}")
    overrides = tuple(str(word) for word in _as(list, record.get("overrides")) or ())
    given = _given(path, record, overrides)
    test = _test(path / "test.json") if tested else None
    status = str(record.get("status", "damaged"))
    started, ended = _time(record.get("started")), _time(record.get("ended"))
    if status == "running" and process_has_exited(record):
        status = "died"
    return RunEntry(
        path=path,
        status=status,
        started=started,
        name=_text(record.get("name")),
        dataset=_text(record.get("dataset")) or given.get("dataset.name"),
        data=_data_name(given) or _text(record.get("dataset")) or given.get("dataset.name"),
        backbone=_text(record.get("backbone")) or given.get("backbone.name"),
        freeze=_text(record.get("freeze")) or given.get("freeze.kind"),
        seed=_as(int, record.get("seed")),
        keep_best=_text(record.get("keep_best")),
        best={str(k): float(v) for k, v in (_as(dict, record.get("best")) or {}).items() if _is_number(v)} or None,
        test=test[0] if test else None,
        test_ci95=(test[1], test[2]) if test else None,
        minutes=_minutes(record, started, datetime.now(UTC) if status == "running" else ended, status),
        error=_text(record.get("error")),
        overrides=overrides,
    )


def _regular(path: Path) -> Path:
    """The same path. Raises OSError for a pipe, which would be waited for, or a device, which may have no end."""
    if not path.is_file():
        raise OSError("not a regular file" if path.exists() else "no such file")
    return path


def _test(path: Path) -> tuple[float, float, float] | None:
    """Test accuracy and the ends of its interval."""
    try:
        with _regular(path).open("rb") as file:
            found = _ACCURACY.match(file.read(HEAD))
        if found:
            return float(found[1]), float(found[2]), float(found[3])
        record = json.loads(path.read_bytes())
        low, high = record["accuracy_ci95"]
        return float(record["accuracy"]), float(low), float(high)
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def _minutes(record: Mapping[str, Any], started: datetime | None, ended: datetime | None, status: str) -> float | None:
    """How long it took: by its own clock where that was written and is not behind, else from its start to its end."""
    seconds = _as(dict, record.get("seconds")) or {}
    if _is_number(seconds.get("total")) and status != "running":
        return float(seconds["total"]) / 60
    return (ended - started).total_seconds() / 60 if started and ended else None


def _given(path: Path, record: Mapping[str, Any], overrides: Sequence[str]) -> Mapping[str, str]:
    """What was asked for, as far as it is needed beside run.json: the overrides, else config.yaml, of which a run that
    ended early has no more in its run.json."""
    given = dict(word.lstrip("+").partition("=")[::2] for word in overrides)
    named = (
        record.get("dataset") not in ("imagefolder", "manifest") or "dataset.root" in given or "dataset.file" in given
    )
    return given if named and record.get("backbone") else _config(path / "config.yaml")


def _config(file: Path) -> dict[str, str]:
    """The plain values in a config.yaml of ours, by `group.key`. (A YAML parser takes milliseconds a file.)"""
    found: dict[str, str] = {}
    group = ""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return found
    for inner, key, value in _PLAIN_KEY.findall(text):
        group = group if inner else key
        found[f"{group}.{key}" if inner else key] = value.strip("'\"")
    return {key: value for key, value in found.items() if value not in ("", "null")}


def _data_name(given: Mapping[str, str]) -> str | None:
    """`photos` for dataset.root=/data/photos."""
    place = given.get("dataset.file") or given.get("dataset.root") or ""
    return re.split(r"[/\\]", place.rstrip("/\\"))[-1] or None


def _time(value: object) -> datetime | None:
    try:
        found = datetime.fromisoformat(value) if isinstance(value, str) else None
    except ValueError:
        return None
    return found.replace(tzinfo=UTC) if found and found.tzinfo is None else found


def _as(kind: type, value: object) -> Any:
    return value if isinstance(value, kind) and not isinstance(value, bool) else None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


def _job_order(job: RunEntry) -> tuple[int, str]:
    """2 before 10."""
    return int(job.path.name) if job.path.name.isdecimal() else -1, str(job.path)
