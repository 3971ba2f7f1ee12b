"""Checks that need no PyTorch: versions, the machine, room on its disks."""

import math
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from tlcli import __version__
from tlcli.doctor.findings import Fact, Finding, Problem, private
from tlcli.store import Store, cache_dir
from tlcli.text import size_text

NEEDED = (
    "torch", "torchvision", "timm", "hydra-core", "omegaconf", "numpy", "Pillow", "scikit-learn", "safetensors",
)  # fmt: skip
OPTIONAL = {
    "onnx": "export",
    "onnxscript": "export",
    "onnxruntime": "export",
    "tensorboard": "tensorboard",
    "mlflow": "mlflow",
    "wandb": "wandb",
}
"""Packages of extras, and the extra that brings each."""

SETTINGS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE", "TLCLI_CACHE", "TORCH_HOME")
"""Environment variables that change what is measured or found here."""

GB = 10**9
LITTLE_DISK, LITTLE_MEMORY = 2 * GB, 2 * GB


def versions() -> Iterator[Finding]:
    found = {"tlcli": __version__, "python": platform.python_version()}
    for package in NEEDED:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            yield Problem(f"{package} is not installed: pip install --upgrade tlcli", True)
    yield Fact("versions", "versions", ", ".join(f"{name} {number}" for name, number in found.items()), found)
    extras = {package: _version(package) for package in OPTIONAL}
    there = ", ".join(f"{name} {number}" for name, number in extras.items() if number) or "none"
    absent = dict.fromkeys(OPTIONAL[name] for name, number in extras.items() if not number)
    missing = "; not installed: " + ", ".join(f"tlcli[{extra}]" for extra in absent) if absent else ""
    yield Fact("versions", "extras", there + missing, extras)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def machine() -> Iterator[Finding]:
    system = f"{platform.system()} {platform.release()}, {platform.machine()}"
    yield Fact("machine", "system", system, {"system": platform.system(), "architecture": platform.machine()})
    cores = usable_cores()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    text = f"{cores} usable of {os.cpu_count()}" + (f", load {load:.1f}" if load is not None else "")
    yield Fact("machine", "cores", text, {"usable": cores, "all": os.cpu_count(), "load": load})
    if load is not None and load > cores:
        yield Problem(f"this machine is busy (load {load:.1f} on {cores} cores): the speeds here are too low", False)
    total, free = memory()
    if total:
        text = size_text(total) + (f", {size_text(free)} free" if free is not None else "")
        yield Fact("machine", "memory", text, {"total": total, "free": free})
        if (free if free is not None else total) < LITTLE_MEMORY:
            yield Problem("little memory is free: close what is not needed, or use a smaller batch_size", False)


def usable_cores() -> int:
    """Cores that this process may use, by its affinity and its control group."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return cores if quota == "max" else max(1, min(cores, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):
        return cores


def memory() -> tuple[int | None, int | None]:
    """Bytes of memory in all and free; a control group's limit counts. None where the system does not say."""
    total: int | None = None
    free: int | None = None
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        if match := re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE):
            free = int(match[1]) * 1024
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii"))
        used = int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii"))
        if limit < total:
            total, free = limit, min(limit - used, free if free is not None else limit)
    except (OSError, ValueError, AttributeError):
        pass
    return total, free


def settings() -> Iterator[Finding]:
    found = {name: private(os.environ[name]) for name in SETTINGS if name in os.environ}
    if found:
        yield Fact("machine", "settings", ", ".join(f"{name}={value}" for name, value in found.items()), found)


def disk(outputs: Path) -> Iterator[Finding]:
    place, free, fault = _place(outputs)
    yield Fact("places", "outputs", f"{place}, {size_text(free)} free", {"path": place, "free": free, "fault": fault})
    if fault:
        yield Problem(f"runs cannot be written to {place} ({fault}): choose another place with out=FOLDER", False)
    elif free < LITTLE_DISK:
        yield Problem(f"{size_text(free)} of disk are free for runs: choose another place with out=FOLDER", False)


def cache() -> Iterator[Finding]:
    root = cache_dir()
    place, free, fault = _place(root)
    entries = Store(root).entries() if root.is_dir() else []
    used = sum(entry.nbytes for entry in entries)
    text = f"{place}, {size_text(used)} in {len(entries):,} entries, {size_text(free)} free"
    facts = {"path": place, "free": free, "used": used, "entries": len(entries), "fault": fault}
    yield Fact("places", "cache", text, facts)
    if fault:
        yield Problem(
            f"activations cannot be kept in {place} ({fault}), so that each run computes them: set TLCLI_CACHE=FOLDER",
            False,
        )
    elif free < LITTLE_DISK:
        yield Problem(f"{size_text(free)} of disk are free for activations: set TLCLI_CACHE=FOLDER", False)


def _place(folder: Path) -> tuple[str, int, str | None]:
    """A folder as it is shown, the bytes free there, and why nothing can be written to it or made there."""
    folder = folder.absolute()
    there = next((path for path in (folder, *folder.parents) if path.exists()), folder)
    free = shutil.disk_usage(there).free
    try:
        with tempfile.TemporaryFile(dir=there):  # found out by writing, which permissions alone do not tell
            pass
    except OSError as error:
        return private(folder), free, error.strerror or str(error)
    return private(folder), free, None
