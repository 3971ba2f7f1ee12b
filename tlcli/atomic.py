"""Files that are there whole or not at all, whatever ends the process that writes them."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

_DRAFT = re.compile(r"\..+\.\d+")


@contextmanager
def replacing(path: Path, *, durable: bool = False) -> Iterator[BinaryIO]:
    """A file to write to, which takes the place of `path` when the block ends; where that fails, the old one stays.

    Args:
        durable: survive a power failure too: the file is on the disk before it is renamed, and the rename afterwards.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = _draft(path)
    try:
        with draft.open("wb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        draft.replace(path)
    except BaseException as error:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, str(draft)):
            error.filename = str(path)  # a write that fails does not say of which file
        raise
    if durable:
        sync_folder(path.parent)


def linked(path: Path, name: Path) -> bool:
    """Give a file a second name, in the same folder, in the place of what has that name; False where the file system
    cannot do that. Each name keeps what it stands for when the other is replaced."""
    draft = _draft(name)
    try:
        draft.unlink(missing_ok=True)
        draft.hardlink_to(path)
        draft.replace(name)
        draft.unlink(missing_ok=True)  # replacing does nothing where both were names of one file
    except (OSError, NotImplementedError):
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        return False
    sync_folder(name.parent)
    return True


def _draft(path: Path) -> Path:
    """What a file is called while it is written."""
    return path.with_name(f".{path.name}.{os.getpid()}")


def remove_drafts(folder: Path) -> None:
    """Remove what killed writers left in a folder. Nobody may be writing there."""
    for path in folder.glob(".*"):
        if _DRAFT.fullmatch(path.name) and path.is_file():
            path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Put the names in a folder on the disk, where the system can do that."""
    with suppress(OSError):  # Windows opens no folders
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
