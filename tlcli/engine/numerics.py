"""The fastest dtype and memory format on this machine: a few steps of each are measured, and the choice is stored.

Rules of thumb fail both ways. Depthwise convolutions train faster in float32 on one processor with bfloat16 arithmetic,
and in bfloat16 on the next; convolutions that gain most from bfloat16 in one memory format lose in the other.
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

from tlcli.device import DTYPE_NAMES, DTYPES, autocast, cpu_has_bfloat16, machine_name, synchronize
from tlcli.engine.gradients import fp32_depthwise_backward
from tlcli.errors import UsageError
from tlcli.specs import DeviceSpec, Precision
from tlcli.store import Store

MEASURE_BATCH_SIZE = 8  # images per measured step: enough to tell the formats apart in a second or two
MIN_SPEEDUP = 1.1  # of a format that is chosen before an earlier one: similar ones must not change between runs
MAX_SLOWDOWN = 1.5  # a format whose first step is this much slower than the fastest format is not measured further
MEASURE_SECONDS = 0.25  # of steps, after which a format has been measured enough
NAME = "numerics"  # of the store's notes on choices
LAYOUT_NAMES = {torch.channels_last: "channels_last", torch.contiguous_format: "contiguous"}

Step = Callable[[], None]


@dataclass(frozen=True)
class ComputeFormat:
    """A dtype for arithmetic and a memory format for images. The speed is None if nothing was measured, and so is the
    batch size of extraction if it is the default."""

    dtype: torch.dtype
    memory_format: torch.memory_format
    images_per_second: float | None = None
    reason: str = ""
    batch_size: int | None = None

    @property
    def description(self) -> str:
        """The format for people: `bfloat16, channels_last`."""
        return f"{DTYPE_NAMES[self.dtype]}, {LAYOUT_NAMES[self.memory_format]}"


def allowed_formats(spec: DeviceSpec, accelerator: torch.device) -> list[ComputeFormat]:
    """Return the formats that the spec allows on this accelerator, the safer and simpler ones first.

    Raises UsageError if the accelerator does not have the dtype that the spec names.
    """
    if spec.precision is Precision.fp16 and accelerator.type == "cpu":
        raise UsageError("device.precision=fp16 needs a GPU; on a CPU set fp32, bf16 or auto")
    dtypes = [torch.float32]
    if spec.precision is not Precision.auto:
        dtypes = [DTYPES[spec.precision]]
    elif accelerator.type == "cuda":
        is_native = torch.cuda.is_bf16_supported(including_emulation=False)
        dtypes = [torch.bfloat16 if is_native else torch.float16]
    elif accelerator.type == "cpu" and cpu_has_bfloat16():
        dtypes = [torch.float32, torch.bfloat16]
    layouts = [torch.channels_last, torch.contiguous_format]
    if spec.channels_last is not None:
        layouts = layouts[:1] if spec.channels_last else layouts[1:]
    elif accelerator.type == "mps":
        layouts = layouts[1:]
    return [ComputeFormat(dtype, layout) for dtype in dtypes for layout in layouts]


class Autotuner:
    """Chooses the fastest of several formats, and stores the measurement for this machine.

    Args:
        store: holds the measurements. A stored one is used again, so that a result does not depend on a race.
        subject: what is measured: the network, its trainable parameters, and all else that its speed depends on.
    """

    def __init__(self, store: Store, accelerator: torch.device, **subject: Any) -> None:
        self._store = store
        self._accelerator = accelerator
        self._subject = {**subject, "machine": machine_name(accelerator), "torch": torch.__version__}

    def choose(
        self,
        options: Sequence[ComputeFormat],
        images: int,
        what: str,
        make: Callable[[ComputeFormat], Step],
        *,
        measure_single: bool = False,
    ) -> ComputeFormat:
        """Return the fastest option for `what` (`training`, `extraction`); each step is over this many images.

        A single option is measured only if `measure_single`, because its speed is needed.
        """
        if len(options) == 1 and not measure_single:
            return replace(options[0], reason="the only choice here")
        names = [option.description for option in options]
        subject = {**self._subject, "what": what, "options": names, "images": images}
        key = hashlib.sha256(json.dumps(subject, sort_keys=True).encode()).hexdigest()[:32]
        speeds, origin = self._store.read_notes(NAME).get(key), "measured before"
        if not isinstance(speeds, dict) or speeds.keys() != set(names):
            speeds, origin = {}, "measured"
            for option in options:
                fastest = max(speeds.values(), default=0.0)
                seconds = self._seconds(make(option), images / fastest if fastest else None)
                speeds[option.description] = round(images / seconds, 2)
            self._store.add_note(NAME, key, speeds)
        fastest = max(speeds.values())
        chosen = next(option for option in options if speeds[option.description] * MIN_SPEEDUP >= fastest)
        reason = f"{origin}: {', '.join(f'{name} {speeds[name]:.0f}' for name in names)} images/s"
        reason = reason if len(options) > 1 else "the only choice here"
        return replace(chosen, images_per_second=speeds[chosen.description], reason=reason)

    def _seconds(self, step: Step, fastest: float | None) -> float:
        """Return the shortest of a few steps after a first one; only one if another option was much faster."""
        times: list[float] = []
        for _ in range(6):
            start = time.perf_counter()
            step()
            synchronize(self._accelerator)
            times.append(time.perf_counter() - start)
            is_slow = len(times) == 2 and fastest is not None and times[1] > MAX_SLOWDOWN * fastest
            if is_slow or sum(times[1:]) > MEASURE_SECONDS:
                break
        return min(times[1:])


def training_step(
    run: nn.Module, network: nn.Module, inputs: tuple[Tensor, ...], accelerator: torch.device, option: ComputeFormat
) -> Step:
    """Return a forward and backward pass of a copy of `run`, the network or its suffix, in its present modes."""
    own_run, own_network = copy.deepcopy((run, network))
    x = _place(own_network, inputs, accelerator, option)

    def step() -> None:
        with (
            torch.random.fork_rng(devices=[]),
            autocast(accelerator, option.dtype),
            fp32_depthwise_backward(accelerator, option.dtype),
        ):
            logits = own_run(*x)
        torch.autograd.backward(logits.float().logsumexp(dim=1).sum())
        own_network.zero_grad(set_to_none=True)

    return step


def forward_step(run: nn.Module, inputs: tuple[Tensor, ...], accelerator: torch.device, option: ComputeFormat) -> Step:
    """Return a forward pass of a copy of the network, or of a part of it, in eval mode and without gradients."""
    own_run = copy.deepcopy(run).eval()
    x = _place(own_run, inputs, accelerator, option)

    def step() -> None:
        with torch.inference_mode(), autocast(accelerator, option.dtype):
            own_run(*x)

    return step


def _place(
    network: nn.Module, inputs: tuple[Tensor, ...], accelerator: torch.device, option: ComputeFormat
) -> tuple[Tensor, ...]:
    layout = option.memory_format
    network.to(device=accelerator, memory_format=layout)  # type: ignore[call-overload]
    return tuple(x.to(accelerator, memory_format=layout) if x.ndim == 4 else x.to(accelerator) for x in inputs)
