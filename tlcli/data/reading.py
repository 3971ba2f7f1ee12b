"""Read every image once: that finds the files that do not decode, and fills memory with what fits."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from tlcli.data.decode import BadImage, Pixels
from tlcli.data.source import Arrays, Images

CHUNK = 4
"""Images a task of a thread: enough to make its cost small, few enough that large photographs do not fill memory."""


@dataclass(frozen=True, eq=False)
class Kept:
    """Images of which some, by position, are in memory."""

    images: Images
    kept: Mapping[int, Pixels]

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> Pixels:
        pixels = self.kept.get(index)
        return self.images.read(index) if pixels is None else pixels

    def name(self, index: int) -> str:
        return self.images.name(index)


def read_once(
    images: Images, indices: Iterable[int], budget: int, done: Callable[[int], None]
) -> tuple[Images, dict[int, str], int]:
    """The images with as many decoded ones as fit in `budget` bytes; why each of the others is bad; bytes left.

    `done` is called with the numbers of images read.
    """
    wanted = list(indices)
    if isinstance(images, Arrays):  # in memory already, and sound
        done(len(wanted))
        return images, {}, budget
    kept: dict[int, Pixels] = {}
    bad: dict[int, str] = {}
    for index, pixels in _in_threads(images, wanted):
        if isinstance(pixels, BadImage):
            bad[index] = str(pixels)
        elif pixels.nbytes <= budget:
            kept[index] = pixels
            budget -= pixels.nbytes
        done(1)
    return Kept(images, kept), bad, budget


def _in_threads(images: Images, indices: list[int]) -> Iterator[tuple[int, Pixels | BadImage]]:
    """Each image or what is wrong with it, in order; only a few are under way at a time."""
    threads = min(16, os.cpu_count() or 1)
    waiting: deque[Future[list[tuple[int, Pixels | BadImage]]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(indices), CHUNK):
            waiting.append(pool.submit(_read_chunk, images, indices[start : start + CHUNK]))
            if len(waiting) > 2 * threads:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()


def _read_chunk(images: Images, indices: list[int]) -> list[tuple[int, Pixels | BadImage]]:
    return [(index, _read(images, index)) for index in indices]


def _read(images: Images, index: int) -> Pixels | BadImage:
    try:
        return images.read(index)
    except BadImage as error:
        return error
