"""The augmentations of training images. Imports without torch."""

import math
import random
from typing import TYPE_CHECKING, Annotated, Any

from msgspec import Meta

from tlcli.specs import AugmentSpec, Count, Fraction, FractionAboveZero, Positive, option, require_ascending

if TYPE_CHECKING:
    from torch import nn

    from tlcli.data.batches import Augmentation, Preprocessing


class _AugmentOption(AugmentSpec, frozen=True):
    def transforms(self, v2: Any) -> "list[nn.Module]":
        return []

    def build(self, preprocessing: "Preprocessing") -> "Augmentation | None":
        from torch import nn
        from torchvision.transforms import v2

        from tlcli.data.batches import Augmentation

        draw_box, flip = (self.draw_box, self.flip) if isinstance(self, CropSpec) else (None, 0.0)
        transforms = self.transforms(v2)
        if self.erasing > 0:
            transforms.append(v2.RandomErasing(self.erasing, value=[round(255 * m) for m in preprocessing.mean]))
        if draw_box is None and not transforms:
            return None
        return Augmentation(preprocessing, draw_box, flip, nn.Sequential(*transforms) if transforms else None)

    def mixer(self, n_classes: int) -> "nn.Module":
        from torchvision.transforms import v2

        kinds = ((v2.MixUp, self.mixup), (v2.CutMix, self.cutmix))
        mixer: nn.Module = v2.RandomChoice([kind(alpha=a, num_classes=n_classes) for kind, a in kinds if a > 0])
        return mixer


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

    def draw_box(self, height: int, width: int, rng: random.Random) -> tuple[int, int, int, int]:
        """Draw top, left, height and width as in torchvision's RandomResizedCrop (Szegedy et al. 2015).

        Area uniform in `scale`, aspect ratio log-uniform in `ratio`, position uniform. If none of ten boxes fits,
        return the largest central box whose ratio is in the range.
        """
        (smallest, largest), (low, high) = self.scale, map(math.log, self.ratio)
        for _ in range(10):  # with random() alone, which gives the same numbers in all Python versions
            area = height * width * (smallest + (largest - smallest) * rng.random())
            aspect = math.exp(low + (high - low) * rng.random())
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                return int(rng.random() * (height - h + 1)), int(rng.random() * (width - w + 1)), h, w
        h = min(height, max(1, round(width / self.ratio[0])))
        w = min(width, max(1, round(height * self.ratio[1])))
        return (height - h) // 2, (width - w) // 2, h, w


@option
class TrivialAugmentSpec(CropSpec, frozen=True, tag="trivial"):
    """Crop, then TrivialAugmentWide: one random operation of random strength (Mueller and Hutter 2021)."""

    def transforms(self, v2: Any) -> "list[nn.Module]":
        return [v2.TrivialAugmentWide(interpolation=v2.InterpolationMode.BILINEAR)]


@option
class RandAugmentSpec(CropSpec, frozen=True, tag="randaugment"):
    """Crop, then RandAugment: `n` random operations of one strength (Cubuk et al. 2020)."""

    n: Count
    magnitude: Annotated[int, Meta(ge=0, le=30)]

    def transforms(self, v2: Any) -> "list[nn.Module]":
        return [v2.RandAugment(self.n, self.magnitude, interpolation=v2.InterpolationMode.BILINEAR)]
