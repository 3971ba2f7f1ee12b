"""Learning rates over time: a factor on every group's rate, set before each step."""

import math
from collections.abc import Callable, Mapping

from torch.optim import Optimizer

from tlcli.specs import ConstantSpec, CosineSpec, LinearSpec, OneCycleSpec, PlateauSpec, SchedulerSpec, StepSpec


class Schedule:
    """Sets each group's rate to its own times a factor that depends on the step alone, and for `plateau` on how the
    validation loss went."""

    def __init__(self, spec: SchedulerSpec, optimizer: Optimizer, *, steps_per_epoch: int, epochs: int) -> None:
        self._spec = spec
        self._optimizer = optimizer
        self._steps_per_epoch = steps_per_epoch
        self._steps = steps_per_epoch * epochs
        self._base = [group["lr"] for group in optimizer.param_groups]
        self._plateau_factor = 1.0
        self._best_loss = math.inf
        self._epochs_without = 0

    def before_step(self, step: int) -> None:
        """Set the rates for step 0, 1, 2, ..."""
        factor = rate_factor(self._spec, step, self._steps, self._steps_per_epoch) * self._plateau_factor
        for group, base in zip(self._optimizer.param_groups, self._base, strict=True):
            group["lr"] = base * factor

    def after_epoch(self, val_loss: float) -> None:
        """`plateau`: a smaller factor once the loss has not fallen for more than `patience` epochs."""
        if not isinstance(self._spec, PlateauSpec):
            return
        if val_loss < self._best_loss:
            self._best_loss, self._epochs_without = val_loss, 0
            return
        self._epochs_without += 1
        if self._epochs_without > self._spec.patience:
            self._plateau_factor *= self._spec.gamma
            self._epochs_without = 0

    def state(self) -> dict[str, float]:
        """What cannot be derived from the step."""
        return {
            "plateau_factor": self._plateau_factor,
            "best_loss": self._best_loss,
            "epochs_without": self._epochs_without,
        }

    def load(self, state: Mapping[str, float]) -> None:
        """Go on from what `state` gave."""
        self._plateau_factor, self._best_loss = state["plateau_factor"], state["best_loss"]
        self._epochs_without = int(state["epochs_without"])


def rate_factor(spec: SchedulerSpec, step: int, steps: int, steps_per_epoch: int) -> float:
    """The factor on the rate at a step (0-based) of so many: a linear warmup, then what the spec's type says.

    Warmup takes `warmup` of all steps and reaches the full rate at its end; one_cycle has a cosine there instead.
    """
    warmup = round(spec.warmup * steps)
    if step < warmup:
        if isinstance(spec, OneCycleSpec):
            return _cosine(1 / spec.start_div, 1.0, step / warmup)
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, steps - warmup)
    return _AFTER_WARMUP[type(spec)](spec, progress, step // steps_per_epoch)


def _cosine(start: float, end: float, progress: float) -> float:
    """From start to end along half a cosine, progress in 0..1."""
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def _after_cosine(spec: SchedulerSpec, progress: float, epoch: int) -> float:
    assert isinstance(spec, CosineSpec)
    return _cosine(1.0, spec.final, progress)


def _after_linear(spec: SchedulerSpec, progress: float, epoch: int) -> float:
    assert isinstance(spec, LinearSpec)
    return 1.0 + (spec.final - 1.0) * progress


def _after_step(spec: SchedulerSpec, progress: float, epoch: int) -> float:
    assert isinstance(spec, StepSpec)
    return spec.gamma ** (epoch // spec.every)


def _after_one_cycle(spec: SchedulerSpec, progress: float, epoch: int) -> float:
    assert isinstance(spec, OneCycleSpec)
    return _cosine(1.0, 1 / spec.final_div, progress)


def _flat(spec: SchedulerSpec, progress: float, epoch: int) -> float:
    return 1.0


_AFTER_WARMUP: dict[type[SchedulerSpec], Callable[[SchedulerSpec, float, int], float]] = {
    ConstantSpec: _flat,
    PlateauSpec: _flat,
    CosineSpec: _after_cosine,
    LinearSpec: _after_linear,
    StepSpec: _after_step,
    OneCycleSpec: _after_one_cycle,
}
