"""One thing done to many images in threads, with only a few under way at a time, however many there are."""

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

from tlcli.reporter import Reporter

S = TypeVar("S")
T = TypeVar("T")

PATIENCE = 1.0
"""Seconds that work may take before anybody is told of it."""


def map_in_threads(work: Callable[[S], T], items: Iterable[S], chunk: int, ahead: int | None = None) -> Iterator[T]:
    """What `work` gives for each item, in order; a task of a thread is `chunk` of them. Errors are raised here.

    At most `ahead` tasks (None: two for each thread) are done or under way before their results are taken.
    """
    threads = min(16, os.cpu_count() or 1)
    most = 2 * threads if ahead is None else ahead
    waiting: deque[Future[list[T]]] = deque()
    source = iter(items)
    with ThreadPoolExecutor(threads) as pool:
        try:
            while some := list(islice(source, chunk)):
                waiting.append(pool.submit(_each, work, some))
                if len(waiting) > most:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        finally:
            for task in waiting:  # whoever took the results has gone
                task.cancel()


def shown_if_slow(results: Iterator[T], label: str, total: int, reporter: Reporter) -> Iterator[T]:
    """The same results; the watch tracks them once they have taken longer than `PATIENCE`."""
    began = time.monotonic()
    count = 0
    for result in results:
        yield result
        count += 1
        if time.monotonic() - began > PATIENCE:
            break
    if count < total:
        with reporter.track(label, total) as done:
            done(count)
            for result in results:
                yield result
                done(1)


def _each(work: Callable[[S], T], items: Sequence[S]) -> list[T]:
    return [work(item) for item in items]
