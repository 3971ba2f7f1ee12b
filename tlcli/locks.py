"""Lock files and heartbeats, for processes on machines that share a file system.

A process touches its files every 10 s. Clocks of two machines are never compared: a file is stale if its mtime, as the
file system reports it, has not changed for 60 s of the observer's monotonic clock. If the file names its owner (`host`
and `pid`, in JSON), it is stale as soon as that process of the same machine has ended.
"""

import errno
import json
import os
import platform
import secrets
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BEAT_SECONDS = 10.0
STALE_SECONDS = 60.0
MAX_POLL_SECONDS = 0.1


class Heartbeat:
    """Touches files every `interval` seconds from a daemon thread, as long as this process lives."""

    def __init__(self, interval: float = BEAT_SECONDS) -> None:
        self._interval, self._pid = interval, 0
        self._files: dict[Path, Callable[[], bool]] = {}

    def add(self, path: Path, is_owned: Callable[[], bool] = lambda: True) -> None:
        """Touch a file from now on, while `is_owned()`. A missing one is not made."""
        import threading  # here: it takes a quarter of the time of `tlcli --help`

        if self._pid != os.getpid():  # a forked process has no thread, and owns nothing
            self._pid, self._files = os.getpid(), {}
            threading.Thread(target=self._run, daemon=True).start()
        self._files[path] = is_owned

    def drop(self, path: Path) -> None:
        """Stop touching a file."""
        self._files.pop(path, None)

    def beat(self) -> None:
        """Touch all files once."""
        for path, is_owned in list(self._files.items()):
            with suppress(OSError):  # it is missing, or its file system does not answer
                if is_owned():
                    os.utime(path)  # with the time of the file system

    def _run(self) -> None:
        while True:
            time.sleep(self._interval)
            self.beat()


@dataclass
class _Look:
    """A file at the last look: since when it is unchanged, when that look was, and if it is known to be touched."""

    state: tuple[int, bytes]  # mtime and content
    since: float
    at: float
    has_changed: bool = False


class Observer:
    """Tells by the monotonic clock of this process which files are still touched."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, sleep: Callable[..., None] = time.sleep) -> None:
        self.clock, self.sleep = clock, sleep
        self._seen: dict[Path, _Look] = {}

    def is_alive(self, path: Path) -> bool | None:
        """Return False if a file is stale or missing, True if its owner lives, None if that is not known yet.

        An owner lives if the file has changed since the first call, or if it runs on this machine.
        """
        try:
            with path.open("rb") as file:  # unless it is opened, NFS may report the mtime of a minute ago
                state = os.fstat(file.fileno()).st_mtime_ns, file.read()
        except FileNotFoundError:
            return False
        except OSError:  # it was replaced while it was read (ESTALE), or its server does not answer
            state = seen.state if (seen := self._seen.get(path)) else (0, b"")
        now = self.clock()
        seen = self._seen.setdefault(path, _Look(state, since=now, at=now))
        if seen.state != state:  # if the last look was long ago, or failed, it may have changed long ago
            seen.has_changed = seen.state[0] > 0 and now - seen.at < STALE_SECONDS
            seen.state, seen.since = state, now
        seen.at, runs_here = now, None
        with suppress(ValueError, RecursionError, AttributeError):  # it does not name its owner
            runs_here = runs_on_this_machine(owner := json.loads(state[1]))
        if runs_here is False or now - seen.since >= STALE_SECONDS:
            return False
        if runs_here and owner.get("process_start") is None:  # without /proc another process may have its pid
            runs_here = None
        return seen.has_changed or runs_here

    def living(self, paths: Collection[Path]) -> set[Path]:
        """Return the files whose owners live. It takes up to 60 s for those of other machines."""
        while True:
            states = {path: self.is_alive(path) for path in paths}
            if None not in states.values():
                return {path for path, is_alive in states.items() if is_alive}
            self.sleep(1)


heartbeat, observer = Heartbeat(), Observer()  # of this process


class Lock:
    """A lock among all threads and processes: a file that names its owner and is touched while it is held.

    A process that was suspended may have lost it: it checks `owned()` before it moves a result into place.
    """

    def __init__(self, path: Path, observer: Observer = observer) -> None:
        self.path, self._observer, self._content = path, observer, owner_text()

    def owned(self) -> bool:
        """Return True if this object holds the lock."""
        with suppress(OSError):
            return self.path.read_bytes() == self._content
        return False

    @contextmanager
    def held(self, timeout: float = -1) -> Iterator[None]:
        """Hold the lock within the block. Raise TimeoutError after `timeout` seconds, OSError if it cannot be made."""
        try:
            self.acquire(timeout)
            heartbeat.add(self.path, self.owned)
            yield
        finally:  # also after an interrupt while it was acquired
            if self.owned():
                heartbeat.drop(self.path)
                self.path.unlink(missing_ok=True)

    def acquire(self, timeout: float = -1) -> None:
        """Wait for the lock, also for one that was lost within `held`."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        start, pause = self._observer.clock(), 0.001
        while not self.owned():
            try:
                with open(self.path, "xb", buffering=0) as file:  # noqa: PTH123  atomic, also on NFS
                    try:
                        file.write(self._content)
                    except BaseException:  # the disk is full
                        self.path.unlink()
                        raise
                return
            except FileExistsError:
                if self._remove_stale():
                    continue
            if 0 <= timeout <= self._observer.clock() - start:
                raise TimeoutError(f"{self.path}: another process holds it")
            self._observer.sleep(pause)
            pause = min(2 * pause, MAX_POLL_SECONDS)

    def _remove_stale(self) -> bool:
        """Remove the file of an owner that has ended. Return False if the owner may live."""
        with suppress(FileNotFoundError):  # it was released, or another process is faster
            try:
                content = self.path.read_bytes()
            except OSError as error:
                if error.errno == errno.ESTALE:  # so NFS says that it was released
                    return True
                raise
            if self._observer.is_alive(self.path) is not False:
                return False
            aside = self.path.with_name(f".{self.path.name}.{secrets.token_hex(8)}")
            self.path.rename(aside)
            if aside.read_bytes() != content:  # of a process or thread that was faster, and holds the lock now
                with suppress(OSError):
                    self.path.hardlink_to(aside)
            aside.unlink()
        return True


def owner_text() -> bytes:
    """Return the content of a file that this process owns: its machine and pid, and a random id."""
    return json.dumps({**this_process(), "id": secrets.token_hex(8)}).encode()


def this_process() -> dict[str, Any]:
    """Return what `runs_on_this_machine` needs to know of the process that calls it."""
    return {"host": host_digest(), "pid": os.getpid(), "process_start": _process_start(os.getpid())}


def host_digest() -> str:
    """Return a digest of the machine's name and id, and of the namespace in which a pid has a meaning."""
    import hashlib

    namespace = Path("/proc/self/ns/pid")  # that of a container, which may have the name of another one
    name = f"{platform.node()} {namespace.readlink()}" if namespace.is_symlink() else platform.node()
    with suppress(OSError):  # two machines may both be called localhost
        name += Path("/etc/machine-id").read_text(encoding="utf-8")
    return hashlib.sha256(name.encode()).hexdigest()[:12]


def runs_on_this_machine(owner: Mapping[str, Any]) -> bool | None:
    """Return True if the process with this `pid` on this `host` runs, False if it has ended, None if not known here."""
    pid = owner.get("pid")
    if type(pid) is not int or pid <= 0 or owner.get("host") != host_digest() or platform.system() == "Windows":
        return None  # on Windows signal 0 is Ctrl-C
    try:
        os.kill(pid, 0)
    except (OSError, OverflowError) as error:
        return not isinstance(error, ProcessLookupError)  # otherwise it is another user's process
    known, now = owner.get("process_start"), _process_start(pid)
    return known is None or now is None or known == now  # else, after a restart, another process has this pid


def _process_start(pid: int) -> int | None:
    """Return when a process began, in clock ticks since the machine started (man 5 proc); None if not known here."""
    with suppress(OSError, ValueError, IndexError):
        if str(Path("/proc/self").readlink()) != str(os.getpid()):  # that of another namespace
            return None
        return int(Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[19])
    return None
