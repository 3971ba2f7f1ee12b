"""What a run tells whoever is watching. Work never prints; it tells a Watch, and the command line shows it.

Plain data alone, so that the command line can show it without importing torch.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class StageRow:
    """One stage of the network in the freeze table; `lr` is its highest rate, None where nothing in it trains."""

    name: str
    parameters: int
    trainable: int
    lr: float | None


@dataclass(frozen=True)
class RunPlan:
    """What a run is about to do. `counts` has, for each split in use, the number of images of each class."""

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
    """One epoch's figures; epoch 0 is the network before training. `best`: the best on validation so far."""

    epoch: int
    epochs: int
    train_loss: float | None
    train_accuracy: float | None
    val_loss: float
    val_accuracy: float
    val_macro_f1: float
    lr: float | None
    images_per_second: float | None
    seconds: float
    best: bool


@dataclass(frozen=True)
class RunResult:
    """How a run ended. `ci95` is Wilson's interval of the accuracy; `confused` has (true, predicted, count), worst
    first; `top5` is None with five classes or fewer."""

    run: Path
    accuracy: float
    ci95: tuple[float, float]
    top5: float | None
    loss: float
    n: int
    epoch: int
    val_accuracy: float
    confused: tuple[tuple[str, str, int], ...]
    checkpoint: Path
    seconds: float


class Reporter:
    """A silent watcher, and the base of those that show something."""

    def note(self, text: str) -> None:
        """One line worth reading: a choice that was made and why, or a warning."""

    @contextmanager
    def track(self, label: str, total: int, unit: str = "images") -> Iterator[Callable[[int], None]]:
        """A span of work over `total` units; the function that it yields is called with each number of units done."""
        yield lambda done: None

    def plan(self, plan: RunPlan) -> None:
        """Everything is loaded and training is about to begin."""

    def epoch(self, row: EpochRow) -> None:
        """An epoch ended."""

    def outcome(self, outcome: RunResult) -> None:
        """The test accuracy is known and everything is written."""
