"""Processes that fill, read, remove and die at one cache: `python -m tests.faults.filling ROLE ROOT NUMBER...` prints
what they saw as JSON. No torch is imported here, so that a process forks at once and without threads."""

import functools
import hashlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from tlcli.errors import UsageError
from tlcli.store import CacheEntry, Column, Store, Writer

COLUMNS = (Column("float32", (64, 16)), Column("bfloat16", (5,)))
ROWS, BATCH = 48, 4
KEY = "0123456789abcdef"


@functools.cache
def content(key: str, column: int) -> bytes:
    """What a column of an entry has to hold: other bytes in every row of every key."""
    return hashlib.shake_256(f"{key}/{column}".encode()).digest(ROWS * COLUMNS[column].nbytes)


def wrong_rows(entry: CacheEntry) -> int:
    """How many rows, of all columns, are not what they should be. FileNotFoundError where a file is gone."""
    wrong = 0
    for number, column in enumerate(entry.columns):
        found, wanted, size = entry.file(number).read_bytes(), content(entry.key, number), column.nbytes
        wrong += sum(found[at : at + size] != wanted[at : at + size] for at in range(0, len(wanted), size))
    return wrong


def fill(store: Store, key: str) -> CacheEntry:
    """Write an entry in batches; to be called within `store.filling`."""
    with store.create(key, ROWS, COLUMNS, {"dataset": "shapes"}) as writer:
        for row in range(0, ROWS, BATCH):
            parts = [(row * column.nbytes, (row + BATCH) * column.nbytes) for column in COLUMNS]
            writer.append([content(key, number)[start:end] for number, (start, end) in enumerate(parts)])
    return writer.entry


def entry_of(store: Store, key: str) -> tuple[CacheEntry, bool]:
    """The entry, and whether it was filled here: the steps of `SplitActivations.entry`."""
    if (found := store.find(key)) is not None:
        return found, False
    with store.lock_for_write(key, lambda: None):
        found = store.find(key)
        return (found, False) if found is not None else (fill(store, key), True)


def forked(work: Callable[[], int | None]) -> int:
    """The id of a process that does this, and no more; what that returns is its exit code."""
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(work() or 0)
        except BaseException:
            sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
            sys.stderr.flush()
            os._exit(1)
    return pid


def together(work: Callable[[int, Callable[[], None]], Any], n: int) -> list[Any]:
    """What n processes return. Each gets its number, and a function that returns once all of them have called it."""
    (gate, open_gate), (ready, at_gate), (results, result) = os.pipe(), os.pipe(), os.pipe()

    def wait() -> None:
        os.write(at_gate, b".")
        os.read(gate, 1)  # the end of the stream: the last who could write has closed it

    def member(number: int) -> None:
        os.close(open_gate)
        os.write(result, json.dumps(work(number, wait)).encode() + b"\n")  # in one piece: it is short

    pids = [forked(functools.partial(member, number)) for number in range(n)]
    for _ in range(n):
        os.read(ready, 1)
    for end in (open_gate, result):
        os.close(end)
    with os.fdopen(results) as lines:
        found = [json.loads(line) for line in lines]
    ended = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    assert ended == [0] * n, ended
    for end in (gate, ready, at_gate):
        os.close(end)
    return found


def cold(root: Path, processes: int, rounds: int) -> list[Any]:
    """Many processes want the same new entry: for each round, who filled it and what each one read."""

    def member(key: str, number: int, wait: Callable[[], None]) -> dict[str, Any]:
        wait()
        entry, filled = entry_of(Store(root), key)
        return {"filled": filled, "wrong": wrong_rows(entry)}

    return [together(functools.partial(member, f"{number:04x}"), processes) for number in range(rounds)]


def noticing(root: Path, step: Callable[[str], None]) -> None:
    """From now on in this process: call `step` before everything that it does to files below root."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir", "os.listdir"):
            with suppress(TypeError):
                if os.fspath(arguments[0]).startswith(str(root)):
                    step(event)

    sys.addaudithook(hook)
    append, fsync = Writer.append, os.fsync

    def appending(self: Writer, batch: Any) -> None:
        step("append")
        append(self, batch)

    def syncing(file: int) -> None:
        step("fsync")
        fsync(file)

    Writer.append = appending  # type: ignore[method-assign]
    os.fsync = syncing


def steps_of_a_fill(root: Path) -> list[str]:
    """The names of all steps of a fill, in their order."""
    reader, writer = os.pipe()

    def work() -> None:
        noticing(root, lambda name: os.write(writer, f"{name}\n".encode()) and None)
        entry_of(Store(root), KEY)

    pid = forked(work)
    os.close(writer)
    with os.fdopen(reader) as lines:
        names = lines.read().split()
    assert os.waitpid(pid, 0)[1] == 0
    return names


def dies_before(root: Path, number: int) -> None:
    """Fill an entry, and die before the step of this number."""
    left = number

    def step(name: str) -> None:
        nonlocal left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1

    noticing(root, step)
    entry_of(Store(root), KEY)


def after_death(root: Path, key: str, pid: int) -> dict[str, Any]:
    """What the next run finds of an entry whose writer was killed, and what it makes of it."""
    killed = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    store, waited = Store(root), []
    found = store.find(key)
    with store.lock_for_write(key, lambda: waited.append(key)):
        entry = store.find(key) or fill(store, key)
    left = [path.name for path in store.activations.iterdir() if path.name.startswith(".")]
    return {
        "killed": killed,
        "whole": found is not None,
        "wrong": (wrong_rows(found) if found else 0) + wrong_rows(entry),
        "waited": bool(waited),
        "left": left,
    }


def each_step(root: Path) -> list[Any]:
    """A death before each step of a fill, each in a cache of its own."""
    found = []
    for number, name in enumerate(steps_of_a_fill(root / "whole")):
        own = root / str(number)
        found.append({"step": name, **after_death(own, KEY, forked(functools.partial(dies_before, own, number)))})
    return found


def removals(root: Path, reads: int) -> list[Any]:
    """Two processes read one entry again and again, filling it where it is gone, while a third removes it."""

    def reader(number: int, wait: Callable[[], None]) -> dict[str, int]:
        wait()
        seen = {"filled": 0, "gone": 0, "wrong": 0, "right": 0}
        for _ in range(reads):
            try:
                entry, filled = entry_of(Store(root), KEY)
                wrong = wrong_rows(entry)
            except FileNotFoundError:  # removed between its being found and its being read
                seen["gone"] += 1
                continue
            seen["filled"] += filled
            seen["wrong"] += wrong
            seen["right"] += wrong == 0
        return seen

    def remover() -> None:
        for removal in _removals(Store(root)):
            with suppress(UsageError, FileNotFoundError):  # it is gone already
                removal()

    pid = forked(remover)
    try:
        return together(reader, 2)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _removals(store: Store) -> Iterator[Callable[[], object]]:
    while True:
        yield lambda: store.remove(KEY)
        yield store.clear


def folders(root: Path, n: int) -> list[Any]:
    """The directories that n runs get which ask for the same one at one moment; its parents are missing."""
    from tlcli.cli.train import make_folder

    def member(number: int, wait: Callable[[], None]) -> str:
        wait()
        return make_folder(root / "2026-11-24" / "10-15-00")[0].name

    return together(member, n)


ROLES: dict[str, Callable[..., list[Any]]] = {role.__name__: role for role in (cold, each_step, removals, folders)}

if __name__ == "__main__":
    role, folder, *numbers = sys.argv[1:]
    sys.stdout.write(json.dumps(ROLES[role](Path(folder), *map(int, numbers))))
