"""Directories that belong to one run alone."""

import contextlib
import shutil
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from tlcli.errors import UsageError
from tlcli.runs.run_dir import RunDir


@dataclass(frozen=True)
class Folder:
    """A directory for one run or one sweep. `made`: what did not exist before, outermost first."""

    path: Path
    made: tuple[Path, ...]

    def discard(self) -> None:
        """Remove what was made, and nothing else."""
        if self.path in self.made:
            shutil.rmtree(self.path, ignore_errors=True)
        for parent in reversed(self.made):
            with contextlib.suppress(OSError):  # somebody else's run has come into it, or it is gone already
                parent.rmdir()


def new_folder(wanted: Path) -> Folder:
    """Make a directory that nobody else has: -2, -3, ... are tried where the name is taken.

    Raises UsageError where no directory can be made.
    """
    try:
        parents = _make_parents(wanted)
        for n in count(1):
            path = wanted if n == 1 else wanted.with_name(f"{wanted.name}-{n}")
            with contextlib.suppress(FileExistsError):
                path.mkdir()  # atomic: of two runs that start in the same second only one makes it
                return Folder(path, (*parents, path))
    except OSError as exc:
        raise UsageError(f"cannot make {wanted}: {exc.strerror}; choose another place with out=...") from exc
    raise AssertionError("unreachable")


def named_folder(path: Path, key: str) -> Folder:
    """Make the directory that the user named; UsageError where it has files that a run would overwrite."""
    run = RunDir(path)
    files = [run.info_file, run.config_file, run.metrics_file, run.test_file, run.log_file, run.plots]
    files += [run.best_checkpoint.parent, path / ".hydra", path / "sweep.json", path / "multirun.yaml"]
    if taken := next((file for file in files if file.exists()), None):
        raise UsageError(f"{key}={path}: {taken.name} is there already; name a directory without a run in it")
    try:
        parents = _make_parents(path)
        made = () if path.is_dir() else (path,)
        path.mkdir(exist_ok=True)
    except OSError as exc:
        raise UsageError(f"{key}={path}: cannot make it: {exc.strerror}") from exc
    return Folder(path, (*parents, *made))


def _make_parents(path: Path) -> list[Path]:
    """Make the parents that are missing; these, outermost first."""
    missing = [parent for parent in reversed(path.parents) if not parent.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    return missing
