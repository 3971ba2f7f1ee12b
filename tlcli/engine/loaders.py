"""Batches of one split on the device: decoded from images (uncached), or read from activations (cached)."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Protocol

import torch
from torch import Tensor, nn

from tlcli.data.batches import ImageBatches, Preprocessing, apply_transforms, epoch_order
from tlcli.device import Device

Batch = tuple[tuple[Tensor, ...], Tensor]
"""The inputs of the network, and the labels (B) int64."""
ActivationTensors = tuple[Tensor, ...]
"""A row per image in each tensor that crosses the cut."""

READ_BYTES, READ_ROWS = 4 * 1024 * 1024, 1024
"""The most that is gathered at a time if a batch is smaller: a few rows cost as much to gather as many."""


class BatchLoader(Protocol):
    """One split as device batches (x, y): x as `network` takes it, which runs in `dtype`.

    `threads` is the best number of threads of arithmetic on a CPU (None: all). `head` is the linear layer that the
    network consists of if the loader yields the head's features, else None.
    """

    network: nn.Module
    dtype: torch.dtype
    threads: int | None
    head: nn.Linear | None

    def __len__(self) -> int:
        """Return the number of images."""

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        """Yield each image once, in the order of this epoch (1, 2, ...), without the first `start` batches."""

    def in_order(self) -> Iterator[Batch]:
        """Yield each image once, in order, as evaluation sees it."""


class ImageLoader:
    """Batches of images that are decoded, augmented and normalized on demand: x (B, 3, S, S) float32.

    Args:
        network: the whole network.
        dtype: the precision that it runs in.
        views: the number of augmented views per image, one per epoch in turn; None: a new view in each epoch.
        transforms: random transforms of training images that run on the device; `batches` has not applied them.
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
        transforms: nn.Module | None = None,
    ) -> None:
        self.network, self.dtype = network, dtype
        self.threads: int | None = None
        self.head: nn.Linear | None = None
        self._batches, self._preprocessing, self._device = batches, preprocessing, device
        self._views, self._transforms = views, transforms

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._batches.split)

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        """Yield each image once, in the order of this epoch, augmented by a function of (seed, view, index)."""
        view = (number - 1) % self._views if self._views else None
        batches = prefetch_to_device(self._batches.epoch(number, view, start), self._device)
        if self._transforms is None:
            yield from self._normalized(batches)
            return
        for (images, labels), seeds in zip(batches, self._batches.seeds(number, view, start), strict=True):
            yield from self._normalized([(apply_transforms(self._transforms, images, seeds), labels)])

    def in_order(self) -> Iterator[Batch]:
        """Yield each image once, in order, as evaluation sees it."""
        return self._normalized(prefetch_to_device(self._batches.in_order(), self._device))

    def _normalized(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[Batch]:
        for images, labels in batches:
            x = images.contiguous(memory_format=self._device.memory_format)
            yield (self._preprocessing.normalize(x),), labels


class ActivationLoader:
    """Batches of activations, in the order in which an ImageLoader would yield their images.

    Args:
        views: the tensors of each augmented view, or of the images as they are.
        rows: the index of each image of the split in these tensors.
        network: the suffix of the cut.
        head: the suffix, if it is one plain linear layer. Its steps are so short that a second thread costs more than
            it gains, and a hundred times that on a busy machine.
        dtype: the precision that the suffix runs in.
    """

    def __init__(
        self,
        views: Sequence[ActivationTensors],
        rows: Tensor,
        labels: Tensor,
        *,
        network: nn.Module,
        head: nn.Linear | None,
        dtype: torch.dtype,
        device: Device,
        batch_size: int,
        seed: int,
    ) -> None:
        self.network, self.head, self.dtype = network, head, dtype
        self.threads = None if head is None else 1
        self._views, self._rows, self._labels = views, rows, device.to_device(labels)
        self._device, self._batch_size, self._seed = device, batch_size, seed
        row_bytes = sum(t[0].numel() * t.element_size() for t in views[0])
        self._rows_at_once = max(1, min(READ_ROWS, READ_BYTES // max(1, row_bytes)))

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._rows)

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        """Yield each image once, in the order of this epoch (1, 2, ...) and in the view whose turn it is."""
        order = torch.from_numpy(epoch_order(len(self), self._seed, number))
        return self._read(self._views[(number - 1) % len(self._views)], order, self._batch_size, start)

    def in_order(self) -> Iterator[Batch]:
        """Yield each image once, in order, in the first view."""
        return self._read(self._views[0], torch.arange(len(self)), max(self._rows_at_once, self._batch_size))

    def _read(self, tensors: ActivationTensors, order: Tensor, batch_size: int, start: int = 0) -> Iterator[Batch]:
        """Yield the batches from number `start` on. Chunks begin at the same batches whatever `start` is, so that a
        batch has the same memory alignment in an interrupted epoch: kernels may round by that."""
        rows, labels = self._rows[order], self._labels[order.to(self._labels.device)]
        batches_per_chunk = max(1, self._rows_at_once // batch_size)
        for chunk in range(start - start % batches_per_chunk, -(-len(order) // batch_size), batches_per_chunk):
            part = slice(chunk * batch_size, (chunk + batches_per_chunk) * batch_size)
            columns = [torch.split(self._prepared(t.index_select(0, rows[part])), batch_size) for t in tensors]
            batches = zip(zip(*columns, strict=True), torch.split(labels[part], batch_size), strict=True)
            for x, y in islice(batches, max(0, start - chunk), None):
                yield tuple(t.detach() for t in x), y  # else autograd objects to a write into one of the views

    def _prepared(self, t: Tensor) -> Tensor:
        x = self._device.to_device(t)
        if self.dtype == torch.float32:
            x = x.float()
        if x.ndim == 4:  # stored as (B, H, W, C)
            x = x.permute(0, 3, 1, 2).contiguous(memory_format=self._device.memory_format)
        return x


def prefetch_to_device(batches: Iterable[tuple[Tensor, Tensor]], device: Device) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the same batches on the device, in order. On CUDA the next batch is copied from pinned memory on a stream
    of its own while the current one is used."""
    if device.accelerator.type != "cuda":
        for x, y in batches:
            yield device.to_device(x), device.to_device(y)
        return
    copies = torch.cuda.Stream(device.accelerator)  # type: ignore[no-untyped-call]
    previous: tuple[Tensor, Tensor] | None = None
    for x, y in batches:
        with torch.cuda.stream(copies):
            copied = device.to_device(x), device.to_device(y)
        if previous is not None:
            yield _wait_for_copy(previous, copies, device)
        previous = copied
    if previous is not None:
        yield _wait_for_copy(previous, copies, device)


def _wait_for_copy(batch: tuple[Tensor, Tensor], copies: torch.cuda.Stream, device: Device) -> tuple[Tensor, Tensor]:
    """Have the computing stream wait for the copy, and keep the batch's memory from reuse until it has used it."""
    computing = torch.cuda.current_stream(device.accelerator)
    computing.wait_stream(copies)
    for tensor in batch:
        tensor.record_stream(computing)
    return batch
