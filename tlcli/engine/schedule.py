"""The options of `scheduler`: a new one is a decorated class here, which imports without torch, and a YAML file."""

import math
from typing import TYPE_CHECKING, Annotated, ClassVar

from msgspec import Meta

from tlcli.specs import Count, CountOrZero, Fraction, FractionAboveZero, OpenFraction, SchedulerSpec, TrainSpec, option

if TYPE_CHECKING:
    from torch.optim import Optimizer


@option
class ConstantSpec(SchedulerSpec, frozen=True, tag="constant"):
    """Constant learning rate."""


@option
class CosineSpec(SchedulerSpec, frozen=True, tag="cosine"):
    """Half a cosine from lr to `final` times lr."""

    final: Fraction

    def after_warmup(self, progress: float, epoch: int) -> float:
        return _half_cosine(1.0, self.final, progress)


@option
class LinearSpec(SchedulerSpec, frozen=True, tag="linear"):
    """A straight line from lr to `final` times lr."""

    final: Fraction

    def after_warmup(self, progress: float, epoch: int) -> float:
        return 1.0 + (self.final - 1.0) * progress


@option
class StepSpec(SchedulerSpec, frozen=True, tag="step"):
    """lr times gamma, every `every` epochs."""

    every: Count
    gamma: FractionAboveZero

    def after_warmup(self, progress: float, epoch: int) -> float:
        return float(self.gamma ** (epoch // self.every))


@option
class OneCycleSpec(SchedulerSpec, frozen=True, tag="one_cycle"):
    """Up from lr/start_div to lr over `warmup`, down to lr/final_div by cosines (Smith and Topin 2018)."""

    start_div: Annotated[float, Meta(ge=1)]
    final_div: Annotated[float, Meta(ge=1)]

    def during_warmup(self, step: int, steps: int) -> float:
        return _half_cosine(1 / self.start_div, 1.0, step / steps)

    def after_warmup(self, progress: float, epoch: int) -> float:
        return _half_cosine(1.0, 1 / self.final_div, progress)


@option
class PlateauSpec(SchedulerSpec, frozen=True, tag="plateau"):
    """lr times gamma after more than `patience` epochs without a better validation loss."""

    patience: CountOrZero
    gamma: OpenFraction

    reads_validation: ClassVar[bool] = True


def steps_per_epoch(spec: TrainSpec, n_images: int) -> int:
    """Return the number of optimizer steps in a pass over this many training images."""
    return math.ceil(math.ceil(n_images / spec.batch_size) / spec.accumulate)


def number_of_epochs(spec: TrainSpec, n_images: int) -> int:
    """Return the epochs of a run on this many training images: as given, else enough for the fewest steps."""
    return spec.epochs or max(spec.min_epochs, math.ceil(spec.min_steps / steps_per_epoch(spec, n_images)))


class Schedule:
    """Sets the learning rate of each parameter group before each step: its own lr times a factor."""

    def __init__(self, spec: SchedulerSpec, optimizer: "Optimizer", steps_per_epoch: int, epochs: int) -> None:
        self._spec, self._optimizer = spec, optimizer
        self._steps_per_epoch, self._steps = steps_per_epoch, steps_per_epoch * epochs
        self._base_lrs = [group["lr"] for group in optimizer.param_groups]
        # all that does not follow from the step
        self.plateau: dict[str, float] = {"plateau_factor": 1.0, "best_loss": math.inf, "epochs_without": 0}

    def before_step(self, step: int) -> None:
        """Set the learning rates for a step, counted from 0 through all fits; each fit repeats the schedule."""
        factor = lr_factor(self._spec, step % self._steps, self._steps, self._steps_per_epoch)
        factor *= self.plateau["plateau_factor"]
        for group, lr in zip(self._optimizer.param_groups, self._base_lrs, strict=True):
            group["lr"] = lr * factor

    def after_epoch(self, val_loss: float) -> None:
        """Reduce the factor of `plateau` if the loss has not decreased for more than `patience` epochs."""
        if val_loss < self.plateau["best_loss"]:
            self.plateau |= {"best_loss": val_loss, "epochs_without": 0}
        elif isinstance(self._spec, PlateauSpec):
            self.plateau["epochs_without"] += 1
            if self.plateau["epochs_without"] > self._spec.patience:
                self.plateau["plateau_factor"] *= self._spec.gamma
                self.plateau["epochs_without"] = 0


def lr_factor(spec: SchedulerSpec, step: int, steps: int, steps_per_epoch: int) -> float:
    """Return the factor on lr at a step (0-based) of `steps`, of which the fraction `warmup` comes first."""
    warmup = round(spec.warmup * steps)
    if step < warmup:
        return spec.during_warmup(step, warmup)
    return spec.after_warmup((step - warmup) / max(1, steps - warmup), step // steps_per_epoch)


def _half_cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2
