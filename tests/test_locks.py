"""Locks and signs of life: killed owners, suspended owners, and clocks that differ by an hour."""

import errno
import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest

from tlcli import locks
from tlcli.locks import (
    STALE_SECONDS,
    Heartbeat,
    Lock,
    Observer,
    host_digest,
    owner_text,
    runs_on_this_machine,
    this_process,
)

ELSEWHERE = json.dumps({"host": "another", "pid": 1, "id": "0"}).encode()
WITHOUT_START = json.dumps({**this_process(), "process_start": None}).encode()  # as where there is no /proc
HOUR_NS = 3_600_000_000_000


class Clock:
    """A clock that only sleeping moves; `on_sleep` is called each time."""

    def __init__(self, on_sleep: Callable[[], object] = lambda: None) -> None:
        self.now, self.on_sleep = 0.0, on_sleep

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.on_sleep()


def observer_of(clock: Clock) -> Observer:
    return Observer(lambda: clock.now, clock.sleep)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.lock"


def touch(path: Path, offset_ns: int = 0) -> None:
    """Set the next mtime, as an owner does whose file system counts from another time."""
    mtime = path.stat().st_mtime_ns + 1_000_000 + offset_ns
    os.utime(path, ns=(mtime, mtime))


def test_a_lock_excludes_names_its_owner_and_leaves_nothing(path: Path) -> None:
    lock = Lock(path)
    with lock.held():
        assert lock.owned()
        assert json.loads(path.read_bytes())["pid"] == os.getpid()
        with pytest.raises(TimeoutError), Lock(path).held(timeout=0):
            pass
    assert not lock.owned()
    assert list(path.parent.iterdir()) == []


def add_one(path: Path, n: int) -> None:
    for _ in range(n):
        with Lock(path.with_suffix(".lock")).held():
            path.write_text(str(int(path.read_text()) + 1))


def test_processes_never_lose_an_update(tmp_path: Path) -> None:
    file, fork = tmp_path / "count", multiprocessing.get_context("fork")
    file.write_text("0")
    members = [fork.Process(target=add_one, args=(file, 50)) for _ in range(3)]
    for member in members:
        member.start()
    for member in members:
        member.join(60)
    assert file.read_text() == "150"


def hold_and_die(path: Path) -> None:
    with Lock(path).held():
        os.kill(os.getpid(), signal.SIGKILL)


def test_the_lock_of_a_killed_process_of_this_machine_is_free_at_once(path: Path) -> None:
    owner = multiprocessing.get_context("fork").Process(target=hold_and_die, args=(path,))
    owner.start()
    owner.join(60)
    assert path.exists()
    with Lock(path, observer_of(Clock(lambda: pytest.fail("it waited")))).held(timeout=0):
        pass


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="it is not known when a process began")
def test_an_owner_whose_pid_another_process_has_now_has_ended(path: Path) -> None:
    owner = this_process()
    assert runs_on_this_machine(owner) is True
    owner["process_start"] -= 1
    assert runs_on_this_machine(owner) is False
    path.write_text(json.dumps(owner))
    with Lock(path, observer_of(Clock(lambda: pytest.fail("it waited")))).held(timeout=0):
        pass


def test_machines_of_one_name_have_digests_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", Mock(side_effect=["one", "two", "two", FileNotFoundError]))  # machine-id
    one, two, again, without = (host_digest() for _ in range(4))
    assert two == again and len({one, two, without}) == 3


@pytest.mark.parametrize("offset", [0, HOUR_NS, -HOUR_NS])
@pytest.mark.parametrize("content", [ELSEWHERE, b""])
def test_the_lock_of_a_killed_process_elsewhere_is_free_after_a_time(path: Path, offset, content: bytes) -> None:
    path.write_bytes(content)
    touch(path, offset)
    clock = Clock()
    with Lock(path, observer_of(clock)).held():
        assert STALE_SECONDS <= clock.now < STALE_SECONDS + 1


@pytest.mark.parametrize("offset", [0, HOUR_NS, -HOUR_NS])
def test_a_lock_that_is_touched_is_waited_for(path: Path, offset: int) -> None:
    path.write_bytes(ELSEWHERE)
    touch(path, offset)
    sleeps = 0

    def beat() -> None:
        nonlocal sleeps
        sleeps += 1
        if sleeps % 100 == 0:  # each 10 s
            touch(path)

    clock = Clock(beat)
    with pytest.raises(TimeoutError), Lock(path, observer_of(clock)).held(timeout=10 * STALE_SECONDS):
        pass
    assert path.read_bytes() == ELSEWHERE


def test_a_lock_that_is_released_while_nfs_reads_it_is_free(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_bytes(ELSEWHERE)
    lock, reads = Lock(path, observer_of(Clock())), []

    def read_bytes(self: Path) -> bytes:
        reads.append(self)
        if len(reads) == 2:  # the first one asks who owns it
            self.unlink()
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", read_bytes)
        lock.acquire()
    assert lock.owned()


def test_an_owner_that_lost_its_lock_does_not_own_touch_or_remove_it(path: Path) -> None:
    lock = Lock(path)
    with lock.held():
        path.write_bytes(ELSEWHERE)  # another process has found it stale
        mtime = path.stat().st_mtime_ns
        locks.heartbeat.beat()
        assert not lock.owned()
        assert path.stat().st_mtime_ns == mtime
    assert path.read_bytes() == ELSEWHERE


def test_of_two_that_find_a_lock_stale_the_slower_one_gives_it_back(path: Path, monkeypatch) -> None:
    path.write_bytes(ELSEWHERE)
    clock, faster, rename = Clock(), owner_text(), Path.rename

    def rename_late(self: Path, target: Path) -> Path:
        monkeypatch.setattr(Path, "rename", rename)
        self.unlink()
        self.write_bytes(faster)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", rename_late)
    with pytest.raises(TimeoutError), Lock(path, observer_of(clock)).held(timeout=STALE_SECONDS + 1):
        pass
    assert path.read_bytes() == faster
    assert list(path.parent.iterdir()) == [path]


def test_a_full_disk_leaves_no_lock(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = Lock(path)
    monkeypatch.setattr(lock, "_content", None)
    with pytest.raises(TypeError), lock.held():
        pass
    assert not path.exists()


def test_the_heartbeat_touches_what_exists_until_it_is_dropped(tmp_path: Path) -> None:
    heartbeat, file, missing = Heartbeat(interval=1e6), tmp_path / "run.json", tmp_path / "missing"
    file.write_text("{}")
    os.utime(file, (0, 0))
    heartbeat.add(missing)
    heartbeat.add(file)
    heartbeat.beat()
    assert file.stat().st_mtime > 0
    assert not missing.exists()
    os.utime(file, (0, 0))
    heartbeat.drop(file)
    heartbeat.beat()
    assert file.stat().st_mtime == 0


@pytest.mark.parametrize("owner", [ELSEWHERE, WITHOUT_START], ids=["elsewhere", "here"])
def test_the_observer_knows_an_owner_by_the_next_touch_or_after_60_s(tmp_path: Path, owner: bytes) -> None:
    names = ("touched", "written", "dead")
    touched, written, dead = (tmp_path / name for name in names)
    for file in (touched, written, dead):
        file.write_bytes(owner)
    clock = Clock()
    observer = observer_of(clock)
    assert [observer.is_alive(file) for file in (touched, written, dead)] == [None] * 3
    touch(touched, -HOUR_NS)
    written.write_bytes(owner + b" ")
    clock.now = STALE_SECONDS - 1
    assert [observer.is_alive(file) for file in (touched, written, dead)] == [True, True, None]
    clock.now = STALE_SECONDS
    assert [observer.is_alive(file) for file in (touched, written, dead)] == [True, True, False]
    clock.now = 2 * STALE_SECONDS
    assert not observer.is_alive(touched)  # it was alive once
    assert observer.is_alive(tmp_path / "missing") is False


def test_a_change_since_a_look_long_ago_is_no_sign_of_life(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("goes on", "dead")]
    clock = Clock()
    observer = observer_of(clock)
    for file in files:
        file.write_bytes(ELSEWHERE)
        observer.is_alive(file)
        touch(file)
    clock.now = STALE_SECONDS + 1
    assert [observer.is_alive(file) for file in files] == [None, None]
    touch(files[0])
    clock.now += STALE_SECONDS - 1
    assert [observer.is_alive(file) for file in files] == [True, None]
    clock.now += 1
    assert [observer.is_alive(file) for file in files] == [True, False]


def test_a_file_that_cannot_be_read_at_first_lives_or_not_as_others_do(path: Path, monkeypatch) -> None:
    path.write_bytes(ELSEWHERE)
    clock, read = Clock(), Path.open
    observer = observer_of(clock)
    monkeypatch.setattr(Path, "open", Mock(side_effect=OSError(errno.EIO, "no answer")))
    assert observer.is_alive(path) is None
    clock.now = 10
    assert observer.is_alive(path) is None
    monkeypatch.setattr(Path, "open", read)
    assert observer.is_alive(path) is None, "that it can be read is no sign of life"
    clock.now += STALE_SECONDS
    assert observer.is_alive(path) is False


def test_who_lives_is_known_as_soon_as_each_is_touched(tmp_path: Path) -> None:
    files = [tmp_path / name for name in "ab"]
    for file in files:
        file.write_bytes(ELSEWHERE)
    here, clock = tmp_path / "here", Clock(lambda: [touch(file) for file in files])
    here.write_bytes(owner_text())
    assert observer_of(clock).living([*files, here]) == {*files, here}
    assert clock.now <= 2


@pytest.mark.parametrize("content", [b"", b"[]", b"not JSON", b"[" * 100_000, b'{"pid": "1"}', b'{"pid": true}'])
def test_an_owner_that_cannot_be_read_is_known_by_its_mtime(path: Path, content: bytes) -> None:
    path.write_bytes(content.replace(b"}", b', "host": "%b"}' % host_digest().encode()))
    clock = Clock()
    assert observer_of(clock).living([path]) == set()
    assert clock.now >= STALE_SECONDS
