"""What is at a path that anybody may have named.

pathlib's own questions raise for names that are too long and for links that lead in a circle; these answer.
"""

import os
from pathlib import Path

from tlcli.errors import UsageError


def expanded(place: str) -> Path:
    """The path with the home directory in place of ~. Raises UsageError for the home of somebody unknown."""
    try:
        return Path(place).expanduser()
    except RuntimeError:
        raise UsageError(f"{place}: there is no such home directory; write the whole path") from None


def exists(path: str | Path) -> bool:
    """Whether there is anything; False where the system does not even look, as for a name that is too long."""
    return os.path.exists(path)  # noqa: PTH110


def is_dir(path: str | Path) -> bool:
    """Whether there is a folder; False where the system does not even look."""
    return os.path.isdir(path)  # noqa: PTH112


def is_file(path: str | Path) -> bool:
    """Whether there is a regular file; False where the system does not even look."""
    return os.path.isfile(path)  # noqa: PTH113


def real(path: Path) -> Path:
    """Where a path leads once links are followed, as far as they can be."""
    return Path(os.path.realpath(path))
