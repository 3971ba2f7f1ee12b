"""What the loop reads: live images or cached activations, as `planning` decided."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import nn

from tlcli.data.augment import Augmentation, make_augmentation
from tlcli.data.batches import ImageBatches
from tlcli.data.dataset import Dataset, Split
from tlcli.data.preprocess import Preprocessing
from tlcli.data.reading import preload_images
from tlcli.device import Device
from tlcli.engine.activations import ActivationLoader, SplitActivations, Table, Tables, row_indices
from tlcli.engine.extraction import Speed
from tlcli.engine.formats import Decisions
from tlcli.engine.live import Batch, ImageLoader
from tlcli.errors import TlcliError
from tlcli.models.classifier import Classifier
from tlcli.reporter import Reporter
from tlcli.specs import CacheMode, TrainSpec
from tlcli.store import CacheEntry

EVALUATION_BATCH = 64
"""Images a forward pass of evaluation at the most; at most four times the training batch, whose backward pass needs as
much memory."""


class BatchLoader(Protocol):
    """One split as the loop reads it: batches (x, y) on the device, x as `network` takes it in the format `dtype`.

    `threads` of arithmetic are best for it on a CPU (None: all). Where the features of a head are read, `head` is it.
    """

    network: nn.Module
    dtype: torch.dtype
    threads: int | None
    head: nn.Linear | None

    def __len__(self) -> int:
        """The number of images."""

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        """Every image once, in the order of this epoch (1, 2, ...), without the first `start` batches."""

    def in_order(self) -> Iterator[Batch]:
        """Every image once, in order, as evaluation sees it."""


@dataclass(frozen=True)
class Inputs:
    """What a run reads before its test; `probe` is train as evaluation sees it."""

    train: BatchLoader
    probe: BatchLoader
    val: BatchLoader


def image_size(spec: TrainSpec) -> int | None:
    """The size that the user or the data set names, in pixels a side; None: the backbone's own."""
    return spec.image.size or spec.dataset.image_size


def preprocessing_for(spec: TrainSpec, model: Classifier) -> Preprocessing:
    """How images become what this model takes: the spec's values, else those that its weights expect."""
    own = model.architecture
    return Preprocessing(
        size=image_size(spec) or own.size,
        fit=spec.image.fit,
        mean=spec.image.mean or own.mean,
        std=spec.image.std or own.std,
    )


@dataclass
class InputPlan:
    """Where each split comes from: `cached` has those that are read from activations, by train, probe, val and test.

    `line` says to people what was decided and why, `facts` to run.json; `numerics` says how the formats were chosen.
    """

    device: Device
    preprocessing: Preprocessing
    line: str
    facts: dict[str, Any]
    numerics: dict[str, str]
    live: "LiveFeeds"
    cached: "dict[str, CachedFeed]"

    def open(self, reporter: Reporter) -> Inputs:
        """Fill what is missing in the cache; where that fails, that split is live, and a note says so."""
        return Inputs(
            train=self._feed("train", reporter), probe=self._feed("probe", reporter), val=self._feed("val", reporter)
        )

    def open_test(self, reporter: Reporter) -> BatchLoader:
        """The test set: nothing runs on it before this is called."""
        return self._feed("test", reporter)

    @property
    def formats(self) -> Decisions:
        """How this run computes, as far as its splits have been opened."""
        device, how = self.device, (entry.metadata.get("computed") for entry in self._entries())
        compiled = any(str(computed).startswith("compiled") for computed in how)
        return Decisions(device.train_dtype, device.eval_dtype, device.memory_format, frozenset(self.cached), compiled)

    def checksums(self) -> dict[str, list[str]]:
        """Of the activations that have been opened, by key."""
        return {entry.key: list(entry.checksums) for entry in self._entries()}

    def _entries(self) -> list[CacheEntry]:
        sources = (source for feed in self.cached.values() for source in feed.sources)
        return [source.found for source in sources if source.found is not None]

    def extraction(self) -> dict[str, Any] | None:
        """How the extractions of this run went, for run.json; None where everything was there or is live."""
        speeds: dict[str, Speed] = {}
        for feed in self.cached.values():
            speeds |= {a.key: a.speed for a in feed.sources if a.speed is not None}
        if not speeds:
            return None
        first, *others = speeds.values()
        for other in others:
            first = first.plus(other)
        return {
            "images": first.images,
            "seconds": round(first.seconds, 3),
            "compile_seconds": round(first.compile_seconds, 3),
            "images_per_second": round(first.images_per_second, 1),
            "dtype": first.dtype,
            "memory_format": first.memory_format,
            "why": first.why,
        }

    def _feed(self, role: str, reporter: Reporter) -> BatchLoader:
        if role not in self.cached:
            return self.live.feed(role, reporter)
        try:
            return self.cached[role].open(self.device, reporter)
        except OSError as error:  # a disk that is full now, a folder that was taken away
            why = f"activations cannot be written ({error.strerror or error})"
            if self.live.spec.cache.mode is CacheMode.require:
                raise TlcliError(f"cache.mode=require: {why}") from error
            reporter.note(f"{why}: what is not in the cache is live")
            self.cached = {
                name: feed
                for name, feed in self.cached.items()
                if name != role and all(source.filled for source in feed.sources)
            }
            if self.facts["used"] and "train" not in self.cached:
                self.facts |= {"used": False, "key": None, "why": why}
            return self._feed(role, reporter)


@dataclass(frozen=True)
class CachedFeed:
    """How a split is read from activations: `sources` are its views, or the one that has its images as they are."""

    sources: tuple[SplitActivations, ...]
    pool: Split
    split: Split
    network: nn.Module
    head: nn.Linear | None
    dtype: torch.dtype
    batch_size: int
    seed: int
    tables: Tables

    def open(self, device: Device, reporter: Reporter) -> BatchLoader:
        return ActivationLoader(
            [self._table(source, reporter) for source in self.sources],
            row_indices(self.pool, self.split),
            torch.from_numpy(self.split.labels),
            network=self.network,
            head=self.head,
            dtype=self.dtype,
            device=device,
            batch_size=self.batch_size,
            seed=self.seed,
        )

    def _table(self, source: SplitActivations, reporter: Reporter) -> Table:
        """The rows of a source. Of what somebody removes between its being found and its being read there is one more
        try."""
        try:
            return self.tables.open(source.entry(reporter))
        except FileNotFoundError:
            return self.tables.open(source.entry(reporter))


@dataclass(frozen=True)
class LiveFeeds:
    """How a split is read live."""

    data: Dataset
    network: nn.Module
    spec: TrainSpec
    preprocessing: Preprocessing
    device: Device

    def feed(self, role: str, reporter: Reporter) -> BatchLoader:
        spec, device, train = self.spec, self.device, role == "train"
        split: Split = getattr(self.data, "train" if role == "probe" else role)
        preload_images([split], reporter)
        augmentation, changes = self._augmentation() if train else (None, None)
        batches = ImageBatches(
            split,
            self.preprocessing,
            batch_size=spec.batch_size if train else min(EVALUATION_BATCH, 4 * spec.batch_size),
            workers=device.workers,
            pin_memory=device.accelerator.type == "cuda",
            augmentation=augmentation,
            seed=spec.seed,
        )
        return ImageLoader(
            batches,
            self.preprocessing,
            device,
            network=self.network,
            dtype=device.train_dtype if train else device.eval_dtype,
            views=spec.cache.views if train else None,
            changes=changes,
        )

    def _augmentation(self) -> tuple[Augmentation | None, nn.Module | None]:
        """What happens to training images where they are decoded, and what of it is left for the device."""
        whole = make_augmentation(self.spec.augment, self.preprocessing)
        if whole is None or not changes_on(self.device.accelerator):
            return whole, None
        return replace(whole, changes=None), whole.changes


def changes_on(accelerator: torch.device) -> bool:
    """Whether colours are changed, images turned and parts erased on the device. Crops are taken where images are
    decoded: what they leave is less to copy."""
    return accelerator.type == "cuda"
