"""Turns images into batches; order and augmentation depend on seed, epoch and index, not on the number of workers."""

import hashlib
import os
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional

from tlcli.data.decode import Pixels, ValueRange
from tlcli.data.images import Ints, Split, map_in_threads
from tlcli.errors import TlcliError
from tlcli.ranks import ALONE, Ranks
from tlcli.specs import Fit, parse_image_stats

RESIZE_BATCH_BYTES = 2**20  # images resized in one call: calls cost more than small images, copies more than large ones
MAX_PADDED_SIZES = 4  # an image is shrunk to so many input sizes before padding: 20,000 by 1 would be 400 megapixels

Batch = tuple[Tensor, Tensor]
Chunk = tuple[list[int], list[int] | None]  # positions in a split, seeds of their augmentation (None: without)


@dataclass(frozen=True)
class Preprocessing:
    """Image -> square of `size` pixels -> (value / 255 - mean) / std. Plain numbers, stored with every checkpoint.

    `range` has the values of images deeper than 8 bits that become 0 and 255; None is the full range of their type.
    """

    size: int
    fit: Fit
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    range: ValueRange | None = None

    def apply(self, image: Pixels) -> Tensor:
        """Return `apply_batch` of one image: uint8 (height, width, 3) -> uint8 (3, size, size), contiguous."""
        return self.apply_batch([image])[0].contiguous()

    def apply_batch(self, images: Iterable[Pixels]) -> Tensor:
        """Return uint8 (batch, 3, size, size), channels_last, of uint8 (height, width, 3); antialiased bilinear.

        squash resizes both sides, crop keeps the central square, pad keeps everything and fills with black. The result
        of an image does not depend on the others. At most RESIZE_BATCH_BYTES of an iterator's images are in memory.
        """
        squares, group = list[Tensor](), list[Pixels]()  # a group is small images of one shape that follow each other
        for image in images:
            if group and (image.shape != group[0].shape or (len(group) + 1) * image.nbytes > RESIZE_BATCH_BYTES):
                squares.append(self._squares(group))
                group = []
            group.append(image)
        squares.append(self._squares(group))
        return torch.cat(squares).permute(0, 3, 1, 2)

    def _squares(self, images: Sequence[Pixels]) -> Tensor:
        """Return (n, size, size, 3) of images of one shape."""
        height, width = images[0].shape[:2]
        if self.fit is Fit.pad:
            return _pad_to_square(_stack(images), self.size)
        if self.fit is Fit.crop:  # crop, then resize: in the other order, 20,000 by 1 pixels would grow 224-fold
            side = min(height, width)
            left, top = round((width - side) / 2), round((height - side) / 2)
            images = [image[top : top + side, left : left + side] for image in images]
        return resize(_stack(images), self.size, self.size)

    def normalize(self, batch: Tensor) -> Tensor:
        """Return float32 of the same shape, device and memory format of uint8 (batch, 3, size, size)."""
        mean, std = (_on_device(values, batch.device) for values in (self.mean, self.std))
        return batch.to(torch.float32).div_(255).sub_(mean).div_(std)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"fit": self.fit.value}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Preprocessing":
        """Return what `to_json` stored; up to 0.5.0 without a range. Raise KeyError, TypeError or ValueError."""
        stats = parse_image_stats(data)
        value_range = data.get("range")
        if value_range is not None:
            low, high = value_range
            if not -3e38 <= low < high <= 3e38:
                raise ValueError(f"range is {value_range!r:.40}, not two ascending numbers")
            value_range = float(low), float(high)
        return cls(range=value_range, **stats)


@lru_cache(maxsize=8)
def _on_device(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Return a value per channel, (1, 3, 1, 1). It is cached: a copy per batch would wait for the accelerator."""
    with torch.inference_mode(False):  # the tensor is used within inference mode and outside
        return torch.tensor(values, device=device).view(1, 3, 1, 1)


def _stack(images: Sequence[Pixels]) -> Tensor:
    """Return images of one shape as (n, height, width, 3); a single one may share its memory."""
    return torch.from_numpy(np.ascontiguousarray(images[0])[None] if len(images) == 1 else np.stack(images))


def resize(pixels: Tensor, height: int, width: int) -> Tensor:
    """Return uint8 (n, height, width, 3), contiguous, of uint8 (n, h, w, 3); the same memory if the size is the same.

    Colors are the last dimension throughout: torch resizes three times as fast as with (n, 3, h, w), to equal values.
    """
    out: Tensor = functional.resize(pixels.permute(0, 3, 1, 2), [height, width], antialias=True)
    return out.permute(0, 2, 3, 1).contiguous()


def _pad_to_square(pixels: Tensor, side: int) -> Tensor:
    """Return (n, side, side, 3): the longer side is resized to fit, in the middle of black."""
    height, width = pixels.shape[1:3]
    scale = side / max(height, width)
    height, width = max(1, round(height * scale)), max(1, round(width * scale))
    left, top = (side - width) // 2, (side - height) // 2
    out = pixels.new_zeros(len(pixels), side, side, 3)
    out[:, top : top + height, left : left + width] = resize(pixels, height, width)
    return out


@dataclass(frozen=True)
class Augmentation:
    """A random box (None: the whole image), flipped with probability `flip`; then `transforms` of the square."""

    preprocessing: Preprocessing
    draw_box: Callable[[int, int, random.Random], tuple[int, int, int, int]] | None
    flip: float
    transforms: nn.Module | None

    def apply_batch(self, images: Iterable[Pixels], seeds: Sequence[int]) -> Tensor:
        """Return uint8 (batch, 3, size, size), channels_last, as `Preprocessing.apply_batch`, by a seed per image."""
        if self.draw_box is None:
            squares = self.preprocessing.apply_batch(images)
        else:
            parts, size = [], self.preprocessing.size
            for image, seed in zip(images, seeds, strict=True):
                rng = random.Random(seed)
                if self.preprocessing.fit is Fit.pad:  # as evaluation does: the black square is cropped
                    side = min(max(image.shape[:2]), MAX_PADDED_SIZES * size)
                    image = _pad_to_square(_stack([image]), side)[0].numpy()
                top, left, h, w = self.draw_box(image.shape[0], image.shape[1], rng)
                part = _stack([image[top : top + h, left : left + w]])
                part = part.flip(2) if rng.random() < self.flip else part  # numpy takes 10 times as long to flip
                parts.append(resize(part, size, size))
            squares = torch.cat(parts).permute(0, 3, 1, 2)
        return squares if self.transforms is None else apply_transforms(self.transforms, squares, seeds)


def apply_transforms(transforms: nn.Module, squares: Tensor, seeds: Sequence[int]) -> Tensor:
    """Return each square as `transforms` change it with its seed: uint8 (batch, 3, size, size), channels_last."""
    if not len(squares):
        return squares
    changed = []
    for square, seed in zip(squares, seeds, strict=True):
        with torch.random.fork_rng(devices=[]):
            # not torch.manual_seed: that would seed the GPU's generator too, and with it every dropout mask
            torch.default_generator.manual_seed(seed)
            changed.append(transforms(square))
    return torch.stack(changed).contiguous(memory_format=torch.channels_last)


def epoch_order(n: int, seed: int, epoch: int) -> Ints:
    return np.random.default_rng([seed, epoch]).permutation(n)


def balanced_order(labels: Ints, seed: int, epoch: int) -> Ints:
    """Return as many positions as there are labels, in random order, each class equally often or once more.

    An image is drawn again when all of its class were. The k-th repetition of position i is i + k * len(labels).
    """
    rng, n, names = np.random.default_rng([seed, epoch]), len(labels), np.unique(labels)
    drawn = []
    for label, extra in zip(names, rng.permutation(len(names)) < n % len(names), strict=True):
        members, size = np.flatnonzero(labels == label), n // len(names) + extra
        drawn.append(np.concatenate([rng.permutation(members) + k * n for k in range(-(-size // len(members)))])[:size])
    return rng.permutation(np.concatenate(drawn))


def split_order(split: Split, seed: int, epoch: int, *, balanced: bool) -> Ints:
    """Return the positions of an epoch over a split, as `epoch_order` or `balanced_order` draws them."""
    order = balanced_order(split.labels, seed, epoch) if balanced else epoch_order(len(split), seed, epoch)
    return split.images.order_by_buffer(order, split.indices[order % len(split)], seed, epoch)


def sample_seed(seed: int, view: int, index: int) -> int:
    """Return a number from 0 to 2**63 - 1 that differs in all its bits between neighbors."""
    digest = hashlib.blake2b(f"{seed}/{view}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@dataclass(frozen=True, eq=False)
class ImageBatches(Dataset[Batch | TlcliError]):
    """The images of a split as (x, y): x uint8 (batch, 3, size, size), channels_last, y int64 (batch,), on the CPU.

    The last batch may be smaller. Iterating raises BadImagesError if a file can no longer be read. `workers` are
    processes that read images; with 0, threads of this process do. With several ranks each reads its share: a part of
    each batch of an epoch, which may be empty, and whole batches in order.
    """

    split: Split
    preprocessing: Preprocessing
    _: KW_ONLY
    batch_size: int
    workers: int
    augmentation: Augmentation | None = None
    seed: int = 0
    balanced: bool = False  # an epoch has classes equally often, instead of each image once
    pin_memory: bool = False
    ranks: Ranks = ALONE
    first: int = 0  # position of the first image in the split of which these are a part

    def __len__(self) -> int:
        return -(-len(self.split) // self.batch_size)

    def in_order(self, view: int | None = None) -> Iterator[Batch]:
        """Yield every image once, in the split's order, with the augmentation of a view; None: without."""
        order = self.ranks.positions(len(self.split), self.batch_size).numpy()
        return self._load(self._chunks(order, view, ALONE))

    def epoch(self, number: int, view: int | None = None, start: int = 0) -> Iterator[Batch]:
        """Yield the images of an epoch, in its order, augmented by a view (None: its own), from batch `start`."""
        return self._load(self._epoch_chunks(number, view, start))

    def seeds(self, number: int, view: int | None, start: int) -> Iterator[Sequence[int]]:
        """Yield the seeds of the augmentation for the batches of `epoch`."""
        return (seeds for _, seeds in self._epoch_chunks(number, view, start) if seeds is not None)

    def _epoch_chunks(self, number: int, view: int | None, start: int) -> Iterator[Chunk]:
        order = split_order(self.split, self.seed, number, balanced=self.balanced)
        if view is not None:  # one that may be stored: a repeated image has the same
            order = order % len(self.split)
        return self._chunks(order[start * self.batch_size :], number if view is None else view, self.ranks)

    def _chunks(self, order: Ints, view: int | None, ranks: Ranks) -> Iterator[Chunk]:
        for start in range(0, len(order), self.batch_size):
            drawn = order[start : start + self.batch_size][ranks.rank :: ranks.size]
            seeds = None if view is None else [sample_seed(self.seed, view, self.first + i) for i in drawn.tolist()]
            yield (drawn % len(self.split)).tolist(), seeds

    def _load(self, chunks: Iterator[Chunk]) -> Iterator[Batch]:
        batches: Iterable[Batch | TlcliError] = map(self.__getitem__, chunks)
        if self.workers:
            batches = DataLoader(
                self,
                sampler=chunks,
                batch_size=None,  # a sample of the loader is a whole batch
                num_workers=self.workers,
                pin_memory=self.pin_memory,
                # fork shares the images in memory; spawn and forkserver would send them to each worker
                multiprocessing_context="fork" if sys.platform == "linux" else None,
                generator=torch.Generator(),  # else every pass would advance torch's global generator
                worker_init_fn=leave_process_group,
            )
        for batch in batches:
            if isinstance(batch, TlcliError):
                raise batch
            x, y = batch
            yield (x.pin_memory(), y.pin_memory()) if self.pin_memory and not self.workers else (x, y)

    def __getitem__(self, chunk: Chunk) -> Batch | TlcliError:
        """Return a batch, or the error, so that it is raised as it is in the process that reads the batches."""
        positions, seeds = chunk
        if not positions:
            size = (self.augmentation or self).preprocessing.size
            return torch.empty((0, 3, size, size), dtype=torch.uint8), torch.empty(0, dtype=torch.int64)
        source, indices = self.split.images, self.split.indices[positions].tolist()
        images: Iterator[Pixels] = map(self.split.read, positions)  # one at a time: photographs are large
        if not self.workers and source.memory is not None and not all(i in source.pixels for i in indices):
            images = map_in_threads(self.split.read, positions, 1)  # decode on all cores
        try:
            if self.augmentation is None or seeds is None:
                x = self.preprocessing.apply_batch(images)
            else:
                x = self.augmentation.apply_batch(images, seeds)
        except TlcliError as error:
            return error
        return x, torch.from_numpy(self.split.labels[positions])


def leave_process_group(worker: int) -> None:
    """Leave the group, to which terminals, `timeout` and torchrun send signals: a run saves its state before it ends.

    DataLoader takes a worker that a signal has killed for an error of the run.
    """
    if hasattr(os, "setpgrp"):  # Windows has none
        os.setpgrp()
