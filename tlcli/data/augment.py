"""Random changes to training images. Each is a function of the image and a seed. Imports without torch."""

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from msgspec import Meta

from tlcli.registry import option
from tlcli.specs import AugmentSpec, Fit, Fraction, FractionAboveZero, Positive, require_ascending

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tlcli.data.decode import Pixels
    from tlcli.data.preprocess import Preprocessing

MAX_PADDED_SIZES = 4
"""Before padding, an image is shrunk to this many times the input size: 20,000 by 1 would become 400 megapixels."""


@dataclass(frozen=True)
class RandomCrop:
    """A random box of the image, flipped with probability `flip`."""

    scale: tuple[float, float]
    ratio: tuple[float, float]
    flip: float

    def __call__(self, image: "Pixels", seed: int) -> "Tensor":
        """Return a part of any size: uint8 (height, width, 3) -> (1, h, w, 3)."""
        from tlcli.data.preprocess import stacked

        rng = random.Random(seed)
        height, width = image.shape[:2]
        top, left, h, w = self.box(height, width, rng)
        part = stacked([image[top : top + h, left : left + w]])
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

    preprocessing: "Preprocessing"
    crop: RandomCrop | None
    transforms: "nn.Module | None"

    def apply(self, image: "Pixels", seed: int) -> "Tensor":
        """Return `apply_batch` of one image: uint8 (height, width, 3) -> uint8 (3, size, size), contiguous."""
        return self.apply_batch([image], [seed])[0].contiguous()

    def apply_batch(self, images: "Iterable[Pixels]", seeds: Sequence[int]) -> "Tensor":
        """Return uint8 (batch, 3, size, size), channels_last, of uint8 (height, width, 3), each with its seed.

        The result of an image does not depend on the others. An iterator's images are in memory one at a time.
        """
        import torch

        from tlcli.data.preprocess import resized

        if self.crop is None:
            squares = self.preprocessing.apply_batch(images)
        else:
            size, crop = self.preprocessing.size, self.crop
            parts = (crop(self._padded(image), seed) for image, seed in zip(images, seeds, strict=True))
            squares = torch.cat([resized(part, size, size) for part in parts]).permute(0, 3, 1, 2)
        return squares if self.transforms is None else apply_transforms(self.transforms, squares, seeds)

    def _padded(self, image: "Pixels") -> "Pixels":
        """Return the whole image, in a black square if evaluation pads."""
        from tlcli.data.preprocess import fitted, pad_to_square, resized, stacked

        if self.preprocessing.fit is not Fit.pad:
            return image
        pixels = stacked([image])
        height, width = image.shape[:2]
        if max(height, width) > (max_side := MAX_PADDED_SIZES * self.preprocessing.size):
            pixels = resized(pixels, *fitted(height, width, max_side))
        return pad_to_square(pixels)[0].numpy()


def apply_transforms(transforms: "nn.Module", squares: "Tensor", seeds: Sequence[int]) -> "Tensor":
    """Return each square as `transforms` change it with its seed: uint8 (batch, 3, size, size), channels_last."""
    import torch

    changed = []
    for square, seed in zip(squares, seeds, strict=True):
        with torch.random.fork_rng(devices=[]):
            # not torch.manual_seed: that would seed the GPU's generator too, and with it every dropout mask
            torch.default_generator.manual_seed(seed)
            changed.append(transforms(square))
    return torch.stack(changed).contiguous(memory_format=torch.channels_last)


class _AugmentOption(AugmentSpec, frozen=True):
    """The part of an augmentation that all options share."""

    def crop(self) -> RandomCrop | None:
        """Return the random crop."""
        return None

    def transforms(self) -> "list[nn.Module]":
        """Return torchvision's transforms of the square."""
        return []

    def build(self, preprocessing: "Preprocessing") -> Augmentation | None:
        from torch import nn
        from torchvision.transforms import v2

        crop, transforms = self.crop(), self.transforms()
        if self.erasing > 0:
            transforms.append(v2.RandomErasing(self.erasing, value=[round(255 * m) for m in preprocessing.mean]))
        if crop is None and not transforms:
            return None
        return Augmentation(preprocessing, crop, nn.Sequential(*transforms) if transforms else None)


@option
class AugmentNoneSpec(_AugmentOption, frozen=True, tag="none"):
    """Images as in evaluation."""


@option
class CropSpec(_AugmentOption, frozen=True, tag="crop"):
    """A random crop by area and aspect ratio, resized; a horizontal flip with a probability."""

    scale: tuple[FractionAboveZero, FractionAboveZero]
    ratio: tuple[Positive, Positive]
    flip: Fraction

    def __post_init__(self) -> None:
        require_ascending("scale", self.scale)
        require_ascending("ratio", self.ratio)

    def crop(self) -> RandomCrop:
        return RandomCrop(self.scale, self.ratio, self.flip)


@option
class TrivialAugmentSpec(CropSpec, frozen=True, tag="trivial"):
    """Crop, then TrivialAugmentWide: one random operation of random strength (Mueller and Hutter 2021)."""

    def transforms(self) -> "list[nn.Module]":
        from torchvision.transforms import v2

        return [v2.TrivialAugmentWide(interpolation=v2.InterpolationMode.BILINEAR)]


@option
class RandAugmentSpec(CropSpec, frozen=True, tag="randaugment"):
    """Crop, then RandAugment: `n` random operations of one strength (Cubuk et al. 2020)."""

    n: Annotated[int, Meta(ge=1)]
    magnitude: Annotated[int, Meta(ge=0, le=30)]

    def transforms(self) -> "list[nn.Module]":
        from torchvision.transforms import v2

        return [v2.RandAugment(self.n, self.magnitude, interpolation=v2.InterpolationMode.BILINEAR)]
