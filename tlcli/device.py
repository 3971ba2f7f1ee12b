"""The accelerator of a run with its dtypes and memory format, and settings of the process."""

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tlcli.errors import UsageError
from tlcli.ranks import ALONE, Ranks
from tlcli.specs import Accelerator, DeviceSpec, Precision

DTYPES = {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16, Precision.fp16: torch.float16}
PROCESS_THREADS = torch.get_num_threads()  # of a job that names no number
DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
LAYOUT_NAMES = {torch.channels_last: "channels_last", torch.contiguous_format: "contiguous"}


@dataclass(frozen=True)
class ComputeFormat:
    """A dtype and a memory format; a speed if it was measured, a batch size of extraction if not the default."""

    dtype: torch.dtype
    memory_format: torch.memory_format
    images_per_second: float | None = None
    reason: str = ""
    batch_size: int | None = None

    @property
    def description(self) -> str:
        """The format as `bfloat16, channels_last`."""
        return f"{DTYPE_NAMES[self.dtype]}, {LAYOUT_NAMES[self.memory_format]}"


@dataclass(frozen=True)
class Device:
    """An accelerator with the dtypes of training and of evaluation."""

    accelerator: torch.device
    train_dtype: torch.dtype
    eval_dtype: torch.dtype
    memory_format: torch.memory_format
    compile: bool | None  # None: only to compute activations
    workers: int
    ranks: Ranks = ALONE

    @property
    def description(self) -> str:
        """The accelerator, its formats and how images are decoded, in one line."""
        kind, layout = self.accelerator.type, LAYOUT_NAMES[self.memory_format]
        name = machine_name(self.accelerator) if kind == "cuda" else {"cpu": "CPU", "mps": "Apple GPU"}[kind]
        dtypes = f"training in {DTYPE_NAMES[self.train_dtype]}, evaluation in {DTYPE_NAMES[self.eval_dtype]}"
        threads = f", {torch.get_num_threads()} threads" if kind == "cpu" else ""
        decoding = f"{self.workers} decoding workers" if self.workers else "decoding in process"
        processes = f"{self.ranks.size} processes, each with " if self.ranks.size > 1 else ""
        return f"{processes}{name}, {dtypes}, {layout}{threads}, {decoding}"

    def place(self, network: nn.Module) -> None:
        """Move the weights of a network to this device, in this memory format."""
        network.to(device=self.accelerator, memory_format=self.memory_format)  # type: ignore[call-overload]

    def to_device(self, batch: Tensor) -> Tensor:
        """Return a batch on this device; on CUDA the copy from pinned memory overlaps with arithmetic."""
        return batch.to(self.accelerator, non_blocking=self.accelerator.type == "cuda")


def autocast(accelerator: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """Return the context of forward passes in `dtype`, as far as PyTorch finds it safe; weights stay float32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(accelerator.type, dtype=dtype)


@contextmanager
def limit_threads(n: int | None) -> Iterator[None]:
    """Use n CPU threads for arithmetic in the block; None: as many as now."""
    previous = torch.get_num_threads()
    torch.set_num_threads(n or previous)
    try:
        yield
    finally:
        torch.set_num_threads(previous)


def setup_process(spec: DeviceSpec, threads: int | None = None, processes: int = 1) -> torch.device:
    """Set this process's threads (of a resumed run: `threads`), determinism and allocator. Return the accelerator."""
    accelerator = find_accelerator(spec.kind, processes)
    own = PROCESS_THREADS if "OMP_NUM_THREADS" in os.environ else PROCESS_THREADS // processes  # that is per process
    torch.set_num_threads(threads or spec.threads or max(1, own))
    torch.use_deterministic_algorithms(spec.deterministic)
    torch.backends.cudnn.benchmark = not spec.deterministic
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # always, because cuBLAS reads it once per process
    if accelerator.type == "cpu":
        keep_freed_memory()
    return accelerator


def find_accelerator(kind: Accelerator, processes: int = 1) -> torch.device:
    """Return the accelerator of this kind (auto: CUDA, then MPS, then CPU).

    Raise UsageError if there is none, or fewer devices than processes.
    """
    is_usable = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    names = [name for name in is_usable if is_usable[name]]
    name = names[0] if kind is Accelerator.auto else kind.value
    if name not in names:
        reason = f"PyTorch {torch.__version__} finds no such device. Available: {', '.join(names)}, auto"
        raise UsageError(f"device={name} is not available: {reason}.")
    n_devices = {"cuda": torch.cuda.device_count(), "mps": 1, "cpu": processes}[name]
    if processes > n_devices:
        reason = f"each process needs a device of its own, and {name} has {n_devices} here"
        raise UsageError(f"device.processes={processes}: {reason}")
    return torch.device(name)


def allowed_formats(spec: DeviceSpec, accelerator: torch.device) -> list[ComputeFormat]:
    """Return the formats that the spec allows here, the safer and simpler ones first. Raises UsageError without any."""
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


def cpu_has_bfloat16() -> bool:
    """Return True if the CPU has bfloat16 instructions (AVX512-BF16 or AMX)."""
    capabilities: Any = getattr(torch.cpu, "get_capabilities", dict)()  # not in every release of our range
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def keep_freed_memory() -> None:
    """Make glibc keep freed memory for the next step: page faults would cost up to a third of the time."""
    if platform.system() == "Linux" and platform.libc_ver()[0] == "glibc":
        for option in (-3, -1):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            ctypes.CDLL(None).mallopt(option, 2**31 - 1)


def synchronize(accelerator: torch.device) -> None:
    """Wait until the accelerator has finished, before a time is taken."""
    if accelerator.type != "cpu":
        torch.accelerator.synchronize(accelerator)


def auto_workers(accelerator: torch.device) -> int:
    """Return one per usable core, at most 8, with CUDA on Linux; else 0: a CPU is busy, or workers do not fork."""
    if accelerator.type != "cuda" or platform.system() != "Linux":
        return 0
    return min(8, len(os.sched_getaffinity(0)))  # SLURM and containers set the affinity


def machine_name(accelerator: torch.device) -> str:
    """Return what a measured speed depends on: the accelerator, or the model, instructions and threads of a CPU."""
    if accelerator.type == "cuda":
        return torch.cuda.get_device_name(accelerator)
    instructions = torch.backends.cpu.get_cpu_capability()
    cores = f"{torch.get_num_threads()} threads, {os.cpu_count()} cores"
    gpu = "" if accelerator.type == "cpu" else f"{accelerator.type} of "
    return f"{gpu}{platform.machine()} {processor_name()}, {instructions}, {cores}"


def processor_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:  # noqa: PTH123 - a stream of the kernel's
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
