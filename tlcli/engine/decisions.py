"""Decisions of a run on precision, layout, caching and the cut: made once, recorded in run.json, then followed.

Rounding differs between dtypes, memory formats, batch sizes, and cached and uncached splits, so that only the same
decisions give the same metrics to the last digit. Deciding runs one small batch through the network to time it.
"""

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, cast

import torch
from msgspec import Meta, Struct, ValidationError, convert, structs, to_builtins

from tlcli.device import DTYPE_NAMES, DTYPES, Device
from tlcli.engine.activations import SplitActivations, Workload
from tlcli.engine.numerics import (
    LAYOUT_NAMES,
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

SMALL_ROW_BYTES = 64 * 1024  # activations of at most this size per image are always cached: the next run reads them
READ_SECONDS_PER_BYTE, WRITE_SECONDS_PER_BYTE = 1e-9, 2e-9  # a slow SSD
DtypeName = Literal["float32", "bfloat16", "float16"]
_DTYPES = {DTYPE_NAMES[dtype]: dtype for dtype in DTYPES.values()}


class Decisions(Struct, frozen=True, kw_only=True):
    """The choices of a run, each with its reason, as run.json stores them.

    Args:
        eval_precision: of evaluation and of the frozen prefix.
        cut: names of the first modules after the cut; None if nothing is cut off.
        extraction_batch: images per forward pass of the prefix; None if nothing is cut off or if it is not recorded.
        cached: the splits (train, train_eval, val, test) that are read from activations.
        compiled: those of them whose activations a compiled prefix computes.
        reasons: text by name: training, evaluation (precision and layout), train (cached or not), and each split for
            which the cache has no room.
    """

    train_precision: DtypeName
    eval_precision: DtypeName
    channels_last: bool
    cut: str | None = None
    extraction_batch: Annotated[int, Meta(ge=1, le=4096)] | None = None
    cached: frozenset[str] = frozenset()
    compiled: frozenset[str] = frozenset()
    reasons: dict[str, str] = {}

    @property
    def suffix_dtype(self) -> torch.dtype:
        """The dtype in which activations are evaluated: that of training if it reads them, too."""
        return _DTYPES[self.train_precision if "train" in self.cached else self.eval_precision]

    @property
    def train_format(self) -> ComputeFormat:
        """The format of training."""
        return ComputeFormat(_DTYPES[self.train_precision], self.eval_format.memory_format)

    @property
    def eval_format(self) -> ComputeFormat:
        """The format of evaluation and of the frozen prefix."""
        return ComputeFormat(
            _DTYPES[self.eval_precision],
            torch.channels_last if self.channels_last else torch.contiguous_format,
            reason=self.reasons.get("evaluation", ""),
            batch_size=self.extraction_batch,
        )

    def without(self, split_names: Iterable[str], reason: str) -> "Decisions":
        """Return the same with these splits uncached, for a reason."""
        names = self.cached.intersection(split_names)
        return structs.replace(
            self,
            cached=self.cached - names,
            compiled=self.compiled - names,
            reasons={**self.reasons, **dict.fromkeys(sorted(names), reason)},
        )

    def to_json(self) -> Any:
        """Return the value that run.json stores."""
        return to_builtins(self, order="deterministic")


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
            return convert(info["decisions"], Decisions)
        precision, cache, extraction = (info.get(key) or {} for key in ("precision", "cache", "extraction"))
        names = {"train_eval" if name == "probe" else str(name) for name in cache.get("entries") or {}}
        cached = names if cache.get("used") else names - {"train"}
        content = {
            "train_precision": precision["train"].removeprefix("torch."),
            "eval_precision": precision["evaluate"].removeprefix("torch."),
            "channels_last": "channels_last" in str(info.get("memory_format") or info["numerics"]["device"]),
            "cut": cache.get("at"),
            "cached": cached,
            "compiled": cached if str(extraction.get("why", "")).startswith("compiled") else set(),
            "reasons": {"train": str(cache.get("why", ""))},
        }
        return convert(content, Decisions)
    except (KeyError, TypeError, AttributeError, ValidationError):
        return None


# -- deciding


def decide(workload: Workload) -> Decisions:
    """Measure formats, and decide for each split if it is read from images or from cached activations.

    Raises UsageError if cache.mode=require cannot be followed.
    """
    cut, spec, dtype_names = workload.cut, workload.spec, cast("dict[torch.dtype, DtypeName]", DTYPE_NAMES)
    cached: set[str] = set()
    reasons: dict[str, str] = {}
    uncached_reason = uncacheable_reason(workload)
    if uncached_reason is None:
        assert isinstance(cut, Cut)
        evaluation = measure_extraction(workload, cut)
        cached = {"train", "val"} | ({"train_eval"} if workload.needs_probe or not workload.augments else set())
        missing = _missing(workload, cached, evaluation)
        row_bytes = sum(column.nbytes for column in workload.extractor(cut, evaluation).columns())
        uncached_reason = not_worthwhile_reason(workload, evaluation, sum(map(len, missing)), row_bytes)
    if uncached_reason is None:
        assert isinstance(cut, Cut)
        train = measure_suffix(workload, cut, evaluation)
    elif spec.cache.mode is CacheMode.require:
        raise UsageError(f"cache.mode=require: {uncached_reason}")
    else:
        cached, (train, evaluation) = set(), measure_network(workload)
        if workload.needs_probe and isinstance(workload.features_cut, Cut):
            _add_if_worthwhile(workload, evaluation, cached, "train_eval", 1, reasons)
        if isinstance(cut, Cut):
            _add_if_worthwhile(workload, evaluation, cached, "val", spec.epochs + 1, reasons)
    if isinstance(cut, Cut):  # test is read once: it is cached for later runs, if that is cheap
        _add_if_worthwhile(workload, evaluation, cached, "test", 1, reasons)
        uncached_reason = uncached_reason or f"what comes before {cut.suffix_start} is frozen"
    return Decisions(
        train_precision=dtype_names[train.dtype],
        eval_precision=dtype_names[evaluation.dtype],
        channels_last=evaluation.memory_format == torch.channels_last,
        cut=cut.suffix_start if isinstance(cut, Cut) else None,
        extraction_batch=workload.extractor(cut, evaluation).batch_size if isinstance(cut, Cut) else None,
        cached=frozenset(cached),
        compiled=_worth_compiling(workload, cached, evaluation),
        reasons={**reasons, "training": train.reason, "evaluation": evaluation.reason, "train": str(uncached_reason)},
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
    """Return the reason why activations should not be read, with `images` of them missing: no room, or no gain."""
    spec, data, nbytes = workload.spec, workload.data, images * row_bytes
    reason = workload.session.store.no_room_reason(nbytes) if images else None
    if reason or not images or row_bytes <= SMALL_ROW_BYTES or spec.cache.mode is CacheMode.require:
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
    """Add a split that is only evaluated to the cached ones if that is faster for this number of reads, and if there is
    space for it in addition to those that are missing."""
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
    """Return the activations that are not in the store, each once."""
    names = sorted(cached)
    sources = {s.key: s for name in names for s in workload.cached_split(name, names, option).views}
    return [source for source in sources.values() if not source.filled]


def _prefix_seconds(option: ComputeFormat, images: int, reads: int, row_bytes: int) -> tuple[float, float]:
    """Estimate the seconds that the prefix takes for these reads: with activations of `images` images, and without."""
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
        return dataclasses.replace(extraction, dtype=options[0].dtype, images_per_second=None, reason="a linear layer")
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
    options, tuner, n = allowed_formats(workload.spec.device, accelerator), _autotuner(workload), len(sample[0])
    training = lambda option: training_step(network, network, sample, accelerator, option)  # noqa: E731
    train = tuner.choose(options, n, "training", training)
    same_layout = [option for option in options if option.memory_format == train.memory_format]
    forward = lambda option: forward_step(network, sample, accelerator, option)  # noqa: E731
    # even if it is the only one: the speed of the prefix is taken to be this one
    return train, tuner.choose(same_layout, n, "evaluation", forward, measure_single=True)


def _sample(workload: Workload) -> torch.Tensor:
    return torch.rand(min(MEASURE_BATCH_SIZE, max(2, workload.spec.batch_size)), 3, *[workload.preprocessing.size] * 2)


def _autotuner(workload: Workload) -> Autotuner:
    backbone = workload.spec.backbone
    trainable = sorted(name for name, p in workload.classifier.network.named_parameters() if p.requires_grad)
    return Autotuner(
        workload.session.store,
        workload.accelerator,
        backbone=f"{backbone.kind}/{backbone.name}",
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
        decisions = structs.replace(decisions, cached=decisions.cached - {"train_eval"})
    cut, names = workload.cut, decisions.cached.intersection(split_names)
    reason = cut.why if isinstance(cut, NoCut) else None
    if names and reason is None:
        missing = sum(source.nbytes for source in _missing(workload, names, decisions.eval_format))
        reason = workload.session.store.no_room_reason(missing) if missing else None
    if names and reason is not None:
        if workload.spec.cache.mode is CacheMode.require:
            raise UsageError(f"cache.mode=require: {reason}")
        lost = names
        if isinstance(
            cut, Cut
        ):  # splits that are complete in the cache stay; without train the others have new entries
            views = {name: workload.cached_split(name, names, decisions.eval_format).views for name in names}
            lost = frozenset(name for name in names if not all(view.filled for view in views[name]))
            lost = names - {"test"} | lost if "train" in lost else lost
        reporter.note(f"{' and '.join(sorted(lost))}: reading images instead of activations ({reason})")
        decisions, names = decisions.without(lost, reason), names - lost
    for name in names & decisions.compiled:
        split = workload.cached_split(name, names, decisions.eval_format)
        workload.extractor(split.cut, decisions.eval_format, compiled=True).always_compiles = True
    return decisions


def _with_supported_formats(recorded: Decisions, workload: Workload, reporter: Reporter) -> Decisions:
    """Return the decisions with float32 and a memory format of this accelerator in place of what it does not have."""
    options = allowed_formats(workload.spec.device, workload.accelerator)
    dtypes = [DTYPE_NAMES[option.dtype] for option in options]
    layouts = [option.memory_format for option in options]
    changes: dict[str, Any] = {
        name: "float32"
        for name in ("train_precision", "eval_precision")
        if getattr(recorded, name) not in (*dtypes, "float32")  # every device has float32
    }
    was, new = {getattr(recorded, name) for name in changes}, set(changes.values())
    if (layout := recorded.eval_format.memory_format) not in layouts:
        changes["channels_last"] = layouts[0] == torch.channels_last
        was, new = was | {LAYOUT_NAMES[layout]}, new | {LAYOUT_NAMES[layouts[0]]}
    if not changes:
        return recorded
    reason = (
        f"{', '.join(sorted(new))} in place of {', '.join(sorted(was))}, which this device or the config does not allow"
    )
    reporter.note(f"precision: {reason}")
    return structs.replace(recorded, **changes, reasons={**recorded.reasons, "training": reason, "evaluation": reason})
