"""The cost of training on this machine, measured on a few batches with the code that trains; no weight is changed."""

import itertools
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from msgspec import structs
from torch.optim.swa_utils import update_bn

from tlcli.data.batches import ImageBatches, epoch_order
from tlcli.data.dataset import Dataset, load_dataset, without_bad
from tlcli.device import Device, setup_process
from tlcli.engine.activations import Workload, image_size
from tlcli.engine.decisions import device_with, not_worthwhile_reason, uncacheable_reason
from tlcli.engine.extraction import Extractor
from tlcli.engine.inputs import MAX_EVALUATION_BATCH, image_loader
from tlcli.engine.loaders import ActivationLoader, BatchLoader
from tlcli.engine.metrics import evaluate
from tlcli.engine.numerics import measure_extraction, measure_network, measure_suffix
from tlcli.engine.session import session_for
from tlcli.engine.trainer import Trainer
from tlcli.errors import NonFiniteLossError, UsageError
from tlcli.models.build import build_model
from tlcli.models.classifier import count
from tlcli.reporter import Reporter
from tlcli.specs import AugmentSpec, HeadInit, TrainSpec, options
from tlcli.transfer.contract import apply_freeze, freeze_table
from tlcli.transfer.cut import Cut
from tlcli.transfer.freeze import HeadSpec

SAMPLE_IMAGES = 64  # decoded and measured with, or as many as a batch has
WARMUP_IMAGES = 8  # of the first steps: the first is slow, the second tells how many images to measure with
MEASURE_SECONDS = 0.2  # after which a step is not repeated
# Longest measured step; it has fewer images if a whole batch takes longer. (8 images in place of 32 gave 20 to 40 %
# fewer images per second.)
MAX_STEP_SECONDS, MAX_UNCACHED_STEP_SECONDS = 0.5, 1.5


def inspect(spec: TrainSpec, head_augment: AugmentSpec, reporter: Reporter) -> dict[str, Any]:
    """Return the JSON of `tlcli inspect`: the stages of the network and the cost of each freeze strategy on the data.

    `head_augment` is the augmentation of freeze=head. Raises UsageError, and BadImagesError of the sample.
    """
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    accelerator, session = setup_process(spec.device), session_for(spec.cache)
    data = load_dataset(spec.dataset.offline(), seed=spec.seed, reporter=reporter, decode=False)
    backbone = spec.backbone
    is_random = backbone.weights == "default" and not backbone.is_packaged  # no download: time does not depend on them
    if is_random:
        backbone = structs.replace(backbone, weights="none", reinit=())
    classifier = build_model(backbone, data.classes, size=image_size(spec), seed=spec.seed)
    if is_random:  # counted as pretrained: BatchNorm layers keep pretrained statistics
        classifier = replace(classifier, pretrained=frozenset(classifier.network.state_dict()))
    classifier.network.to(accelerator)

    n_sample = max(SAMPLE_IMAGES, spec.batch_size)
    sample = replace(data, train=data.train.take(epoch_order(len(data.train), spec.seed, 1)[:n_sample]))
    start = time.perf_counter()
    sample = replace(sample, train=without_bad({"train": sample.train}, spec.dataset, reporter, None)[0]["train"])
    if not len(sample.train):
        raise UsageError(f"{spec.dataset.name}: no image of a sample of {n_sample} decodes; see `tlcli data check`")
    meter = CostMeter(sample, (time.perf_counter() - start) / len(sample.train))
    # raises UsageError if the network has no such stage
    workload = Workload(data, classifier, apply_freeze(spec.freeze, classifier), spec, accelerator, session)
    preprocessing = workload.preprocessing
    if is_random:  # without statistics signals vanish, and processors are many times slower with such small numbers
        images = [preprocessing.apply(sample.train.read(i)) for i in range(min(WARMUP_IMAGES, len(sample.train)))]
        update_bn([preprocessing.normalize(torch.stack(images).to(accelerator))], classifier.network.eval())

    variants = [v for strategy in options("freeze").values() for v in strategy.variants(spec.freeze, classifier)]
    strategies: list[dict[str, Any]] = []
    with reporter.track("measuring", len(variants), "strategies") as advance:
        for freeze in reversed(variants):  # the whole network first: its formats are used for the others
            augment = head_augment if isinstance(freeze, HeadSpec) else spec.augment
            needs_probe = freeze.head_init is HeadInit.probe and bool(classifier.pretrained)
            contract, own = apply_freeze(freeze, classifier), structs.replace(spec, freeze=freeze, augment=augment)
            workload = replace(workload, contract=contract, spec=own, needs_probe=needs_probe)
            strategies.insert(0, meter.cost(workload))
            advance(1)
    sizes = {row.name: row.parameters for row in freeze_table(spec.optimizer, classifier)}
    return {
        "backbone": classifier.name,
        "dataset": f"{data.name} {Path(spec.dataset.root).name}" if spec.dataset.root else data.name,
        "classes": len(data.classes),
        "images": {"train": len(data.train), "val": len(data.val), "test": len(data.test)},
        "size": preprocessing.size,
        "epochs": workload.epochs,
        "batch_size": spec.batch_size,
        "device": meter.device(workload).description,
        "cores": os.cpu_count() or 1,
        "load": load,  # before the measurements
        "stages": [{"name": k, "parameters": n, "share": n / sum(sizes.values())} for k, n in sizes.items()],
        "strategies": strategies,
    }


class CostMeter:
    """Measures workloads of one session with a sample of their training images, which is decoded into memory.

    Formats, step size and speed of evaluation are measured with the first workload only. `decode_seconds`: per image.
    """

    def __init__(self, sample: Dataset, decode_seconds: float) -> None:
        self._sample, self._decode_seconds = sample, decode_seconds
        self._step_images: int | None = None

    def cost(self, workload: Workload) -> dict[str, Any]:
        """Return the cost of a workload's strategy, in seconds.

        `first_pass` is over all images, with decoding, once for all later runs. `cached_epoch` and `live_epoch` (on
        images) include validation. `total` is of one run with an empty cache, as it `takes` its images: cached or live.
        If the network cannot be cut the cached values are None, and `why_live` is the reason.
        """
        data, spec, sized = workload.data, workload.spec, workload.for_training
        cut = sized.cut
        n_train, n_val, n_test = len(data.train), len(data.val), len(data.test)
        n_evaluated = n_val + n_test + (n_train if workload.needs_probe else 0)

        def epoch_and_run(train: float, evaluation: float) -> tuple[float, float]:
            epoch = n_train / train + n_val / evaluation
            first_fit = part.epochs * len(part.data.train) / train if (part := workload.first_fit) else 0
            return epoch, first_fit + n_evaluated / evaluation + workload.epochs * epoch

        decoding, reason = self._decode_seconds * (n_train + n_val + n_test), uncacheable_reason(workload)
        live_epoch, live_run = epoch_and_run(*self.uncached(workload))
        total = decoding + live_run
        cached: dict[str, Any] = dict.fromkeys(("at", "row_bytes", "cache_bytes", "first_pass", "cached_epoch"))
        if isinstance(cut, Cut):
            prefix_format = workload.session.get_or_create("prefix", lambda: measure_extraction(sized, cut))
            extractor = sized.extractor(cut, prefix_format)
            n_rows, row_bytes = n_train + n_val + n_test, sum(column.nbytes for column in extractor.columns)
            if workload.augments and workload.views is not None:
                n_rows += n_train * (min(workload.views, workload.epochs) + workload.needs_probe - 1)
            extraction, train, evaluation = self._cached(sized, cut, extractor)
            cached_epoch, cached_run = epoch_and_run(train, evaluation)
            first_pass = decoding + extractor.estimate_seconds(n_rows, extraction)
            reason = reason or not_worthwhile_reason(workload, prefix_format, n_rows, row_bytes)
            total = total if reason else first_pass + cached_run
            cached |= {"at": cut.suffix_start, "first_pass": first_pass, "cached_epoch": cached_epoch}
            cached |= {"row_bytes": row_bytes, "cache_bytes": row_bytes * n_rows}
        return {
            "freeze": spec.freeze.label,
            "trainable": count(p for p in workload.classifier.network.parameters() if p.requires_grad),
            **cached,
            "live_epoch": live_epoch,
            "takes": "live" if reason else "cached",
            "why_live": reason,
            "total": total,
        }

    def device(self, workload: Workload) -> Device:
        train, evaluation = workload.session.get_or_create("network", lambda: measure_network(workload))
        return device_with(workload, train.dtype, evaluation)

    def uncached(self, workload: Workload) -> tuple[float, float]:
        """Return the images per second of training and of evaluation on images, without decoding."""
        device, network, batch_size = self.device(workload), workload.classifier.network, workload.spec.batch_size
        device.place(network)

        def loader(split_name: str, n: int) -> BatchLoader:
            return image_loader(replace(workload, data=self._first_images(n)), device, split_name, Reporter())

        fit, n_sample = _fitting(workload, device), len(self._sample.train)
        self._step_images, train = measure_throughput(
            lambda n: fit(loader("train", n)), min(n_sample, batch_size), self._step_images, MAX_UNCACHED_STEP_SECONDS
        )
        evaluation_step = lambda n: evaluate(network, loader("train_eval", n), device, Reporter(), "")  # noqa: E731
        max_images, once = min(n_sample, MAX_EVALUATION_BATCH, 4 * batch_size), workload.session.get_or_create
        return train, once("evaluation", lambda: measure_throughput(evaluation_step, max_images)[1])

    def _cached(self, workload: Workload, cut: Cut, extractor: Extractor) -> tuple[float, float, float]:
        """Return the images per second of the prefix without decoding, and of training and evaluation on its output."""
        spec, head, n_train = workload.spec, workload.plain_head(cut), len(workload.data.train)
        name = "suffix" if head is None else "head"  # the format of a linear layer is not that of other suffixes
        once, prefix_format = workload.session.get_or_create, extractor.compute_format
        suffix_format = once(name, lambda: measure_suffix(workload, cut, prefix_format))
        device = device_with(workload, suffix_format.dtype, prefix_format)
        network = workload.classifier.network
        device.place(network)
        extractor.prepare(Reporter())
        sample, batch_size = self._first_images(extractor.batch_size).train, extractor.batch_size
        batches = ImageBatches(sample, workload.preprocessing, batch_size=batch_size, workers=0)
        tensors, labels = extractor(next(batches.in_order())[0]), torch.from_numpy(sample.labels)
        n_sample = len(sample)
        _, extraction = measure_throughput(lambda n: [extractor(x) for x, _ in batches.in_order()], n_sample, n_sample)

        def loader(n: int) -> BatchLoader:
            rows = torch.arange(n) % n_sample  # the same rows again and again, as many as there are images
            return ActivationLoader(
                [tensors], rows, labels[rows], cut.suffix, head, device.train_dtype, device, spec.batch_size, spec.seed
            )

        fit = _fitting(workload, device)
        _, train = measure_throughput(lambda n: fit(loader(n)), n_train)
        n_evaluated = n_train if head is not None else min(WARMUP_IMAGES, n_train)  # a small part of an epoch
        _, evaluation = measure_throughput(lambda n: evaluate(network, loader(n), device, Reporter(), ""), n_evaluated)
        return extraction * batch_size / n_sample, train, evaluation  # a short batch is padded

    def _first_images(self, n: int) -> Dataset:
        return replace(self._sample, train=self._sample.train.take(np.arange(min(n, len(self._sample.train)))))


def _fitting(workload: Workload, device: Device) -> Callable[[BatchLoader], None]:
    """Return a function that trains for one epoch without changing the weights."""
    optimizer = structs.replace(workload.spec.optimizer, lr=1e-12)  # changes weights by less than their rounding
    spec = structs.replace(workload.spec, optimizer=optimizer, epochs=1000)  # longer than any measurement
    trainer, epochs = Trainer(replace(workload, spec=spec), device), itertools.count(1)

    def fit(loader: BatchLoader) -> None:
        with suppress(NonFiniteLossError):  # the weights may be random
            trainer.fit(loader, next(epochs), Reporter())

    return fit


def measure_throughput(
    step: Callable[[int], object], max_images: int, images: int | None = None, max_seconds: float = MAX_STEP_SECONDS
) -> tuple[int, float]:
    """Return the number of images per measured step (None: as many as there is time for), and the images per second."""

    def seconds(n: int) -> float:
        start = time.perf_counter()
        step(n)
        return max(time.perf_counter() - start, 1e-9)

    shortest, spent = float("inf"), 0.0
    if images is None:
        images = min(WARMUP_IMAGES, max_images)
        seconds(images)  # the first step is slow
        shortest = spent = seconds(images)
        while images < max_images and 2 * spent < max_seconds:
            images = min(max_images, images * max(2, int(max_seconds / spent / 2)))
            shortest = spent = seconds(images)
    while spent < MEASURE_SECONDS:
        last = seconds(images)
        shortest, spent = min(shortest, last), spent + last
    return images, images / shortest
