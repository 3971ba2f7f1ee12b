"""Crash-safe file replacement, YAML from any source, and checks of paths that do not raise."""

import os
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from secrets import randbelow
from typing import Any

from tlcli.errors import UsageError
from tlcli.text import csv_line


def atomic_write(path: Path, content: bytes, *, durable: bool = False) -> None:
    """Replace a file in one atomic step: if that fails, the old one stays. A durable file survives a power failure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = _temp_path(path)
    try:
        with temp.open("wb") as file:
            file.write(content)
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


def write_csv(path: Path, rows: Iterable[Iterable[object]]) -> None:
    """Replace a file by rows of CSV; bytes of file names that are not UTF-8 stay."""
    atomic_write(path, "".join(map(csv_line, rows)).encode(errors="surrogateescape"))


def replace_with_hardlink(path: Path, name: Path) -> bool:
    """Give a file a second name in the same folder. Return False if the file system has no hard links."""
    temp = _temp_path(name)
    try:
        temp.hardlink_to(path)
        temp.replace(name)
    except (OSError, NotImplementedError):
        return False
    finally:
        with suppress(OSError):
            temp.unlink(missing_ok=True)  # after a rename, too: it does nothing if both are names of one file
    sync_folder(name.parent)
    return True


def _temp_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}{randbelow(10**9):09}")  # two containers may have the same pid


def remove_temp_files(folder: Path) -> None:
    """Remove what killed writers left in a folder. No process may be writing there."""
    for path in folder.glob(".*"):
        if re.fullmatch(r"\..+\.(csv|html|json|png|safetensors|yaml)\.\d+", path.name) and path.is_file():
            path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Write the names in a folder to the disk, if the system can do that."""
    with suppress(OSError):  # Windows opens no folders
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file as plain values. Raise OSError, or ValueError if it is not such a mapping."""
    import yaml  # type: ignore[import-untyped]

    if exists(path) and not is_file(path):
        raise OSError("not a regular file")  # reading a pipe would block
    text = path.read_text(encoding="utf-8")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    if re.search(r"\\u[dD][89a-fA-F]", text):  # a name that is not UTF-8, which libyaml writes but does not read
        loader = yaml.SafeLoader
    try:
        if "*" in text:  # a few lines of aliases can stand for billions of values
            for event in yaml.parse(text, Loader=loader):
                if isinstance(event, yaml.AliasEvent):
                    line = event.start_mark.line + 1
                    raise ValueError(f"line {line}: alias *{event.anchor} is not allowed; write the values out")
        content = yaml.load(text, Loader=loader)  # noqa: S506  libyaml's safe loader
    except (yaml.YAMLError, RecursionError, OverflowError) as error:
        raise ValueError(f"not YAML: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(content, dict):
        raise ValueError("not a config (keys and values)")
    return content


def check_links(folder: Path) -> None:
    """Raise UsageError for a link in a folder that leads out of it. Someone else's may name any file of the user."""
    top = resolve_links(folder)
    for place, folders, names in os.walk(folder):
        for path in (Path(place, name) for name in (*folders, *names)):
            is_of_wandb = path.name == "debug-core.log"  # names a log in wandb's own folder, and is never written to
            if path.is_symlink() and not is_of_wandb and not resolve_links(path).is_relative_to(top):
                raise UsageError(f"{path}: is a link that leads out of {folder}; replace it by what it names")


def expand_user(path: str) -> Path:
    """Return the path with ~ replaced by the home directory. Raise UsageError for an unknown user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UsageError(f"{path}: no such home directory; write the whole path") from None


def resolve_links(path: Path) -> Path:
    """Return the path with links followed as far as possible."""
    try:
        return Path(os.path.realpath(path))
    except ValueError:  # it has a NUL character
        return path


# pathlib's checks and resolve() raise for names that are too long and for links that form a circle; these do not
exists, is_dir, is_file = os.path.exists, os.path.isdir, os.path.isfile
