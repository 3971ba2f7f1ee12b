"""Which accelerator, precision and memory format a run uses, and why; seeding and determinism."""

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tlcli.errors import UsageError
from tlcli.specs import Accelerator, DeviceSpec, Precision

DTYPES = {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16, Precision.fp16: torch.float16}
PROCESS_THREADS = torch.get_num_threads()
"""Threads of arithmetic of a job that names no number."""
SHORT = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


@dataclass(frozen=True)
class Device:
    """An accelerator with the number formats for training and for evaluation."""

    accelerator: torch.device
    train_dtype: torch.dtype
    eval_dtype: torch.dtype
    memory_format: torch.memory_format
    compile: bool
    workers: int

    @property
    def words(self) -> str:
        """The accelerator, its formats and how images are decoded, in one line."""
        words = [
            accelerator_name(self.accelerator),
            f"training in {SHORT[self.train_dtype]}, evaluation in {SHORT[self.eval_dtype]}",
            "channels_last" if self.memory_format == torch.channels_last else "contiguous",
        ]
        if self.accelerator.type == "cpu":
            words.append(f"{torch.get_num_threads()} threads")
        words.append(f"{self.workers} decoding workers" if self.workers else "decoding in process")
        return ", ".join(words)

    def autocast(self, dtype: torch.dtype) -> AbstractContextManager[object]:
        """Forward passes in `dtype`; weights and the loss stay float32."""
        return autocast(self.accelerator, dtype)

    def place(self, network: nn.Module) -> None:
        """Move a network's weights here, in this memory format."""
        network.to(device=self.accelerator, memory_format=self.memory_format)  # type: ignore[call-overload]

    def put(self, batch: Tensor) -> Tensor:
        """A batch on this device; on CUDA, where host memory is pinned, the copy overlaps with arithmetic."""
        return batch.to(self.accelerator, non_blocking=self.accelerator.type == "cuda")

    def compile_where_asked(self, network: nn.Module) -> None:
        """torch.compile, in place: the names of tensors stay as they are."""
        if self.compile:
            network.compile()


def autocast(accelerator: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """Arithmetic in `dtype` as far as PyTorch finds it safe; float32 is what there is without."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(accelerator.type, dtype=dtype)


@contextmanager
def threads(n: int | None) -> Iterator[None]:
    """So many threads of arithmetic on the CPU within the block; None: as many as there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(n or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def prepare(spec: DeviceSpec, threads: int | None = None) -> torch.device:
    """Set threads, determinism and the allocator of this process, and return the accelerator.

    `threads` is the number of threads of a resumed run. Every setting is set anew: an earlier job of the process may
    have had another. Raises UsageError if the accelerator is not available.
    """
    accelerator = find_accelerator(spec.kind)
    n_threads = threads or spec.threads or PROCESS_THREADS
    if n_threads != torch.get_num_threads():
        torch.set_num_threads(n_threads)
    torch.use_deterministic_algorithms(spec.deterministic)
    torch.backends.cudnn.benchmark = not spec.deterministic
    if spec.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS refuses to be deterministic without
    if accelerator.type == "cpu":
        keep_freed_memory()
    return accelerator


def find_accelerator(kind: Accelerator) -> torch.device:
    """The accelerator asked for; `auto` takes CUDA, then MPS, then the CPU."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if kind is Accelerator.auto:
        return torch.device(next(name for name, is_there in there.items() if is_there))
    if not there[kind.value]:
        usable = ", ".join(name for name, is_there in there.items() if is_there)
        raise UsageError(f"device={kind.value}: PyTorch {torch.__version__} finds none here. Usable: {usable}, auto.")
    return torch.device(kind.value)


def cpu_has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 in hardware (AVX512-BF16 or AMX)."""
    if not hasattr(torch.cpu, "get_capabilities"):  # not in every release of our range
        return False
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def keep_freed_memory() -> None:
    """Have glibc keep what is freed for the next step instead of returning it to the kernel.

    Large activations are otherwise mapped anew each step, and the page faults cost up to a third of the time.
    Does nothing where the C library is another.
    """
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return
    m_trim_threshold, m_mmap_threshold, limit = -1, -3, 2**31 - 1
    libc = ctypes.CDLL(None)
    libc.mallopt(m_mmap_threshold, limit)
    libc.mallopt(m_trim_threshold, limit)


def synchronize(accelerator: torch.device) -> None:
    """Wait until the accelerator has finished, before a time is taken."""
    if accelerator.type == "cuda":
        torch.cuda.synchronize(accelerator)
    elif accelerator.type == "mps":
        torch.mps.synchronize()


def auto_workers(accelerator: torch.device) -> int:
    """One a core, at most 8, beside a CUDA GPU on Linux. None on a CPU, where decoding and arithmetic share the cores,
    and none where workers cannot be forked: each would be sent the images that are in memory."""
    forks = platform.system() == "Linux"
    return min(8, os.cpu_count() or 1) if accelerator.type == "cuda" and forks else 0


def accelerator_name(accelerator: torch.device) -> str:
    """What a person calls this accelerator."""
    if accelerator.type == "cuda":
        return torch.cuda.get_device_name(accelerator)
    return {"cpu": "CPU", "mps": "Apple GPU"}[accelerator.type]


def machine_name(accelerator: torch.device) -> str:
    """What a measurement of speed holds for: the accelerator, and on a CPU its model, instructions and threads."""
    if accelerator.type == "cuda":
        return accelerator_name(accelerator)
    instructions = torch.backends.cpu.get_cpu_capability()
    cores = f"{torch.get_num_threads()} threads, {os.cpu_count()} cores"
    return f"{platform.machine()} {processor_name()}, {instructions}, {cores}"


def processor_name() -> str:
    """The processor's name as the system knows it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:  # noqa: PTH123 - a stream of the kernel's
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
