"""How a run computes: decided once by measuring and estimating, recorded in run.json, and followed from then on.

Rounding differs between dtypes, memory formats, batch sizes, and cached and uncached splits, so that only the same
decisions give the same metrics to the last digit. Nothing is computed for all images here: one small batch runs through
the network, as often as it takes to time it.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from tlcli.device import DTYPE_NAMES, DTYPES, Device
from tlcli.engine.activations import SplitActivations, Workload
from tlcli.engine.numerics import (
    MEASURE_BATCH_SIZE,
    Autotuner,
    ComputeFormat,
    allowed_formats,
    forward_step,
    training_step,
)
from tlcli.errors import UsageError
from tlcli.reporter import Reporter
from tlcli.specs import CacheMode
from tlcli.text import size_text
from tlcli.transfer.cut import Cut, NoCut

FORCE_COMPILE_IMAGES = 10**9
"""A number of expected images for which compiling always pays."""
SMALL_ROW_BYTES = 64 * 1024
"""Activations of at most this size per image are cached without an estimate: the next run reads them."""
READ_SECONDS_PER_BYTE, WRITE_SECONDS_PER_BYTE = 1e-9, 2e-9
"""What reading and writing activations is taken to cost: 1 and 0.5 GB/s, a slow SSD."""
_DTYPES = {DTYPE_NAMES[dtype]: dtype for dtype in DTYPES.values()}


@dataclass(frozen=True)
class Decisions:
    """The choices of a run, each with its reason.

    Args:
        train_dtype: precision of training.
        eval_dtype: precision of evaluation and of the frozen prefix.
        memory_format: layout of images and activation maps.
        cut: names of the first modules after the cut; None if nothing is cut off.
        extraction_batch: images per forward pass of the prefix.
        cached: the splits (train, train_eval, val, test) that are read from activations.
        compiled: those of them whose activations a compiled prefix computes.
        reasons: text by name: training, evaluation (precision and layout), train (cached or not), and each split for
            which the cache has no room.
    """

    train_dtype: torch.dtype
    eval_dtype: torch.dtype
    memory_format: torch.memory_format
    cut: str | None
    extraction_batch: int | None
    cached: frozenset[str]
    compiled: frozenset[str]
    reasons: Mapping[str, str]

    @property
    def suffix_dtype(self) -> torch.dtype:
        """The precision in which activations are evaluated: that of training if it reads them, too."""
        return self.train_dtype if "train" in self.cached else self.eval_dtype

    @property
    def eval_format(self) -> ComputeFormat:
        """The format of evaluation and of the frozen prefix."""
        return ComputeFormat(self.eval_dtype, self.memory_format, reason=self.reasons.get("evaluation", ""))

    def device(self, workload: Workload) -> Device:
        """Return the device of a workload with these formats."""
        return device_with(workload, ComputeFormat(self.train_dtype, self.memory_format), self.eval_format)

    def without(self, split_names: Iterable[str], reason: str) -> "Decisions":
        """Return the same with these splits uncached, for a reason."""
        names = frozenset(split_names) & self.cached
        return replace(
            self,
            cached=self.cached - names,
            compiled=self.compiled - names,
            reasons={**self.reasons, **dict.fromkeys(sorted(names), reason)},
        )

    def to_json(self) -> dict[str, Any]:
        """Return the value that run.json stores."""
        return {
            "train_precision": DTYPE_NAMES[self.train_dtype],
            "eval_precision": DTYPE_NAMES[self.eval_dtype],
            "channels_last": self.memory_format == torch.channels_last,
            "cut": self.cut,
            "extraction_batch": self.extraction_batch,
            "cached": sorted(self.cached),
            "compiled": sorted(self.compiled),
            "reasons": dict(self.reasons),
        }


def device_with(workload: Workload, train: ComputeFormat, evaluation: ComputeFormat) -> Device:
    """Return the device of a workload with these formats."""
    return Device(
        accelerator=workload.accelerator,
        train_dtype=train.dtype,
        eval_dtype=evaluation.dtype,
        memory_format=evaluation.memory_format,
        compile=workload.spec.device.compile,
        workers=workload.workers,
    )


def recorded_decisions(info: Mapping[str, Any]) -> Decisions | None:
    """Return the decisions in a run.json, of tlcli 0.1 or later; None if it does not have them."""
    try:
        if "decisions" in info:
            return _decisions_of(info["decisions"])
        precision, cache, extraction = (info.get(key) or {} for key in ("precision", "cache", "extraction"))
        train, evaluation = (_DTYPES[precision[use].removeprefix("torch.")] for use in ("train", "evaluate"))
        layout = "channels_last" in str(info.get("memory_format") or info["numerics"]["device"])
        names = {"train_eval" if name == "probe" else str(name) for name in cache.get("entries") or {}}
        cached = frozenset(names if cache.get("used") else names - {"train"})
        return Decisions(
            train_dtype=train,
            eval_dtype=evaluation,
            memory_format=torch.channels_last if layout else torch.contiguous_format,
            cut=cache.get("at"),
            extraction_batch=None,
            cached=cached,
            compiled=cached if str(extraction.get("why", "")).startswith("compiled") else frozenset(),
            reasons={"train": str(cache.get("why", ""))},
        )
    except (KeyError, TypeError, AttributeError, ValueError):
        return None


def _decisions_of(value: Mapping[str, Any]) -> Decisions:
    batch = value["extraction_batch"]
    return Decisions(
        train_dtype=_DTYPES[value["train_precision"]],
        eval_dtype=_DTYPES[value["eval_precision"]],
        memory_format=torch.channels_last if value["channels_last"] else torch.contiguous_format,
        cut=value["cut"],
        extraction_batch=None if batch is None else int(batch),
        cached=frozenset(map(str, value["cached"])),
        compiled=frozenset(map(str, value["compiled"])),
        reasons={str(name): str(reason) for name, reason in value["reasons"].items()},
    )


# -- deciding


def decide(workload: Workload) -> Decisions:
    """Measure formats, and decide for each split if it is read from images or from cached activations.

    Raises UsageError if cache.mode=require cannot be followed.
    """
    cut, spec = workload.cut, workload.spec
    cached: set[str] = set()
    reasons: dict[str, str] = {}
    uncached_reason = uncacheable_reason(workload)
    if uncached_reason is None:
        assert isinstance(cut, Cut)
        evaluation = measure_extraction(workload, cut)
        names = {"train", "val"} | ({"train_eval"} if workload.needs_probe or not workload.augments else set())
        missing = _missing(workload, names, evaluation)
        extractor = workload.extractor(cut, evaluation)
        row_bytes = sum(column.nbytes for column in extractor.columns())
        uncached_reason = not_worthwhile_reason(workload, evaluation, sum(map(len, missing)), row_bytes)
    if uncached_reason is None:
        assert isinstance(cut, Cut)
        cached, train = names, measure_suffix(workload, cut, evaluation)
    elif spec.cache.mode is CacheMode.require:
        raise UsageError(f"cache.mode=require: {uncached_reason}")
    else:
        train, evaluation = measure_network(workload)
        if workload.needs_probe and isinstance(workload.features_cut, Cut):
            _add_if_worthwhile(workload, evaluation, cached, "train_eval", 1, reasons)
        if isinstance(cut, Cut):
            _add_if_worthwhile(workload, evaluation, cached, "val", spec.epochs + 1, reasons)
    if isinstance(cut, Cut):  # test is read once: it is cached for later runs, if that is cheap
        _add_if_worthwhile(workload, evaluation, cached, "test", 1, reasons)
    reasons |= {"training": train.reason, "evaluation": evaluation.reason}
    reasons["train"] = uncached_reason or f"what comes before {cut.suffix_start} is frozen"  # type: ignore[union-attr]
    return Decisions(
        train_dtype=train.dtype,
        eval_dtype=evaluation.dtype,
        memory_format=evaluation.memory_format,
        cut=cut.suffix_start if isinstance(cut, Cut) else None,
        extraction_batch=workload.extractor(cut, evaluation).batch_size if isinstance(cut, Cut) else None,
        cached=frozenset(cached),
        compiled=_worth_compiling(workload, cached, evaluation),
        reasons=reasons,
    )


def uncacheable_reason(workload: Workload) -> str | None:
    """Return why training reads images at any cost; None if it could read activations."""
    cut, spec = workload.cut, workload.spec
    if isinstance(cut, NoCut):
        return cut.why
    if workload.augments and spec.cache.views is None:
        return f"augment={spec.augment.kind} is random in each epoch (cache.views=8 caches 8 views of each image)"
    return None


def not_worthwhile_reason(workload: Workload, option: ComputeFormat, images: int, row_bytes: int) -> str | None:
    """Return why training should not read activations, of which so many images' are missing: no room, or no gain."""
    spec, data, nbytes = workload.spec, workload.data, images * row_bytes
    reason = workload.session.store.no_room_reason(nbytes) if images else None
    if reason is not None or not images or row_bytes <= SMALL_ROW_BYTES or spec.cache.mode is CacheMode.require:
        return reason
    reads = len(data.train) * (spec.epochs + workload.needs_probe) + len(data.val) * (spec.epochs + 1)
    cached, uncached = _prefix_seconds(option, images, reads, row_bytes)
    if cached < uncached:
        return None
    return (
        f"{size_text(row_bytes)} per image: the frozen layers would take about {uncached:.0f} s in all, "
        f"and {cached:.0f} s with {size_text(nbytes)} of activations"
    )


def _add_if_worthwhile(
    workload: Workload, option: ComputeFormat, cached: set[str], split_name: str, reads: int, reasons: dict[str, str]
) -> None:
    """Add a split that is only evaluated, so many times, to the cached ones if that is faster and if there is room
    beside those that are still to be computed."""
    (source,) = workload.cached_split(split_name, cached | {split_name}, option).views
    if not source.filled:
        cached_seconds, seconds = _prefix_seconds(option, len(source), reads * len(source), source.row_bytes)
        if source.row_bytes > SMALL_ROW_BYTES and cached_seconds >= seconds:
            return
        pending = sum(other.nbytes for other in _missing(workload, cached, option))
        reason = workload.session.store.no_room_reason(pending + source.nbytes)
        if reason is not None:
            reasons[split_name] = reason
            return
    cached.add(split_name)


def _missing(workload: Workload, cached: Iterable[str], option: ComputeFormat) -> list[SplitActivations]:
    """Return the activations that are not in the store yet, each once."""
    names = sorted(cached)
    sources = {s.key: s for name in names for s in workload.cached_split(name, names, option).views}
    return [source for source in sources.values() if not source.filled]


def _prefix_seconds(option: ComputeFormat, images: int, reads: int, row_bytes: int) -> tuple[float, float]:
    """Return about how long the prefix takes for so many reads: with activations of so many images, and without."""
    seconds = 1 / (option.images_per_second or 1.0)
    writing = images * (seconds + row_bytes * WRITE_SECONDS_PER_BYTE)
    return writing + reads * row_bytes * READ_SECONDS_PER_BYTE, reads * seconds


def _worth_compiling(workload: Workload, cached: Iterable[str], option: ComputeFormat) -> frozenset[str]:
    """Return the splits whose prefix is worth compiling for the images that are missing."""
    names, compiled = sorted(cached), set()
    splits = {name: workload.cached_split(name, names, option) for name in names}
    for cut in {id(split.cut): split.cut for split in splits.values()}.values():
        own = {name for name, split in splits.items() if split.cut is cut}
        missing = {s.key: len(s) for name in own for s in splits[name].views if not s.filled}
        count, speed = sum(missing.values()), option.images_per_second or 1.0
        if count and workload.extractor(cut, option).estimate_seconds(count, speed) < count / speed:
            workload.extractor(cut, option, compiled=True).add_expected_images(count)
            compiled |= own
    return frozenset(compiled)


# -- measuring


def measure_extraction(workload: Workload, cut: Cut) -> ComputeFormat:
    """Return the fastest format of the prefix, with its speed."""
    sample = (_sample(workload),)
    return _autotuner(workload).choose(
        allowed_formats(workload.spec.device, workload.accelerator),
        len(sample[0]),
        f"extraction up to {cut.suffix_start}",
        lambda option: forward_step(cut.prefix, sample, workload.accelerator, option),
        measure_single=True,
    )


def measure_suffix(workload: Workload, cut: Cut, extraction: ComputeFormat) -> ComputeFormat:
    """Return the fastest format of training on activations, in the memory format of the extraction."""
    options = allowed_formats(workload.spec.device, workload.accelerator)
    if workload.plain_head(cut) is not None:  # so little work that no dtype is faster than float32
        return replace(extraction, dtype=options[0].dtype, images_per_second=None, reason="a linear layer")
    n, network = len(_sample(workload)), workload.classifier.network
    inputs = tuple(torch.rand(n, *shape) for shape in cut.shapes)
    return _autotuner(workload).choose(
        [option for option in options if option.memory_format == extraction.memory_format],
        n,
        f"training from {cut.suffix_start}",
        lambda option: training_step(cut.suffix, network, inputs, workload.accelerator, option),
    )


def measure_network(workload: Workload) -> tuple[ComputeFormat, ComputeFormat]:
    """Return the fastest formats of training the whole network on images and, in the same layout, of evaluating it."""
    workload.contract.train_mode()  # a training step is measured in the modes of training
    network, sample, accelerator = workload.classifier.network, (_sample(workload),), workload.accelerator
    options, tuner = allowed_formats(workload.spec.device, accelerator), _autotuner(workload)
    training = lambda option: training_step(network, network, sample, accelerator, option)  # noqa: E731
    forward = lambda option: forward_step(network, sample, accelerator, option)  # noqa: E731
    train = tuner.choose(options, len(sample[0]), "training", training)
    same_layout = [option for option in options if option.memory_format == train.memory_format]
    # even if it is one alone: the speed of the prefix is taken to be this one
    return train, tuner.choose(same_layout, len(sample[0]), "evaluation", forward, measure_single=True)


def _sample(workload: Workload) -> torch.Tensor:
    return torch.rand(min(MEASURE_BATCH_SIZE, max(2, workload.spec.batch_size)), 3, *[workload.preprocessing.size] * 2)


def _autotuner(workload: Workload) -> Autotuner:
    spec = workload.spec
    trainable = sorted(name for name, p in workload.classifier.network.named_parameters() if p.requires_grad)
    return Autotuner(
        workload.session.store,
        workload.accelerator,
        backbone=f"{spec.backbone.kind}/{spec.backbone.name}",
        size=workload.preprocessing.size,
        trains=hashlib.sha256(" ".join(trainable).encode()).hexdigest(),
    )


# -- following


def follow(recorded: Decisions, workload: Workload, reporter: Reporter, split_names: Iterable[str]) -> Decisions:
    """Return recorded decisions for these splits; what cannot be followed here is replaced, each with a note.

    Raises UsageError if cache.mode=require cannot be followed.
    """
    decisions = _with_supported_formats(recorded, workload, reporter)
    if "train" not in decisions.cached:  # then train_eval serves the probe alone, which was fitted before
        decisions = replace(decisions, cached=decisions.cached - {"train_eval"})
    cut, names = workload.cut, decisions.cached.intersection(split_names)
    reason = cut.why if isinstance(cut, NoCut) else None
    if names and reason is None:
        missing = sum(source.nbytes for source in _missing(workload, names, decisions.eval_format))
        reason = workload.session.store.no_room_reason(missing) if missing else None
    if names and reason is not None:
        if workload.spec.cache.mode is CacheMode.require:
            raise UsageError(f"cache.mode=require: {reason}")
        reporter.note(f"{' and '.join(sorted(names))}: reading images instead of activations ({reason})")
        decisions, names = decisions.without(names, reason), frozenset()
    for name in names & decisions.compiled:
        where = workload.cached_split(name, names, decisions.eval_format).cut
        extractor = workload.extractor(where, decisions.eval_format, compiled=True)
        extractor.add_expected_images(FORCE_COMPILE_IMAGES)
    return decisions


def _with_supported_formats(recorded: Decisions, workload: Workload, reporter: Reporter) -> Decisions:
    """Return the decisions with float32 and a memory format of this accelerator in place of what it does not have."""
    options = allowed_formats(workload.spec.device, workload.accelerator)
    dtypes, layouts = ({option.dtype for option in options}, [option.memory_format for option in options])
    changes: dict[str, Any] = {
        name: torch.float32 if torch.float32 in dtypes else options[0].dtype
        for name in ("train_dtype", "eval_dtype")
        if getattr(recorded, name) not in dtypes
    }
    if recorded.memory_format not in layouts:
        changes["memory_format"] = layouts[0]
    if not changes:
        return recorded
    was = ", ".join(sorted({str(getattr(recorded, name)).removeprefix("torch.") for name in changes}))
    new = ", ".join(sorted({str(value).removeprefix("torch.") for value in changes.values()}))
    reason = f"{new} in place of {was}, which is not available here"
    reporter.note(f"precision: {reason}")
    return replace(recorded, **changes, reasons={**recorded.reasons, "training": reason, "evaluation": reason})
