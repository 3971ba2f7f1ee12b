"""Whether a directory is a run's, said at once: torch is not imported here."""

from pathlib import Path
from typing import Any

from tlcli.errors import UsageError
from tlcli.files import exists, expand_user, is_dir
from tlcli.runs.run_dir import SCHEMA_VERSION, RunDir, read_json
from tlcli.text import did_you_mean


def open_run(path: str | Path) -> tuple[RunDir, dict[str, Any]]:
    """The run in a directory, and its run.json. Raises UsageError where there is none that this tlcli can read."""
    run = RunDir(expand_user(str(path)))
    if not exists(run.path):
        raise UsageError(f"{run.path}: no such run directory.{_near(run.path)}")
    if not run.record_file.is_file():
        raise UsageError(f"{run.path}: not a run directory (it has no run.json){_instead(run.path)}")
    try:
        info = read_json(run.record_file)
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{run.record_file}: damaged ({error})") from error
    version = info.get("schema_version")
    if not isinstance(version, int) or not 1 <= version <= SCHEMA_VERSION:
        raise UsageError(
            f"{run.record_file}: schema_version {version!r} is of another tlcli ({info.get('tlcli', 'unknown')}); "
            f"this one reads up to {SCHEMA_VERSION}: use that one, or a newer one"
        )
    return run, info


def _near(path: Path) -> str:
    """A directory beside it that may have been meant."""
    beside = [p.name for p in path.parent.iterdir() if p.is_dir()] if is_dir(path.parent) else []
    return did_you_mean(path.name, beside)


def _instead(path: Path) -> str:
    """The run that may have been meant: the one a file is in, or one below a directory."""
    above = next((parent for parent in path.parents if (parent / "run.json").is_file()), None)
    below = next(iter(sorted(path.glob("*/run.json"))), None) or next(iter(sorted(path.glob("*/*/run.json"))), None)
    near = above if path.is_file() else below and below.parent
    return f". Did you mean {near}?" if near else ""
