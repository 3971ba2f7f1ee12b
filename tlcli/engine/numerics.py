"""Which number format and memory format are quickest on this machine: a few steps of each, measured and remembered.

Rules of thumb go wrong both ways. Depthwise convolutions train faster in float32 on one processor with bfloat16
arithmetic, and in bfloat16 on the next; convolutions that gain most from bfloat16 in one memory format lose in another.
"""

import copy
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tlcli.device import DTYPES, SHORT, autocast, cpu_has_bfloat16, machine_name
from tlcli.engine.gradients import fp32_depthwise_backward
from tlcli.errors import UsageError
from tlcli.specs import DeviceSpec, Precision
from tlcli.store import Store

SAMPLE = 8
"""Images a measured step at the most: enough to tell the formats apart, few enough to take a second or two."""
BETTER = 1.1
"""How much faster a format has to be to be taken before one that stands earlier among the candidates: two that are
alike must not change places from run to run."""
HOPELESS = 1.5
"""How much slower than the best a step may be, at the first look, for there to be a second one."""
ENOUGH = 0.25
"""Seconds of steps after which a format has been seen often enough."""
NAME = "numerics"
"""Of the notes in which choices are remembered."""


@dataclass(frozen=True)
class ComputeFormat:
    """A number format for arithmetic and a memory format for images. Its speed is None where nothing was measured."""

    dtype: torch.dtype
    memory_format: torch.memory_format
    images_per_second: float | None = None
    why: str = ""

    @property
    def words(self) -> str:
        """`bfloat16, channels_last`."""
        return f"{SHORT[self.dtype]}, {FORMATS[self.memory_format]}"


FORMATS = {torch.channels_last: "channels_last", torch.contiguous_format: "contiguous"}


def candidates(spec: DeviceSpec, accelerator: torch.device) -> list[ComputeFormat]:
    """What may be used here, as far as the user has not named it; what is safer or simpler first.

    Raises UsageError where the user names a format that this accelerator does not have.
    """
    formats = [torch.channels_last, torch.contiguous_format]
    if spec.channels_last is not None:
        formats = [torch.channels_last if spec.channels_last else torch.contiguous_format]
    elif accelerator.type == "mps":
        formats = [torch.contiguous_format]
    return [ComputeFormat(dtype, memory_format) for dtype in _dtypes(spec, accelerator) for memory_format in formats]


def _dtypes(spec: DeviceSpec, accelerator: torch.device) -> list[torch.dtype]:
    if spec.precision is not Precision.auto:
        if spec.precision is Precision.fp16 and accelerator.type == "cpu":
            raise UsageError("device.precision=fp16 needs a GPU: on a CPU give fp32, bf16 or auto")
        return [DTYPES[spec.precision]]
    if accelerator.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return [torch.bfloat16 if native else torch.float16]
    if accelerator.type == "cpu" and cpu_has_bfloat16():
        return [torch.float32, torch.bfloat16]
    return [torch.float32]


Step = Callable[[], None]


class Autotuner:
    """Chooses among candidates by measurement, and remembers the choice for this machine.

    Args:
        store: where choices are remembered; a choice made once is made again, so that a result depends on no race.
        subject: what is measured: the network, what of it trains, and everything else that its speed depends on.
    """

    def __init__(self, store: Store, accelerator: torch.device, **subject: Any) -> None:
        self._store = store
        self._accelerator = accelerator
        self._subject = {**subject, "machine": machine_name(accelerator), "torch": torch.__version__}

    def of(
        self,
        options: Sequence[ComputeFormat],
        images: int,
        what: str,
        make: Callable[[ComputeFormat], Step],
        *,
        even_one: bool = False,
    ) -> ComputeFormat:
        """The quickest of these for `what` (`training`, `extraction`); each step is over so many images.

        Where there is but one its speed is measured only if `even_one` says that something depends on it.
        """
        if len(options) == 1 and not even_one:
            return replace(options[0], why="the only choice here")
        listed = [option.words for option in options]
        facts = json.dumps({**self._subject, "what": what, "options": listed, "images": images}, sort_keys=True)
        key = hashlib.sha256(facts.encode()).hexdigest()[:32]
        known = self._store.read_notes(NAME).get(key)
        if isinstance(known, dict) and known.keys() == set(listed):
            return _choose(options, known, "measured before")
        speeds = self._measure(options, images, make)
        self._store.add_note(NAME, key, speeds)
        return _choose(options, speeds, "measured")

    def _measure(
        self, options: Sequence[ComputeFormat], images: int, make: Callable[[ComputeFormat], Step]
    ) -> dict[str, float]:
        """Images a second of each option, by its words."""
        speeds: dict[str, float] = {}
        for option in options:
            best = max(speeds.values(), default=0.0)
            speeds[option.words] = round(images / self._seconds(make(option), images / best if best else None), 2)
        return speeds

    def _seconds(self, step: Step, best: float | None) -> float:
        """The shortest of a few steps after a first one; the first of them where another option was much quicker."""
        self._once(step)
        shortest = spent = self._once(step)
        if best is not None and shortest > HOPELESS * best:
            return shortest
        for _ in range(4):
            if spent > ENOUGH:
                break
            seconds = self._once(step)
            shortest, spent = min(shortest, seconds), spent + seconds
        return shortest

    def _once(self, step: Step) -> float:
        start = time.perf_counter()
        step()
        if self._accelerator.type == "cuda":
            torch.cuda.synchronize(self._accelerator)
        return time.perf_counter() - start


def _choose(options: Sequence[ComputeFormat], speeds: dict[str, float], how: str) -> ComputeFormat:
    """The first option that no other beats by more than BETTER."""
    quickest = max(speeds.values())
    chosen = next(option for option in options if speeds[option.words] * BETTER >= quickest)
    shown = ", ".join(f"{option.words} {speeds[option.words]:.0f}" for option in options)
    why = f"{how}: {shown} images/s" if len(options) > 1 else "the only choice here"
    return replace(chosen, images_per_second=speeds[chosen.words], why=why)


def training_step(
    run: nn.Module, network: nn.Module, inputs: tuple[Tensor, ...], accelerator: torch.device, option: ComputeFormat
) -> Step:
    """One forward and backward pass of `run`, the network or a suffix of it, on a copy in the modes that it is in."""
    own, owner = copy.deepcopy((run, network))
    owner.to(device=accelerator, memory_format=option.memory_format)  # type: ignore[call-overload]
    ready = tuple(_laid_out(x, accelerator, option) for x in inputs)

    def step() -> None:
        with (
            torch.random.fork_rng(devices=[]),
            autocast(accelerator, option.dtype),
            fp32_depthwise_backward(accelerator, option.dtype),
        ):
            logits = own(*ready)
        torch.autograd.backward(logits.float().logsumexp(dim=1).sum())
        owner.zero_grad(set_to_none=True)

    return step


def forward_step(run: nn.Module, inputs: tuple[Tensor, ...], accelerator: torch.device, option: ComputeFormat) -> Step:
    """One forward pass of a copy of the network, or of a part of it, in eval mode and without gradients."""
    own = copy.deepcopy(run).eval()
    own.to(device=accelerator, memory_format=option.memory_format)  # type: ignore[call-overload]
    ready = tuple(_laid_out(x, accelerator, option) for x in inputs)

    def step() -> None:
        with torch.inference_mode(), autocast(accelerator, option.dtype):
            own(*ready)

    return step


def _laid_out(x: Tensor, accelerator: torch.device, option: ComputeFormat) -> Tensor:
    x = x.to(accelerator)
    return x.contiguous(memory_format=option.memory_format) if x.ndim == 4 else x
