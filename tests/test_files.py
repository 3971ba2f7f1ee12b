"""A file is the old one or the new one, wherever its writing ends."""

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tlcli.errors import UsageError
from tlcli.files import atomic_write, expand_user, read_yaml, remove_temp_files, replace_with_hardlink

OLD, NEW = b"old" * 1000, b"new" * 2000


def write(path: Path) -> None:
    atomic_write(path, NEW, durable=True)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(OLD)
    return path


STEPS = ("open", "fsync", "replace", "fsync of the folder")


def at(step: str, do: Callable[[], None], patch: pytest.MonkeyPatch) -> None:
    """Have something done instead of a step of the writing: each is one call of the system's."""
    if step == "open":
        patch.setattr(Path, "open", lambda self, *args: do())
    elif step == "replace":
        patch.setattr(Path, "replace", lambda self, other: do())
    else:
        calls, fsync = iter(range(9)), os.fsync
        which = int(step != "fsync")
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


def test_writers_of_one_pid_have_drafts_of_their_own(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = Path.replace

    def replace_late(self: Path, other: Path) -> Path:
        monkeypatch.setattr(Path, "replace", replace)
        atomic_write(file, b"of another thread, or of a process in another container")
        return replace(self, other)

    monkeypatch.setattr(Path, "replace", replace_late)
    write(file)
    assert file.read_bytes() == NEW
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_files_that_are_not_drafts_stay(tmp_path: Path) -> None:
    names = [".hidden", ".env.20240101", ".a.1x", "plain", ".version.1.2b"]
    for name in (*names, ".run.json.123"):
        (tmp_path / name).touch()
    (tmp_path / ".folder.7").mkdir()
    remove_temp_files(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*names, ".folder.7"}


def test_a_second_name_keeps_the_old_contents(file: Path) -> None:
    name = file.with_name("last.bin")
    name.write_bytes(b"before")
    for _ in range(2):  # the second time it is so already
        assert replace_with_hardlink(file, name)
    write(file)
    assert (file.read_bytes(), name.read_bytes()) == (NEW, OLD)
    assert {path.name for path in file.parent.iterdir()} == {file.name, name.name}


@pytest.mark.parametrize("step", ["hardlink_to", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.EPERM, "not permitted"), NotImplementedError("os.link()")])
def test_a_second_name_that_cannot_be_leaves_the_old_file(file: Path, step: str, error: Exception, monkeypatch) -> None:
    def refuse(*args: object) -> None:
        raise error

    name = file.with_name("last.bin")
    name.write_bytes(b"before")
    monkeypatch.setattr(Path, step, refuse)
    assert not replace_with_hardlink(file, name)
    assert name.read_bytes() == b"before"
    assert {path.name for path in file.parent.iterdir()} == {file.name, name.name}


def test_an_unknown_home_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="no such home directory"):
        expand_user("~nobody-at-all/x")


def test_a_name_that_is_not_utf_8_is_read_as_it_was_written(tmp_path: Path) -> None:
    config = {"dataset": {"root": os.fsdecode(b"/data/not \xff\xfe utf-8")}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
    assert read_yaml(tmp_path / "config.yaml") == config
