"""Batches of images. Order and augmentation are functions of seed, epoch and index, whatever the number of workers."""

import hashlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tlcli.data.augment import Augmentation
from tlcli.data.decode import Pixels
from tlcli.data.preprocess import Preprocessing
from tlcli.data.reading import CachedImages
from tlcli.data.source import Ints, Split
from tlcli.data.threads import map_in_threads
from tlcli.errors import TlcliError

Batch = tuple[Tensor, Tensor]


def epoch_order(n: int, seed: int, epoch: int) -> Ints:
    """A permutation of 0..n-1."""
    return np.random.default_rng([seed, epoch]).permutation(n)


def sample_seed(seed: int, view: int, index: int) -> int:
    """A number from 0 to 2**63 - 1 that differs in all its bits between neighbours."""
    digest = hashlib.blake2b(f"{seed}/{view}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class ImageBatches:
    """The images of a split as (x, y): x uint8 (batch, 3, size, size), channels_last, y int64 (batch,), on the CPU.

    With workers=0 images are read in this process, else in so many others. `pin_memory` is for batches that go to a
    CUDA GPU. The last batch may be smaller. Iterating raises BadImages if a file can no longer be read.
    """

    def __init__(
        self,
        split: Split,
        preprocessing: Preprocessing,
        *,
        batch_size: int,
        workers: int,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        pin_memory: bool = False,
    ) -> None:
        self.split = split
        self.batch_size = batch_size
        self.workers = workers
        self.seed = seed
        self.pin_memory = pin_memory
        self._samples = _Samples(split, preprocessing, augmentation, seed, threads=workers == 0)

    def __len__(self) -> int:
        """The number of batches."""
        return -(-len(self.split) // self.batch_size)

    def in_order(self, view: int | None = None) -> Iterator[Batch]:
        """Every image once, in the split's order; as evaluation sees it, or with the augmentation of a view."""
        return self._load(self._chunks(view, np.arange(len(self.split))))

    def epoch(self, number: int, view: int | None = None, start: int = 0) -> Iterator[Batch]:
        """Every image once, in the order of this epoch, with the augmentation of a view: the epoch's own, if None.

        `start`: batches to leave out, which an interrupted epoch has had.
        """
        return self._load(self._of_epoch(number, view, start))

    def seeds(self, number: int, view: int | None = None, start: int = 0) -> Iterator[list[int]]:
        """What draws the augmentation of each image, for the batches of `epoch`."""
        return (self._samples.seeds(chunk) for chunk in self._of_epoch(number, view, start))

    def _of_epoch(self, number: int, view: int | None, start: int) -> list["_Chunk"]:
        order = epoch_order(len(self.split), self.seed, number)
        return self._chunks(number if view is None else view, order[start * self.batch_size :])

    def _load(self, chunks: list["_Chunk"]) -> Iterator[Batch]:
        return self._in_workers(chunks) if self.workers else self._in_process(chunks)

    def _chunks(self, view: int | None, order: Ints) -> list["_Chunk"]:
        return [_Chunk(view, order[i : i + self.batch_size]) for i in range(0, len(order), self.batch_size)]

    def _in_process(self, chunks: list["_Chunk"]) -> Iterator[Batch]:
        for chunk in chunks:
            x, y = self._samples.batch(chunk)
            yield (x.pin_memory(), y.pin_memory()) if self.pin_memory else (x, y)

    def _in_workers(self, chunks: list["_Chunk"]) -> Iterator[Batch]:
        loader = DataLoader(
            self._samples,
            sampler=chunks,
            batch_size=None,  # a sample of the loader's is a whole batch of ours
            num_workers=self.workers,
            pin_memory=self.pin_memory,
            # fork shares the images in memory; spawn and forkserver would send them to each worker
            multiprocessing_context="fork" if sys.platform == "linux" else None,
            generator=torch.Generator(),  # its own: else every pass would move torch's global generator on
        )
        for batch in loader:
            if isinstance(batch, TlcliError):
                raise batch
            x, y = batch  # the loader makes a list of it
            yield x, y


@dataclass(frozen=True, eq=False)
class _Chunk:
    """Positions of images in a split, and which augmentation they get; view None is none."""

    view: int | None
    positions: Ints


@dataclass(frozen=True, eq=False)
class _Samples(Dataset[Batch | TlcliError]):
    """Batches by chunk. An error is returned, so that it reaches the other process as it is."""

    split: Split
    preprocessing: Preprocessing
    augmentation: Augmentation | None
    seed: int
    threads: bool  # whether to decode in threads, where no other processes do it

    def __getitem__(self, chunk: _Chunk) -> Batch | TlcliError:
        try:
            return self.batch(chunk)
        except TlcliError as error:
            return error

    def batch(self, chunk: _Chunk) -> Batch:
        """Raises BadImages."""
        positions = chunk.positions.tolist()
        images = self._images(positions)  # an iterator: photographs are large
        y = torch.from_numpy(self.split.labels[chunk.positions])
        if self.augmentation is None or chunk.view is None:
            return self.preprocessing.apply_batch(images), y
        return self.augmentation.apply_batch(images, self.seeds(chunk)), y

    def seeds(self, chunk: _Chunk) -> list[int]:
        """What draws the augmentation of each image."""
        assert chunk.view is not None
        return [sample_seed(self.seed, chunk.view, i) for i in chunk.positions.tolist()]

    def _images(self, positions: list[int]) -> Iterator[Pixels]:
        """In order; in threads where they have to be decoded, for arithmetic waits for that on all cores."""
        images = self.split.images
        if (
            self.threads
            and isinstance(images, CachedImages)
            and not images.holds(self.split.indices[positions].tolist())
        ):
            return map_in_threads(self.split.read, positions, 1)
        return (self.split.read(i) for i in positions)
