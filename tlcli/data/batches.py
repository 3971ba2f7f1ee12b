"""Batches of images. Order and augmentation are functions of (seed, epoch, index), whatever the number of workers."""

import hashlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tlcli.data.augment import Augmentation
from tlcli.data.preprocess import Preprocessing
from tlcli.data.source import Ints, Split
from tlcli.errors import TlcliError

Batch = tuple[Tensor, Tensor]


def epoch_order(n: int, seed: int, epoch: int) -> Ints:
    """A permutation of 0..n-1."""
    return np.random.default_rng([seed, epoch]).permutation(n)


def sample_seed(seed: int, epoch: int, index: int) -> int:
    """A number from 0 to 2**63 - 1 that differs in all its bits between neighbours."""
    digest = hashlib.blake2b(f"{seed}/{epoch}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class Batches:
    """The images of a split as (x, y): x uint8 (batch, 3, size, size), y int64 (batch,), both on the CPU.

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
        self.plain = _Samples(split, preprocessing, None, seed)
        self.augmented = _Samples(split, preprocessing, augmentation, seed)

    def __len__(self) -> int:
        """The number of batches."""
        return -(-len(self.split) // self.batch_size)

    def in_order(self) -> Iterator[Batch]:
        """Every image once, in the split's order, as evaluation sees it."""
        return self._load(self.plain, 0, np.arange(len(self.split)))

    def epoch(self, number: int) -> Iterator[Batch]:
        """Every image once, in the order and with the augmentation of this epoch."""
        return self._load(self.augmented, number, epoch_order(len(self.split), self.seed, number))

    def _load(self, samples: "_Samples", epoch: int, order: Ints) -> Iterator[Batch]:
        keys = [(epoch, int(i)) for i in order]
        loader = DataLoader(
            samples,
            batch_sampler=[keys[i : i + self.batch_size] for i in range(0, len(keys), self.batch_size)],
            num_workers=self.workers,
            collate_fn=_collate,
            pin_memory=self.pin_memory,
            # fork shares the images in memory; spawn and forkserver would send them to each worker
            multiprocessing_context="fork" if self.workers and sys.platform == "linux" else None,
            generator=torch.Generator(),  # its own: else every pass would move torch's global generator on
        )
        for batch in loader:
            if isinstance(batch, TlcliError):
                raise batch
            x, y = batch  # pinning makes a list of it
            yield x, y


@dataclass(frozen=True, eq=False)
class _Samples(Dataset[tuple[Tensor, int] | TlcliError]):
    """A sample by (epoch, index). An error is returned, so that it reaches the other process as it is."""

    split: Split
    preprocessing: Preprocessing
    augmentation: Augmentation | None
    seed: int

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int] | TlcliError:
        epoch, index = key
        try:
            image = self.split.read(index)
        except TlcliError as error:
            return error
        label = int(self.split.labels[index])
        if self.augmentation is None:
            return self.preprocessing.apply(image), label
        return self.augmentation(image, sample_seed(self.seed, epoch, index)), label


def _collate(samples: list[tuple[Tensor, int] | TlcliError]) -> Batch | TlcliError:
    good = []
    for sample in samples:
        if isinstance(sample, TlcliError):
            return sample
        good.append(sample)
    return torch.stack([x for x, _ in good]), torch.tensor([y for _, y in good])
