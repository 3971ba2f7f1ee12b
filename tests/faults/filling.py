"""Processes that fill, read and die at one cache: `python -m tests.faults.filling ROLE FOLDER ...` prints JSON.

Only `runs` imports torch, so that a process forks at once and without threads.
"""

import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tlcli.cli import main, quiet_libraries
from tlcli.store import CacheEntry, Column, Store

COLUMNS = (Column("float32", (64, 16)), Column("bfloat16", (5,)))
ROWS, BATCH = 48, 4
KEY = "0123456789abcdef"
TIMEOUT = 300  # seconds for a member that fails, so that nobody waits for it forever
fork = multiprocessing.get_context("fork")


@functools.cache
def content(key: str, column: int) -> bytes:
    """Return the expected column of an entry: different bytes in every row of every key."""
    return hashlib.shake_256(f"{key}/{column}".encode()).digest(ROWS * COLUMNS[column].nbytes)


def wrong_rows(entry: CacheEntry) -> int:
    """Count the rows, over all columns, that differ from what was filled in."""
    wrong = 0
    for number, column in enumerate(entry.columns):
        found, wanted, size = entry.file(number).read_bytes(), content(entry.key, number), column.nbytes
        wrong += sum(found[at : at + size] != wanted[at : at + size] for at in range(0, len(wanted), size))
    return wrong


def batches(key: str) -> Iterator[list[bytes]]:
    """Yield the rows of an entry in batches."""
    for row in range(0, ROWS, BATCH):
        parts = [(row * column.nbytes, (row + BATCH) * column.nbytes) for column in COLUMNS]
        yield [content(key, number)[start:end] for number, (start, end) in enumerate(parts)]


def fill(store: Store, key: str, rows: Iterator[list[bytes]] | None = None) -> CacheEntry:
    """Write an entry; to be called within `store.lock_for_write`."""
    return store.write(key, ROWS, COLUMNS, {"dataset": "shapes"}, rows or batches(key))


def entry_of(store: Store, key: str) -> tuple[CacheEntry, bool]:
    """Return the entry and whether this process filled it, like `SplitActivations.entry`."""
    if (found := store.find(key)) is not None:
        return found, False
    with store.lock_for_write(key, lambda: None):
        found = store.find(key)
        return (found, False) if found is not None else (fill(store, key), True)


def together(work: Callable[[int, Callable[[], Any]], Any], n: int) -> list[Any]:
    """Return the results of n processes. Each gets its number, and a function that waits for all of them."""
    gate, results = fork.Barrier(n, timeout=TIMEOUT), fork.Queue()
    members = [fork.Process(target=lambda number=number: results.put(work(number, gate.wait))) for number in range(n)]
    for member in members:
        member.start()
    found = [results.get(timeout=TIMEOUT) for _ in members]
    for member in members:
        member.join()
    return found


def cold(root: Path, processes: str, rounds: str) -> list[Any]:
    """Return per round who filled an entry that many processes want, and how many wrong rows each one read."""

    def member(key: str, number: int, wait: Callable[[], Any]) -> dict[str, Any]:
        wait()
        entry, filled = entry_of(Store(root), key)
        return {"filled": filled, "wrong": wrong_rows(entry)}

    return [together(functools.partial(member, f"{number:04x}"), int(processes)) for number in range(int(rounds))]


def killed(root: Path) -> list[Any]:
    """Kill a writer before each of its batches, each time in a new cache, and return what the next process finds."""

    def dies(store: Store, n: int) -> None:
        def rows() -> Iterator[list[bytes]]:
            yield from itertools.islice(batches(KEY), n)
            os.kill(os.getpid(), signal.SIGKILL)

        with store.lock_for_write(KEY, lambda: None):
            fill(store, KEY, rows())

    found = []
    for n in range(ROWS // BATCH):
        store, waited = Store(root / str(n)), []
        writer = fork.Process(target=dies, args=(store, n))
        writer.start()
        writer.join()
        before = store.find(KEY)
        with store.lock_for_write(KEY, lambda waited=waited: waited.append(KEY)):
            wrong = wrong_rows(fill(store, KEY))
        left = [path.name for path in store.activations.iterdir() if path.name.startswith(".")]
        found.append([writer.exitcode, before is None, wrong, waited, left])
    return found


def folders(root: Path, n: str) -> list[Any]:
    """Return the directories of n runs that ask for the same one at once; its parents are missing."""
    from tlcli.cli.train import make_folder

    def member(number: int, wait: Callable[[], Any]) -> str:
        wait()
        return make_folder(root / "2026-11-24" / "10-15-00")[0].name

    return together(member, int(n))


def runs(folder: Path, n: str, *words: str) -> list[Any]:
    """Return the exit codes of n runs that first read the cache at the same moment; they print to FOLDER/N.log."""
    import tlcli.train  # noqa: F401 - once, for all processes
    from tlcli.engine.activations import SplitActivations

    entry = SplitActivations.entry

    def member(number: int, wait: Callable[[], Any]) -> int:
        def when_all_are_here(self: SplitActivations, *args: Any) -> Any:
            wait()
            SplitActivations.entry = entry  # type: ignore[method-assign]
            return entry(self, *args)

        SplitActivations.entry = when_all_are_here  # type: ignore[method-assign]
        with (folder / f"{number}.log").open("wb") as log:
            for stream in (1, 2):
                os.dup2(log.fileno(), stream)
        return main(["train", f"hydra.run.dir='{folder / str(number)}'", *words])

    return together(member, int(n))


if __name__ == "__main__":
    quiet_libraries()
    role, place, *rest = sys.argv[1:]
    sys.stdout.write(json.dumps({one.__name__: one for one in (cold, killed, folders, runs)}[role](Path(place), *rest)))
