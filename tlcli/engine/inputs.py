"""What the loop reads: batches (x, y) on the device, x as the network takes it."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from tlcli.data.augment import make_augmentation
from tlcli.data.batches import Batches
from tlcli.data.dataset import Dataset, Split
from tlcli.data.preprocess import Preprocessing
from tlcli.device import Device
from tlcli.models.classifier import Classifier
from tlcli.specs import TrainSpec

Batch = tuple[Tensor, Tensor]
EVALUATION_BATCH = 64
"""Images a forward pass of evaluation at the most; at most four times the training batch, whose backward pass needs as
much memory."""


class LiveImages:
    """Images decoded, augmented and normalised as they are needed: x (B, 3, S, S) float32, y (B) int64."""

    def __init__(self, batches: Batches, preprocessing: Preprocessing, device: Device) -> None:
        self._batches = batches
        self._preprocessing = preprocessing
        self._device = device

    def __len__(self) -> int:
        """The number of images."""
        return len(self._batches.split)

    def epoch(self, number: int) -> Iterator[Batch]:
        """Every image once, shuffled and augmented as (seed, epoch, index) say."""
        return self._ready(self._batches.epoch(number))

    def in_order(self) -> Iterator[Batch]:
        """Every image once, in order, as evaluation sees it."""
        return self._ready(self._batches.in_order())

    def _ready(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        for images, labels in batches:
            x = self._device.put(images).contiguous(memory_format=self._device.memory_format)
            yield self._preprocessing.normalise(x), self._device.put(labels)


@dataclass(frozen=True)
class Inputs:
    """The splits of a data set as the loop reads them; `probe` is train as evaluation sees it."""

    train: LiveImages
    probe: LiveImages
    val: LiveImages
    test: LiveImages
    preprocessing: Preprocessing


def open_inputs(data: Dataset, model: Classifier, spec: TrainSpec, device: Device) -> Inputs:
    """Live images of every split, in the size that the spec, the data set or the backbone names."""
    preprocessing = preprocessing_for(spec, model)

    def live(split: Split, *, train: bool = False) -> LiveImages:
        batches = Batches(
            split,
            preprocessing,
            batch_size=spec.batch_size if train else min(EVALUATION_BATCH, 4 * spec.batch_size),
            workers=device.workers,
            pin_memory=device.accelerator.type == "cuda",
            augmentation=make_augmentation(spec.augment, preprocessing) if train else None,
            seed=spec.seed,
        )
        return LiveImages(batches, preprocessing, device)

    return Inputs(
        train=live(data.train, train=True),
        probe=live(data.train),
        val=live(data.val),
        test=live(data.test),
        preprocessing=preprocessing,
    )


def image_size(spec: TrainSpec) -> int | None:
    """The size that the user or the data set names, in pixels a side; None: the backbone's own."""
    return spec.image.size or spec.dataset.image_size


def preprocessing_for(spec: TrainSpec, model: Classifier) -> Preprocessing:
    """How images become what this model takes: the spec's values, else those that its weights expect."""
    own = model.architecture
    return Preprocessing(
        size=image_size(spec) or own.size,
        fit=spec.image.fit,
        mean=_three(spec.image.mean, own.mean),
        std=_three(spec.image.std, own.std),
    )


def _three(given: list[float] | None, own: tuple[float, float, float]) -> tuple[float, float, float]:
    red, green, blue = own if given is None else given
    return red, green, blue
