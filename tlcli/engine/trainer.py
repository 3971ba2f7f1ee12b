"""The loop. There is one: what it reads, what trains and at which rates are inputs to it."""

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from math import ceil, isfinite
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tlcli.data.batches import sample_seed
from tlcli.device import Device, threads
from tlcli.engine.depthwise import fp32_depthwise_backward
from tlcli.engine.inputs import BatchLoader
from tlcli.engine.linear import LinearLoss
from tlcli.engine.live import Batch
from tlcli.engine.memory import batch_size_that_fits
from tlcli.engine.optimizers import build_optimizer, take_step
from tlcli.engine.schedule import Schedule
from tlcli.errors import NonFiniteLossError, TlcliError
from tlcli.interrupts import defer_interrupts
from tlcli.models.classifier import Classifier
from tlcli.reporter import Reporter
from tlcli.specs import ClassWeights, TrainSpec
from tlcli.transfer.contract import FreezeContract
from tlcli.transfer.groups import parameter_groups

STEPS_BETWEEN_CHECKS = 20
"""Looking at a loss waits for it on an accelerator, and costs a step of a small head a tenth of its time on a CPU."""


@dataclass(frozen=True)
class Fit:
    """What one epoch of training gave: means over its images, as they were seen in training."""

    loss: float
    accuracy: float
    step: int
    seconds: float
    images_per_second: float
    lr: dict[str, float]


@dataclass(frozen=True)
class Running:
    """The mean loss of the last `log_every` batches."""

    epoch: int
    batch: int
    loss: float


class Trainer:
    """Trains what is trainable in a model, an epoch at a time."""

    def __init__(
        self,
        model: Classifier,
        contract: FreezeContract,
        spec: TrainSpec,
        device: Device,
        class_counts: tuple[int, ...],
    ) -> None:
        self._spec = spec
        self._device = device
        self._contract = contract
        self.optimizer = build_optimizer(spec.optimizer, parameter_groups(spec.optimizer, model))
        self._trainable = [p for group in self.optimizer.param_groups for p in group["params"]]
        n_train = sum(class_counts)
        self.steps_per_epoch = ceil(ceil(n_train / spec.batch_size) / spec.accumulate)
        self.schedule = Schedule(
            spec.scheduler, self.optimizer, steps_per_epoch=self.steps_per_epoch, epochs=spec.epochs
        )
        self._scaler = torch.amp.GradScaler(device.accelerator.type, enabled=device.train_dtype == torch.float16)
        self._class_weights = _class_weights(spec.class_weights, class_counts, device)
        self._linear: LinearLoss | None = None
        self._pass: _Pass | None = None
        self._loaded: _Pass | None = None
        self.step = 0

    def fit(
        self,
        inputs: BatchLoader,
        epoch: int,
        reporter: Reporter,
        on_running: Callable[[Running], None],
        after_step: Callable[[], None] = lambda: None,
    ) -> Fit:
        """Train on every image once, or on those that are left of an epoch that `load` brought.

        Interrupts wait for the end of a step, so that the state is always that of whole ones. Raises NotFinite where
        the loss becomes NaN or infinite.
        """
        self._contract.train_mode()
        now = self._begin(epoch)
        batches, mark = inputs.epoch(epoch, now.batches), time.perf_counter()
        with threads(inputs.threads), reporter.track(f"epoch {epoch}", len(inputs)) as advance:
            advance(now.tally.images)
            while group := list(islice(batches, self._spec.accumulate)):
                with defer_interrupts:
                    self._step(inputs, group, now.tally)
                    if self.step % STEPS_BETWEEN_CHECKS == 0:
                        self._check(now)
                    self._tell(now, group, on_running, advance)
                    now.seconds, mark = now.seconds + time.perf_counter() - mark, time.perf_counter()
                after_step()
        self._check(now)
        lr = {group["name"]: group["lr"] for group in self.optimizer.param_groups}
        return Fit(now.tally.loss(), now.tally.accuracy(), self.step, now.seconds, len(inputs) / now.seconds, lr)

    def _begin(self, epoch: int) -> "_Pass":
        """The epoch as far as it has come: dropout is a function of it and of the steps within it."""
        loaded, self._loaded = self._loaded, None
        if loaded is not None and loaded.epoch == epoch:
            return loaded
        self._pass = _Pass(epoch, self.step, _Tally(self._device.accelerator))
        torch.manual_seed(sample_seed(self._spec.seed, epoch, 0))
        return self._pass

    def _tell(
        self,
        now: "_Pass",
        group: list[Batch],
        on_running: Callable[[Running], None],
        advance: Callable[[int], None],
    ) -> None:
        """Count the batches of a step, and tell how training goes."""
        every = self._spec.log_every
        for _, y in group:
            now.batches += 1
            if every and now.batches % every == 0:
                on_running(Running(now.epoch, now.batches, now.tally.running(now.batches, every)))
            advance(len(y))

    def is_between_epochs(self, last: int) -> bool:
        """Whether no step was made since the end of this epoch."""
        return self._pass is None or self._pass.epoch <= last

    def state(self) -> dict[str, Any]:
        """The state of training beside the weights, between two steps."""
        own = self.optimizer.state_dict()["state"]
        return {
            "optimizer": {str(place): values for place, values in own.items()},
            "schedule": self.schedule.state(),
            "scaler": self._scaler.state_dict(),
            "step": self.step,
            "random": _random_states(),
            "pass": None if self._pass is None else self._pass.state(),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a state: what follows is what would have followed it. The network has its weights by itself."""
        laid_out = {
            int(place): {name: _laid_out(value, self._trainable[int(place)]) for name, value in values.items()}
            for place, values in state["optimizer"].items()
        }
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": laid_out, "param_groups": groups})
        self.schedule.load(state["schedule"])
        self._scaler.load_state_dict(state["scaler"])
        self.step = int(state["step"])
        self.schedule.before_step(max(0, self.step - 1))  # the rates that an epoch of no more steps reports
        self._pass = None if state["pass"] is None else _Pass.of(state["pass"], self._device.accelerator)
        self._loaded = self._pass
        _set_random_states(state["random"])

    def _step(self, inputs: BatchLoader, group: list[Batch], tally: "_Tally") -> None:
        """One step; where it runs out of memory, the error names a batch that does not."""
        batch = group[0]
        attempt = lambda n: self._attempt(inputs, batch, n)  # noqa: E731
        with batch_size_that_fits(attempt, len(batch[1]), self._spec.accumulate):
            self._update(inputs, group, tally)

    def _attempt(self, inputs: BatchLoader, batch: Batch, n: int) -> None:
        """Forward and backward pass over n images of a batch, for the memory that they take: nothing is trained."""
        x, y = batch
        self._contract.train_mode(update_stats=False)
        try:
            losses, _ = self._forward(inputs, tuple(part[:n] for part in x), y[:n])
            torch.autograd.backward(losses)
        finally:
            for parameter in self._trainable:
                parameter.grad = None
            self._contract.train_mode()

    def _update(self, inputs: BatchLoader, group: list[Batch], tally: "_Tally") -> None:
        """One step of the optimizer: the gradient of the mean loss over all images of the group."""
        self.schedule.before_step(self.step)
        for parameter in self._trainable:
            parameter.grad = None  # what zero_grad(set_to_none=True) comes to, without its overhead
        total = sum(len(y) for _, y in group)
        formula = self._formula(inputs)
        for x, y in group:
            if formula is not None:
                losses, logits = formula.backward(x[0], y, total)
            else:
                losses, logits = self._forward(inputs, x, y)
                torch.autograd.backward(self._scaler.scale(losses / total))
            tally.add(losses.detach(), logits.detach(), y)
        if self._spec.clip_grad is not None:
            self._scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self._trainable, self._spec.clip_grad)
        if self._scaler.is_enabled():
            self._scaler.step(self.optimizer)
            self._scaler.update()
        else:
            take_step(self.optimizer)
        self.step += 1

    def _formula(self, inputs: BatchLoader) -> LinearLoss | None:
        """Loss and gradient without autograd, where the features of one linear layer are read in float32."""
        if inputs.head is None or inputs.dtype != torch.float32:
            return None
        if self._linear is None:
            self._linear = LinearLoss(inputs.head, self._spec.label_smoothing, self._class_weights)
        return self._linear

    def _forward(self, inputs: BatchLoader, x: tuple[Tensor, ...], y: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of the images' losses, and the logits."""
        alone = len(y) == 1 < self._spec.batch_size
        if alone:  # one image left over has no batch statistics to speak of
            self._contract.train_mode(update_stats=False)
        try:
            with self._device.autocast(inputs.dtype), self._quick_gradients(inputs.dtype):
                logits = inputs.network(*x)
        except ValueError as error:
            if "more than 1 value per channel" in str(error):
                raise TlcliError(
                    f"batch_size={self._spec.batch_size}: BatchNorm cannot update its statistics from one value a "
                    f"channel: give batch_size=2 or more, or freeze.bn_stats=frozen"
                ) from error
            raise
        if alone:
            self._contract.train_mode()
        logits = logits.float()
        losses = F.cross_entropy(
            logits, y, self._class_weights, reduction="sum", label_smoothing=self._spec.label_smoothing
        )
        return losses, logits

    def _quick_gradients(self, dtype: torch.dtype) -> AbstractContextManager[Any]:
        """torch.compile makes kernels of its own."""
        return nullcontext() if self._device.compile else fp32_depthwise_backward(self._device.accelerator, dtype)

    def require_finite(self, loss: float, epoch: int, what: str) -> None:
        """Raise NotFinite, after an epoch, unless this loss is a number."""
        if not isfinite(loss):
            raise self._not_finite(f"the {what} is not finite after epoch {epoch}", self.step - 1)

    def _check(self, now: "_Pass") -> None:
        """Raise NotFinite where the loss of a batch that was not looked at yet is not a number."""
        at = now.tally.first_not_finite()
        if at is not None:
            step = now.first_step + at // self._spec.accumulate
            raise self._not_finite(f"the loss is not finite at epoch {now.epoch}, batch {at + 1}", step)

    def _not_finite(self, what: str, step: int) -> NonFiniteLossError:
        """The error for a step (0-based), with its rate and what to try."""
        self.schedule.before_step(max(0, step))
        rate = max(group["lr"] for group in self.optimizer.param_groups)
        return NonFiniteLossError(
            f"{what} (step {step + 1}, lr {rate:.3g}): "
            f"try optimizer.lr={self._spec.optimizer.lr / 10:g}, clip_grad=1.0 or device.precision=fp32"
        )


class _Tally:
    """Loss and accuracy of an epoch as it goes, kept on the device: reading them waits for it."""

    def __init__(self, device: torch.device) -> None:
        self._losses: list[Tensor] = []
        self._sizes: list[int] = []
        self._checked = 0
        self._right = torch.zeros((), dtype=torch.int64, device=device)
        self._to_count: list[tuple[Tensor, Tensor]] = []

    def add(self, losses: Tensor, logits: Tensor, labels: Tensor) -> None:
        """A batch: the sum of its losses, its logits and its labels."""
        self._losses.append(losses)
        self._sizes.append(len(labels))
        self._to_count.append((logits, labels))
        if len(self._to_count) == STEPS_BETWEEN_CHECKS:  # a few operations for many batches, not for each
            self._count()

    def _count(self) -> None:
        if self._to_count:
            logits, labels = (torch.cat(part) for part in zip(*self._to_count, strict=True))
            self._right += (logits.argmax(dim=1) == labels).sum()
            self._to_count.clear()

    @property
    def images(self) -> int:
        """The number of images so far."""
        return sum(self._sizes)

    def state(self) -> dict[str, Any]:
        """What has been counted."""
        self._count()
        losses = torch.stack(self._losses).cpu() if self._losses else torch.zeros(0)
        return {"losses": losses, "sizes": self._sizes, "right": self._right.item()}

    @classmethod
    def of(cls, state: Mapping[str, Any], device: torch.device) -> "_Tally":
        """From a state."""
        tally = cls(device)
        tally._losses = list(state["losses"].to(device).unbind())
        tally._sizes = [int(size) for size in state["sizes"]]
        tally._right += int(state["right"])
        return tally

    def loss(self) -> float:
        """The mean over all images so far."""
        return torch.stack(self._losses).cpu().double().sum().item() / sum(self._sizes)

    def running(self, end: int, batches: int) -> float:
        """The mean, over so many batches up to number `end`, of each one's mean, as the classic tutorial prints it."""
        last = slice(end - batches, end)
        means = torch.stack(self._losses[last]) / torch.tensor(self._sizes[last], device=self._right.device)
        return means.mean().item()

    def accuracy(self) -> float:
        """The share of images that were classified rightly as they were trained on."""
        self._count()
        return self._right.item() / sum(self._sizes)

    def first_not_finite(self) -> int | None:
        """The index of the first batch whose loss is NaN or infinite, among those not looked at yet."""
        new = torch.stack(self._losses[self._checked :]) if self._checked < len(self._losses) else None
        if new is None:
            return None
        if not bool(new.isfinite().all()):
            return self._checked + int((~new.isfinite()).nonzero()[0])
        self._checked = len(self._losses)
        return None


@dataclass
class _Pass:
    """An epoch as far as it has come: batches that were trained on, from which step on, and the seconds it took."""

    epoch: int
    first_step: int
    tally: _Tally
    batches: int = 0
    seconds: float = 0.0

    def state(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("epoch", "first_step", "batches", "seconds")}
        return {**own, "tally": self.tally.state()}

    @classmethod
    def of(cls, state: Mapping[str, Any], device: torch.device) -> "_Pass":
        tally = _Tally.of(state["tally"], device)
        epoch, first_step, batches = (int(state[name]) for name in ("epoch", "first_step", "batches"))
        return cls(epoch, first_step, tally, batches, float(state["seconds"]))


def _random_states() -> list[Tensor]:
    """Of the CPU's generator, then of each CUDA GPU's: dropout draws there."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else ())]


def _set_random_states(states: list[Tensor]) -> None:
    """Back to these; without those of GPUs that are not here."""
    torch.set_rng_state(states[0])
    if len(states) - 1 == (torch.cuda.device_count() if torch.cuda.is_available() else 0) > 0:
        torch.cuda.set_rng_state_all(states[1:])


def _laid_out(value: Any, parameter: Tensor) -> Any:
    """A tensor of the optimizer's as its parameter lies in memory, which is how its kernels read both."""
    if isinstance(value, Tensor) and value.shape == parameter.shape:
        return torch.empty_like(parameter).copy_(value)
    return value


def _class_weights(kind: ClassWeights, counts: tuple[int, ...], device: Device) -> Tensor | None:
    """`balanced`: the inverse of each class's count, with a mean of 1 over the training images."""
    if kind is ClassWeights.none:
        return None
    return torch.tensor([sum(counts) / (len(counts) * n) for n in counts], device=device.accelerator)
