"""A file is the old one or the new one, wherever its writing ends."""

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tlcli.errors import UsageError
from tlcli.files import (
    atomic_write,
    exists,
    expand_user,
    is_dir,
    is_file,
    remove_temp_files,
    replace_with_hardlink,
    resolve_links,
)

OLD, NEW = b"old" * 1000, b"new" * 2000


def write(path: Path) -> None:
    with atomic_write(path, durable=True) as file:
        file.write(NEW)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights.bin"
    path.write_bytes(OLD)
    return path


STEPS = ("open", "write", "flush", "fsync", "replace", "fsync of the folder")


def at(step: str, do: Callable[[], None], patch: pytest.MonkeyPatch) -> None:
    """Have something done instead of a step of the writing: each is one call of the system's."""
    opened = Path.open

    class Spoilt:
        """A file of which one method does it."""

        def __init__(self, file) -> None:
            self._file = file

        def __getattr__(self, name: str):
            return (lambda *args: do()) if name == step else getattr(self._file, name)

        def __enter__(self):
            return self

        def __exit__(self, *exc: object) -> None:
            self._file.close()

    if step == "open":
        patch.setattr(Path, "open", lambda self, *args: do())
    elif step in ("write", "flush"):
        patch.setattr(Path, "open", lambda self, *args: Spoilt(opened(self, *args)))
    elif step == "replace":
        patch.setattr(Path, "replace", lambda self, other: do())
    else:
        calls, fsync = iter(range(9)), os.fsync
        which = STEPS.index(step) - STEPS.index("fsync") and 1
        patch.setattr(os, "fsync", lambda handle: do() if next(calls) == which else fsync(handle))


@pytest.mark.parametrize("step", STEPS[:-1])
def test_an_error_leaves_the_old_file_and_nothing_else(file: Path, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left") as raised:
        at(step, full, patch)
        write(file)
    assert raised.value.filename == str(file)
    assert file.read_bytes() == OLD
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    write(file)
    assert file.read_bytes() == NEW


@pytest.mark.parametrize("step", STEPS)
def test_a_crash_leaves_the_old_file_or_the_new_one(file: Path, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pid = os.fork()
    if pid == 0:
        at(step, lambda: os.kill(os.getpid(), signal.SIGKILL), monkeypatch)
        write(file)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert file.read_bytes() == (NEW if step == STEPS[-1] else OLD)
    remove_temp_files(file.parent)
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_what_is_no_draft_stays(tmp_path: Path) -> None:
    names = [".hidden", ".a.1x", "plain", ".version.1.2b"]
    for name in (*names, ".run.json.123"):
        (tmp_path / name).touch()
    (tmp_path / ".folder.7").mkdir()
    remove_temp_files(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*names, ".folder.7"}


def test_a_file_has_the_mode_that_the_umask_gives(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write(tmp_path / "one")
    finally:
        os.umask(before)
    assert (tmp_path / "one").stat().st_mode & 0o777 == 0o640


def test_a_second_name_keeps_what_it_stands_for(file: Path) -> None:
    name = file.with_name("last.bin")
    name.write_bytes(b"before")
    assert replace_with_hardlink(file, name)
    assert replace_with_hardlink(file, name)  # once more: it is so already
    assert name.samefile(file)
    write(file)
    assert (file.read_bytes(), name.read_bytes()) == (NEW, OLD)
    assert {path.name for path in file.parent.iterdir()} == {file.name, name.name}


@pytest.mark.parametrize("step", ["hardlink_to", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.EPERM, "not permitted"), NotImplementedError("os.link()")])
def test_a_second_name_that_cannot_be_leaves_the_old_file(
    file: Path, step: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise error

    name = file.with_name("last.bin")
    name.write_bytes(b"before")
    monkeypatch.setattr(Path, step, refuse)
    assert not replace_with_hardlink(file, name)
    assert name.read_bytes() == b"before"
    assert {path.name for path in file.parent.iterdir()} == {file.name, name.name}


def test_checks_of_paths_do_not_raise(tmp_path: Path) -> None:
    """Assert that checks of long names and circular links do not raise, unlike pathlib's."""
    path = tmp_path / ("x" * 5000)
    assert not exists(path) and not is_dir(path) and not is_file(path)
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    assert not exists(tmp_path / "a") and not is_dir(tmp_path / "a") and not is_file(tmp_path / "a")
    assert resolve_links(tmp_path / "a").is_relative_to(resolve_links(tmp_path))


def test_the_home_of_nobody_is_one_line() -> None:
    with pytest.raises(UsageError, match="no such home directory"):
        expand_user("~nobody-at-all/x")
