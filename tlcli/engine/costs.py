"""What a way to train costs on this machine: a few batches through the loop, the cut and the cache's own code.

The network's weights may be random, for time does not depend on them; nothing here changes them.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
import torch
from msgspec import structs
from torch.nn.modules.batchnorm import _NormBase

from tlcli.data.batches import ImageBatches, epoch_order
from tlcli.data.dataset import Dataset, preload_images
from tlcli.data.preprocess import Preprocessing
from tlcli.device import Device
from tlcli.engine.activations import Workload
from tlcli.engine.decisions import (
    device_with,
    measure_extraction,
    measure_network,
    measure_suffix,
    not_worthwhile_reason,
    uncacheable_reason,
)
from tlcli.engine.evaluate import evaluate
from tlcli.engine.extraction import Extractor
from tlcli.engine.inputs import MAX_EVALUATION_BATCH, image_loader
from tlcli.engine.loaders import ActivationLoader, BatchLoader
from tlcli.engine.loaders import ActivationTensors as Table
from tlcli.engine.numerics import ComputeFormat
from tlcli.engine.trainer import Trainer
from tlcli.errors import NonFiniteLossError
from tlcli.models.classifier import Classifier
from tlcli.reporter import Reporter
from tlcli.specs import TrainSpec
from tlcli.transfer.cut import Cut

FIRST = 8
"""Images of the first step, which is slower than the next ones and says how many images to measure."""
LONG_ENOUGH = 0.2
"""Seconds of measuring after which a step is not done again."""
TOO_LONG, TOO_LONG_LIVE = 0.5, 1.5
"""Seconds that a measured step should take at the most: fewer images where a whole batch would take longer. (Eight
images in place of 32 gave 20 to 40 % fewer images a second.)"""
STILL = 1e-12
"""A learning rate that changes weights by less than their rounding, or from zero to nearly that."""
EPOCHS = 1000
"""That the schedule is to last longer than any measurement."""


@dataclass(frozen=True)
class Speeds:
    """Images a second, in training and in evaluation."""

    train: float
    evaluate: float


@dataclass
class Shared:
    """What was found for one strategy and holds for the others: the formats on images, of the prefix and of the suffix,
    how many images a step is measured with, and the speed of evaluation."""

    live: tuple[Device, ComputeFormat] | None = None
    prefix: ComputeFormat | None = None
    suffix: ComputeFormat | None = None
    images: int | None = None
    evaluate: float | None = None


@dataclass(frozen=True)
class Cached:
    """Training on activations: where the cut is, bytes a row, how long the first pass over the images takes, decoding
    not included, and the speeds from then on. `why_live` says why `tlcli train` would not do this."""

    at: str
    row_bytes: int
    rows: int
    first_pass: float
    speeds: Speeds
    why_live: str | None


class CostMeter:
    """Measures one spec on a sample of its data. `data` is the whole set, of which only the sample is read."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload

    def live(self, sample: Dataset, reporter: Reporter, shared: Shared) -> Speeds:
        """Training and evaluation on images, decoding not included."""
        if shared.live is None:
            formats = measure_network(self.workload)
            shared.live = device_with(self.workload, *formats), formats[1]
        device, spec = shared.live[0], _still(self.workload.spec)
        device.place(self.workload.classifier.network)

        def feed(split_name: str, n: int) -> BatchLoader:
            return image_loader(replace(self.workload, data=first(sample, n), spec=spec), device, split_name, reporter)

        fit = self._fitting(spec, device, reporter)
        most = min(len(sample.train), spec.batch_size)
        shared.images, train = speed(lambda n: fit(feed("train", n)), most, shared.images, TOO_LONG_LIVE)
        if shared.evaluate is None:
            look = lambda n: evaluate(self.workload.classifier.network, feed("train_eval", n), device, reporter, "")  # noqa: E731
            most = min(len(sample.train), MAX_EVALUATION_BATCH, 4 * spec.batch_size)
            shared.evaluate = speed(look, most)[1]
        return Speeds(train, shared.evaluate)

    def cached(self, sample: Dataset, reporter: Reporter, shared: Shared) -> Cached | str:
        """Training on activations of the sample, or why the network cannot be cut."""
        workload, cut = self.workload, self.workload.cut
        if not isinstance(cut, Cut):
            return cut.why
        shared.prefix = shared.prefix or measure_extraction(workload, cut)
        extractor = workload.extractor(cut, shared.prefix)
        device = device_with(workload, self._suffix_numerics(cut, extractor, shared), extractor.numerics)
        device.place(workload.classifier.network)
        table, images_per_second = self._extracted(extractor, sample, reporter)
        row, images = sum(column.nbytes for column in extractor.columns()), self._images_to_extract()
        return Cached(
            at=cut.suffix_start,
            row_bytes=row,
            rows=images,
            first_pass=extractor.about(images, images_per_second),
            speeds=self._suffix_speeds(cut, table, sample, device, reporter),
            why_live=uncacheable_reason(workload) or not_worthwhile_reason(workload, shared.prefix, images, row),
        )

    def _suffix_numerics(self, cut: Cut, extractor: Extractor, shared: Shared) -> ComputeFormat:
        """The format of the suffix; that of a bare head is no measure for others."""
        if self.workload.plain_head(cut) is not None:
            return measure_suffix(self.workload, cut, extractor.numerics)
        shared.suffix = shared.suffix or measure_suffix(self.workload, cut, extractor.numerics)
        return shared.suffix

    def _extracted(self, extractor: Extractor, sample: Dataset, reporter: Reporter) -> tuple[Table, float]:
        """The rows of a batch of the sample, and how many a second."""
        extractor.prepare(reporter)
        batch = first(sample, extractor.batch_size).train
        batches = ImageBatches(batch, self.workload.preprocessing, batch_size=extractor.batch_size, workers=0)
        rows: list[Table] = []

        def extract(n: int) -> None:
            rows[:] = [extractor(images) for images, _ in batches.in_order()]

        _seconds(extract, len(batch))
        shortest = _shortest(extract, len(batch))
        return rows[0], extractor.batch_size / shortest  # a short batch is filled up

    def _suffix_speeds(self, cut: Cut, table: Table, sample: Dataset, device: Device, reporter: Reporter) -> Speeds:
        """Over as many rows as there are training images, where that is quick: the same rows again and again."""
        spec, labels = _still(self.workload.spec), torch.from_numpy(sample.train.labels)

        def feed(n: int) -> BatchLoader:
            rows = torch.arange(n) % len(table[0])
            return ActivationLoader(
                [table],
                rows,
                labels[rows],
                network=cut.suffix,
                head=self.workload.plain_head(cut),
                dtype=device.train_dtype,
                device=device,
                batch_size=spec.batch_size,
                seed=spec.seed,
            )

        fit = self._fitting(spec, device, reporter)
        look = lambda n: evaluate(self.workload.classifier.network, feed(n), device, reporter, "")  # noqa: E731
        most = len(self.workload.data.train)
        few = (
            most if self.workload.plain_head(cut) is not None else min(FIRST, most)
        )  # evaluation is a small part of an epoch
        return Speeds(speed(lambda n: fit(feed(n)), most)[1], speed(look, few)[1])

    def _fitting(self, spec: TrainSpec, device: Device, reporter: Reporter) -> Callable[[BatchLoader], None]:
        """An epoch of training over a feed."""
        counts = self.workload.data.train.class_counts(len(self.workload.data.classes))
        trainer = Trainer(self.workload.classifier, self.workload.contract, spec, device, counts)

        def fit(feed: BatchLoader) -> None:
            with suppress(NonFiniteLossError):  # the weights may be random
                trainer.fit(feed, 1, reporter, lambda running: None)

        return fit

    def _images_to_extract(self) -> int:
        """How many rows one run computes."""
        data, views = self.workload.data, self.workload.spec.cache.views
        evaluated = len(data.val) + len(data.test)
        if not self.workload.augments or views is None:  # None: without augmentation, which is how they could be kept
            return len(data.train) + evaluated
        return len(data.train) * (views + self.workload.needs_probe) + evaluated


def _still(spec: TrainSpec) -> TrainSpec:
    """The same, so that training leaves the weights as they are and its schedule does not end."""
    return structs.replace(spec, optimizer=structs.replace(spec.optimizer, lr=STILL), epochs=EPOCHS)


def sample_of(data: Dataset, n: int, seed: int) -> Dataset:
    """The same with n training images, drawn."""
    return replace(data, train=data.train.take(epoch_order(len(data.train), seed, 1)[:n]))


def first(data: Dataset, n: int) -> Dataset:
    """The same with the first n training images."""
    return replace(data, train=data.train.take(np.arange(min(n, len(data.train)))))


def settle(model: Classifier, sample: Dataset, preprocessing: Preprocessing) -> None:
    """Give BatchNorm layers with random weights the statistics of a few images, as trained ones have them. Without,
    what passes through a deep network vanishes, and numbers that small take a processor many times as long."""
    layers = [m for m in model.network.modules() if isinstance(m, _NormBase) and m.track_running_stats]
    images = torch.stack([preprocessing.apply(sample.train.read(i)) for i in range(min(FIRST, len(sample.train)))])
    momenta = [layer.momentum for layer in layers]
    model.network.eval()
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # the mean over all that is seen
        layer.train()
    with torch.no_grad():
        device = next(model.network.parameters()).device
        model.network(preprocessing.normalise(images.to(device)))
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
        layer.eval()


def decoding_seconds(sample: Dataset, reporter: Reporter) -> float:
    """Seconds an image that decoding takes here; the sample stays in memory, where there is room."""
    start = time.perf_counter()
    preload_images([sample.train], reporter)
    return (time.perf_counter() - start) / len(sample.train)


def speed(
    step: Callable[[int], object], most: int, n: int | None = None, too_long: float = TOO_LONG
) -> tuple[int, float]:
    """How many images a step was measured with, and how many a second are done in the quickest of a few steps.

    Args:
        most: images of a step.
        n: so many, where it is known how many there is time for.
        too_long: seconds that are too many for a step.
    """
    if n is not None:
        return n, n / _shortest(step, n)
    n = min(FIRST, most)
    _seconds(step, n)  # the first step of all is slow
    seconds = _seconds(step, n)
    while n < most and 2 * seconds < too_long:
        n = min(most, n * max(2, int(too_long / seconds / 2)))
        seconds = _seconds(step, n)
    return n, n / min(seconds, _shortest(step, n, seconds))


def _shortest(step: Callable[[int], object], n: int, spent: float = 0.0) -> float:
    """Seconds of the quickest of a few steps, infinite where so much was spent before that none is to follow."""
    shortest = float("inf")
    while spent < LONG_ENOUGH:
        seconds = _seconds(step, n)
        shortest, spent = min(shortest, seconds), spent + seconds
    return shortest


def _seconds(step: Callable[[int], object], n: int) -> float:
    """How long a step over n images takes."""
    start = time.perf_counter()
    step(n)
    return max(time.perf_counter() - start, 1e-9)
