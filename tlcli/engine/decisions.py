"""Decisions of a run on precision, layout, caching and the cut: made once, recorded in run.json, then followed.

Rounding depends on dtype, memory format, batch size, and on caching: only the same decisions give the same metrics.
"""

from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from typing import Annotated, Any, Literal, cast

import torch
from msgspec import Meta, Struct, ValidationError, convert, structs

from tlcli.device import DTYPE_NAMES, DTYPES, LAYOUT_NAMES, ComputeFormat, Device, allowed_formats
from tlcli.engine.activations import SplitActivations, Workload
from tlcli.engine.numerics import measure_extraction, measure_network, measure_suffix
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
    """The choices of a run, each with its reason, as run.json stores them. Splits are train, train_eval, val, test."""

    train_precision: DtypeName
    eval_precision: DtypeName  # of evaluation and of the frozen prefix
    channels_last: bool
    train_size: int | None = None  # pixels of augmented training images; None up to tlcli 0.6: as in evaluation
    views: int | None = None  # of each augmented training image, one per epoch in turn; None: each epoch has its own
    interpolate: float | None = None  # the share of the way from initial to trained weights at which the run ends
    train_images_per_second: float | None = None  # as measured for a few steps, if there was something to choose
    cut: str | None = None  # names of the first modules after the cut
    extraction_batch: Annotated[int, Meta(ge=1, le=4096)] | None = None  # images per forward pass of the prefix
    cached: frozenset[str] = frozenset()  # the splits that are read from activations
    compiled: frozenset[str] = frozenset()  # those of them whose activations a compiled prefix computes
    reasons: dict[str, str] = {}  # of training, evaluation (precision and layout), train (cached or not), other splits

    @property
    def suffix_dtype(self) -> torch.dtype:
        """The dtype in which activations are evaluated: that of training if it reads them, too."""
        return self.train_dtype if "train" in self.cached else _DTYPES[self.eval_precision]

    @property
    def train_dtype(self) -> torch.dtype:
        return _DTYPES[self.train_precision]

    @property
    def eval_format(self) -> ComputeFormat:
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        reason = self.reasons.get("evaluation", "")
        return ComputeFormat(_DTYPES[self.eval_precision], layout, reason=reason, batch_size=self.extraction_batch)

    def without(self, split_names: Iterable[str], reason: str) -> "Decisions":
        names = self.cached.intersection(split_names)
        reasons = {**self.reasons, **dict.fromkeys(sorted(names), reason)}
        return structs.replace(self, cached=self.cached - names, compiled=self.compiled - names, reasons=reasons)


def device_with(workload: Workload, train_dtype: torch.dtype, evaluation: ComputeFormat) -> Device:
    formats = train_dtype, evaluation.dtype, evaluation.memory_format
    return Device(workload.accelerator, *formats, workload.spec.device.compile, workload.workers, workload.ranks)


def recorded_decisions(info: Mapping[str, Any]) -> Decisions | None:
    """Return the decisions in a run.json; None if they are damaged or missing, as up to tlcli 0.5."""
    with suppress(KeyError, ValidationError):
        return convert(info["decisions"], Decisions)
    return None


def decide(workload: Workload) -> Decisions:
    """Measure formats, and decide for each split. Raises UsageError if cache.mode=require cannot be followed."""
    reason, dtype_names = uncacheable_reason(workload), cast("dict[torch.dtype, DtypeName]", DTYPE_NAMES)
    if reason is None and isinstance(cut := workload.cut, NoCut):
        reason = cut.reason
    sized = workload if reason else workload.for_training  # whose cut is not needed if images are read
    cut = sized.cut
    if isinstance(cut, Cut) and reason is None:
        evaluation = measure_extraction(sized, cut)
        cached = {"train", "val"} | ({"train_eval"} if workload.needs_probe or not workload.augments else set())
        cached = {name for name in cached if len(workload.split(name))}
        missing = sum(map(len, _missing(workload, cached, evaluation)))
        row_bytes = workload.cached_split("train", cached, evaluation).views[0].row_bytes
        reason = not_worthwhile_reason(workload, evaluation, missing, row_bytes)
    if reason is None:
        assert isinstance(cut, Cut)
        train = measure_suffix(sized, cut, evaluation)
        reason = f"what comes before {cut.suffix_start} is frozen"
    elif workload.spec.cache.mode is CacheMode.require:
        raise UsageError(f"cache.mode=require: {reason}")
    else:
        cached, (train, evaluation) = set(), measure_network(workload)
    reasons = _add_evaluated_splits(workload, evaluation, cached)
    return Decisions(
        train_precision=dtype_names[train.dtype],
        eval_precision=dtype_names[evaluation.dtype],
        channels_last=evaluation.memory_format == torch.channels_last,
        train_size=workload.train_size,
        views=workload.views if "train" in cached else workload.spec.cache.views or None,
        interpolate=workload.spec.interpolate,
        train_images_per_second=train.images_per_second,
        cut=cut.suffix_start if isinstance(cut, Cut) else None,
        extraction_batch=sized.extractor(cut, evaluation).batch_size if isinstance(cut, Cut) else None,
        cached=frozenset(cached),
        compiled=_worth_compiling(workload, cached, evaluation),
        reasons={**reasons, "training": train.reason, "evaluation": evaluation.reason, "train": reason},
    )


def uncacheable_reason(workload: Workload) -> str | None:
    """Return why training reads images at any cost; None if it could read activations."""
    spec = workload.spec
    reads_images = spec.augment.mixes or (workload.augments and workload.views is None)
    cut = (workload if reads_images else workload.for_training).cut  # of one size: a cut takes most of a second
    if isinstance(cut, NoCut):
        return cut.reason
    if spec.augment.mixes:
        return "augment.mixup and augment.cutmix mix images"
    if reads_images:
        return f"augment={spec.augment.kind} is random in each epoch (cache.views=8 caches 8 views of each image)"
    return None


def not_worthwhile_reason(
    workload: Workload, option: ComputeFormat, images: int, row_bytes: int, reads: int | None = None, pending: int = 0
) -> str | None:
    """Return why activations should not be used, with `images` of them missing: no space, or no gain.

    `reads`: the rows read (None: by training, which cache.mode=require caches anyway); `pending`: bytes written before.
    """
    spec, data, nbytes = workload.spec, workload.data, images * row_bytes
    reason = workload.session.store.no_room_reason(pending + nbytes) if images else None
    is_required = reads is None and spec.cache.mode is CacheMode.require
    if reason or not images or row_bytes <= SMALL_ROW_BYTES or is_required:
        return reason
    if reads is None:
        reads = len(data.train) * (workload.epochs + workload.needs_probe) + len(data.val) * (workload.epochs + 1)
    seconds = 1 / (option.images_per_second or 1.0)
    uncached = reads * seconds
    cached = images * (seconds + row_bytes * WRITE_SECONDS_PER_BYTE) + reads * row_bytes * READ_SECONDS_PER_BYTE
    if cached < uncached:
        return None
    return (
        f"{size_text(row_bytes)} per image: the frozen layers would take about {uncached:.0f} s in all, "
        f"and {cached:.0f} s with {size_text(nbytes)} of activations"
    )


def _add_evaluated_splits(workload: Workload, option: ComputeFormat, cached: set[str]) -> dict[str, str]:
    """Add evaluated splits to the cached ones, if that is worthwhile. Return the reason for each of the others."""
    reads: dict[str, int] = {}
    if not cached and workload.needs_probe and isinstance(workload.features_cut, Cut):
        reads["train_eval"] = 1
    if isinstance(workload.cut, Cut):  # test is read once: it is cached for later runs, if that is cheap
        reads |= {"test": 1} if cached else {"val": workload.epochs + 1, "test": 1}
    reasons = {}
    for name, n in reads.items():
        if not len(workload.split(name)):
            continue
        (source,) = workload.cached_split(name, cached | {name}, option).views
        images, pending = 0 if source.filled else len(source), sum(s.nbytes for s in _missing(workload, cached, option))
        reason = not_worthwhile_reason(workload, option, images, source.row_bytes, n * len(source), pending)
        if reason is None:
            cached.add(name)
        else:
            reasons[name] = reason
    return reasons


def _missing(workload: Workload, cached: Collection[str], option: ComputeFormat) -> list[SplitActivations]:
    """Return the activations that are not in the store, each once."""
    sources = {s.key: s for name in sorted(cached) for s in workload.cached_split(name, cached, option).views}
    return [source for source in sources.values() if not source.filled]


def _worth_compiling(workload: Workload, cached: set[str], option: ComputeFormat) -> frozenset[str]:
    """Return the splits whose prefix is worth compiling for the images that are missing."""
    speed, compiled = option.images_per_second or 1.0, set()
    by_cut = [cached] if "train" in cached else [cached & {"train_eval"}, cached - {"train_eval"}]
    for names in filter(None, by_cut):
        images = sum(map(len, _missing(workload, names, option)))
        split = workload.cached_split(min(names), names, option)
        if images and split.workload.extractor(split.cut, option).estimate_seconds(images, speed) < images / speed:
            compiled |= names
    return frozenset(compiled)


def follow(recorded: Decisions, workload: Workload, reporter: Reporter, split_names: Iterable[str]) -> Decisions:
    """Return recorded decisions; replace what cannot be followed, with a note (UsageError with cache.mode=require)."""
    options = allowed_formats(workload.spec.device, workload.accelerator)
    layouts, layout = [option.memory_format for option in options], recorded.eval_format.memory_format
    refused: set[str] = {recorded.train_precision, recorded.eval_precision}
    refused -= {"float32", *(DTYPE_NAMES[option.dtype] for option in options)}  # every device has float32
    keys = ("train_precision", "eval_precision")
    changes: dict[str, Any] = {key: "float32" for key in keys if getattr(recorded, key) in refused}
    if layout not in layouts:
        changes["channels_last"] = layouts[0] == torch.channels_last
        refused.add(LAYOUT_NAMES[layout])
    decisions = structs.replace(recorded, **changes)
    if changes:
        new = f"training in {decisions.train_precision}, evaluation in {decisions.eval_format.description}"
        why = f"{new}: this device or the config does not allow {' and '.join(sorted(refused))}"
        reporter.note(f"precision: {why}")
        decisions = structs.replace(decisions, reasons={**recorded.reasons, "training": why, "evaluation": why})
    if "train" not in decisions.cached:  # then train_eval serves the probe alone, which was fitted before
        decisions = structs.replace(decisions, cached=decisions.cached - {"train_eval"})
    cut, option, names = workload.cut, decisions.eval_format, decisions.cached.intersection(split_names)
    reason: str | None
    if isinstance(cut, NoCut):
        lost, reason = names, cut.reason
    else:
        missing = _missing(workload, names, option)
        reason = workload.session.store.no_room_reason(sum(s.nbytes for s in missing)) if missing else None
        views = {name: workload.cached_split(name, names, option).views for name in names if reason}
        lost = frozenset(name for name in views if not all(view.filled for view in views[name]))
        lost |= names - {"test"} if "train" in lost else set()  # without train the others have new entries
    if lost and workload.spec.cache.mode is CacheMode.require:
        raise UsageError(f"cache.mode=require: {reason}")
    if lost:
        reporter.note(f"{' and '.join(sorted(lost))}: reading images instead of activations ({reason})")
        decisions = decisions.without(lost, str(reason))
    return decisions
