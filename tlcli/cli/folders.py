"""Directories of runs: a new one belongs to one run alone; those in outputs/ complete a command line."""

import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from tlcli.errors import UsageError
from tlcli.runs.run_dir import RunDir

RUN_PATTERNS = ("outputs/*/*/run.json", "outputs/*/*/*/run.json")
"""Where `tlcli train` writes runs: OUT/DATE/TIME, and below that the jobs of a sweep."""

MAX_COMPLETIONS = 200


@dataclass(frozen=True)
class Folder:
    """A directory of one run or one sweep. `made`: the folders that were created for it, outermost first."""

    path: Path
    made: tuple[Path, ...]

    def discard(self) -> None:
        """Remove the folders that were created, and nothing else."""
        if self.path in self.made:
            shutil.rmtree(self.path, ignore_errors=True)
        for parent in reversed(self.made):
            with suppress(OSError):  # another run is in it, or it is gone already
                parent.rmdir()


def new_folder(path: Path) -> Folder:
    """Create a directory that no other run has; -2, -3, ... is appended if the name is taken.

    Raises:
        UsageError: no directory can be created there.
    """
    try:
        parents = _make_parents(path)
        for n in count(1):
            numbered = path if n == 1 else path.with_name(f"{path.name}-{n}")
            with suppress(FileExistsError):
                numbered.mkdir()  # atomic: of two runs that start in the same second only one creates it
                return Folder(numbered, (*parents, numbered))
    except OSError as exc:
        raise UsageError(f"cannot create {path}: {exc.strerror}; choose another folder with out=...") from exc
    raise AssertionError("unreachable")


def named_folder(path: Path, key: str) -> Folder:
    """Create the directory that the user named. Raise UsageError if it has files that a run would overwrite."""
    run = RunDir(path)
    files = [run.info_file, run.config_file, run.metrics_file, run.test_file, run.log_file, run.plots]
    files += [run.best_checkpoint.parent, path / ".hydra", path / "sweep.json", path / "multirun.yaml"]
    if existing := next((file for file in files if file.exists()), None):
        raise UsageError(f"{key}={path}: {existing.name} already exists there; choose an empty directory")
    try:
        parents = _make_parents(path)
        made = () if path.is_dir() else (path,)
        path.mkdir(exist_ok=True)
    except OSError as exc:
        raise UsageError(f"{key}={path}: cannot create it: {exc.strerror}") from exc
    return Folder(path, (*parents, *made))


def _make_parents(path: Path) -> list[Path]:
    """Create the missing parents and return them, outermost first."""
    missing = [parent for parent in reversed(path.parents) if not parent.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    return missing


def run_folders() -> Iterator[str]:
    """Yield the runs below outputs/, the newest first, for completion."""
    folders = [path.parent.as_posix() for pattern in RUN_PATTERNS for path in Path().glob(pattern)]
    yield from sorted(folders, reverse=True)[:MAX_COMPLETIONS]
