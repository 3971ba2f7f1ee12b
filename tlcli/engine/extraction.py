"""Run the frozen prefix over many images, once, as fast as the machine allows."""

import copy
import hashlib
import math
import time
import warnings
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from tlcli.data.batches import Preprocessing
from tlcli.device import DTYPE_NAMES, DTYPES, ComputeFormat, autocast, machine_name, synchronize
from tlcli.reporter import Reporter
from tlcli.specs import CacheDtype, Precision
from tlcli.store import Column, Store
from tlcli.transfer.graph import device_of, full_precision

# Images per forward pass. On a CPU 32 was as fast as 64 and 128 for ResNet-18, and faster for EfficientNet-Lite0: its
# maps then stay in the processor's cache.
BATCH = {"cpu": 32, "mps": 64, "cuda": 256}
# Cost and gain of torch.compile until measured on this machine: 12 to 15 s at first, 3 to 8 s once inductor has it on
# disk; 1.05 to 1.25 times the speed with torch 2.13 on a processor without AMX, twice the speed on one with it.
COMPILE_SECONDS, COMPILE_SPEEDUP = 12.0, 1.2
NOTES = "compiled"  # name of the store's notes on compiling
FP32_TOLERANCE = 1e-4  # relative difference that rounding makes in float32


@dataclass(eq=False)
class Extractor:
    """Runs the prefix of a cut: uint8 images (B, 3, S, S) to the tensors that cross the cut, as they are stored.

    Maps (B, C, H, W) are returned as (B, H, W, C), which is channels_last without a copy when it is read back.
    """

    name: str  # for the store's notes on compiling
    prefix: nn.Module
    preprocessing: Preprocessing
    accelerator: torch.device
    compute_format: ComputeFormat
    store: Store
    stored: CacheDtype = CacheDtype.auto  # auto: as the prefix computes, so that nothing is lost
    may_compile: bool = True  # for `estimate_seconds`
    compiled: bool = False  # if set, `prepare` compiles
    reason: str = ""  # how the prefix runs, for people

    def __post_init__(self) -> None:
        self.batch_size = self.compute_format.batch_size or BATCH[self.accelerator.type]
        self._network: nn.Module | None = None
        self._tried_compiling = False

    @property
    def _note_key(self) -> str:
        facts = (self.name, self.preprocessing, self.compute_format.description, machine_name(self.accelerator))
        text = f"{' '.join(map(str, facts))} {self.batch_size} {torch.__version__}"
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    @cached_property
    def columns(self) -> tuple[Column, ...]:
        size = self.preprocessing.size
        rows = self._forward(self.prefix, torch.zeros(1, 3, size, size, dtype=torch.uint8))
        return tuple(Column(DTYPE_NAMES[t.dtype], tuple(t.shape[1:])) for t in rows)

    def estimate_seconds(self, images: int, speed: float) -> float:
        """Estimate the seconds for these images at this speed (images/s), or compiled if that is faster."""
        cost, compiled_speed = self._compiling(speed)
        return min(images / speed, cost + images / compiled_speed)

    def _compiling(self, speed: float) -> tuple[float, float]:
        """Return the seconds that compiling takes and the images per second of the result."""
        if not self.may_compile:
            return math.inf, speed
        note = self.store.read_notes(NOTES).get(self._note_key)
        if isinstance(note, dict) and {"seconds", "images_per_second"} <= note.keys():
            return float(note["seconds"]), float(note["images_per_second"])
        return COMPILE_SECONDS, COMPILE_SPEEDUP * speed

    def prepare(self, reporter: Reporter) -> None:
        """Fold BatchNorm, and compile if `compiled` is set."""
        if self._network is None:
            self._network = _fold_batchnorm(self.prefix, self.preprocessing)
            self.reason = "as the network is" if self._network is self.prefix else "BatchNorm folded"
        if self.compiled and not self._tried_compiling:
            self._tried_compiling = True
            reporter.note(f"extraction: compiling, about {self._compiling(1.0)[0]:.0f} s")
            self._compile(self._network)

    def _compile(self, network: nn.Module) -> None:
        """Try torch.compile with frozen weights, and record what it cost and gained."""
        start, sample = time.perf_counter(), _random_images(self.batch_size, self.preprocessing.size)
        prefix = copy.deepcopy(network).to(self.compute_format.dtype)  # inductor then folds and packs weights
        try:
            with warnings.catch_warnings(action="ignore"):  # inductor's advice is for the network's author
                from torch._inductor import config as inductor  # takes most of a second

                # pixels are normalized outside: inductor makes slow code of their bytes
                compiled: Any = torch.compile(prefix, dynamic=False)
                with inductor.patch(freezing=True):
                    self._forward(compiled, sample)
            synchronize(self.accelerator)
            seconds = time.perf_counter() - start
            with full_precision(self.prefix):  # TF32 rounds more than the tolerance
                rows, plain = self._forward(compiled, sample), self._forward(self.prefix, sample)
                exact = self._forward(self.prefix, sample, torch.float32)
        except Exception as error:  # no C++ compiler, too little memory, or a network that inductor cannot compile
            self.reason += f", not compiled ({type(error).__name__})"
            return
        # as near to float32 as the network itself in this dtype
        triples = zip(rows, plain, exact, strict=True)
        if not all(_relative_distance(a, e) <= 2 * _relative_distance(b, e) + FP32_TOLERANCE for a, b, e in triples):
            self.reason += ", not compiled: the compiled network is less exact"
            return
        synchronize(self.accelerator)
        start = time.perf_counter()
        for _ in range(2):
            self._forward(compiled, sample)
        synchronize(self.accelerator)
        speed = 2 * self.batch_size / (time.perf_counter() - start)
        note = {"seconds": round(seconds, 2), "images_per_second": round(speed, 2)}
        self.store.add_note(NOTES, self._note_key, note)
        self._network, self.reason = compiled, f"compiled in {seconds:.0f} s"

    def __call__(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the rows of a batch, on the CPU. A short batch is padded: a compiled network takes one size."""
        assert self._network is not None
        n = len(images)
        if n < self.batch_size:
            images = torch.cat([images, images[-1:].expand(self.batch_size - n, -1, -1, -1)])
        return tuple(t[:n].cpu() for t in self._forward(self._network, images))

    def _forward(self, network: nn.Module, images: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
        x = images.to(self.accelerator, non_blocking=self.accelerator.type == "cuda")
        x = x.contiguous(memory_format=self.compute_format.memory_format)
        with torch.inference_mode(), autocast(self.accelerator, dtype or self.compute_format.dtype):
            rows = network(self.preprocessing.normalize(x))
        if self.stored is not CacheDtype.auto:
            rows = [t.to(DTYPES[Precision(self.stored.value)]) for t in rows]
        return tuple((t.permute(0, 2, 3, 1) if t.ndim == 4 else t).contiguous() for t in rows)


def _fold_batchnorm(prefix: nn.Module, preprocessing: Preprocessing) -> nn.Module:
    """Return the prefix with each BatchNorm folded into its convolution, if the output changes by rounding only."""
    if not isinstance(prefix, fx.GraphModule):
        return prefix
    folded, count = copy.deepcopy(prefix), 0
    calls = Counter(str(node.target) for node in folded.graph.nodes if node.op == "call_module")
    for node in folded.graph.nodes:
        previous = next(iter(node.all_input_nodes), None)
        if previous is None or {node.op, previous.op} != {"call_module"} or len(previous.users) > 1:
            continue
        names = str(previous.target), str(node.target)
        conv, norm = (folded.get_submodule(name) for name in names)
        is_conv = type(conv).__name__ in ("Conv2d", "Conv2dSame") and calls[names[0]] == calls[names[1]] == 1
        if is_conv and isinstance(norm, nn.BatchNorm2d) and norm.track_running_stats:
            activations = [getattr(norm, name) for name in ("drop", "act") if hasattr(norm, name)]  # timm's norms
            folded.set_submodule(names[0], fuse_conv_bn_eval(conv, norm))  # type: ignore[type-var]
            folded.set_submodule(names[1], nn.Sequential(*activations))
            count += 1
    normalize, sample = preprocessing.normalize, _random_images(2, preprocessing.size).to(device_of(folded))
    with torch.inference_mode(), full_precision(folded):  # TF32 rounds more than the tolerance
        pairs = zip(folded(normalize(sample)), prefix(normalize(sample)), strict=True)
        is_same = count > 0 and all(_relative_distance(a, b) <= FP32_TOLERANCE for a, b in pairs)
    return folded if is_same else prefix


def _random_images(n: int, size: int) -> Tensor:
    """Return uint8 images (n, 3, size, size), always the same: all processes that fill an entry decide alike."""
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def _relative_distance(values: Tensor, expected: Tensor) -> float:
    return float((values.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-6))
