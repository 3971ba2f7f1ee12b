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
from tlcli.data.images import CachedImages, Ints, Split, map_in_threads
from tlcli.data.preprocess import Preprocessing
from tlcli.errors import TlcliError

Batch = tuple[Tensor, Tensor]


def epoch_order(n: int, seed: int, epoch: int) -> Ints:
    """Return a permutation of 0..n-1."""
    return np.random.default_rng([seed, epoch]).permutation(n)


def sample_seed(seed: int, view: int, index: int) -> int:
    """Return a number from 0 to 2**63 - 1 that differs in all its bits between neighbors."""
    digest = hashlib.blake2b(f"{seed}/{view}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class ImageBatches:
    """The images of a split as (x, y): x uint8 (batch, 3, size, size), channels_last, y int64 (batch,), on the CPU.

    The last batch may be smaller. Iterating raises BadImagesError if a file can no longer be read.

    Args:
        workers: processes that read images; 0: this process, in threads.
        pin_memory: for batches that go to a CUDA GPU.
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
        self._samples = _Samples(split, preprocessing, augmentation, seed, in_threads=workers == 0)

    def __len__(self) -> int:
        """Return the number of batches."""
        return -(-len(self.split) // self.batch_size)

    def in_order(self, view: int | None = None) -> Iterator[Batch]:
        """Yield every image once, in the split's order, with the augmentation of a view; None: without."""
        return self._load(self._chunks(view, np.arange(len(self.split))))

    def epoch(self, number: int, view: int | None = None, start: int = 0) -> Iterator[Batch]:
        """Yield every image once, in the order of this epoch, with the augmentation of a view.

        Args:
            view: None is the epoch's own.
            start: number of batches to skip, which an interrupted epoch has already used.
        """
        return self._load(self._epoch_chunks(number, view, start))

    def seeds(self, number: int, view: int | None = None, start: int = 0) -> Iterator[list[int]]:
        """Yield the seeds of the augmentation for the batches of `epoch`."""
        return (self._samples.seeds(chunk) for chunk in self._epoch_chunks(number, view, start))

    def _epoch_chunks(self, number: int, view: int | None, start: int) -> list["_Chunk"]:
        order = epoch_order(len(self.split), self.seed, number)
        return self._chunks(number if view is None else view, order[start * self.batch_size :])

    def _chunks(self, view: int | None, order: Ints) -> list["_Chunk"]:
        return [_Chunk(view, order[i : i + self.batch_size]) for i in range(0, len(order), self.batch_size)]

    def _load(self, chunks: list["_Chunk"]) -> Iterator[Batch]:
        if not self.workers:
            for chunk in chunks:
                x, y = self._samples.batch(chunk)
                yield (x.pin_memory(), y.pin_memory()) if self.pin_memory else (x, y)
            return
        loader = DataLoader(
            self._samples,
            sampler=chunks,
            batch_size=None,  # a sample of the loader is a whole batch
            num_workers=self.workers,
            pin_memory=self.pin_memory,
            # fork shares the images in memory; spawn and forkserver would send them to each worker
            multiprocessing_context="fork" if sys.platform == "linux" else None,
            generator=torch.Generator(),  # else every pass would advance torch's global generator
        )
        for batch in loader:
            if isinstance(batch, TlcliError):
                raise batch
            x, y = batch  # the loader makes a list of it
            yield x, y


@dataclass(frozen=True, eq=False)
class _Chunk:
    """Positions of images in a split, and the view whose augmentation they get; None: no augmentation."""

    view: int | None
    positions: Ints


@dataclass(frozen=True, eq=False)
class _Samples(Dataset[Batch | TlcliError]):
    """Batches by chunk. An error is returned, so that it reaches the other process as it is."""

    split: Split
    preprocessing: Preprocessing
    augmentation: Augmentation | None
    seed: int
    in_threads: bool

    def __getitem__(self, chunk: _Chunk) -> Batch | TlcliError:
        try:
            return self.batch(chunk)
        except TlcliError as error:
            return error

    def batch(self, chunk: _Chunk) -> Batch:
        """Return a batch. Raise BadImagesError."""
        positions = chunk.positions.tolist()
        images: Iterator[Pixels] = (self.split.read(i) for i in positions)  # an iterator: photographs are large
        source = self.split.images
        indices = self.split.indices[positions].tolist()
        if self.in_threads and isinstance(source, CachedImages) and not source.holds(indices):
            images = map_in_threads(self.split.read, positions, 1)  # arithmetic waits for decoding on all cores
        y = torch.from_numpy(self.split.labels[chunk.positions])
        if self.augmentation is None or chunk.view is None:
            return self.preprocessing.apply_batch(images), y
        return self.augmentation.apply_batch(images, self.seeds(chunk)), y

    def seeds(self, chunk: _Chunk) -> list[int]:
        """Return the seed of each image's augmentation."""
        assert chunk.view is not None
        return [sample_seed(self.seed, chunk.view, i) for i in chunk.positions.tolist()]
