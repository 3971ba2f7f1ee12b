"""Images as the loop reads them where nothing of the network has run on them before."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from tlcli.data.augment import changed
from tlcli.data.batches import ImageBatches
from tlcli.data.preprocess import Preprocessing
from tlcli.device import Device
from tlcli.engine.prefetch import Pair, prefetch_to_device

Batch = tuple[tuple[Tensor, ...], Tensor]
"""What the network takes, and the labels (B) int64."""


class ImageLoader:
    """Images decoded, augmented and normalised as they are needed: x (B, 3, S, S) float32, y (B) int64.

    Args:
        network: what takes the images: the whole network.
        dtype: the number format that it runs in.
        views: how many augmented views of each image there are, one an epoch in turn; None: a new one each epoch.
        changes: what becomes of training images on the device, where `batches` have not done it before.
    """

    def __init__(
        self,
        batches: ImageBatches,
        preprocessing: Preprocessing,
        device: Device,
        *,
        network: nn.Module,
        dtype: torch.dtype,
        views: int | None = None,
        changes: nn.Module | None = None,
    ) -> None:
        self.network = network
        self.threads: int | None = None
        self.head: nn.Linear | None = None
        self.dtype = dtype
        self._batches = batches
        self._preprocessing = preprocessing
        self._device = device
        self._views = views
        self._changes = changes

    def __len__(self) -> int:
        """The number of images."""
        return len(self._batches.split)

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        """Every image once, in the order of this epoch (1, 2, ...), augmented as (seed, view, index) say; without the
        first `start` batches."""
        view = (number - 1) % self._views if self._views else None
        batches = prefetch_to_device(self._batches.epoch(number, view, start), self._device)
        if self._changes is not None:
            batches = self._changed(self._changes, batches, self._batches.seeds(number, view, start))
        return self._ready(batches)

    def in_order(self) -> Iterator[Batch]:
        """Every image once, in order, as evaluation sees it."""
        return self._ready(prefetch_to_device(self._batches.in_order(), self._device))

    @staticmethod
    def _changed(changes: nn.Module, batches: Iterator[Pair], seeds: Iterator[list[int]]) -> Iterator[Pair]:
        for (images, labels), drawn in zip(batches, seeds, strict=True):
            yield changed(changes, images, drawn), labels

    def _ready(self, batches: Iterator[Pair]) -> Iterator[Batch]:
        for images, labels in batches:
            x = images.contiguous(memory_format=self._device.memory_format)
            yield (self._preprocessing.normalise(x),), labels
