"""Batches of one split on the device: decoded from images (uncached), or read from activations (cached)."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain, islice
from typing import ClassVar

import torch
from torch import Tensor, nn

from tlcli.data.batches import ImageBatches, apply_transforms, split_order
from tlcli.data.images import Split
from tlcli.device import Device
from tlcli.ranks import ALONE, Ranks

Batch = tuple[tuple[Tensor, ...], Tensor]  # the inputs of the network, and the labels (B) int64
ActivationTensors = tuple[Tensor, ...]  # a row per image in each tensor that crosses the cut

READ_BYTES, READ_ROWS = 4 * 1024 * 1024, 1024  # read at once if a batch is smaller, at most: gathering few rows is slow


@dataclass(eq=False)
class ImageLoader:
    """Batches of images that are decoded, augmented and normalized on demand: x (B, 3, S, S) float32."""

    batches: ImageBatches
    device: Device
    network: nn.Module
    dtype: torch.dtype
    views: int | None = None  # augmented views per image, one per epoch in turn; None: a new one in each epoch
    transforms: nn.Module | None = None  # of training images, on the device: `batches` has not applied them
    mirrors: bool = False  # evaluation takes the mean over an image and its mirror image
    threads: ClassVar[None] = None
    head: ClassVar[None] = None

    def __len__(self) -> int:
        return len(self.batches.split)

    @property
    def ranks(self) -> Ranks:
        """The ranks among which the images of a batch are divided in an epoch."""
        return self.batches.ranks

    @property
    def positions(self) -> Tensor:
        """The position in the split of each image that `in_order` yields: all of them, or this rank's share."""
        return self.ranks.positions(len(self), self.batches.batch_size)

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch (1, 2, ...) from `start` on; of several ranks each has a share, maybe empty."""
        view = (number - 1) % self.views if self.views else None
        batches = prefetch_to_device(self.batches.epoch(number, view, start), self.device)
        if self.transforms is not None:
            pairs = zip(batches, self.batches.seeds(number, view, start), strict=True)
            batches = ((apply_transforms(self.transforms, images, seeds), labels) for (images, labels), seeds in pairs)
        return self._normalized(batches)

    def in_order(self) -> Iterator[Batch]:
        """Yield each image once, in order, as evaluation sees it."""
        return self._normalized(prefetch_to_device(self.batches.in_order(), self.device))

    def _normalized(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[Batch]:
        for images, labels in batches:
            x = images.contiguous(memory_format=self.device.memory_format)
            yield (self.batches.preprocessing.normalize(x),), labels


@dataclass(eq=False)
class ActivationLoader:
    """Batches of activations, in the order in which an ImageLoader would yield their images."""

    views: Sequence[ActivationTensors]  # of each augmented view, or of the images as they are
    rows: Tensor  # the index of each image of the split in them
    split: Split
    network: nn.Module  # the suffix of the cut
    head: nn.Linear | None  # the same if it is one plain linear layer
    dtype: torch.dtype
    device: Device
    batch_size: int
    seed: int
    balanced: bool = False
    mirrors: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self.threads = None if self.head is None else 1  # its steps are too short for a second thread
        self.ranks = self.device.ranks if self.head is None else ALONE  # and shorter than an exchange among ranks
        self.labels = self.device.to_device(torch.from_numpy(self.split.labels))
        row_bytes = sum(t[0].numel() * t.element_size() for t in self.views[0])
        self._rows_at_once = max(1, min(READ_ROWS, READ_BYTES // max(1, row_bytes)))

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def positions(self) -> Tensor:
        return self.device.ranks.positions(len(self), max(self._rows_at_once, self.batch_size))

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        order = split_order(self.split, self.seed, number, balanced=self.balanced) % len(self)
        view = self.views[(number - 1) % len(self.views)]
        return self._read(view, torch.from_numpy(order), self.batch_size, start, self.ranks)

    def in_order(self) -> Iterator[Batch]:
        return self._read(self.views[0], self.positions, max(self._rows_at_once, self.batch_size))

    def _read(
        self, tensors: ActivationTensors, order: Tensor, batch_size: int, start: int = 0, ranks: Ranks = ALONE
    ) -> Iterator[Batch]:
        """Yield this rank's share of the batches from number `start` on. Chunks begin at the same batches whatever
        `start` is, so that a batch has the same memory alignment in an interrupted epoch: kernels may round by that."""
        rows, labels = self.rows[order], self.labels[order.to(self.labels.device)]
        batches_per_chunk = max(1, self._rows_at_once // batch_size)
        for chunk in range(start - start % batches_per_chunk, -(-len(order) // batch_size), batches_per_chunk):
            part = slice(chunk * batch_size, (chunk + batches_per_chunk) * batch_size)
            sizes: int | list[int] = batch_size
            chosen, chosen_labels = rows[part], labels[part]
            if ranks.size > 1:
                own = torch.arange(len(chosen)) % batch_size % ranks.size == ranks.rank
                chosen, chosen_labels = chosen[own], chosen_labels[own.to(labels.device)]
                sizes = [int(batch.sum()) for batch in torch.split(own, batch_size)]
            stored = [self.device.to_device(t.index_select(0, chosen)) for t in tensors]
            inputs = [from_stored(t, self.dtype, self.device.memory_format) for t in stored]
            columns = [torch.split(t, sizes) for t in inputs]
            batches = zip(zip(*columns, strict=True), torch.split(chosen_labels, sizes), strict=True)
            for x, y in islice(batches, max(0, start - chunk), None):
                yield tuple(t.detach() for t in x), y  # else autograd objects to a write into one of the views


BatchLoader = ImageLoader | ActivationLoader
"""One split as device batches (x, y): x as `network` takes it, which runs in `dtype` and, on a CPU, is fastest with
`threads` (None: all). `head` is the linear layer that the network consists of if x are its features, else None."""


def from_stored(rows: Tensor, dtype: torch.dtype, memory_format: torch.memory_format) -> Tensor:
    """Return rows of activations as a suffix that runs in `dtype` takes them; maps are stored as (B, H, W, C)."""
    x = rows.float() if dtype == torch.float32 else rows
    return x.permute(0, 3, 1, 2).contiguous(memory_format=memory_format) if x.ndim == 4 else x


@cache
def _copy_stream(accelerator: torch.device) -> torch.cuda.Stream:
    """Return the stream of copies to an accelerator: memory that was allocated on one is used again on it alone."""
    return torch.cuda.Stream(accelerator)  # type: ignore[no-untyped-call]


def prefetch_to_device(batches: Iterable[tuple[Tensor, Tensor]], device: Device) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the same batches on the device, in order. On CUDA the next batch is copied from pinned memory on a stream
    of its own while the current one is used."""
    if device.accelerator.type != "cuda":
        for x, y in batches:
            yield device.to_device(x), device.to_device(y)
        return
    copies = _copy_stream(device.accelerator)
    previous: tuple[Tensor, Tensor] | None = None
    for batch in chain(batches, [None]):
        with torch.cuda.stream(copies):
            copied = None if batch is None else (device.to_device(batch[0]), device.to_device(batch[1]))
        if previous is not None:
            computing = torch.cuda.current_stream(device.accelerator)
            computing.wait_stream(copies)
            for tensor in previous:
                tensor.record_stream(computing)  # its memory is not reused before the batch has been used
            yield previous
        previous = copied
