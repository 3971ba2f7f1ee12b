"""The cost of training on this machine, measured on a few batches with the code that trains, before it is paid.

Weights may be random, because time does not depend on them, and nothing is downloaded. No weight is changed.
"""

import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from msgspec import structs
from torch import Tensor
from torch.optim.swa_utils import update_bn

from tlcli.data.batches import ImageBatches, epoch_order
from tlcli.data.dataset import Dataset, load_without_decoding, preload_images
from tlcli.device import Device, setup_process
from tlcli.engine.activations import Workload, image_size, preprocessing_for
from tlcli.engine.decisions import (
    device_with,
    measure_extraction,
    measure_network,
    measure_suffix,
    not_worthwhile_reason,
    uncacheable_reason,
)
from tlcli.engine.inputs import MAX_EVALUATION_BATCH, image_loader
from tlcli.engine.loaders import ActivationLoader, BatchLoader
from tlcli.engine.metrics import evaluate
from tlcli.engine.numerics import ComputeFormat
from tlcli.engine.session import session_for
from tlcli.engine.trainer import Trainer
from tlcli.errors import NonFiniteLossError
from tlcli.models.build import build_model
from tlcli.models.classifier import count
from tlcli.registry import options
from tlcli.reporter import Reporter
from tlcli.specs import AugmentSpec, HeadInit, TrainSpec
from tlcli.transfer.contract import apply_freeze
from tlcli.transfer.cut import Cut
from tlcli.transfer.freeze import HeadSpec

SAMPLE_IMAGES = 64  # decoded and measured with, or as many as a batch has
WARMUP_IMAGES = 8  # of the first steps: the first is slow, the second tells how many images to measure with
MEASURE_SECONDS = 0.2  # after which a step is not repeated
# Longest measured step; it has fewer images if a whole batch takes longer. (8 images in place of 32 gave 20 to 40 %
# fewer images per second.)
MAX_STEP_SECONDS, MAX_UNCACHED_STEP_SECONDS = 0.5, 1.5
NEGLIGIBLE_LR = 1e-12  # changes weights by less than their rounding, or from zero to nearly zero
EPOCHS = 1000  # makes the schedule longer than any measurement


@dataclass(frozen=True)
class StageCost:
    """A stage of the network and its share of the parameters."""

    name: str
    parameters: int
    share: float


@dataclass(frozen=True, kw_only=True)
class StrategyCost:
    """The cost of a freeze strategy, in seconds.

    `first_pass` is over all images, with decoding, once for all later runs. `cached_epoch` and `live_epoch` (on images)
    include validation. `total` is of one run with an empty cache, as it `takes` its images: cached or live. If the
    network cannot be cut the cached values are None, and `why_live` is the reason.
    """

    freeze: str
    trainable: int
    at: str | None = None
    row_bytes: int | None = None
    cache_bytes: int | None = None
    first_pass: float | None = None
    cached_epoch: float | None = None
    live_epoch: float
    takes: str = "live"
    why_live: str | None
    total: float


@dataclass(frozen=True)
class Inspection:
    """The result of `tlcli inspect`. `images` are per split; `load` is that of the machine before the measurements."""

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
    strategies: tuple[StrategyCost, ...]


def inspect(spec: TrainSpec, head_augment: AugmentSpec, reporter: Reporter) -> Inspection:
    """Return the stages of the spec's network and the cost of each freeze strategy on the spec's data.

    `head_augment` is the augmentation of freeze=head. Measured formats are stored, as `tlcli train` stores them. Raises
    UsageError if the spec cannot be followed, BadImagesError if an image of the sample does not decode.
    """
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    accelerator, session = setup_process(spec.device), session_for(spec.cache)
    data = load_without_decoding(spec.dataset, seed=spec.seed, reporter=reporter)
    backbone = spec.backbone
    is_random = backbone.weights == "default" and not backbone.is_packaged  # nothing is downloaded
    if is_random:
        backbone = structs.replace(backbone, weights="none", reinit=())
    classifier = build_model(backbone, data.classes, size=image_size(spec), seed=spec.seed)
    if is_random:  # counted as pretrained: BatchNorm layers keep pretrained statistics
        classifier = replace(classifier, pretrained=frozenset(classifier.network.state_dict()))
    classifier.network.to(accelerator)

    n_sample = max(SAMPLE_IMAGES, spec.batch_size)
    sample = replace(data, train=data.train.take(epoch_order(len(data.train), spec.seed, 1)[:n_sample]))
    start = time.perf_counter()
    preload_images([sample.train], reporter)
    meter = CostMeter(sample, (time.perf_counter() - start) / len(sample.train))
    preprocessing = preprocessing_for(spec, classifier)
    if is_random:  # without statistics signals vanish, and processors are many times slower with such small numbers
        images = [preprocessing.apply(sample.train.read(i)) for i in range(min(WARMUP_IMAGES, len(sample.train)))]
        update_bn([preprocessing.normalize(torch.stack(images).to(accelerator))], classifier.network.eval())

    spec.freeze.trainable(classifier)  # raises UsageError if the network has no such stage
    variants = [v for strategy in options("freeze").values() for v in strategy.variants(spec.freeze, classifier)]
    costs: list[StrategyCost] = []
    with reporter.track("measuring", len(variants), "strategies") as advance:
        for freeze in reversed(variants):  # the whole network first: its formats are used for the others
            augment = head_augment if isinstance(freeze, HeadSpec) else spec.augment
            needs_probe = freeze.head_init is HeadInit.probe and bool(classifier.pretrained)
            contract, own = apply_freeze(freeze, classifier), structs.replace(spec, freeze=freeze, augment=augment)
            workload = Workload(data, classifier, contract, own, accelerator, session, needs_probe)
            costs.insert(0, meter.cost(workload))
            advance(1)
    parameters = dict(classifier.network.named_parameters())
    sizes = {stage.name: count(parameters[n] for n in stage.tensors & parameters.keys()) for stage in classifier.stages}
    return Inspection(
        backbone=classifier.name,
        dataset=f"{data.name} {Path(spec.dataset.root).name}" if spec.dataset.root else data.name,
        classes=len(data.classes),
        images={"train": len(data.train), "val": len(data.val), "test": len(data.test)},
        size=preprocessing.size,
        epochs=spec.epochs,
        batch_size=spec.batch_size,
        device=meter.device(workload).description,
        cores=os.cpu_count() or 1,
        load=load,
        stages=tuple(StageCost(name, n, n / sum(sizes.values())) for name, n in sizes.items()),
        strategies=tuple(costs),
    )


class CostMeter:
    """Measures workloads with a sample of their training images, which is decoded into memory.

    Formats, the size of a step and the speed of evaluation are measured with the first workload, and used for others.

    Args:
        decode_seconds: per image.
    """

    def __init__(self, sample: Dataset, decode_seconds: float) -> None:
        self._sample = sample
        self._decode_seconds = decode_seconds
        self._network_formats: tuple[ComputeFormat, ComputeFormat] | None = None
        self._prefix_format: ComputeFormat | None = None
        self._suffix_format: ComputeFormat | None = None
        self._train_images: int | None = None
        self._evaluate: float | None = None

    def device(self, workload: Workload) -> Device:
        """Return the device with the formats of training on images."""
        self._network_formats = self._network_formats or measure_network(workload)
        return device_with(workload, *self._network_formats)

    def cost(self, workload: Workload) -> StrategyCost:
        """Return the cost of a workload's strategy."""
        data, epochs = workload.data, workload.spec.epochs
        n_train, n_val, n_test = len(data.train), len(data.val), len(data.test)
        decoding = self._decode_seconds * (n_train + n_val + n_test)
        n_evaluated = n_val + n_test + (n_train if workload.needs_probe else 0)

        def epoch_and_run(train: float, evaluation: float) -> tuple[float, float]:
            epoch = n_train / train + n_val / evaluation
            return epoch, n_evaluated / evaluation + epochs * epoch

        cached = self._cached(workload) if isinstance(workload.cut, Cut) else None
        uncached_epoch, uncached_run = epoch_and_run(*self.uncached(workload))
        cost = StrategyCost(
            freeze=workload.spec.freeze.label,
            trainable=count(p for p in workload.classifier.network.parameters() if p.requires_grad),
            live_epoch=uncached_epoch,
            why_live=uncacheable_reason(workload),
            total=decoding + uncached_run,
        )
        if cached is None or not isinstance(workload.cut, Cut):
            return cost
        rows, row_bytes, extraction_seconds, speeds, uncached_reason = cached
        cached_epoch, cached_run = epoch_and_run(*speeds)
        first_pass = decoding + extraction_seconds
        return replace(
            cost,
            at=workload.cut.suffix_start,
            row_bytes=row_bytes,
            cache_bytes=row_bytes * rows,
            first_pass=first_pass,
            cached_epoch=cached_epoch,
            takes="live" if uncached_reason else "cached",
            why_live=uncached_reason,
            total=cost.total if uncached_reason else first_pass + cached_run,
        )

    def uncached(self, workload: Workload) -> tuple[float, float]:
        """Return the images per second of training and of evaluation on images, without decoding."""
        device, network, batch_size = self.device(workload), workload.classifier.network, workload.spec.batch_size
        device.place(network)

        def loader(split_name: str, n: int) -> BatchLoader:
            return image_loader(replace(workload, data=self._first_images(n)), device, split_name, Reporter())

        fit, n_sample = _fitting(workload, device), len(self._sample.train)
        self._train_images, train = measure_throughput(
            lambda n: fit(loader("train", n)),
            min(n_sample, batch_size),
            self._train_images,
            MAX_UNCACHED_STEP_SECONDS,
        )
        if self._evaluate is None:
            _, self._evaluate = measure_throughput(
                lambda n: evaluate(network, loader("train_eval", n), device, Reporter(), ""),
                min(n_sample, MAX_EVALUATION_BATCH, 4 * batch_size),
            )
        return train, self._evaluate

    def _cached(self, workload: Workload) -> tuple[int, int, float, tuple[float, float], str | None]:
        """Return the cost of training on activations: the rows to extract, the bytes of each, the seconds of that
        without decoding, the images per second of training and evaluation, and why `tlcli train` would read images."""
        cut, spec, data = workload.cut, workload.spec, workload.data
        assert isinstance(cut, Cut)
        self._prefix_format = self._prefix_format or measure_extraction(workload, cut)
        extractor, head = workload.extractor(cut, self._prefix_format), workload.plain_head(cut)
        suffix_format = self._suffix_format if head is None else None  # a linear layer's is not that of other suffixes
        suffix_format = suffix_format or measure_suffix(workload, cut, extractor.compute_format)
        self._suffix_format = suffix_format if head is None else self._suffix_format
        device = device_with(workload, suffix_format, extractor.compute_format)
        device.place(workload.classifier.network)

        extractor.prepare(Reporter())
        batch = self._first_images(extractor.batch_size).train
        batches = ImageBatches(batch, workload.preprocessing, batch_size=extractor.batch_size, workers=0)

        def extract(n: int) -> list[tuple[Tensor, ...]]:
            return [extractor(images) for images, _ in batches.in_order()]

        (tensors,) = extract(len(batch))
        _, speed = measure_throughput(extract, len(batch), len(batch))
        labels = torch.from_numpy(self._sample.train.labels)

        def loader(n: int) -> BatchLoader:
            rows = torch.arange(n) % len(tensors[0])  # the same rows again and again, as many as there are images
            return ActivationLoader(
                [tensors],
                rows,
                labels[rows],
                network=cut.suffix,
                head=head,
                dtype=device.train_dtype,
                device=device,
                batch_size=spec.batch_size,
                seed=spec.seed,
            )

        fit, n_train, network = _fitting(workload, device), len(data.train), workload.classifier.network
        _, train = measure_throughput(lambda n: fit(loader(n)), n_train)
        _, evaluation = measure_throughput(
            lambda n: evaluate(network, loader(n), device, Reporter(), ""),
            n_train if head is not None else min(WARMUP_IMAGES, n_train),  # a small part of an epoch
        )
        row_bytes, rows = sum(column.nbytes for column in extractor.columns()), n_train + len(data.val) + len(data.test)
        if workload.augments and spec.cache.views is not None:
            rows += n_train * (min(spec.cache.views, spec.epochs) + workload.needs_probe - 1)
        seconds = extractor.estimate_seconds(rows, speed * extractor.batch_size / len(batch))  # a short batch is padded
        reason = uncacheable_reason(workload) or not_worthwhile_reason(workload, self._prefix_format, rows, row_bytes)
        return rows, row_bytes, seconds, (train, evaluation), reason

    def _first_images(self, n: int) -> Dataset:
        train = self._sample.train
        return replace(self._sample, train=train.take(np.arange(min(n, len(train)))))


def _fitting(workload: Workload, device: Device) -> Callable[[BatchLoader], None]:
    """Return a function that trains for one epoch without changing the weights."""
    optimizer = structs.replace(workload.spec.optimizer, lr=NEGLIGIBLE_LR)
    spec = structs.replace(workload.spec, optimizer=optimizer, epochs=EPOCHS)
    counts = workload.data.train.class_counts(len(workload.data.classes))
    trainer = Trainer(workload.classifier, workload.contract, spec, device, counts)

    def fit(loader: BatchLoader) -> None:
        with suppress(NonFiniteLossError):  # the weights may be random
            trainer.fit(loader, 1, Reporter(), lambda *running: None)

    return fit


def measure_throughput(
    step: Callable[[int], object],
    max_images: int,
    images: int | None = None,
    max_step_seconds: float = MAX_STEP_SECONDS,
) -> tuple[int, float]:
    """Return the number of images of a measured step, and the images per second of the fastest of a few steps.

    `images` sets that number; None finds how many of `max_images` there is time for.
    """

    def seconds(n: int) -> float:
        start = time.perf_counter()
        step(n)
        return max(time.perf_counter() - start, 1e-9)

    shortest, spent = float("inf"), 0.0
    if images is None:
        images = min(WARMUP_IMAGES, max_images)
        seconds(images)  # the first step is slow
        shortest = spent = seconds(images)
        while images < max_images and 2 * spent < max_step_seconds:
            images = min(max_images, images * max(2, int(max_step_seconds / spent / 2)))
            shortest = spent = seconds(images)
    while spent < MEASURE_SECONDS:
        last = seconds(images)
        shortest, spent = min(shortest, last), spent + last
    return images, images / shortest
