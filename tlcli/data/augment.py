"""Random changes to training images. Each is a function of the image and a seed."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.transforms import v2

from tlcli.data.decode import Pixels
from tlcli.data.preprocess import Preprocessing, fitted, pad_to_square, resized, to_tensor
from tlcli.specs import AugmentNone, AugmentSpec, Crop, Fit, Rand, Trivial

OVERSIZE = 4
"""Before padding, an image is shrunk to so many times the network's size: 20,000 by 1 would become 400 megapixels."""


@dataclass(frozen=True)
class Augmentation:
    """uint8 (height, width, 3) and a seed -> uint8 (3, size, size)."""

    preprocessing: Preprocessing
    transform: torch.nn.Module
    whole: bool  # the transform takes what evaluation sees, not the image as it is

    def __call__(self, image: Pixels, seed: int) -> Tensor:
        pixels = self.preprocessing.apply(image) if self.whole else _as_it_is(image, self.preprocessing)
        with torch.random.fork_rng(devices=[]):
            # not torch.manual_seed: that would seed the GPU's generator too, and with it every dropout mask
            torch.default_generator.manual_seed(seed)
            out: Tensor = self.transform(pixels)
        return out.contiguous()


def make_augmentation(spec: AugmentSpec, preprocessing: Preprocessing) -> Augmentation | None:
    """What `spec` says for images of this size; None where training sees what evaluation sees."""
    steps: list[torch.nn.Module] = []
    if isinstance(spec, Crop):
        steps += [
            v2.RandomResizedCrop(preprocessing.size, scale=spec.scale, ratio=spec.ratio, antialias=True),
            v2.RandomHorizontalFlip(spec.flip),
        ]
    if isinstance(spec, Trivial):
        steps.append(v2.TrivialAugmentWide(interpolation=v2.InterpolationMode.BILINEAR))
    if isinstance(spec, Rand):
        steps.append(v2.RandAugment(spec.n, spec.magnitude, interpolation=v2.InterpolationMode.BILINEAR))
    if spec.erasing > 0:
        steps.append(v2.RandomErasing(spec.erasing, value=[round(255 * m) for m in preprocessing.mean]))
    if not steps:
        return None
    return Augmentation(preprocessing, torch.nn.Sequential(*steps), isinstance(spec, AugmentNone))


def _as_it_is(image: Pixels, preprocessing: Preprocessing) -> Tensor:
    """The whole image; in a black square where evaluation pads."""
    pixels = to_tensor(image)
    if preprocessing.fit is not Fit.pad:
        return pixels
    height, width = pixels.shape[1:]
    if max(height, width) > (most := OVERSIZE * preprocessing.size):
        pixels = resized(pixels, *fitted(height, width, most))
    return pad_to_square(pixels)
