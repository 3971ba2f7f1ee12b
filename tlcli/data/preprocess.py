"""What every image goes through on its way into the network, in training and everywhere else."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

from tlcli.data.decode import Pixels
from tlcli.specs import Fit, parse_image_stats

TOGETHER = 2**20
"""Bytes of images that are resized in one call: of small ones the calls cost more than the pixels, of large ones a copy
of them does."""


@dataclass(frozen=True)
class Preprocessing:
    """Image -> square of `size` pixels -> (value / 255 - mean) / std. Plain numbers, kept with every checkpoint."""

    size: int
    fit: Fit
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def apply(self, image: Pixels) -> Tensor:
        """uint8 (height, width, 3) -> uint8 (3, size, size), contiguous: the image of `apply_batch`."""
        return self.apply_batch([image])[0].contiguous()

    def apply_batch(self, images: Iterable[Pixels]) -> Tensor:
        """uint8 (height, width, 3), each its own -> uint8 (batch, 3, size, size), channels_last, antialiased bilinear.

        squash resizes both sides; crop keeps the middle square; pad keeps everything and fills up with black. What
        becomes of an image does not depend on the others. Of an iterator only a few images are in memory at a time.
        """
        return torch.cat([self._squares(group) for group in _alike(images)]).permute(0, 3, 1, 2)

    def _squares(self, images: Sequence[Pixels]) -> Tensor:
        """Images of one shape -> (n, size, size, 3)."""
        height, width = images[0].shape[:2]
        if self.fit is Fit.pad:
            return pad_to_square(resized(stacked(images), *fitted(height, width, self.size)))
        if self.fit is Fit.crop:  # crop, then resize: the other way round, 20,000 by 1 pixels would grow 224-fold
            images = [_middle(image) for image in images]
        return resized(stacked(images), self.size, self.size)

    def normalise(self, batch: Tensor) -> Tensor:
        """uint8 (batch, 3, size, size) on any device -> float32 of the same shape, device and memory format."""
        mean, std = (torch.tensor(v, device=batch.device).view(1, 3, 1, 1) for v in (self.mean, self.std))
        return batch.to(torch.float32).div_(255).sub_(mean).div_(std)

    def to_json(self) -> dict[str, Any]:
        """As a plain dict."""
        return asdict(self) | {"fit": self.fit.value}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Preprocessing":
        """From what `to_json` gave. Raises KeyError, TypeError or ValueError for anything else."""
        return cls(fit=Fit(data["fit"]), **parse_image_stats(data))


def stacked(images: Sequence[Pixels]) -> Tensor:
    """Images of one shape -> (n, height, width, 3); a single one may share its memory."""
    return torch.from_numpy(np.ascontiguousarray(images[0])[None] if len(images) == 1 else np.stack(images))


def resized(pixels: Tensor, height: int, width: int) -> Tensor:
    """uint8 (n, h, w, 3) -> uint8 (n, height, width, 3), contiguous, or the same memory where the size is the same.

    Colours lie last throughout: so torch resizes three times as fast as with (n, 3, h, w), and to the same values.
    """
    out: Tensor = functional.resize(pixels.permute(0, 3, 1, 2), [height, width], antialias=True)
    return out.permute(0, 2, 3, 1).contiguous()


def fitted(height: int, width: int, size: int) -> tuple[int, int]:
    """Height and width with the longer side `size`, the shape kept, and no side below 1."""
    scale = size / max(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def pad_to_square(pixels: Tensor) -> Tensor:
    """(n, h, w, 3), each in the middle of a black square of the longer side."""
    n, height, width, colours = pixels.shape
    side = max(height, width)
    if height == width:
        return pixels
    left, top = (side - width) // 2, (side - height) // 2
    out = pixels.new_zeros(n, side, side, colours)
    out[:, top : top + height, left : left + width] = pixels
    return out


def _middle(image: Pixels) -> Pixels:
    """The middle square."""
    height, width = image.shape[:2]
    side = min(height, width)
    left, top = round((width - side) / 2), round((height - side) / 2)
    return image[top : top + side, left : left + side]


def _alike(images: Iterable[Pixels]) -> Iterator[list[Pixels]]:
    """The images in order, those together that follow each other, have one shape, and are small."""
    group: list[Pixels] = []
    for image in images:
        if group and (image.shape != group[0].shape or (len(group) + 1) * image.nbytes > TOGETHER):
            yield group
            group = []
        group.append(image)
    yield group
