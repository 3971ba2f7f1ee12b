"""What every image goes through on its way into the network, in training and everywhere else."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

from tlcli.data.decode import Pixels
from tlcli.specs import Fit


@dataclass(frozen=True)
class Preprocessing:
    """Image -> square of `size` pixels -> (value / 255 - mean) / std. Plain numbers, kept with every checkpoint."""

    size: int
    fit: Fit
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def apply(self, image: Pixels) -> Tensor:
        """uint8 (height, width, 3) -> uint8 (3, size, size), by antialiased bilinear resizing.

        squash resizes both sides; crop keeps the middle square; pad keeps everything and fills up with black.
        """
        pixels = to_tensor(image)
        height, width = pixels.shape[1:]
        if self.fit is Fit.pad:
            return pad_to_square(resized(pixels, *fitted(height, width, self.size)))
        if self.fit is Fit.crop:  # crop, then resize: the other way round, 20,000 by 1 pixels would grow 224-fold
            pixels = functional.center_crop(pixels, [min(height, width)] * 2)
        return resized(pixels, self.size, self.size)

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
        (r, g, b), (sr, sg, sb) = ([float(v) for v in data[key]] for key in ("mean", "std"))
        return cls(int(data["size"]), Fit(data["fit"]), (r, g, b), (sr, sg, sb))


def to_tensor(image: Pixels) -> Tensor:
    """uint8 (height, width, 3) -> a view of it as (3, height, width)."""
    return torch.from_numpy(image).permute(2, 0, 1)


def resized(pixels: Tensor, height: int, width: int) -> Tensor:
    """uint8 (3, h, w) -> uint8 (3, height, width), contiguous."""
    out: Tensor = functional.resize(pixels, [height, width], antialias=True)
    return out.contiguous()


def fitted(height: int, width: int, size: int) -> tuple[int, int]:
    """Height and width with the longer side `size`, the shape kept, and no side below 1."""
    scale = size / max(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def pad_to_square(pixels: Tensor) -> Tensor:
    """(3, h, w) in the middle of a black square of the longer side."""
    height, width = pixels.shape[1:]
    side = max(height, width)
    left, top = (side - width) // 2, (side - height) // 2
    out: Tensor = functional.pad(pixels, [left, top, side - width - left, side - height - top])
    return out
