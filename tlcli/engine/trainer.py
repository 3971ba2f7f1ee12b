"""The training loop. What it reads, what trains and at which learning rates are inputs to it."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tlcli.data.batches import sample_seed
from tlcli.device import Device, autocast, limit_threads
from tlcli.engine.activations import Workload
from tlcli.engine.gradients import LinearLoss, fast_depthwise_backward
from tlcli.engine.loaders import Batch, BatchLoader
from tlcli.engine.schedule import Schedule, steps_per_epoch
from tlcli.errors import TlcliError, is_out_of_memory
from tlcli.interrupts import defer_interrupts
from tlcli.reporter import Reporter
from tlcli.specs import ClassWeights
from tlcli.transfer.contract import parameter_groups

OnRunning = Callable[[int, int, float], None]  # receives epoch, batch, and mean loss of the last `log_every` batches
STEPS_BETWEEN_CHECKS = 20  # reading a loss waits for an accelerator, and is a tenth of a small step on a CPU


class Trainer:
    """Trains the trainable parameters of a classifier, one epoch at a time. `label` is what its progress is called."""

    def __init__(self, workload: Workload, device: Device, label: str = "epoch") -> None:
        self._spec, self._device, self._contract, self._label = workload.spec, device, workload.contract, label
        self._stops = False  # as all ranks have agreed
        self._synchronizes = any(isinstance(m, nn.SyncBatchNorm) for m in workload.classifier.network.modules())
        spec, classes = workload.spec, workload.data.classes
        self.optimizer = spec.optimizer.build(parameter_groups(spec.optimizer, workload.classifier))
        self._trainable = [p for group in self.optimizer.param_groups for p in group["params"]]
        norms = workload.contract.updated_norms().values()
        statistics = [t for norm in norms for t in (norm.running_mean, norm.running_var) if t is not None]
        self._moved = [*self._trainable, *statistics]  # what interpolation and averages move
        class_counts = workload.data.train.class_counts(len(classes))
        steps = steps_per_epoch(spec, sum(class_counts))
        self.schedule = Schedule(spec.scheduler, self.optimizer, steps, workload.epochs_per_fit)
        self._fits, self._epochs_per_fit = workload.fits, workload.epochs_per_fit
        self._ends: list[Tensor] = []  # sum of `_moved` at the ends of earlier fits
        self._scaler = torch.amp.GradScaler(device.accelerator.type, enabled=device.train_dtype == torch.float16)
        self._scaler.scale(torch.zeros((), device=device.accelerator))  # a rank may have no image of its first step
        self._class_weights: Tensor | None = None
        if spec.class_weights is ClassWeights.balanced:  # the inverse count, with a mean of 1 over the training images
            weights = [sum(class_counts) / (len(classes) * n) for n in class_counts]
            self._class_weights = torch.tensor(weights, device=device.accelerator)
        self._linear_loss: LinearLoss | None = None
        self._mixer = spec.augment.mixer(len(classes)) if spec.augment.mixes else None
        head = workload.classifier.head_parameters()
        self._body = {id(p) for name, p in workload.classifier.network.named_parameters() if name not in head}
        self._average: list[Tensor] = []
        self._progress: _EpochProgress | None = None
        self._start: list[Tensor] = []
        self._advice = f"try optimizer.lr={spec.optimizer.lr / 10:g}, clip_grad=1.0 or device.precision=fp32"
        self.step = 0

    def fit(
        self,
        loader: BatchLoader,
        epoch: int,
        reporter: Reporter,
        on_running: OnRunning = lambda *running: None,
        after_step: Callable[[], None] = lambda: None,
    ) -> dict[str, Any]:
        """Train on every image once, or on the images that are left of an epoch that `load` restored.

        Return the row of metrics.jsonl: means over images as they were when each was trained on. Interrupts wait for
        the end of a step. Raises TlcliError if a loss is not finite or a step needs too much memory.
        """
        self._contract.train_mode()
        progress = self._progress
        if progress is None or progress.epoch != epoch:
            with defer_interrupts:  # a state that is saved has all of it, or nothing
                progress = _EpochProgress(epoch, self.step, torch.tensor(0, device=self._device.accelerator))
                self._progress = progress
                torch.manual_seed(sample_seed(self._spec.seed, epoch, 0))  # dropout depends on the epoch and its steps
                if self._fits > 1 and (epoch - 1) % self._epochs_per_fit == 0:
                    self._begin_fit()
        batches, start = loader.epoch(epoch, len(progress.sizes)), time.perf_counter()
        track = reporter.track(f"{self._label} {epoch}", len(loader))
        held = defer_interrupts if loader.ranks.size > 1 else nullcontext()  # until all ranks stop at the same step
        with limit_threads(loader.threads), held, track as advance:
            advance(sum(progress.sizes))
            while group := list(islice(batches, self._spec.accumulate)):
                with defer_interrupts:
                    try:
                        self._step(loader, group, progress, on_running)
                    except Exception as error:
                        self._explain(error)
                        raise
                    if self.step % STEPS_BETWEEN_CHECKS == 0:
                        self._check_losses(progress)
                        progress.count()
                    advance(sum(progress.sizes[-len(group) :]))
                    progress.seconds, start = progress.seconds + time.perf_counter() - start, time.perf_counter()
                after_step()
                if self._stops:
                    self._stops = False
                    defer_interrupts.raise_pending()
        if loader.ranks.size < self._device.ranks.size:  # each rank has trained on whole batches
            self._device.ranks.copy_tensors(self._trainable)
        self._check_losses(progress)
        if not torch.stack([tensor.isfinite().all() for tensor in self._moved]).all():  # after the last step
            raise TlcliError(f"the weights are not finite after epoch {epoch}: {self._advice}")
        progress.seconds += time.perf_counter() - start  # waiting for an accelerator included
        if self._ends and epoch == self._fits * self._epochs_per_fit:
            with defer_interrupts:
                self._set([(end + p.detach()) / self._fits for end, p in zip(self._ends, self._moved, strict=True)])
                self._ends = []
        progress.count()
        loss, n = torch.stack(progress.losses).cpu().double().sum().item(), sum(progress.sizes)
        lr, seconds = {group["name"]: group["lr"] for group in self.optimizer.param_groups}, progress.seconds
        means = {"loss": loss / n, "accuracy": progress.n_correct.item() / n}
        return {**means, "step": self.step, "seconds": seconds, "images_per_second": n / seconds, "lr": lr}

    def _step(self, loader: BatchLoader, group: list[Batch], progress: "_EpochProgress", on_running: OnRunning) -> None:
        """Make one optimizer step with the gradient of the mean loss over all images of `group`."""
        spec, ranks, first = self._spec, loader.ranks, len(progress.sizes)
        self.schedule.before_step(self.step)
        self.optimizer.zero_grad()
        if ranks.size > 1:
            torch.manual_seed(sample_seed(spec.seed, self.step, -1 - ranks.rank))  # dropout of its own
        # of whole batches, of which `group` has this rank's share
        sizes = [min(spec.batch_size, len(loader) - (first + i) * spec.batch_size) for i in range(len(group))]
        n_images, losses, outputs = sum(sizes), [], []
        for (x, y), size in zip(group, sizes, strict=True):
            if not len(y):  # not of this rank
                losses.append(torch.tensor(0.0, device=self._device.accelerator))
                continue
            if loader.head is not None and loader.dtype == torch.float32:  # features of a linear layer: no autograd
                if self._linear_loss is None:
                    self._linear_loss = LinearLoss(loader.head, spec.label_smoothing, self._class_weights)
                loss, logits = self._linear_loss.backward(x[0], y, n_images)
            else:
                target = y
                if self._mixer is not None:
                    images, target = self._mixer(x[0], y)
                    x, y = (images,), target.argmax(dim=1)
                lacks_stats = size == 1 < spec.batch_size or (self._synchronizes and size < ranks.size)
                logits = self._forward(loader, x, lacks_stats=lacks_stats)
                options: Any = {"reduction": "sum", "label_smoothing": spec.label_smoothing}
                loss = F.cross_entropy(logits, target, self._class_weights, **options)
                torch.autograd.backward(self._scaler.scale(loss / n_images))
            losses.append(loss.detach())
            outputs.append((logits.detach(), y))
        if ranks.size > 1:
            n_correct = sum(((logits.argmax(dim=1) == y).sum() for logits, y in outputs), torch.zeros_like(losses[0]))
            values, stop = torch.stack([*losses, n_correct]), defer_interrupts.is_pending
            values, self._stops = ranks.sum_gradients(self._trainable, values, stop=stop)
            *losses, n_correct = values.unbind()
            progress.n_correct += n_correct.long()
        else:
            progress.uncounted += outputs
        progress.losses += losses
        progress.sizes += sizes
        every = spec.log_every
        for done in range(first + 1, len(progress.sizes) + 1):
            if every and done % every == 0:  # the mean of each batch's mean, as PyTorch's tutorial has
                self._check_losses(progress)
                last = slice(done - every, done)
                n = torch.tensor(progress.sizes[last], device=self._device.accelerator)
                on_running(progress.epoch, done, (torch.stack(progress.losses[last]) / n).mean().item())
        self._update()
        self.step += 1

    def _update(self) -> None:
        """Change the weights by their gradients, and the moving average by the weights."""
        spec = self._spec
        if spec.clip_grad is not None or spec.l2sp:
            self._scaler.unscale_(self.optimizer)
        if spec.l2sp:  # the gradient of l2sp / 2 times the squared distance (Li et al. 2018)
            if not self._start:
                self.remember_start()
            for tensor, start in zip(self._moved, self._start, strict=True):
                if id(tensor) in self._body and tensor.grad is not None:
                    tensor.grad.add_(tensor.detach() - start, alpha=spec.l2sp)
        if spec.clip_grad is not None:
            nn.utils.clip_grad_norm_(self._trainable, spec.clip_grad)
        self._scaler.step(self.optimizer)  # a disabled scaler calls optimizer.step()
        self._scaler.update()
        if spec.ema is not None:
            self._average = self._average or [tensor.detach().clone() for tensor in self._moved]
            for average, tensor in zip(self._average, self._moved, strict=True):
                average.lerp_(tensor.detach(), 1 - spec.ema)

    def _forward(self, loader: BatchLoader, x: tuple[Tensor, ...], *, lacks_stats: bool) -> Tensor:
        """Return the logits (B, classes), float32.

        The last image of an epoch alone has no batch statistics, and neither has a last batch of fewer images than
        ranks: SyncBatchNorm of a rank without images would send values of another dtype.
        """
        device = self._device  # torch.compile generates its own kernels
        fast = nullcontext() if device.compile else fast_depthwise_backward(device.accelerator, loader.dtype)
        if lacks_stats:
            self._contract.train_mode(update_stats=False)
        with autocast(device.accelerator, loader.dtype), fast:
            logits: Tensor = loader.network(*x)
        if lacks_stats:
            self._contract.train_mode()
        return logits.float()

    def _explain(self, error: Exception) -> None:
        """Raise an error that says what to change after `error` ended a step, if that is known."""
        size, accumulate = self._spec.batch_size, self._spec.accumulate
        if isinstance(error, ValueError) and "more than 1 value per channel" in str(error):
            reason = "BatchNorm cannot update its statistics from one value per channel"
            raise TlcliError(f"batch_size={size}: {reason}; set batch_size=2 or freeze.bn_stats=frozen") from error
        if "does not have a deterministic implementation" in str(error):
            reason = "PyTorch has no deterministic gradient of a layer of this network on this device"
            raise TlcliError(f"device.deterministic=true: {reason}; set device.deterministic=false") from error
        if is_out_of_memory(error):
            smaller = f"batch_size={size // 2} accumulate={2 * accumulate}, which keeps the size of a step, or "
            advice = f"set {smaller if size > 1 else ''}a smaller image.size"
            raise TlcliError(f"out of memory with batch_size={size}: {advice}") from error

    def _check_losses(self, progress: "_EpochProgress") -> None:
        """Raise TlcliError for the first unchecked batch whose loss is NaN or infinite."""
        unchecked = progress.losses[progress.n_checked :]
        if unchecked and not torch.stack(unchecked).isfinite().all():
            batch = progress.n_checked + next(i for i, loss in enumerate(unchecked) if not loss.isfinite())
            step = progress.first_step + batch // self._spec.accumulate
            self.schedule.before_step(step)
            lr = max(group["lr"] for group in self.optimizer.param_groups)
            place = f"epoch {progress.epoch}, batch {batch + 1} (step {step + 1}, lr {lr:.3g})"
            raise TlcliError(f"the loss is not finite at {place}: {self._advice}")
        progress.n_checked = len(progress.losses)

    def _begin_fit(self) -> None:
        """Restore the initial weights; add those of the last fit to a sum: a uniform soup (Wortsman et al. 2022)."""
        if self.step:
            ends = self._ends or [torch.zeros_like(p) for p in self._moved]
            self._ends = [end + p.detach() for end, p in zip(ends, self._moved, strict=True)]
            self._set(self._start)
            self.optimizer.state.clear()
        elif not self._start:
            self.remember_start()

    def remember_start(self) -> None:
        """Keep a copy of what trains and of the statistics that follow, from which `interpolate` starts."""
        self._start = [tensor.detach().clone() for tensor in self._moved]

    def interpolate(self, share: float) -> None:
        """Replace what trains by its interpolation from the remembered weights (0) to the present ones (1)."""
        self._set([start.lerp(t.detach(), share) for start, t in zip(self._start, self._moved, strict=True)])

    @contextmanager
    def averaged(self, *, use: bool = True) -> Iterator[None]:
        """Replace what trains by its moving average within the block, if there is one."""
        if not (use and self._average):
            yield
            return
        own = [tensor.detach().clone() for tensor in self._moved]
        try:
            self._set(self._average)
            yield
        finally:
            with defer_interrupts:  # a state that is saved has no mixture
                self._set(own)

    def _set(self, weights: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for tensor, weight in zip(self._moved, weights, strict=True):
                tensor.copy_(weight)

    def is_between_epochs(self, last: int) -> bool:
        """Return True if no step was made since the end of this epoch."""
        return self._progress is None or self._progress.epoch <= last

    def state(self) -> dict[str, Any]:
        return {
            "optimizer": {str(index): values for index, values in self.optimizer.state_dict()["state"].items()},
            "schedule": dict(self.schedule.plateau),
            "scaler": self._scaler.state_dict(),
            "step": self.step,
            "start": self._start,
            "average": self._average,
            "ends": self._ends,
            "random": [generator.get_state() for generator in _generators()],
            "pass": self._progress and self._progress.state(),
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
        self.schedule.plateau.update(state["schedule"])
        self._scaler.load_state_dict(state["scaler"])
        self.step = int(state["step"])
        self.schedule.before_step(max(0, self.step - 1))  # an epoch that has no steps left reports these rates
        saved, device, names = state["pass"], self._device.accelerator, ("start", "average", "ends")
        self._start, self._average, self._ends = ([t.to(device) for t in state[name]] for name in names)
        self._progress = saved and _EpochProgress(
            epoch=int(saved["epoch"]),
            first_step=int(saved["first_step"]),
            n_correct=torch.tensor(int(saved["n_correct"]), device=device),
            seconds=float(saved["seconds"]),
            losses=list(saved["losses"].to(device).unbind()),
            sizes=[int(size) for size in saved["sizes"]],
        )
        for generator, values in zip(_generators(), state["random"], strict=False):  # other accelerators if not equal
            if generator.get_state().shape == values.shape:
                generator.set_state(values)


@dataclass
class _EpochProgress:
    """The epoch in progress. Losses and counts stay on the device, because reading them waits for it."""

    epoch: int
    first_step: int
    n_correct: Tensor
    seconds: float = 0.0
    losses: list[Tensor] = field(default_factory=list)  # the sum over each batch
    sizes: list[int] = field(default_factory=list)
    uncounted: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # logits and labels
    n_checked: int = 0

    def count(self) -> None:
        if self.uncounted:  # a few operations for many batches, not for each
            logits, labels = (torch.cat(part) for part in zip(*self.uncounted, strict=True))
            self.n_correct += (logits.argmax(dim=1) == labels).sum()
            self.uncounted.clear()

    def state(self) -> dict[str, Any]:
        self.count()
        losses = torch.stack(self.losses).cpu() if self.losses else torch.zeros(0)
        counts = {"losses": losses, "n_correct": self.n_correct.item(), "sizes": self.sizes}
        return {**counts, "epoch": self.epoch, "first_step": self.first_step, "seconds": self.seconds}


def _generators() -> list[torch.Generator]:
    """Return the random generators of the CPU and of the GPUs, where dropout draws."""
    mps = [torch.mps._get_default_mps_generator()] if torch.backends.mps.is_available() else []
    return [torch.default_generator, *torch.cuda.default_generators, *mps]
