"""Where a report is written, and what is never overwritten."""

import os
import re
from pathlib import Path

from tlcli.errors import UsageError
from tlcli.files import atomic_write

GENERATOR = "tlcli report"
"""The content of a report's generator tag, by which a later one knows that it may replace the file."""

_OURS = re.compile(rb'<meta name="generator" content="' + GENERATOR.encode() + rb'[^"]*">')
_HEAD = 2048  # bytes: the tag is among the first lines


def check_is_ours(file: Path) -> None:
    """Raise UsageError unless a report may be written to this place: nothing is there, or an earlier report."""
    remedy = "name another file with --output FILE"
    if file.is_dir():
        raise UsageError(f"--output {file}: this is a directory; {remedy}")
    if not file.parent.is_dir():
        raise UsageError(f"--output {file}: there is no directory {file.parent}; make it, or {remedy}")
    if os.path.lexists(file) and not _is_ours(file):
        raise UsageError(f"{file}: there already, and not a report of tlcli's; {remedy}")


def _is_ours(file: Path) -> bool:
    if file.is_symlink() or not file.is_file():
        return False
    try:
        with file.open("rb") as stream:
            return _OURS.search(stream.read(_HEAD)) is not None
    except OSError:
        return False


def save(html: str, file: Path) -> None:
    """Write a report in one atomic step. Raises UsageError where there is another file, or none can be written."""
    check_is_ours(file)
    try:
        with atomic_write(file) as stream:
            stream.write(html.encode())  # as bytes: the style sheet's digest is over \n
    except OSError as exc:
        raise UsageError(f"{file}: cannot be written: {exc.strerror or exc}; name another file with --output") from exc
