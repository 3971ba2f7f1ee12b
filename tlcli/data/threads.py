"""One thing done to many images in threads, with only a few under way at a time, however many there are."""

import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from tlcli.watch import Watch

T = TypeVar("T")

PATIENCE = 1.0
"""Seconds that work may take before anybody is told of it."""


def in_threads(work: Callable[[int], T], indices: Sequence[int], chunk: int) -> Iterator[T]:
    """What `work` gives for each index, in order; a task of a thread is `chunk` of them. Errors are raised here."""
    threads = min(16, os.cpu_count() or 1)
    waiting: deque[Future[list[T]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(indices), chunk):
            waiting.append(pool.submit(_each, work, indices[start : start + chunk]))
            if len(waiting) > 2 * threads:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()


def shown_if_slow(results: Iterator[T], label: str, total: int, watch: Watch) -> Iterator[T]:
    """The same results; the watch tracks them once they have taken longer than `PATIENCE`."""
    began = time.monotonic()
    count = 0
    for result in results:
        yield result
        count += 1
        if time.monotonic() - began > PATIENCE:
            break
    if count < total:
        with watch.track(label, total) as done:
            done(count)
            for result in results:
                yield result
                done(1)


def _each(work: Callable[[int], T], indices: Sequence[int]) -> list[T]:
    return [work(index) for index in indices]
