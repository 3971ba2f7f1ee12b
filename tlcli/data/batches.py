"""Turns images into the network's input and into batches, the same way in training and everywhere else.

Order and augmentation are functions of seed, epoch and index, whatever the number of workers.
"""

import hashlib
import math
import random
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from tlcli.specs import Fit, parse_image_stats

RESIZE_BATCH_BYTES = 2**20
"""Bytes of images that are resized in one call: calls cost more than the pixels of small images, copies more than the
calls of large ones."""
MAX_PADDED_SIZES = 4
"""Before padding, an image is shrunk to this many times the input size: 20,000 by 1 would become 400 megapixels."""

Batch = tuple[Tensor, Tensor]
Chunk = tuple[int | None, Ints]  # the view of the augmentation (None: no augmentation), positions in a split


# -- preprocessing ----------------------------------------------------------------------------------------------------


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
        squares: list[Tensor] = []
        group: list[Pixels] = []  # small images of one shape that follow each other
        for image in images:
            if group and (image.shape != group[0].shape or (len(group) + 1) * image.nbytes > RESIZE_BATCH_BYTES):
                squares.append(self._squares(group))
                group = []
            group.append(image)
        squares.append(self._squares(group))
        return torch.cat(squares).permute(0, 3, 1, 2)

    def _squares(self, images: Sequence[Pixels]) -> Tensor:
        """Images of one shape -> (n, size, size, 3)."""
        height, width = images[0].shape[:2]
        if self.fit is Fit.pad:
            return _pad_to_square(_shrink(_stack(images), self.size))
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
        """Return a plain dict."""
        return asdict(self) | {"fit": self.fit.value}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Preprocessing":
        """Return what `to_json` stored; up to 0.5.0 without a range. Raise KeyError, TypeError or ValueError."""
        fit, stats = Fit(data["fit"]), parse_image_stats(data)
        value_range = data.get("range")
        if value_range is not None:
            low, high = value_range
            if not -3e38 < low < high < 3e38:
                raise ValueError(f"range is {value_range!r:.40}, not two ascending numbers")
            value_range = float(low), float(high)
        return cls(fit=fit, range=value_range, **stats)


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


def _shrink(pixels: Tensor, size: int) -> Tensor:
    """Resize the longer side to `size`, the other in proportion, to 1 at least."""
    height, width = pixels.shape[1:3]
    scale = size / max(height, width)
    return resize(pixels, max(1, round(height * scale)), max(1, round(width * scale)))


def _pad_to_square(pixels: Tensor) -> Tensor:
    """Return (n, h, w, 3) in the middle of black squares of the longer side."""
    n, height, width, colors = pixels.shape
    side = max(height, width)
    if height == width:
        return pixels
    left, top = (side - width) // 2, (side - height) // 2
    out = pixels.new_zeros(n, side, side, colors)
    out[:, top : top + height, left : left + width] = pixels
    return out


# -- augmentation -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RandomCrop:
    """A random box of the image, flipped with probability `flip`."""

    scale: tuple[float, float]
    ratio: tuple[float, float]
    flip: float

    def __call__(self, image: Pixels, seed: int) -> Tensor:
        """Return a part of any size: uint8 (height, width, 3) -> (1, h, w, 3)."""
        rng = random.Random(seed)
        height, width = image.shape[:2]
        top, left, h, w = self.box(height, width, rng)
        part = _stack([image[top : top + h, left : left + w]])
        return part.flip(2) if rng.random() < self.flip else part  # numpy takes 10 times as long to flip

    def box(self, height: int, width: int, rng: random.Random) -> tuple[int, int, int, int]:
        """Draw top, left, height and width as in torchvision's RandomResizedCrop (Szegedy et al. 2015).

        Area uniform in `scale`, aspect ratio log-uniform in `ratio`, position uniform. If none of ten boxes fits,
        return the largest central box whose ratio is in the range.
        """
        low, high = (math.log(ratio) for ratio in self.ratio)
        for _ in range(10):
            area = height * width * _uniform(*self.scale, rng)
            aspect = math.exp(_uniform(low, high, rng))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                return int(rng.random() * (height - h + 1)), int(rng.random() * (width - w + 1)), h, w
        h = min(height, round(width / self.ratio[0]))
        w = min(width, round(height * self.ratio[1]))
        return (height - h) // 2, (width - w) // 2, h, w


def _uniform(low: float, high: float, rng: random.Random) -> float:
    """Draw with random(), of which alone Python promises the same numbers in later versions."""
    return low + (high - low) * rng.random()


@dataclass(frozen=True)
class Augmentation:
    """A random crop (None: the input of evaluation), then torchvision's `transforms` of the square."""

    preprocessing: Preprocessing
    crop: RandomCrop | None
    transforms: nn.Module | None

    def apply(self, image: Pixels, seed: int) -> Tensor:
        """Return `apply_batch` of one image: uint8 (height, width, 3) -> uint8 (3, size, size), contiguous."""
        return self.apply_batch([image], [seed])[0].contiguous()

    def apply_batch(self, images: Iterable[Pixels], seeds: Sequence[int]) -> Tensor:
        """Return uint8 (batch, 3, size, size), channels_last, of uint8 (height, width, 3), each with its seed.

        The result of an image does not depend on the others. An iterator's images are in memory one at a time.
        """
        size, crop = self.preprocessing.size, self.crop
        if crop is None:
            squares = self.preprocessing.apply_batch(images)
        else:
            parts = (crop(self._padded(image), seed) for image, seed in zip(images, seeds, strict=True))
            squares = torch.cat([resize(part, size, size) for part in parts]).permute(0, 3, 1, 2)
        return squares if self.transforms is None else apply_transforms(self.transforms, squares, seeds)

    def _padded(self, image: Pixels) -> Pixels:
        """Return the whole image, in a black square if evaluation pads."""
        if self.preprocessing.fit is not Fit.pad:
            return image
        pixels, max_side = _stack([image]), MAX_PADDED_SIZES * self.preprocessing.size
        return _pad_to_square(_shrink(pixels, max_side) if max(image.shape[:2]) > max_side else pixels)[0].numpy()


def apply_transforms(transforms: nn.Module, squares: Tensor, seeds: Sequence[int]) -> Tensor:
    """Return each square as `transforms` change it with its seed: uint8 (batch, 3, size, size), channels_last."""
    changed = []
    for square, seed in zip(squares, seeds, strict=True):
        with torch.random.fork_rng(devices=[]):
            # not torch.manual_seed: that would seed the GPU's generator too, and with it every dropout mask
            torch.default_generator.manual_seed(seed)
            changed.append(transforms(square))
    return torch.stack(changed).contiguous(memory_format=torch.channels_last)


# -- batches ----------------------------------------------------------------------------------------------------------


def epoch_order(n: int, seed: int, epoch: int) -> Ints:
    """Return a permutation of 0..n-1."""
    return np.random.default_rng([seed, epoch]).permutation(n)


def sample_seed(seed: int, view: int, index: int) -> int:
    """Return a number from 0 to 2**63 - 1 that differs in all its bits between neighbors."""
    digest = hashlib.blake2b(f"{seed}/{view}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@dataclass(frozen=True, eq=False)
class ImageBatches(Dataset[Batch | TlcliError]):
    """The images of a split as (x, y): x uint8 (batch, 3, size, size), channels_last, y int64 (batch,), on the CPU.

    The last batch may be smaller. Iterating raises BadImagesError if a file can no longer be read. `workers` are
    processes that read images; with 0, threads of this process do.
    """

    split: Split
    preprocessing: Preprocessing
    _: KW_ONLY
    batch_size: int
    workers: int
    augmentation: Augmentation | None = None
    seed: int = 0
    pin_memory: bool = False

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
        return (self._seeds(view, positions) for view, positions in self._epoch_chunks(number, view, start))

    def _seeds(self, view: int | None, positions: Ints) -> list[int]:
        assert view is not None
        return [sample_seed(self.seed, view, i) for i in positions.tolist()]

    def _epoch_chunks(self, number: int, view: int | None, start: int) -> list[Chunk]:
        order = epoch_order(len(self.split), self.seed, number)
        return self._chunks(number if view is None else view, order[start * self.batch_size :])

    def _chunks(self, view: int | None, order: Ints) -> list[Chunk]:
        return [(view, order[i : i + self.batch_size]) for i in range(0, len(order), self.batch_size)]

    def _load(self, chunks: list[Chunk]) -> Iterator[Batch]:
        if not self.workers:
            for chunk in chunks:
                x, y = self._batch(*chunk)
                yield (x.pin_memory(), y.pin_memory()) if self.pin_memory else (x, y)
            return
        loader = DataLoader(
            self,
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

    def __getitem__(self, chunk: Chunk) -> Batch | TlcliError:
        """Return a batch, or the error, so that it reaches the other process as it is."""
        try:
            return self._batch(*chunk)
        except TlcliError as error:
            return error

    def _batch(self, view: int | None, positions: Ints) -> Batch:
        images: Iterator[Pixels] = (self.split.read(i) for i in positions.tolist())  # photographs are large
        source, indices = self.split.images, self.split.indices[positions].tolist()
        if not self.workers and source.memory is not None and not all(i in source.pixels for i in indices):
            images = map_in_threads(self.split.read, positions.tolist(), 1)  # decode on all cores
        y = torch.from_numpy(self.split.labels[positions])
        if self.augmentation is None or view is None:
            return self.preprocessing.apply_batch(images), y
        return self.augmentation.apply_batch(images, self._seeds(view, positions)), y
