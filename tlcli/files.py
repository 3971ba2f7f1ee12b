"""Crash-safe file replacement, and checks of paths that do not raise."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from tlcli.errors import UsageError

_TEMP_NAME = re.compile(r"\..+\.\d+")


@contextmanager
def atomic_write(path: Path, *, durable: bool = False) -> Iterator[BinaryIO]:
    """Yield a file that replaces `path` when the block ends; if the block fails, the old file stays.

    Args:
        durable: sync the file before it is renamed and the folder afterwards, so that it survives a power failure.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = _temp_path(path)
    try:
        with temp.open("wb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temp.replace(path)
    except BaseException as error:
        with suppress(OSError):
            temp.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, str(temp)):
            error.filename = str(path)  # a failed write does not name its file
        raise
    if durable:
        sync_folder(path.parent)


def replace_with_hardlink(path: Path, name: Path) -> bool:
    """Give a file a second name in the same folder, replacing what has that name.

    Replacing one of the names later leaves the other as it is. Return False if the file system has no hard links.
    """
    temp = _temp_path(name)
    try:
        temp.unlink(missing_ok=True)
        temp.hardlink_to(path)
        temp.replace(name)
        temp.unlink(missing_ok=True)  # rename does nothing if both are names of one file
    except (OSError, NotImplementedError):
        with suppress(OSError):
            temp.unlink(missing_ok=True)
        return False
    sync_folder(name.parent)
    return True


def _temp_path(path: Path) -> Path:
    """Return the name of a file while it is written."""
    return path.with_name(f".{path.name}.{os.getpid()}")


def remove_temp_files(folder: Path) -> None:
    """Remove what killed writers left in a folder. No process may be writing there."""
    for path in folder.glob(".*"):
        if _TEMP_NAME.fullmatch(path.name) and path.is_file():
            path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Write the names in a folder to the disk, if the system can do that."""
    with suppress(OSError):  # Windows opens no folders
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


# pathlib's checks raise for names that are too long and for links that form a circle; those below do not.


def expand_user(path: str) -> Path:
    """Return the path with ~ replaced by the home directory. Raise UsageError for an unknown user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UsageError(f"{path}: no such home directory; write the whole path") from None


def exists(path: str | Path) -> bool:
    """Return True if the path exists; False also for names that the system does not accept."""
    return os.path.exists(path)  # noqa: PTH110


def is_dir(path: str | Path) -> bool:
    """Return True if the path is a folder; False also for names that the system does not accept."""
    return os.path.isdir(path)  # noqa: PTH112


def is_file(path: str | Path) -> bool:
    """Return True if the path is a regular file; False also for names that the system does not accept."""
    return os.path.isfile(path)  # noqa: PTH113


def resolve_links(path: Path) -> Path:
    """Return the path with links followed as far as possible."""
    return Path(os.path.realpath(path))
