"""The splits of a run as loaders, opened as its decisions say."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from tlcli.data.batches import ImageBatches
from tlcli.data.dataset import preload_images
from tlcli.device import Device
from tlcli.engine.activations import CachedSplit, SplitActivations, Workload, row_indices
from tlcli.engine.decisions import Decisions
from tlcli.engine.loaders import ActivationLoader, ActivationTensors, BatchLoader, ImageLoader
from tlcli.errors import TlcliError
from tlcli.reporter import Reporter
from tlcli.specs import CacheMode
from tlcli.store import CacheEntry
from tlcli.text import size_text
from tlcli.transfer.cut import Cut

MAX_EVALUATION_BATCH = 64
"""Images per forward pass of evaluation; also at most four times the training batch, whose backward pass needs as much
memory."""
SPLIT_NAMES = ("train", "train_eval", "val", "test")
ENTRY_NAMES = {"train_eval": "probe"}
"""Names of splits in run.json's `cache.entries` that differ from those in the code."""


@dataclass(frozen=True)
class Loaders:
    """What a run reads before its test; `train_eval` is train as evaluation sees it, if the head needs a probe."""

    train: BatchLoader
    val: BatchLoader
    train_eval: BatchLoader | None


class Inputs:
    """Opens splits as `decisions` say. A split whose activations cannot be written is read from images: `decisions`
    then say so, and a note does."""

    def __init__(self, decisions: Decisions, workload: Workload, split_names: Sequence[str] = SPLIT_NAMES) -> None:
        self.decisions, self.workload = decisions, workload
        self.device = decisions.device(workload)
        self.preprocessing = workload.preprocessing
        names = [name for name in split_names if name in decisions.cached]
        self.cached = {name: workload.cached_split(name, names, decisions.eval_format) for name in names}

    def open_all(self, reporter: Reporter) -> Loaders:
        """Open what a run reads before its test."""
        train_eval = self.open("train_eval", reporter) if self.workload.needs_probe else None
        return Loaders(self.open("train", reporter), self.open("val", reporter), train_eval)

    def open(self, split_name: str, reporter: Reporter) -> BatchLoader:
        """Return the loader of a split; nothing runs on its images before. Missing activations are computed."""
        split = self.cached.get(split_name)
        if split is None:
            return image_loader(self.workload, self.device, split_name, reporter)
        try:
            views = [self._tensors(split, source, split_name, reporter) for source in split.views]
        except OSError as error:  # the disk is full, or its folder was removed
            self._fall_back(split_name, f"activations cannot be written ({error.strerror or error})", reporter)
            return self.open(split_name, reporter)
        images = self.workload.split(split_name)
        return ActivationLoader(
            views,
            row_indices(split.pool, images),
            torch.from_numpy(images.labels),
            network=split.cut.suffix,
            head=self.workload.plain_head(split.cut),
            dtype=self.decisions.suffix_dtype,
            device=self.device,
            batch_size=self.workload.spec.batch_size,
            seed=self.workload.spec.seed,
        )

    @property
    def trained_network(self) -> nn.Module:
        """What runs on the batches of train: the suffix, or the whole network."""
        cut = self.workload.cut if "train" in self.decisions.cached else None
        return cut.suffix if isinstance(cut, Cut) else self.workload.classifier.network

    def _tensors(
        self, split: CachedSplit, source: SplitActivations, split_name: str, reporter: Reporter
    ) -> ActivationTensors:
        compiled = split_name in self.decisions.compiled
        extractor = self.workload.extractor(split.cut, self.decisions.eval_format, compiled=compiled)
        for attempt in (1, 2):  # an entry may be removed between being found and being read
            entry = source.entry(reporter, extractor)
            try:
                tensors = self.workload.session.reader.open(entry)
            except FileNotFoundError:
                if attempt == 2:
                    raise
                continue
            break
        # the entry may be an earlier run's, and compiling may have failed
        names = {split_name} if str(entry.metadata.get("computed")).startswith("compiled") else set()
        self.decisions = replace(self.decisions, compiled=self.decisions.compiled - {split_name} | names)
        return tensors

    def _fall_back(self, split_name: str, reason: str, reporter: Reporter) -> None:
        """Read a split, and all others whose activations are missing, from images."""
        if self.workload.spec.cache.mode is CacheMode.require:
            raise TlcliError(f"cache.mode=require: {reason}")
        reporter.note(f"{reason}: reading images instead")
        lost = {name for name, split in self.cached.items() if not all(view.filled for view in split.views)}
        lost.add(split_name)
        self.decisions = self.decisions.without(lost, reason)
        self.cached = {name: split for name, split in self.cached.items() if name not in lost}

    # -- for run.json and the plan

    @property
    def cache_info(self) -> dict[str, Any]:
        """The value of `cache` in run.json."""
        train = self.cached.get("train")
        return {
            "used": train is not None,
            "key": train.views[0].key if train else None,
            "why": self.decisions.reasons.get("train", ""),
            "at": self.decisions.cut,
            "entries": {
                ENTRY_NAMES.get(name, name): [source.key for source in split.views]
                for name, split in self.cached.items()
            },
        }

    @property
    def numerics(self) -> dict[str, str]:
        """How the formats of training and evaluation were chosen."""
        return {use: self.decisions.reasons.get(use, "") for use in ("training", "evaluation")}

    @property
    def summary(self) -> str:
        """What is read from the cache, what is computed and what that costs, in one line."""
        reasons = self.decisions.reasons
        if "train" in self.cached:
            uncached = [f"{name} reads images: {reasons[name]}" for name in ("val", "test") if name in reasons]
        else:
            uncached = [f"training reads images: {reasons['train']}"]
        if not self.cached:
            return "; ".join(uncached)
        sources = self._sources()
        missing = [source for source in sources if not source.filled]
        names = f" ({', '.join(self.cached)})" if "train" not in self.cached else ""
        shown = missing or sources
        size = f"{sum(map(len, shown)):,} rows, {size_text(sum(source.nbytes for source in shown))}"
        words = f"computed once and cached{names}: {size}" if missing else f"read from cache{names}: {size}"
        speeds = [source.extractor.compute_format.images_per_second for source in missing]
        if missing and all(speeds):
            seconds = sum(len(source) / (speed or 1) for source, speed in zip(missing, speeds, strict=True))
            words += f", about {seconds:.0f} s"
        return "; ".join([words, *uncached])

    def checksums(self) -> dict[str, list[str]]:
        """Return the checksums of the activations that have been opened, by key."""
        return {entry.key: list(entry.checksums) for entry in self._entries()}

    def extraction(self) -> dict[str, Any] | None:
        """Return how the extractions of this run went, for run.json; None if there were none."""
        speeds = [source.speed for source in self._sources() if source.speed is not None]
        if not speeds:
            return None
        total = speeds[0]
        for speed in speeds[1:]:
            total = total.plus(speed)
        return {
            "images": total.images,
            "seconds": round(total.seconds, 3),
            "compile_seconds": round(total.compile_seconds, 3),
            "images_per_second": round(total.images_per_second, 1),
            "dtype": total.dtype,
            "memory_format": total.memory_format,
            "why": total.reason,
        }

    def _sources(self) -> list[SplitActivations]:
        """Each of the activations once; several splits may read the same."""
        return list({source.key: source for split in self.cached.values() for source in split.views}.values())

    def _entries(self) -> list[CacheEntry]:
        return [source.found for source in self._sources() if source.found is not None]


def image_loader(workload: Workload, device: Device, split_name: str, reporter: Reporter) -> ImageLoader:
    """Return the loader of a split that is read from images, of which as many as fit are decoded into memory."""
    spec, is_train, split = workload.spec, split_name == "train", workload.split(split_name)
    preload_images([split], reporter)
    augmentation = spec.augment.build(workload.preprocessing) if is_train else None
    transforms = None
    if augmentation is not None and transforms_on_device(device.accelerator):
        augmentation, transforms = replace(augmentation, transforms=None), augmentation.transforms
    batches = ImageBatches(
        split,
        workload.preprocessing,
        batch_size=spec.batch_size if is_train else min(MAX_EVALUATION_BATCH, 4 * spec.batch_size),
        workers=device.workers,
        pin_memory=device.accelerator.type == "cuda",
        augmentation=augmentation,
        seed=spec.seed,
    )
    return ImageLoader(
        batches,
        workload.preprocessing,
        device,
        network=workload.classifier.network,
        dtype=device.train_dtype if is_train else device.eval_dtype,
        views=spec.cache.views if is_train else None,
        transforms=transforms,
    )


def transforms_on_device(accelerator: torch.device) -> bool:
    """Return True if colors are changed, images rotated and parts erased on the device. Crops are taken where images
    are decoded: what they leave is less to copy."""
    return accelerator.type == "cuda"
