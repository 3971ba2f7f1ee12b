"""The run directory: the names of its files, and the only code that reads and writes them. Does not import torch."""

import hashlib
import json
import os
import platform
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlcli import __version__
from tlcli.errors import TlcliError, UsageError
from tlcli.files import atomic_write, exists, expand_user, is_dir, read_yaml
from tlcli.text import csv_line, did_you_mean, one_line

if TYPE_CHECKING:
    import numpy as np

SCHEMA_VERSION = 1
MAX_FULL_CONFUSION = 100
"""Classes above which test.json has the cells of the confusion matrix that are not zero, not all of them."""

SWEEP_FILES = frozenset({"sweep.json", "multirun.yaml"})
"""Files of a sweep's folder: the first is written when a job ends, the second by Hydra at the start."""

PACKAGES = ("torch", "torchvision", "timm", "hydra-core", "omegaconf", "numpy", "scikit-learn", "Pillow", "safetensors")


class _PathInRun:
    """A path below a run's directory, joined on access: `list` makes thousands of RunDir objects."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, run: "RunDir", owner: type) -> Path:
        return run.path / self._name


class RunDir:
    """A run's directory. Its files are written while the run is trained; run.json always has the current status."""

    info_file = _PathInRun("run.json")
    config_file = _PathInRun("config.yaml")
    metrics_file = _PathInRun("metrics.jsonl")
    test_file = _PathInRun("test.json")
    val_predictions = _PathInRun("val_predictions.safetensors")
    test_predictions = _PathInRun("test_predictions.safetensors")
    log_file = _PathInRun("run.log")
    bad_files_file = _PathInRun("bad_files.csv")
    best_checkpoint = _PathInRun("checkpoints/best.safetensors")
    last_checkpoint = _PathInRun("checkpoints/last.safetensors")
    state_file = _PathInRun("checkpoints/state.safetensors")
    plots = _PathInRun("plots")

    def __init__(self, path: Path) -> None:
        self.path = path

    # -- reading

    @cached_property
    def info(self) -> dict[str, Any]:
        """The contents of run.json. Raises UsageError if it cannot be read."""
        try:
            return read_json(self.info_file)
        except (OSError, ValueError) as error:
            raise UsageError(f"{self.info_file}: damaged ({one_line(error)})") from error

    def config(self) -> dict[str, Any]:
        """Return the values of config.yaml; an empty dict if it is missing or damaged."""
        try:
            return read_yaml(self.config_file)
        except (OSError, ValueError):
            return {}

    def test(self) -> dict[str, Any]:
        """Return the contents of test.json; an empty dict if it is missing or damaged."""
        try:
            return read_json(self.test_file)
        except (OSError, ValueError):
            return {}

    def metrics(self) -> list[dict[str, Any]]:
        """Return the rows of metrics.jsonl, without lines that are damaged: the last one of a killed run may be."""
        rows = []
        try:
            lines = _regular(self.metrics_file).read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return []
        for line in lines:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict):
                rows.append(row)
        return rows

    def metrics_bytes(self) -> int:
        """Return the size of metrics.jsonl."""
        return self.metrics_file.stat().st_size if self.metrics_file.exists() else 0

    # -- writing

    def start(self, *, command: str, overrides: Sequence[str], config: str, cwd: str | None = None) -> None:
        """Make the directory if necessary; write config.yaml and a run.json with the status `running`.

        `cwd` is the folder in which the command was typed, by default the current one.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self.write_config(config)
        self.update(
            schema_version=SCHEMA_VERSION,
            status="running",
            command=command,
            cwd=cwd or str(Path.cwd()),
            overrides=list(overrides),
            started=now(),
            pid=os.getpid(),
            host=host_digest(),
        )

    def write_config(self, config: str) -> None:
        """Write config.yaml, in one atomic step."""
        with atomic_write(self.config_file) as file:
            file.write(config.encode())

    def mark_resumed(self, command: str) -> None:
        """Write a run.json with the status `running` for an interrupted run."""
        resumed = [*read_json(self.info_file).get("resumed", []), {"command": command, "started": now()}]
        self.update(status="running", error=None, ended=None, pid=os.getpid(), host=host_digest(), resumed=resumed)

    def update(self, **values: Any) -> None:
        """Add values to run.json, in one atomic step."""
        info = read_json(self.info_file) if self.info_file.exists() else {}
        self.info = {**info, **values}
        write_json(self.info_file, self.info)

    def end(self, status: str, error: str | None = None) -> None:
        """Write the final status: done, failed or interrupted."""
        self.update(status=status, error=error, ended=now())

    def log_metrics(self, row: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl; a program that follows the file sees it at once."""
        with self.metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")

    def write_bad_files(self, files: Sequence[tuple[str, str]]) -> None:
        """Write bad_files.csv: the files that do not decode, each with its reason. Without any, write nothing."""
        if files:
            with self.bad_files_file.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
                file.writelines(csv_line(row) for row in [("file", "reason"), *files])

    def add_evaluation(self, write: Callable[[Path], None]) -> Path:
        """Return a new directory eval-1, eval-2, ... with the files that `write` puts into it; it is complete from the
        moment that it exists, and two processes never get the same."""
        try:
            draft = Path(tempfile.mkdtemp(prefix=".eval-", dir=self.path))
        except OSError as error:
            raise TlcliError(f"{self.path}: not writable ({error.strerror}); eval writes its results there") from error
        try:
            write(draft)
            draft.chmod(self.path.stat().st_mode)  # mkdtemp lets only the owner read
            for n in count(1):
                path = self.path / f"eval-{n}"
                if path.exists():
                    continue
                try:
                    return draft.rename(path)
                except OSError:
                    if not path.exists():  # otherwise another process was faster: rename fails if the folder has files
                        raise
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
        raise AssertionError("unreachable")


def open_run(path: str | Path) -> RunDir:
    """Return the run in a directory, with its `info` read.

    Raises:
        UsageError: the directory has no run, or a run that this version of tlcli cannot read.
    """
    run = RunDir(expand_user(str(path)))
    if not exists(run.path):
        siblings = [p.name for p in run.path.parent.iterdir() if p.is_dir()] if is_dir(run.path.parent) else []
        raise UsageError(f"{run.path}: no such run directory.{did_you_mean(run.path.name, siblings)}")
    if not exists(run.info_file):
        raise UsageError(f"{run.path}: not a run directory (it has no run.json){_nearby_run(run.path)}")
    schema = run.info.get("schema_version")
    if not isinstance(schema, int) or not 1 <= schema <= SCHEMA_VERSION:
        raise UsageError(
            f"{run.info_file}: schema_version {schema!r} was written by another tlcli "
            f"({run.info.get('tlcli', 'unknown')}); this one reads up to {SCHEMA_VERSION}: use that one, or a newer one"
        )
    return run


def _nearby_run(path: Path) -> str:
    """Return a hint: the run that a file is in, or one below a directory."""
    above = next((parent for parent in path.parents if (parent / "run.json").is_file()), None)
    below = next((file for pattern in ("*/run.json", "*/*/run.json") for file in sorted(path.glob(pattern))), None)
    near = above if path.is_file() else below and below.parent
    return f". Did you mean {near}?" if near else ""


def is_sweep(path: Path) -> bool:
    """Return True if the directory is a sweep's: it has one of a sweep's files, and no run.json."""
    return any((path / name).is_file() for name in SWEEP_FILES) and not (path / "run.json").exists()


def process_has_exited(info: Mapping[str, Any]) -> bool:
    """Return True if the process that wrote this run.json is known to have ended; False if it runs or if that is
    unknown, because it ran on another machine or the pid is missing."""
    pid = info.get("pid")
    if not isinstance(pid, int) or pid <= 0 or info.get("host") != host_digest() or platform.system() == "Windows":
        return False  # on Windows signal 0 is Ctrl-C
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):  # another user's process
        return False
    return False


def recent_runs(limit: int = 200) -> list[str]:
    """Return the runs, and the jobs of sweeps, that are below outputs/ as `tlcli train` names them; newest first."""
    files = [file for pattern in ("outputs/*/*/run.json", "outputs/*/*/*/run.json") for file in Path().glob(pattern)]
    return sorted((file.parent.as_posix() for file in files), reverse=True)[:limit]


def confusion_matrix(test: Mapping[str, Any]) -> "np.ndarray | None":
    """Return the confusion matrix of test.json or eval.json, int64 (classes, classes), rows are true classes.

    It is stored as rows of counts, or above 100 classes also as cells [true, predicted, count]. Return None if it is
    missing or damaged.
    """
    import numpy as np

    classes, stored = test.get("classes"), test.get("confusion")
    if not isinstance(classes, list) or not isinstance(stored, list):
        return None
    n = len(classes)
    try:
        counts = np.array(stored, dtype=np.int64)
        if counts.shape != (n, n) and n > MAX_FULL_CONFUSION:
            cells = counts.reshape(-1, 3)
            if cells.size and not 0 <= cells[:, :2].min() <= cells[:, :2].max() < n:
                return None
            counts = np.zeros((n, n), dtype=np.int64)
            counts[cells[:, 0], cells[:, 1]] = cells[:, 2]
    except (TypeError, ValueError, OverflowError, MemoryError):
        return None
    return counts if counts.shape == (n, n) and n and counts.min() >= 0 else None


def stored_confusion(counts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return a confusion matrix as it is stored: rows of counts or, above 100 classes, cells that are not zero."""
    if len(counts) <= MAX_FULL_CONFUSION:
        return [list(row) for row in counts]
    return [[true, predicted, n] for true, row in enumerate(counts) for predicted, n in enumerate(row) if n]


def environment() -> dict[str, Any]:
    """Return versions, machine and git commit for run.json, without host name, user name or environment variables."""
    import subprocess
    from importlib.metadata import PackageNotFoundError, version

    from tlcli.device import processor_name

    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    try:
        git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True)
        commit = git.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = None
    return {
        "versions": {"tlcli": __version__, "python": platform.python_version(), **versions},
        "machine": {
            "system": platform.system(),
            "architecture": platform.machine(),
            "processor": processor_name(),
            "cores": os.cpu_count(),
        },
        "git_commit": commit,
    }


def now() -> str:
    """Return the current time, UTC, ISO 8601 to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def host_digest() -> str:
    """Return a digest of the machine's name: a pid in run.json has a meaning only on the same machine."""
    return hashlib.sha256(platform.node().encode()).hexdigest()[:12]


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file. Raise OSError or ValueError if there is none."""
    try:
        value = json.loads(_regular(path).read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: not a JSON object")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write an object in one atomic step: a reader finds the old file or the new one, never a part."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    with atomic_write(path) as file:
        file.write(text.encode())


def number(value: object) -> float | None:
    """Return a finite number of a file, otherwise None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) <= sys.float_info.max else None  # also None for nan


def pair(value: object) -> tuple[float, float] | None:
    """Return two finite numbers of a file, otherwise None."""
    low, high = map(number, value) if isinstance(value, list) and len(value) == 2 else (None, None)
    return None if low is None or high is None else (low, high)


def text(value: object) -> str | None:
    """Return a string of a file that is not empty, otherwise None."""
    return value if isinstance(value, str) and value else None


def _regular(path: Path) -> Path:
    """Return the path. Raise OSError for a pipe, which would block, or a device, which may have no end."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError("not a regular file")
    return path
