"""Progress and results of a run, passed to a Reporter as plain data: work never prints, and torch is not imported."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class StageRow:
    """One stage in the freeze table; `lr` is its highest learning rate, None if nothing in it trains."""

    name: str
    parameters: int
    trainable: int
    lr: float | None


@dataclass(frozen=True)
class RunPlan:
    """The plan of a run. `counts` has the number of images per class of each split."""

    run: Path
    name: str
    dataset: str
    classes: tuple[str, ...]
    counts: Mapping[str, tuple[int, ...]]
    model: str
    image: str
    stages: tuple[StageRow, ...]
    training: str
    device: str
    activations: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class EpochRow:
    """Metrics of an epoch; epoch 0 is before training. `best`: it is selected, as the best on validation so far."""

    epoch: int
    epochs: int
    train_loss: float | None
    train_accuracy: float | None
    val_loss: float | None
    val_accuracy: float | None
    val_macro_f1: float | None
    lr: float | None
    images_per_second: float | None
    seconds: float
    best: bool


class Reporter:
    """Shows nothing; the base of those that do."""

    def heading(self, text: str) -> None:
        """Take the title of a job or a fold, before its plan."""

    def note(self, text: str) -> None:
        """Take a line worth reading: a choice and its reason, or a warning."""

    @contextmanager
    def track(self, label: str, total: int | None, unit: str = "images") -> Iterator[Callable[[int], None]]:
        """Yield a function that is called with each number of units done, of `total` if it is known."""
        yield lambda done: None

    def plan(self, plan: RunPlan) -> None:
        """Take the plan, before training starts."""

    def epoch(self, row: EpochRow) -> None:
        """Take the metrics of an epoch at its end."""

    def outcome(self, run: Path, result: Mapping[str, Any]) -> None:
        """Take test.json's contents with val_accuracy, seconds, and confused: (true, predicted, count) of mistakes.

        `left_out` is the number of images left out of a first fit, if val_accuracy is theirs. Without test images
        there are only checkpoint, epoch, val_accuracy, left_out, seconds, and `cross_validation` of run.json.
        """
