"""Random changes to training images. Each is a function of the image and a seed."""

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.transforms import v2

from tlcli.data.decode import Pixels
from tlcli.data.preprocess import Preprocessing, fitted, pad_to_square, resized, stacked
from tlcli.specs import AugmentSpec, CropSpec, Fit, RandAugmentSpec, TrivialAugmentSpec

OVERSIZE = 4
"""Before padding, an image is shrunk to so many times the network's size: 20,000 by 1 would become 400 megapixels."""

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class RandomCrop:
    """A random box of the image, mirrored with probability `flip`."""

    scale: tuple[float, float]
    ratio: tuple[float, float]
    flip: float

    def __call__(self, image: Pixels, seed: int) -> Tensor:
        """uint8 (height, width, 3) -> a part of it, of any size: (1, h, w, 3)."""
        rng = random.Random(seed)
        height, width = image.shape[:2]
        top, left, h, w = self.box(height, width, rng)
        part = stacked([image[top : top + h, left : left + w]])
        return part.flip(2) if rng.random() < self.flip else part  # numpy takes 10 times as long to mirror

    def box(self, height: int, width: int, rng: random.Random) -> Box:
        """Top, left, height and width, drawn as in torchvision's RandomResizedCrop (Szegedy et al. 2015).

        Area uniform in `scale`, aspect ratio log-uniform in `ratio`, place uniform. Where ten tries give no box that
        fits: the largest in the middle whose ratio is in the range.
        """
        low, high = (math.log(ratio) for ratio in self.ratio)
        for _ in range(10):
            area = height * width * _between(*self.scale, rng)
            aspect = math.exp(_between(low, high, rng))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                return int(rng.random() * (height - h + 1)), int(rng.random() * (width - w + 1)), h, w
        h = min(height, round(width / self.ratio[0]))
        w = min(width, round(height * self.ratio[1]))
        return (height - h) // 2, (width - w) // 2, h, w


def _between(low: float, high: float, rng: random.Random) -> float:
    """Uniform; from random(), of which alone Python promises the same numbers in later versions."""
    return low + (high - low) * rng.random()


@dataclass(frozen=True)
class Augmentation:
    """A random crop (None: what evaluation sees), then torchvision's `changes` of the square."""

    preprocessing: Preprocessing
    crop: RandomCrop | None
    changes: torch.nn.Module | None

    def apply(self, image: Pixels, seed: int) -> Tensor:
        """uint8 (height, width, 3) -> uint8 (3, size, size), contiguous: the image of `apply_batch`."""
        return self.apply_batch([image], [seed])[0].contiguous()

    def apply_batch(self, images: Iterable[Pixels], seeds: Sequence[int]) -> Tensor:
        """uint8 (height, width, 3), each with its seed -> uint8 (batch, 3, size, size), channels_last.

        What becomes of an image does not depend on the others. An iterator's images are in memory one at a time.
        """
        squares = self._squares(images, seeds)
        return squares if self.changes is None else changed(self.changes, squares, seeds)

    def _squares(self, images: Iterable[Pixels], seeds: Sequence[int]) -> Tensor:
        if self.crop is None:
            return self.preprocessing.apply_batch(images)
        size = self.preprocessing.size
        parts = (self.crop(_whole(i, self.preprocessing), seed) for i, seed in zip(images, seeds, strict=True))
        return torch.cat([resized(part, size, size) for part in parts]).permute(0, 3, 1, 2)


def make_augmentation(spec: AugmentSpec, preprocessing: Preprocessing) -> Augmentation | None:
    """What `spec` says for images of this size; None where training sees what evaluation sees."""
    crop = None
    changes: list[torch.nn.Module] = []
    if isinstance(spec, CropSpec):
        crop = RandomCrop(spec.scale, spec.ratio, spec.flip)
    if isinstance(spec, TrivialAugmentSpec):
        changes.append(v2.TrivialAugmentWide(interpolation=v2.InterpolationMode.BILINEAR))
    if isinstance(spec, RandAugmentSpec):
        changes.append(v2.RandAugment(spec.n, spec.magnitude, interpolation=v2.InterpolationMode.BILINEAR))
    if spec.erasing > 0:
        changes.append(v2.RandomErasing(spec.erasing, value=[round(255 * m) for m in preprocessing.mean]))
    if crop is None and not changes:
        return None
    return Augmentation(preprocessing, crop, torch.nn.Sequential(*changes) if changes else None)


def changed(changes: torch.nn.Module, squares: Tensor, seeds: Sequence[int]) -> Tensor:
    """Each square with `changes` as its seed draws them: uint8 (batch, 3, size, size), channels_last, on any device."""
    found = [_seeded(changes, square, seed) for square, seed in zip(squares, seeds, strict=True)]
    return torch.stack(found).contiguous(memory_format=torch.channels_last)


def _seeded(changes: torch.nn.Module, square: Tensor, seed: int) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        # not torch.manual_seed: that would seed the GPU's generator too, and with it every dropout mask
        torch.default_generator.manual_seed(seed)
        out: Tensor = changes(square)
    return out


def _whole(image: Pixels, preprocessing: Preprocessing) -> Pixels:
    """The whole image; in a black square where evaluation pads."""
    if preprocessing.fit is not Fit.pad:
        return image
    pixels = stacked([image])
    height, width = image.shape[:2]
    if max(height, width) > (most := OVERSIZE * preprocessing.size):
        pixels = resized(pixels, *fitted(height, width, most))
    padded: Pixels = pad_to_square(pixels)[0].numpy()
    return padded
