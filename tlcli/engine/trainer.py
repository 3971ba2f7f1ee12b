"""The training loop. What it reads, what trains and at which learning rates are inputs to it."""

import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import islice
from math import ceil, isfinite
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tlcli.data.batches import sample_seed
from tlcli.device import Device, limit_threads
from tlcli.engine.gradients import LinearLoss, fp32_depthwise_backward
from tlcli.engine.loaders import Batch, BatchLoader
from tlcli.engine.schedule import Schedule
from tlcli.errors import NonFiniteLossError, OutOfMemory, TlcliError, is_out_of_memory
from tlcli.interrupts import defer_interrupts
from tlcli.models.classifier import Classifier
from tlcli.reporter import Reporter
from tlcli.specs import ClassWeights, TrainSpec
from tlcli.transfer.contract import FreezeContract, parameter_groups

STEPS_BETWEEN_CHECKS = 20
"""Reading a loss waits for an accelerator, and takes a tenth of a small head's step on a CPU."""


@dataclass(frozen=True)
class EpochStats:
    """Training metrics of one epoch: means over its images, as they were when each was trained on."""

    loss: float
    accuracy: float
    step: int
    seconds: float
    images_per_second: float
    lr: dict[str, float]


@dataclass(frozen=True)
class RunningLoss:
    """The mean loss of the last `log_every` batches."""

    epoch: int
    batch: int
    loss: float


class Trainer:
    """Trains the trainable parameters of a classifier, one epoch at a time."""

    def __init__(
        self,
        classifier: Classifier,
        contract: FreezeContract,
        spec: TrainSpec,
        device: Device,
        class_counts: tuple[int, ...],
    ) -> None:
        self._spec = spec
        self._device = device
        self._contract = contract
        self.optimizer = spec.optimizer.build(parameter_groups(spec.optimizer, classifier))
        self._trainable = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.steps_per_epoch = ceil(ceil(sum(class_counts) / spec.batch_size) / spec.accumulate)
        self.schedule = Schedule(
            spec.scheduler, self.optimizer, steps_per_epoch=self.steps_per_epoch, epochs=spec.epochs
        )
        self._scaler = torch.amp.GradScaler(device.accelerator.type, enabled=device.train_dtype == torch.float16)
        self._class_weights = class_weights(spec.class_weights, class_counts, device.accelerator)
        self._linear_loss: LinearLoss | None = None
        self._progress: _EpochProgress | None = None
        self._loaded_progress: _EpochProgress | None = None
        self.step = 0

    def fit(
        self,
        loader: BatchLoader,
        epoch: int,
        reporter: Reporter,
        on_running: Callable[[RunningLoss], None],
        after_step: Callable[[], None] = lambda: None,
    ) -> EpochStats:
        """Train on every image once, or on the images that are left of an epoch that `load` restored.

        Interrupts wait for the end of a step, so that the state is always that of whole steps. Raises
        NonFiniteLossError if the loss becomes NaN or infinite, and OutOfMemory with a batch size that fits.
        """
        self._contract.train_mode()
        progress, self._loaded_progress = self._loaded_progress, None
        if progress is None or progress.epoch != epoch:
            progress = _EpochProgress(epoch, self.step, self._device.accelerator)
            torch.manual_seed(sample_seed(self._spec.seed, epoch, 0))  # dropout depends on the epoch and its steps
        self._progress = progress
        batches, start = loader.epoch(epoch, progress.batches), time.perf_counter()
        with limit_threads(loader.threads), reporter.track(f"epoch {epoch}", len(loader)) as advance:
            advance(sum(progress.sizes))
            while group := list(islice(batches, self._spec.accumulate)):
                with defer_interrupts:
                    try:
                        self._step(loader, group, progress, on_running)
                    except Exception as error:
                        if (advice := self._advice(error, loader, group[0])) is not None:
                            raise advice from error
                        raise
                    if self.step % STEPS_BETWEEN_CHECKS == 0:
                        self._check_losses(progress)
                    advance(sum(len(y) for _, y in group))
                    progress.seconds, start = progress.seconds + time.perf_counter() - start, time.perf_counter()
                after_step()
        self._check_losses(progress)
        seconds, lr = progress.seconds, {group["name"]: group["lr"] for group in self.optimizer.param_groups}
        return EpochStats(progress.loss(), progress.accuracy(), self.step, seconds, len(loader) / seconds, lr)

    def _step(
        self,
        loader: BatchLoader,
        group: list[Batch],
        progress: "_EpochProgress",
        on_running: Callable[[RunningLoss], None],
    ) -> None:
        """Make one optimizer step with the gradient of the mean loss over all images of `group`."""
        self.schedule.before_step(self.step)
        self.optimizer.zero_grad()
        n_images = sum(len(y) for _, y in group)
        for x, y in group:
            if loader.head is not None and loader.dtype == torch.float32:  # features of a linear layer: no autograd
                if self._linear_loss is None:
                    self._linear_loss = LinearLoss(loader.head, self._spec.label_smoothing, self._class_weights)
                loss, logits = self._linear_loss.backward(x[0], y, n_images)
            else:
                logits = self._forward(loader, x)
                loss = F.cross_entropy(
                    logits, y, self._class_weights, reduction="sum", label_smoothing=self._spec.label_smoothing
                )
                torch.autograd.backward(self._scaler.scale(loss / n_images))
            progress.add(loss.detach(), logits.detach(), y)
            if self._spec.log_every and progress.batches % self._spec.log_every == 0:
                running = progress.running_loss(self._spec.log_every)
                on_running(RunningLoss(progress.epoch, progress.batches, running))
        if self._spec.clip_grad is not None:
            self._scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self._trainable, self._spec.clip_grad)
        self._scaler.step(self.optimizer)  # a disabled scaler calls optimizer.step()
        self._scaler.update()
        self.step += 1

    def _forward(self, loader: BatchLoader, x: tuple[Tensor, ...]) -> Tensor:
        """Return the logits (B, classes), float32."""
        device = self._device  # torch.compile generates its own kernels
        fast = nullcontext() if device.compile else fp32_depthwise_backward(device.accelerator, loader.dtype)
        is_single = len(x[0]) == 1 < self._spec.batch_size
        if is_single:  # the last image of an epoch alone has no batch statistics
            self._contract.train_mode(update_stats=False)
        with device.autocast(loader.dtype), fast:
            logits: Tensor = loader.network(*x)
        if is_single:
            self._contract.train_mode()
        return logits.float()

    def _advice(self, error: Exception, loader: BatchLoader, batch: Batch) -> TlcliError | None:
        """Return an error that says what to change after `error` ended a step; None if nothing is known."""
        if isinstance(error, ValueError) and "more than 1 value per channel" in str(error):
            return TlcliError(
                f"batch_size={self._spec.batch_size}: BatchNorm cannot update its statistics from one value per "
                f"channel; set batch_size=2 or more, or freeze.bn_stats=frozen"
            )
        if not is_out_of_memory(error):
            return None
        traceback.clear_frames(error.__traceback__)  # the tensors of the failed step would leave no room for the tries
        x, y = batch

        def try_images(n: int) -> None:
            self._contract.train_mode(update_stats=False)
            torch.autograd.backward(self._forward(loader, tuple(part[:n] for part in x)).logsumexp(dim=1).sum())
            self.optimizer.zero_grad()

        self.optimizer.zero_grad()
        return OutOfMemory(out_of_memory_advice(try_images, len(y), self._spec.accumulate))

    def _check_losses(self, progress: "_EpochProgress") -> None:
        """Raise NonFiniteLossError for the first unchecked batch whose loss is NaN or infinite."""
        batch = progress.first_non_finite()
        if batch is not None:
            step = progress.first_step + batch // self._spec.accumulate
            raise self._non_finite_error(f"the loss is not finite at epoch {progress.epoch}, batch {batch + 1}", step)

    def check_finite(self, loss: float, epoch: int, name: str) -> None:
        """Raise NonFiniteLossError if this loss is NaN or infinite after an epoch."""
        if not isfinite(loss):
            raise self._non_finite_error(f"the {name} is not finite after epoch {epoch}", self.step - 1)

    def _non_finite_error(self, text: str, step: int) -> NonFiniteLossError:
        self.schedule.before_step(max(0, step))
        lr = max(group["lr"] for group in self.optimizer.param_groups)
        return NonFiniteLossError(
            f"{text} (step {step + 1}, lr {lr:.3g}): "
            f"try optimizer.lr={self._spec.optimizer.lr / 10:g}, clip_grad=1.0 or device.precision=fp32"
        )

    def is_between_epochs(self, last: int) -> bool:
        """Return True if no step was made since the end of this epoch."""
        return self._progress is None or self._progress.epoch <= last

    def state(self) -> dict[str, Any]:
        """Return the state of training between two steps, without the weights."""
        return {
            "optimizer": {str(index): values for index, values in self.optimizer.state_dict()["state"].items()},
            "schedule": self.schedule.state(),
            "scaler": self._scaler.state_dict(),
            "step": self.step,
            "random": _random_states(),
            "pass": None if self._progress is None else self._progress.state(),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from a state, exactly as if training had not been interrupted. Weights are loaded separately."""
        optimizer_state = {int(index): dict(values) for index, values in state["optimizer"].items()}
        for index, values in optimizer_state.items():
            like = self._trainable[index]
            for name, value in values.items():
                if isinstance(value, Tensor) and value.shape == like.shape:  # fused kernels read both in memory order
                    values[name] = torch.empty_like(like).copy_(value)
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": optimizer_state, "param_groups": groups})
        self.schedule.load(state["schedule"])
        self._scaler.load_state_dict(state["scaler"])
        self.step = int(state["step"])
        self.schedule.before_step(max(0, self.step - 1))  # an epoch that has no steps left reports these rates
        progress = state["pass"]
        self._progress = None if progress is None else _EpochProgress.from_state(progress, self._device.accelerator)
        self._loaded_progress = self._progress
        _set_random_states(state["random"])


@dataclass
class _EpochProgress:
    """The epoch in progress. Losses and counts stay on the device, because reading them waits for it."""

    epoch: int
    first_step: int
    device: torch.device
    seconds: float = 0.0
    losses: list[Tensor] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    n_checked: int = 0

    def __post_init__(self) -> None:
        self._n_correct = torch.zeros((), dtype=torch.int64, device=self.device)
        self._uncounted: list[tuple[Tensor, Tensor]] = []

    @property
    def batches(self) -> int:
        """The number of batches trained on."""
        return len(self.losses)

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Count a batch: the sum of its losses, its logits and its labels."""
        self.losses.append(loss)
        self.sizes.append(len(labels))
        self._uncounted.append((logits, labels))
        if len(self._uncounted) == STEPS_BETWEEN_CHECKS:  # a few operations for many batches, not for each
            self._count()

    def _count(self) -> None:
        if self._uncounted:
            logits, labels = (torch.cat(part) for part in zip(*self._uncounted, strict=True))
            self._n_correct += (logits.argmax(dim=1) == labels).sum()
            self._uncounted.clear()

    def loss(self) -> float:
        """Return the mean loss over all images so far."""
        return torch.stack(self.losses).cpu().double().sum().item() / sum(self.sizes)

    def running_loss(self, batches: int) -> float:
        """Return the mean, over the last `batches`, of each batch's mean loss, as the PyTorch tutorial prints it."""
        sizes = torch.tensor(self.sizes[-batches:], device=self.device)
        return (torch.stack(self.losses[-batches:]) / sizes).mean().item()

    def accuracy(self) -> float:
        """Return the share of images classified correctly when they were trained on."""
        self._count()
        return self._n_correct.item() / sum(self.sizes)

    def first_non_finite(self) -> int | None:
        """Return the index of the first batch whose loss is NaN or infinite, among those not checked before."""
        if self.n_checked == self.batches:
            return None
        is_bad = ~torch.stack(self.losses[self.n_checked :]).isfinite()
        if bool(is_bad.any()):
            return self.n_checked + int(is_bad.nonzero()[0])
        self.n_checked = self.batches
        return None

    def state(self) -> dict[str, Any]:
        """Return all counts as numbers and CPU tensors."""
        self._count()
        names = ("epoch", "first_step", "batches", "seconds", "sizes")
        losses = torch.stack(self.losses).cpu() if self.losses else torch.zeros(0)
        counts = {"losses": losses, "n_correct": self._n_correct.item()}
        return {**counts, **{name: getattr(self, name) for name in names}}

    @classmethod
    def from_state(cls, state: Mapping[str, Any], device: torch.device) -> "_EpochProgress":
        """Return the progress that `state` recorded."""
        losses, sizes = list(state["losses"].to(device).unbind()), [int(size) for size in state["sizes"]]
        progress = cls(int(state["epoch"]), int(state["first_step"]), device, float(state["seconds"]), losses, sizes)
        progress._n_correct += int(state["n_correct"])
        return progress


def out_of_memory_advice(try_images: Callable[[int], None], size: int, accumulate: int) -> str:
    """Return what to change after a step over batches of `size` images ran out of memory.

    `try_images(n)` takes the memory of a step over n images; the largest of size/2, size/4, ... 1 that fits is named.
    """
    fits = 0
    for n in (size >> halvings for halvings in range(1, size.bit_length())):
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        try:
            try_images(n)
        except Exception as error:
            if not is_out_of_memory(error):
                break  # for example one image under BatchNorm
            traceback.clear_frames(error.__traceback__)
        else:
            fits = n
            break
    if not fits:
        return f"out of memory with batch_size={size}, and no smaller batch was found to fit: try a smaller image.size"
    return (
        f"out of memory with batch_size={size}: {fits} fits here; "
        f"batch_size={fits} accumulate={ceil(size / fits) * accumulate} keeps the size of a step"
    )


def class_weights(kind: ClassWeights, counts: tuple[int, ...], accelerator: torch.device) -> Tensor | None:
    """Return a weight per class; `balanced`: its inverse count, with a mean of 1 over the training images."""
    if kind is ClassWeights.none:
        return None
    return torch.tensor([sum(counts) / (len(counts) * n) for n in counts], device=accelerator)


def _random_states() -> list[Tensor]:
    """Return the generators' states: the CPU's, then those of the CUDA GPUs or of MPS, where dropout draws."""
    if torch.cuda.is_available():
        return [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]
    return [torch.get_rng_state(), *([torch.mps.get_rng_state()] if torch.backends.mps.is_available() else ())]


def _set_random_states(states: list[Tensor]) -> None:
    """Restore the CPU's generator, and the accelerators' if they are the same in number and kind."""
    torch.set_rng_state(states[0])
    if [state.shape for state in states] != [state.shape for state in _random_states()]:
        return
    if torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states[1:])
    elif len(states) > 1:
        torch.mps.set_rng_state(states[1])
