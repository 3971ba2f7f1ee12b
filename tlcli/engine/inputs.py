"""The splits of a run as loaders, opened as its decisions say."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from msgspec import structs

from tlcli.data.dataset import preload_images
from tlcli.device import Device
from tlcli.engine.activations import SplitActivations, Workload
from tlcli.engine.decisions import Decisions, device_with
from tlcli.engine.loaders import ActivationLoader, ActivationTensors, BatchLoader, ImageLoader
from tlcli.errors import TlcliError
from tlcli.reporter import Reporter
from tlcli.specs import CacheMode, Sampler, Tta
from tlcli.text import size_text

MAX_EVALUATION_BATCH = 64  # also at most four times the training batch, whose backward pass needs as much memory
SPLIT_NAMES = ("train", "train_eval", "val", "test")


class Inputs:
    """Opens splits as `decisions` say. A split whose activations cannot be written is read from images, with a note."""

    def __init__(self, decisions: Decisions, workload: Workload, split_names: Sequence[str] = SPLIT_NAMES) -> None:
        if workload.spec.tta is Tta.flip:
            decisions = decisions.without(("val", "test"), "tta=flip evaluates mirrored images, too")
        self.decisions, self.workload = decisions, workload
        self.device = device_with(workload, decisions.train_dtype, decisions.eval_format)
        names = [name for name in split_names if name in decisions.cached]
        self.cached = {name: workload.cached_split(name, names, decisions.eval_format) for name in names}

    def open(self, split_name: str, reporter: Reporter) -> BatchLoader:
        """Return the loader of a split, after its missing activations are computed, or its images decoded ahead."""
        split = self.cached.get(split_name)
        if split is None:
            return image_loader(self.workload, self.device, split_name, reporter, self.decisions.views)
        missing = [view for view in split.views if not view.filled]
        # a worker decodes whole batches, one image after the other
        if len(missing) > 1 or (missing and len(missing[0]) <= self.device.workers * missing[0].batches.batch_size):
            preload_images([missing[0].batches.split], reporter)
        try:
            views = [self._tensors(source, split_name, reporter) for source in split.views]
        except OSError as error:  # the disk is full, or its folder was removed
            reason = f"activations cannot be written ({error.strerror or error})"
            if self.workload.spec.cache.mode is CacheMode.require:
                raise TlcliError(f"cache.mode=require: {reason}") from error
            reporter.note(f"{reason}: reading images instead")
            lost = {name for name, split in self.cached.items() if not all(view.filled for view in split.views)}
            lost = {*self.device.ranks.broadcast(sorted(lost)), split_name}
            if "train" in lost:  # the others were read from one pool with it
                lost |= {"train_eval", "val"}
            self.decisions = self.decisions.without(lost, reason)
            self.cached = {name: split for name, split in self.cached.items() if name in self.decisions.cached}
            return self.open(split_name, reporter)
        return ActivationLoader(
            views,
            split.rows,
            self.workload.split(split_name),
            network=split.cut.suffix,
            head=split.workload.plain_head(split.cut),
            dtype=self.decisions.suffix_dtype,
            device=self.device,
            batch_size=self.workload.spec.batch_size,
            seed=self.workload.spec.seed,
            balanced=self.workload.spec.sampler is Sampler.balanced,
        )

    def _tensors(self, source: SplitActivations, split_name: str, reporter: Reporter) -> ActivationTensors:
        split, compiled = self.cached[split_name], split_name in self.decisions.compiled
        extractor = split.workload.extractor(split.cut, self.decisions.eval_format, compiled=compiled)
        entry = source.entry(reporter, extractor)
        try:
            tensors = self.workload.session.tensors(entry)
        except OSError as error:  # an entry may be removed between being found and being read
            if self.device.ranks.size > 1:  # the others go on
                raise TlcliError(f"cached activations cannot be read: {error}") from error
            tensors = self.workload.session.tensors(source.entry(reporter, extractor))
        assert source.found is not None
        # the entry may be an earlier run's, and compiling may have failed
        names = {split_name} if str(source.found.metadata.get("computed")).startswith("compiled") else set()
        self.decisions = structs.replace(self.decisions, compiled=self.decisions.compiled - {split_name} | names)
        return tensors

    def add_reason(self, name: str, reason: str) -> None:
        self.decisions = structs.replace(self.decisions, reasons={**self.decisions.reasons, name: reason})

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
                "probe" if name == "train_eval" else name: [source.key for source in split.views]
                for name, split in self.cached.items()
            },
        }

    @property
    def summary(self) -> str:
        """One line on what is read from the cache, what is computed, and the cost."""
        reasons = self.decisions.reasons
        names = [name for name in ("train_eval", "val", "test") if name in reasons]
        uncached = [f"{name} reads images: {reasons[name]}" for name in names]
        if "train" not in self.cached:
            uncached = [f"training reads images: {reasons['train']}"]
        if not self.cached:
            return "; ".join(uncached)
        sources = self.sources()
        missing = [source for source in sources if not source.filled]
        splits = f" ({', '.join(self.cached)})" if "train" not in self.cached else ""
        shown, done = missing or sources, "computed once and cached" if missing else "read from cache"
        text = f"{done}{splits}: {sum(map(len, shown)):,} rows, {size_text(sum(source.nbytes for source in shown))}"
        speeds = [source.extractor.compute_format.images_per_second for source in missing]
        if seconds := sum(len(source) / speed for source, speed in zip(missing, speeds, strict=True) if speed):
            text += f", about {seconds:.0f} s"
        return "; ".join([text, *uncached])

    def checksums(self) -> dict[str, list[str]]:
        """Return the checksums of the activations that have been opened, by key."""
        entries = [source.found for source in self.sources() if source.found is not None]
        return {entry.key: list(entry.checksums) for entry in entries}

    def extraction(self) -> dict[str, Any] | None:
        """Return how the extractions of this run went, for run.json; None if there were none."""
        done = [source.extraction for source in self.sources() if source.extraction is not None]
        if not done:
            return None
        totals = {key: sum(extraction[key] for extraction in done) for key in ("images", "seconds", "compile_seconds")}
        speed = totals["images"] / max(totals["seconds"] - totals["compile_seconds"], 1e-9)  # with decoding
        totals = {key: round(total, 3) for key, total in totals.items()}
        why = "; ".join(dict.fromkeys(extraction["why"] for extraction in done))
        return {**done[0], **totals, "images_per_second": round(speed, 1), "why": why}

    def sources(self) -> list[SplitActivations]:
        """Return each of the activations once; several splits may read the same."""
        return list({source.key: source for split in self.cached.values() for source in split.views}.values())


def image_loader(
    workload: Workload, device: Device, split_name: str, reporter: Reporter, views: int | None = None
) -> ImageLoader:
    """Return the loader of a split that is read from images, of which as many as fit are decoded into memory."""
    spec, is_train, split = workload.spec, split_name == "train", workload.split(split_name)
    preload_images([split], reporter)
    augmentation = spec.augment.build(replace(workload.preprocessing, size=workload.train_size)) if is_train else None
    transforms = None
    if augmentation is not None and transforms_on_device(device.accelerator):
        augmentation, transforms = replace(augmentation, transforms=None), augmentation.transforms
    batch_size = spec.batch_size if is_train else min(MAX_EVALUATION_BATCH, 4 * spec.batch_size)
    batches, network = workload.batches(split, batch_size, augmentation), workload.classifier.network
    if is_train:
        return ImageLoader(batches, device, network, device.train_dtype, views, transforms)
    mirrors = split_name in ("val", "test") and spec.tta is Tta.flip
    return ImageLoader(batches, device, network, device.eval_dtype, mirrors=mirrors)


def transforms_on_device(accelerator: torch.device) -> bool:
    """Return True if transforms run on the device; crops always run on the CPU, so that less is copied."""
    return accelerator.type == "cuda"
