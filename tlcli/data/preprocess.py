"""Turns every image into the input of the network, the same way in training and everywhere else."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

from tlcli.data.decode import Pixels, ValueRange
from tlcli.specs import Fit, parse_image_stats

RESIZE_BATCH_BYTES = 2**20
"""Bytes of images that are resized in one call: calls cost more than the pixels of small images, copies more than the
calls of large ones."""


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
        return torch.cat([self._squares(group) for group in _group_by_shape(images)]).permute(0, 3, 1, 2)

    def _squares(self, images: Sequence[Pixels]) -> Tensor:
        """Images of one shape -> (n, size, size, 3)."""
        height, width = images[0].shape[:2]
        if self.fit is Fit.pad:
            return pad_to_square(resized(stacked(images), *fitted(height, width, self.size)))
        if self.fit is Fit.crop:  # crop, then resize: in the other order, 20,000 by 1 pixels would grow 224-fold
            side = min(height, width)
            left, top = round((width - side) / 2), round((height - side) / 2)
            images = [image[top : top + side, left : left + side] for image in images]
        return resized(stacked(images), self.size, self.size)

    def normalise(self, batch: Tensor) -> Tensor:
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
            if not -1e300 < low < high < 1e300:
                raise ValueError(f"range is {value_range!r:.40}, not two ascending numbers")
            value_range = float(low), float(high)
        return cls(fit=fit, range=value_range, **stats)


@lru_cache(maxsize=8)
def _on_device(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Return a value per channel, (1, 3, 1, 1). It is cached: a copy per batch would wait for the accelerator."""
    with torch.inference_mode(False):  # the tensor is used within inference mode and outside
        return torch.tensor(values, device=device).view(1, 3, 1, 1)


def stacked(images: Sequence[Pixels]) -> Tensor:
    """Return images of one shape as (n, height, width, 3); a single one may share its memory."""
    return torch.from_numpy(np.ascontiguousarray(images[0])[None] if len(images) == 1 else np.stack(images))


def resized(pixels: Tensor, height: int, width: int) -> Tensor:
    """Return uint8 (n, height, width, 3), contiguous, of uint8 (n, h, w, 3); the same memory if the size is the same.

    Colors are the last dimension throughout: torch resizes three times as fast as with (n, 3, h, w), to equal values.
    """
    out: Tensor = functional.resize(pixels.permute(0, 3, 1, 2), [height, width], antialias=True)
    return out.permute(0, 2, 3, 1).contiguous()


def fitted(height: int, width: int, size: int) -> tuple[int, int]:
    """Return height and width with the longer side `size`, the shape kept, and no side below 1."""
    scale = size / max(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def pad_to_square(pixels: Tensor) -> Tensor:
    """Return (n, h, w, 3) in the middle of black squares of the longer side."""
    n, height, width, colors = pixels.shape
    side = max(height, width)
    if height == width:
        return pixels
    left, top = (side - width) // 2, (side - height) // 2
    out = pixels.new_zeros(n, side, side, colors)
    out[:, top : top + height, left : left + width] = pixels
    return out


def _group_by_shape(images: Iterable[Pixels]) -> Iterator[list[Pixels]]:
    """Yield the images in order, small ones of one shape that follow each other together."""
    group: list[Pixels] = []
    for image in images:
        if group and (image.shape != group[0].shape or (len(group) + 1) * image.nbytes > RESIZE_BATCH_BYTES):
            yield group
            group = []
        group.append(image)
    yield group
