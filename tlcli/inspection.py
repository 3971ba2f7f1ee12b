"""What a network is made of, and what each way of freezing it would cost on this data and this machine.

A few batches are measured, so that the cost is known before it is paid. Nothing is fetched: random weights do as well.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from msgspec import structs

from tlcli.data.dataset import Dataset, load_without_decoding
from tlcli.device import setup_process
from tlcli.engine.activations import Workload, image_size, preprocessing_for
from tlcli.engine.costs import Cached, CostMeter, Shared, Speeds, decoding_seconds, sample_of, settle
from tlcli.engine.session import session_for
from tlcli.models.build import build_model
from tlcli.models.classifier import Classifier, count
from tlcli.registry import options
from tlcli.reporter import Reporter
from tlcli.specs import AugmentSpec, FreezeSpec, HeadInit, LiteBackboneSpec, TrainSpec
from tlcli.transfer.contract import apply_freeze
from tlcli.transfer.freeze import HeadSpec

SAMPLE = 64
"""Images that are read and measured with, at the least as many as a batch has."""


@dataclass(frozen=True)
class StageCost:
    """A stage of the network and its share of the parameters."""

    name: str
    parameters: int
    share: float


@dataclass(frozen=True)
class Strategy:
    """A way to freeze. Seconds: `first_pass` over all images, once and for all runs to come, with decoding;
    `cached_epoch` and `live_epoch` with validation; `total` of one run of the spec's epochs with an empty cache, as
    `takes` (cached or live) says. Where nothing can be cached these figures are None, and `why_live` says why."""

    freeze: str
    trainable: int
    at: str | None
    row_bytes: int | None
    cache_bytes: int | None
    first_pass: float | None
    cached_epoch: float | None
    live_epoch: float
    takes: str
    why_live: str | None
    total: float


@dataclass(frozen=True)
class Inspection:
    """What was found. `images`: how many in train, val and test; `load`: that of the machine before anything was
    measured, where it tells."""

    backbone: str
    dataset: str
    classes: int
    images: dict[str, int]
    size: int
    epochs: int
    batch_size: int
    device: str
    cores: int
    load: float | None
    stages: tuple[StageCost, ...]
    strategies: tuple[Strategy, ...]


def inspect(spec: TrainSpec, linear: AugmentSpec, reporter: Reporter) -> Inspection:
    """Look at the spec's network, and measure each way to freeze it on the spec's data.

    `linear` is the augmentation that freeze=head comes with. What the machine does quickest is remembered in the cache,
    as `tlcli train` would. Raises UsageError where the spec cannot be followed, BadImages for an image of the sample
    that does not decode.
    """
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    accelerator = setup_process(spec.device)
    session = session_for(spec.cache)
    data = load_without_decoding(spec.dataset, seed=spec.seed, reporter=reporter)
    model = _model(spec, data.classes)
    model.network.to(accelerator)
    session.set_model(model)
    stages = tuple(_stages(model))
    sample = sample_of(data, max(SAMPLE, spec.batch_size), spec.seed)
    decoding = decoding_seconds(sample, reporter)
    if _stands_in(spec):
        settle(model, sample, preprocessing_for(spec, model))
    ways = list(freezes(spec.freeze, model))
    found: list[Strategy] = []
    shared, quiet = Shared(), Reporter()
    with reporter.track("measuring", len(ways), "strategies") as advance:
        for way in reversed(ways):  # the whole network first: its formats are those of the others, too
            own = structs.replace(spec, freeze=way, augment=linear if isinstance(way, HeadSpec) else spec.augment)
            contract = apply_freeze(way, model)
            trainable = count(p for p in model.network.parameters() if p.requires_grad)
            probes = way.head_init is HeadInit.probe and bool(model.pretrained)
            meter = CostMeter(Workload(data, model, contract, own, accelerator, session, probes))
            cached = meter.cached(sample, quiet, shared)
            live = meter.live(sample, quiet, shared)
            found.insert(0, _strategy(own, data, trainable, decoding, probes, cached, live))
            advance(1)
    assert shared.live is not None
    return Inspection(
        backbone=model.name,
        dataset=f"{data.name} {Path(spec.dataset.root).name}" if spec.dataset.root else data.name,
        classes=len(data.classes),
        images={"train": len(data.train), "val": len(data.val), "test": len(data.test)},
        size=meter.workload.preprocessing.size,
        epochs=spec.epochs,
        batch_size=spec.batch_size,
        device=shared.live[0].description,
        cores=os.cpu_count() or 1,
        load=load,
        stages=stages,
        strategies=tuple(found),
    )


def _model(spec: TrainSpec, classes: tuple[str, ...]) -> Classifier:
    """The spec's network. Weights that would have to be fetched are stood in for by random ones, which count as loaded:
    BatchNorm layers keep what was loaded."""
    if not _stands_in(spec):
        return build_model(spec.backbone, classes, size=image_size(spec), seed=spec.seed)
    bare = structs.replace(spec.backbone, weights="none", reinit=())
    model = build_model(bare, classes, size=image_size(spec), seed=spec.seed)
    return replace(model, pretrained=frozenset(model.network.state_dict()))


def _stands_in(spec: TrainSpec) -> bool:
    """Whether random weights stand in for published ones."""
    return spec.backbone.weights == "default" and not isinstance(spec.backbone, LiteBackboneSpec)


def _stages(model: Classifier) -> Iterator[StageCost]:
    parameters = dict(model.network.named_parameters())
    total = count(parameters.values())
    for stage in model.stages:
        inside = count(p for name, p in parameters.items() if name in stage.tensors)
        yield StageCost(stage.name, inside, inside / total)


def freezes(own: FreezeSpec, model: Classifier) -> Iterator[FreezeSpec]:
    """Yield the strategies to measure, `own` among them."""
    own.trainable(model)  # raises UsageError if the network has no such stage
    for strategy in options("freeze").values():
        yield from strategy.variants(own, model)


def _strategy(
    spec: TrainSpec, data: Dataset, trainable: int, decoding: float, probes: bool, cached: Cached | str, live: Speeds
) -> Strategy:
    """Seconds from speeds."""
    n, n_val, n_test = len(data.train), len(data.val), len(data.test)
    decode = decoding * (n + n_val + n_test)
    looks = n_val + n_test + (n if probes else 0)
    in_all_live = decode + looks / live.evaluate + spec.epochs * _epoch(live, n, n_val)
    facts = {"freeze": spec.freeze.label, "trainable": trainable, "live_epoch": _epoch(live, n, n_val)}
    if isinstance(cached, str):
        empty = dict.fromkeys(("at", "row_bytes", "cache_bytes", "first_pass", "cached_epoch"))
        return Strategy(**facts, **empty, takes="live", why_live=cached, total=in_all_live)  # type: ignore[arg-type]
    first_pass = decode + cached.first_pass
    epoch = _epoch(cached.speeds, n, n_val)
    in_all_cached = first_pass + looks / cached.speeds.evaluate + spec.epochs * epoch
    return Strategy(
        **facts,  # type: ignore[arg-type]
        at=cached.at,
        row_bytes=cached.row_bytes,
        cache_bytes=cached.row_bytes * cached.rows,
        first_pass=first_pass,
        cached_epoch=epoch,
        takes="live" if cached.why_live else "cached",
        why_live=cached.why_live,
        total=in_all_live if cached.why_live else in_all_cached,
    )


def _epoch(speeds: Speeds, n_train: int, n_val: int) -> float:
    return n_train / speeds.train + n_val / speeds.evaluate
