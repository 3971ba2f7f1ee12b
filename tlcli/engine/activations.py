"""Activations: what the frozen part gives for each image, computed once and read from then on.

A key stands for everything that the values depend on, so that an entry is right or is not found:
    the prefix: its operations, and the digest of every tensor that it uses (this says where the cut is, too)
    the images: names, sizes and content digests, in order; the preprocessing; the rules and library that decode
    the view: none, or its number with the augmentation and the seed
    the number format of arithmetic and of storage, the kind of device, the versions of torch, torchvision and timm
"""

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tlcli.data.batches import ImageBatches, epoch_order
from tlcli.data.decode import decoder
from tlcli.data.preprocess import Preprocessing
from tlcli.data.source import Split
from tlcli.device import SHORT, Device
from tlcli.engine.extraction import Extractor, Speed
from tlcli.engine.live import Batch
from tlcli.reporter import Reporter
from tlcli.specs import AugmentSpec
from tlcli.store import CacheEntry, Column, Store
from tlcli.text import to_plain

Table = tuple[Tensor, ...]
"""A row for each image in every tensor that crosses the cut."""

ROWS = 1
"""The version of the rules by which an image becomes a row: part of every key."""
READ_BYTES, READ_ROWS = 4 * 1024 * 1024, 1024
"""What is read at a time, at the most, where a batch is less: to gather a few rows costs as much as to gather many."""


@dataclass(frozen=True)
class View:
    """An augmented view of each image: its number, and what draws it."""

    number: int
    seed: int
    augment: AugmentSpec


def activations_key(
    prefix_digest: str,
    preprocessing: Preprocessing,
    images: str,
    view: View | None,
    dtype: torch.dtype,
    columns: Sequence[Column],
    device_kind: str,
) -> str:
    """The digest of all that activations depend on; `images` is the fingerprint of the split."""
    ingredients = {
        "prefix": prefix_digest,
        "preprocessing": preprocessing.to_json(),
        "images": images,
        "decoder": decoder(),
        "rows": ROWS,
        "view": None if view is None else to_plain({"kind": view.augment.kind, **asdict(view)}),
        "dtype": SHORT[dtype],
        "columns": [asdict(column) for column in columns],
        "device": device_kind,
        "versions": {name: version(name) for name in ("torch", "torchvision", "timm", "Pillow")},
    }
    return hashlib.sha256(json.dumps(ingredients, sort_keys=True).encode()).hexdigest()


class SplitActivations:
    """The rows of one split, in its order: in the store, or extracted into it when they are first wanted."""

    def __init__(
        self,
        store: Store,
        batches: ImageBatches,
        extractor: Extractor,
        key: str,
        columns: tuple[Column, ...],
        view: View | None,
        facts: Mapping[str, Any],
    ) -> None:
        self._store = store
        self._batches = batches
        self.extractor = extractor
        self._columns = columns
        self._view = view
        self._facts = facts
        self.key = key
        self.speed: Speed | None = None
        self.found: CacheEntry | None = None

    def __len__(self) -> int:
        """The number of rows."""
        return len(self._batches.split)

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return len(self) * sum(column.nbytes for column in self._columns)

    @property
    def filled(self) -> bool:
        """Whether they are in the store, as far as a quick look tells."""
        return self._store.exists(self.key)

    def entry(self, reporter: Reporter) -> CacheEntry:
        """The entry, extracted first where it is missing or damaged. Raises OSError where it cannot be written."""
        self.found = self._store.find(self.key)
        if self.found is None:
            waiting = lambda: reporter.note("activations: another process computes them, waiting")  # noqa: E731
            with self._store.lock_for_write(self.key, waiting):
                self.found = self._store.find(self.key) or self._extract(reporter)
        return self.found

    def _extract(self, reporter: Reporter) -> CacheEntry:
        start = time.perf_counter()
        self.extractor.prepare(reporter)
        compiling = time.perf_counter() - start
        facts = {**self._facts, "computed": self.extractor.why}
        label = f"activations of {self._facts['split']}" + (f", view {self._view.number}" if self._view else "")
        with (
            self._store.create(self.key, len(self), self._columns, facts) as writer,
            reporter.track(label, len(self)) as advance,
        ):
            for images, labels in self._batches.in_order(view=self._view.number if self._view else None):
                writer.append([memoryview(_bytes(t)) for t in self.extractor(images)])
                advance(len(labels))
        numerics = self.extractor.numerics
        self.speed = Speed(
            images=len(self),
            seconds=time.perf_counter() - start,
            compile_seconds=compiling,
            dtype=SHORT[numerics.dtype],
            memory_format=str(numerics.memory_format).removeprefix("torch."),
            why=self.extractor.why,
        )
        assert writer.entry is not None
        return writer.entry


def _bytes(t: Tensor) -> Any:
    """The memory of a contiguous tensor on the CPU."""
    return t.contiguous().reshape(-1).view(torch.uint8).numpy()


class Tables:
    """Opens entries as tensors: in memory while they fit in `ram_bytes`, else mapped from their files, of which the
    system keeps in memory what it has room for. What is in memory stays for the next job of the process."""

    def __init__(self, ram_bytes: int) -> None:
        self._left = ram_bytes
        self._held: dict[str, Table] = {}

    def open(self, entry: CacheEntry) -> Table:
        """The tensors of an entry, each (rows, ...). Raises FileNotFoundError where somebody has just removed it."""
        if entry.key in self._held:
            return self._held[entry.key]
        table = tuple(_mapped(entry, i) for i in range(len(entry.columns)))
        if entry.nbytes <= self._left:
            self._left -= entry.nbytes
            table = self._held[entry.key] = tuple(t.clone() for t in table)
        return table


def _mapped(entry: CacheEntry, i: int) -> Tensor:
    column = entry.columns[i]
    dtype: torch.dtype = getattr(torch, column.dtype)
    shape = (entry.rows, *column.shape)
    try:
        flat = torch.from_file(str(entry.file(i)), shared=False, size=torch.Size(shape).numel(), dtype=dtype)
    except RuntimeError:
        entry.file(i).stat()  # FileNotFoundError, where that is why
        raise
    return flat.view(shape)


class ActivationLoader:
    """Rows of activations as the loop reads them, in the order in which live images would come.

    Args:
        tables: one for each view, or one in all.
        rows: where the images of this split stand in them.
        network: what takes the activations: the suffix.
        head: the layer that the suffix is, where it is one bare linear layer. Its steps are so short that a second
            thread costs more than it brings, and a hundred times that on a busy machine.
        dtype: the number format that it runs in.
    """

    def __init__(
        self,
        tables: Sequence[Table],
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
        self.network = network
        self.head = head
        self.threads = None if head is None else 1
        self.dtype = dtype
        self._tables = tables
        self._rows = rows
        self._labels = device.put(labels)
        self._device = device
        self._batch_size = batch_size
        self._seed = seed

    def __len__(self) -> int:
        """The number of images."""
        return len(self._rows)

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        """Every image once, in the order of this epoch (1, 2, ...), in the view whose turn it is; without the first
        `start` batches."""
        order = torch.from_numpy(epoch_order(len(self), self._seed, number))
        table = self._tables[(number - 1) % len(self._tables)]
        return self._read(table, order, self._batch_size, start)

    def in_order(self) -> Iterator[Batch]:
        """Every image once, in order, in the first table."""
        return self._read(self._tables[0], torch.arange(len(self)), max(self._rows_at_once(), self._batch_size))

    def _rows_at_once(self) -> int:
        row_bytes = sum(t[0].numel() * t.element_size() for t in self._tables[0])
        return max(1, min(READ_ROWS, READ_BYTES // max(1, row_bytes)))

    def _read(self, table: Table, order: Tensor, batch_size: int, start: int = 0) -> Iterator[Batch]:
        """The batches from number `start` on. What is read at a time begins at the same batches whatever `start` is, so
        that each lies in memory as it would have without one: kernels may round by that."""
        rows, labels = self._rows[order], self._labels[order.to(self._labels.device)]
        many = max(1, self._rows_at_once() // batch_size)
        for chunk in range(start - start % many, -(-len(order) // batch_size), many):
            part = slice(chunk * batch_size, (chunk + many) * batch_size)
            read = [torch.split(self._ready(t.index_select(0, rows[part])), batch_size) for t in table]
            batches = zip(zip(*read, strict=True), torch.split(labels[part], batch_size), strict=True)
            for x, y in islice(batches, max(0, start - chunk), None):
                yield tuple(t.detach() for t in x), y  # else autograd would mind what is written into one of them

    def _ready(self, t: Tensor) -> Tensor:
        x = self._device.put(t)
        if self.dtype == torch.float32:
            x = x.float()
        if x.ndim == 4:  # stored as (B, H, W, C)
            x = x.permute(0, 3, 1, 2).contiguous(memory_format=self._device.memory_format)
        return x


def merge_splits(splits: Sequence[Split]) -> Split:
    """The images of several splits of the same source together, by position and each once: a validation split that
    is held out anew, with another seed, then needs no other activations."""
    first = splits[0]
    indices, places = np.unique(np.concatenate([split.indices for split in splits]), return_index=True)
    return Split(first.images, indices, np.concatenate([split.labels for split in splits])[places])


def row_indices(pool: Split, split: Split) -> Tensor:
    """Where the images of a split stand in a pool that has them all."""
    return torch.from_numpy(np.searchsorted(pool.indices, split.indices))
