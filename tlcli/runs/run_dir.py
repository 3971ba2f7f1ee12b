"""The run directory: the names of its files, and the only code that reads and writes them. Does not import torch."""

import json
import os
import platform
import shlex
import stat
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from itertools import chain, count, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlcli import __version__
from tlcli.errors import TlcliError, UsageError
from tlcli.files import atomic_write, exists, expand_user, is_dir, is_file, read_yaml, write_csv
from tlcli.locks import Lock, runs_on_this_machine, this_process
from tlcli.text import Names, did_you_mean, one_line

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from tlcli.data.images import Split
    from tlcli.engine.metrics import Predictions

SCHEMA_VERSION = 1
CHECKPOINTS = ("best", "last")
MAX_FULL_CONFUSION = 100  # with more classes, a stored confusion matrix has only the cells that are not zero
FOLD, REFIT = "fold-{}", "best"  # names of the directories of a run with folds
STATE_FILE, JOURNAL_FILE = "tune.json", "study.journal"  # of a search; the latter is Optuna's
SWEEP_FILE, LEADERBOARD_FILE = "sweep.json", "leaderboard.csv"  # written when a job of a sweep ends
SWEEP_FILES = (SWEEP_FILE, "multirun.yaml")  # of which a sweep has one: Hydra writes the latter at its start
PACKAGES = ("torch", "torchvision", "timm", "hydra-core", "omegaconf", "numpy", "scikit-learn", "Pillow", "safetensors")
RUN_FILES: list[str] = []  # names of the files and folders in a run's directory, which `_path_in_run` collects


def _path_in_run(name: str) -> cached_property[Path]:
    """Return a path below a run's directory, joined on access: `list` makes thousands of RunDir objects."""
    if (first := name.partition("/")[0]) not in RUN_FILES:
        RUN_FILES.append(first)
    return cached_property(lambda run: run.path / name)


class RunDir:
    """A run's directory. Its files are written while the run is trained; run.json always has the current status."""

    info_file = _path_in_run("run.json")
    config_file = _path_in_run("config.yaml")
    metrics_file = _path_in_run("metrics.jsonl")
    test_file = _path_in_run("test.json")
    val_predictions = _path_in_run("val_predictions.safetensors")
    val_shares = _path_in_run("val_shares.safetensors")
    test_predictions = _path_in_run("test_predictions.safetensors")
    unknown_file = _path_in_run("unknown.safetensors")
    log_file = _path_in_run("run.log")
    bad_files_file = _path_in_run("bad_files.csv")
    best_checkpoint = _path_in_run("checkpoints/best.safetensors")
    last_checkpoint = _path_in_run("checkpoints/last.safetensors")
    state_file = _path_in_run("checkpoints/state.safetensors")
    plots = _path_in_run("plots")

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def info(self) -> dict[str, Any]:
        """The contents of run.json. Raises UsageError if it cannot be read."""
        try:
            return read_json(self.info_file)
        except (OSError, ValueError) as error:
            raise UsageError(f"{self.info_file}: damaged ({one_line(error)})") from error

    @property
    def status(self) -> str:
        """`status` of run.json; `died` if that is running and the process has ended, `damaged` if there is none."""
        status = text(self.info.get("status")) or "damaged"
        return "died" if status == "running" and runs_on_this_machine(self.info) is False else status

    def check_mirrors(self, option: str) -> None:
        """Raise UsageError, which names the option that mirrors images, if the run had dataset.flip=0."""
        if mapping(self.config().get("dataset")).get("flip") == 0:
            raise UsageError(f"{option}: {self.path} was trained with dataset.flip=0, for which mirror images differ")

    def config(self) -> dict[str, Any]:
        """Return the values of config.yaml; an empty dict if it is missing or damaged."""
        with suppress(OSError, ValueError):
            return read_yaml(self.config_file)
        return {}

    def test(self) -> dict[str, Any]:
        """Return the contents of test.json; an empty dict if it is missing or damaged."""
        with suppress(OSError, ValueError):
            return read_json(self.test_file)
        return {}

    def metrics(self) -> list[dict[str, Any]]:
        """Return the rows of metrics.jsonl, without lines that are damaged: the last one of a killed run may be."""
        rows = []
        with suppress(OSError):
            for line in _regular(self.metrics_file).read_text(encoding="utf-8", errors="replace").splitlines():
                with suppress(ValueError, RecursionError):
                    rows.append(json.loads(line))
        return [row for row in rows if isinstance(row, dict)]

    def metrics_bytes(self) -> int:
        """Return the size of metrics.jsonl."""
        return self.metrics_file.stat().st_size if self.metrics_file.exists() else 0

    def starting(self) -> AbstractContextManager[None]:
        """Hold a lock from when a process sees that no other one runs this run until run.json says that it does."""
        return Lock(self.path / ".start.lock").held()

    def start(self, *, command: str, overrides: Sequence[str], config: str, cwd: str | None = None) -> None:
        """Write config.yaml and a run.json with the status `running`; `cwd` is where the command was typed."""
        self.path.mkdir(parents=True, exist_ok=True)
        self.write_config(config)
        self.update(
            schema_version=SCHEMA_VERSION,
            tlcli=__version__,
            status="running",
            command=command,
            cwd=cwd or str(Path.cwd()),
            overrides=list(overrides),
            started=now(),
            **this_process(),
        )

    def write_config(self, config: str) -> None:
        """Write config.yaml in one atomic step."""
        atomic_write(self.config_file, config.encode())

    def mark_resumed(self, command: str) -> None:
        """Write a run.json with the status `running`, without results of the weights that the run had."""
        resumed = [*self.info.get("resumed", []), {"command": command, "started": now()}]
        results = dict.fromkeys(("error", "ended", "test", "calibration", "unknown"))
        self.update(status="running", resumed=resumed, **results, **this_process())

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

    def write_test(self, report: Mapping[str, Any], predictions: "SplitPredictions") -> None:
        """Write test.json, the predictions, and what a leaderboard shows of them into run.json."""
        write_predictions(self.test_predictions, predictions)
        write_json(self.test_file, report)
        self.update(test={key: report[key] for key in ("accuracy", "accuracy_ci95")})

    def write_bad_files(self, files: Sequence[tuple[str, str]]) -> None:
        """Write bad_files.csv: the files that do not decode, each with its reason. Without any, write nothing."""
        if files:
            write_csv(self.bad_files_file, [("file", "reason"), *files])

    def add_evaluation(self, write: Callable[[Path], None]) -> Path:
        """Return a new directory eval-1, eval-2, ... that has the files that `write` writes as soon as it exists."""
        from tempfile import TemporaryDirectory  # here: with hashlib it is a tenth of what `list` imports

        try:
            draft = TemporaryDirectory(prefix=".eval-", dir=self.path, ignore_cleanup_errors=True)
        except OSError as error:
            raise TlcliError(f"{self.path}: not writable ({error.strerror}); eval writes its results there") from error
        with draft as name:
            write(Path(name))
            Path(name).chmod(self.path.stat().st_mode)  # a temporary folder can be read by its owner only
            while True:
                paths = (self.path / f"eval-{n}" for n in count(1))
                free = next(path for path in paths if not path.exists())  # a rename would replace an empty folder
                try:
                    return Path(name).rename(free)
                except OSError:
                    if not free.exists():
                        raise


def open_run(path: str | Path) -> RunDir:
    """Return the run in a directory. Raise UsageError if there is none, or one that this tlcli cannot read."""
    run = RunDir(expand_user(str(path)))
    if not exists(run.path):
        siblings = [p.name for p in run.path.parent.iterdir() if p.is_dir()] if is_dir(run.path.parent) else []
        raise UsageError(f"{run.path}: no such run directory.{did_you_mean(run.path.name, siblings)}")
    if not exists(run.info_file):
        below = (
            file.parent for pattern in ("*/run.json", "*/*/run.json") for file in sorted(run.path.glob(pattern))[::-1]
        )
        places = chain(run.path.parents, [run.path / REFIT], below)
        near = next((path for path in places if is_file(path / "run.json")), None)
        hint = f". Did you mean {near}?" if near else ""
        raise UsageError(f"{run.path}: not a run directory (it has no run.json){hint}")
    schema = run.info.get("schema_version")
    if not isinstance(schema, int) or not 1 <= schema <= SCHEMA_VERSION:
        found = f"{run.info_file}: schema_version {schema!r} was written by another tlcli ({run.info.get('tlcli')})"
        raise UsageError(f"{found}; this one reads up to {SCHEMA_VERSION}: use that one, or a newer one")
    return run


def is_sweep(path: Path) -> bool:
    """Return True if the directory is a sweep's: it has one of a sweep's files, and no run.json."""
    return any((path / name).is_file() for name in SWEEP_FILES) and not (path / "run.json").exists()


def result_of_search(path: Path) -> Path | None:
    """Return the folder `best` of a search, a link to a job or, after copying, its copy; None if it is no search."""
    return path / REFIT if is_file(path / STATE_FILE) else None


def has_folds(path: Path) -> bool:
    """Return True if the directory is that of a run with folds: its refit or first fold is in it."""
    if result_of_search(path) or not is_sweep(path):
        return False
    return any(RunDir(path / name).config().get("folds") is not None for name in (REFIT, FOLD.format(0)))


def check_version(path: Path, info: Mapping[str, Any]) -> None:
    """Raise TlcliError if another minor version of tlcli started a run, which has other defaults and state files."""
    version = str(info.get("tlcli", __version__))  # a run that ended early may not say
    if version.split(".")[:2] != __version__.split(".")[:2]:
        this = f"this is {__version__}"
        raise TlcliError(f"{path}: was started with tlcli {version}; resume it with that version ({this})")


def rerun_command(info: Mapping[str, Any]) -> str:
    """Return the command that trains this run again in a new directory; for a job of a sweep, that job alone."""
    command, overrides = text(info.get("command")) or "tlcli train", strings(info.get("overrides"))
    if info.get("averaged"):  # by a search
        return command
    try:
        words = shlex.split(command)
    except ValueError:
        return command
    search_path = ("hydra.searchpath=", "+hydra.searchpath=")  # other words of Hydra are for one directory
    flags = []
    for before, word in pairwise(["", *words]):
        is_flag = word.startswith(("-", *search_path)) or "=" not in word or before in ("-cd", "--config-dir")
        flags += [word] if is_flag and word not in ("-m", "--multirun", *overrides) else []
    return shlex.join([*flags, *overrides])


@dataclass(frozen=True, eq=False)
class SplitPredictions:
    """Logits (N, C) float32, labels (N) int64 and unknown scores (N) of a split, in its order, with a key per row.

    A key stays if the data moves: the path below the root of the dataset, or digits/17. `root` precedes it in a name.
    """

    logits: "Tensor"
    labels: "Tensor"
    classes: tuple[str, ...]
    keys: Sequence[str]
    root: str = ""
    unknown: "Tensor | None" = None

    @classmethod
    def of(cls, split: "Split", predictions: "Predictions", classes: Sequence[str]) -> "SplitPredictions":
        """Return the predictions of a split."""
        keys = Names(split.key(i) for i in range(len(split)))
        root = _root_of(split.name(0), keys[0]) if len(split) else ""
        return cls(predictions.logits, predictions.labels, tuple(classes), keys, root, predictions.unknown)

    @property
    def names(self) -> list[str]:
        """The path of each image when it was predicted, or its key if it was not a file."""
        return [self.root + key for key in self.keys]


def _root_of(name: str, key: str) -> str:
    path = Path(name).as_posix()
    return path.removesuffix(key) if path.endswith(key) else ""


def write_predictions(path: Path, predictions: SplitPredictions) -> None:
    """Write predictions as safetensors, in one atomic step; keys are bytes, and the end of each in them."""
    import numpy as np
    from torch import from_numpy

    from tlcli.models.tensorfile import write_tensors

    keys = Names(predictions.keys)
    tensors = {"keys": from_numpy(np.asarray(keys.data)), "key_ends": from_numpy(np.asarray(keys.ends))}
    tensors |= {"logits": predictions.logits.float(), "labels": predictions.labels}
    if predictions.unknown is not None:
        tensors["unknown"] = predictions.unknown
    write_tensors(path, tensors, {"classes": predictions.classes, "root": predictions.root})


def read_predictions(path: Path) -> SplitPredictions:
    """Return the predictions in a file. Raise UsageError if it is missing or damaged."""
    from msgspec import convert
    from torch import int64

    from tlcli.models.tensorfile import read_tensors

    if not path.is_file():
        raise UsageError(f"{path}: no such file; runs of tlcli 0.3.0 and later write it when they are tested")
    try:
        tensors, metadata = read_tensors(path)
        logits, labels, unknown = tensors["logits"], tensors["labels"], tensors.get("unknown")
        classes = convert(metadata["classes"], tuple[str, ...])
        if "keys" in metadata:  # of tlcli 0.12 and earlier
            keys = Names(convert(metadata["keys"], list[str]))
            names = convert(metadata["names"] or (), list[str])
            root = _root_of(names[0], keys[0]) if names and len(keys) else ""
        else:
            keys = Names.from_bytes(*(tensors[name].numpy().tobytes() for name in ("keys", "key_ends")))
            root = convert(metadata["root"], str)
        n, n_classes = len(keys), len(classes)
        is_valid = (logits.shape, labels.shape) == ((n, n_classes), (n,)) and labels.dtype == int64
        is_valid &= unknown is None or unknown.shape == (n,)
        if not is_valid or not logits.is_floating_point() or ((labels < 0) | (labels >= n_classes)).any():
            raise ValueError(f"{tuple(logits.shape)} {logits.dtype} for {n} images and {n_classes} classes")
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{path}: damaged, or not predictions of tlcli ({type(error).__name__}: {error})") from error
    return SplitPredictions(logits, labels, classes, keys, root, unknown)


def confusion_matrix(test: Mapping[str, Any]) -> "np.ndarray | None":
    """Return the matrix of test.json or eval.json, int64 (true classes, predicted classes); None if it is damaged."""
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
    """Return a matrix as it is stored: rows of counts or, above 100 classes, cells [true, predicted, count]."""
    if len(counts) <= MAX_FULL_CONFUSION:
        return [list(row) for row in counts]
    return [[true, predicted, n] for true, row in enumerate(counts) for predicted, n in enumerate(row) if n]


def environment() -> dict[str, Any]:
    """Return versions, machine and git commit for run.json, without host name, user name or environment variables."""
    import subprocess

    from tlcli.device import processor_name

    versions = {package: version for package in PACKAGES if (version := installed_version(package))}
    commit = None
    with suppress(OSError, subprocess.SubprocessError):
        git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True)
        commit = git.stdout.strip()
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


def installed_version(package: str) -> str | None:
    """Return the version of a distribution, None if it is not installed."""
    from importlib.metadata import PackageNotFoundError, version

    with suppress(PackageNotFoundError):
        return version(package)
    return None


def now() -> str:
    """Return the current time, UTC, ISO 8601 to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file. Raise OSError or ValueError if there is none."""
    try:
        value = json.loads(_regular(path).read_bytes().decode())
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: not a JSON object")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write an object in one atomic step."""
    atomic_write(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def number(value: object) -> float | None:
    """Return a finite number of a file, otherwise None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) <= sys.float_info.max else None  # also None for nan


def pair(value: object) -> tuple[float, float] | None:
    """Return two finite numbers of a file, otherwise None."""
    low, high = map(number, value) if isinstance(value, list) and len(value) == 2 else (None, None)
    return None if low is None or high is None else (low, high)


def integer(value: object) -> int | None:
    """Return an int of a file that a float can hold, otherwise None."""
    return value if type(value) is int and abs(value) < 2**53 else None


def text(value: object) -> str | None:
    """Return a string of a file that is not empty, otherwise None."""
    return value if isinstance(value, str) and value else None


def total_seconds(info: Mapping[str, Any]) -> float | None:
    """Return the seconds of a run, with its folds and with those before an interruption; None if it has no result."""
    own = number(mapping(info.get("seconds")).get("total"))
    folds = number(mapping(info.get("cross_validation")).get("seconds"))
    return None if own is None else own + (folds or 0.0)


def strings(value: object) -> tuple[str, ...]:
    """Return the items of a list in a file as strings; none if it is not a list."""
    return tuple(map(str, value)) if isinstance(value, list) else ()


def mapping(value: Any) -> Mapping[str, Any]:
    """Return a mapping of a file, otherwise an empty one."""
    return value if isinstance(value, Mapping) else {}


def _regular(path: Path) -> Path:
    """Return the path. Raise OSError for a pipe, which would block, or a device, which may have no end."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError("not a regular file")
    return path
