"""Processes that fill, read and die at one cache: `python -m tests.faults.filling ROLE ROOT NUMBER...` prints JSON.

No torch is imported, so that a process forks at once and without threads.
"""

import functools
import hashlib
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tlcli.store import CacheEntry, Column, Store, Writer

COLUMNS = (Column("float32", (64, 16)), Column("bfloat16", (5,)))
ROWS, BATCH = 48, 4
KEY = "0123456789abcdef"


@functools.cache
def content(key: str, column: int) -> bytes:
    """Return the expected column of an entry: different bytes in every row of every key."""
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
    """Return the entry and whether this process filled it, like `SplitActivations.entry`."""
    if (found := store.find(key)) is not None:
        return found, False
    with store.lock_for_write(key, lambda: None):
        found = store.find(key)
        return (found, False) if found is not None else (fill(store, key), True)


def forked(work: Callable[[], int | None]) -> int:
    """Fork a process that calls a function and exits with its result; return its id."""
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
    """Return the results of n processes. Each gets its number, and a barrier that waits for all of them."""
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
    """Per round, who filled an entry that many processes want, and how many wrong rows each one read."""

    def member(key: str, number: int, wait: Callable[[], None]) -> dict[str, Any]:
        wait()
        entry, filled = entry_of(Store(root), key)
        return {"filled": filled, "wrong": wrong_rows(entry)}

    return [together(functools.partial(member, f"{number:04x}"), processes) for number in range(rounds)]


def killed(root: Path) -> list[Any]:
    """Kill a writer before each of its batches, each time in a new cache, and return what the next process finds."""

    def dies(store: Store, batches: int) -> None:
        append, left = Writer.append, iter(range(batches))

        def appending(self: Writer, batch: Any) -> None:
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            append(self, batch)

        Writer.append = appending  # type: ignore[method-assign]
        entry_of(store, KEY)

    found = []
    for batches in range(ROWS // BATCH):
        store, waited = Store(root / str(batches)), []
        status = os.waitpid(forked(functools.partial(dies, store, batches)), 0)[1]
        before = store.find(KEY)
        with store.lock_for_write(KEY, lambda waited=waited: waited.append(KEY)):
            wrong = wrong_rows(fill(store, KEY))
        left = [path.name for path in store.activations.iterdir() if path.name.startswith(".")]
        found.append([os.waitstatus_to_exitcode(status), before is None, wrong, waited, left])
    return found


def folders(root: Path, n: int) -> list[Any]:
    """Return the directories of n runs that ask for the same one at once; its parents are missing."""
    from tlcli.cli.train import make_folder

    def member(number: int, wait: Callable[[], None]) -> str:
        wait()
        return make_folder(root / "2026-11-24" / "10-15-00")[0].name

    return together(member, n)


ROLES: dict[str, Callable[..., list[Any]]] = {role.__name__: role for role in (cold, killed, folders)}

if __name__ == "__main__":
    role, folder, *numbers = sys.argv[1:]
    sys.stdout.write(json.dumps(ROLES[role](Path(folder), *map(int, numbers))))
