"""The augmentations of training images. Imports without torch."""

from typing import TYPE_CHECKING, Annotated

from msgspec import Meta

from tlcli.registry import option
from tlcli.specs import AugmentSpec, Fraction, FractionAboveZero, Positive, require_ascending

if TYPE_CHECKING:
    from torch import nn

    from tlcli.data.batches import Augmentation, Preprocessing, RandomCrop


class _AugmentOption(AugmentSpec, frozen=True):
    """The part of an augmentation that all options share."""

    def crop(self) -> "RandomCrop | None":
        """Return the random crop."""
        return None

    def transforms(self) -> "list[nn.Module]":
        """Return torchvision's transforms of the square."""
        return []

    def build(self, preprocessing: "Preprocessing") -> "Augmentation | None":
        from torch import nn
        from torchvision.transforms import v2

        from tlcli.data.batches import Augmentation

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

    def crop(self) -> "RandomCrop":
        from tlcli.data.batches import RandomCrop

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
