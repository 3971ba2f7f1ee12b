"""The frozen part over many images, once, as fast as the machine gives it."""

import copy
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from tlcli.data.preprocess import Preprocessing
from tlcli.device import SHORT, autocast
from tlcli.engine.numerics import ComputeFormat
from tlcli.reporter import Reporter
from tlcli.specs import CacheDtype
from tlcli.store import Column, Store

BATCH = {"cpu": 32, "mps": 64, "cuda": 256}
"""Images a forward pass of extraction. On a CPU 32 was as fast as 64 and 128 for ResNet-18, and faster for
EfficientNet-Lite0, whose maps then stay in the cache of the processor."""
COMPILE_SECONDS, COMPILE_GAIN = 12.0, 1.5
"""What torch.compile is taken to cost and to bring until it was measured on this machine: 9 to 12 s at first, 2 to 5 s
once inductor has it on disk, and twice the speed on a processor with AMX, 1.3 to 1.9 times on one without."""
NOTES = "compiled"
SAME = 1e-4
"""The relative difference that rounding makes in float32."""


@dataclass(frozen=True)
class Speed:
    """How an extraction went: for run.json and the run's line."""

    images: int
    seconds: float
    compile_seconds: float
    dtype: str
    memory_format: str
    why: str

    @property
    def images_per_second(self) -> float:
        """Decoding included, compilation not."""
        return self.images / max(self.seconds - self.compile_seconds, 1e-9)

    def plus(self, other: "Speed") -> "Speed":
        """Both together."""
        return replace(
            self,
            images=self.images + other.images,
            seconds=self.seconds + other.seconds,
            compile_seconds=self.compile_seconds + other.compile_seconds,
            why=self.why if self.why == other.why else f"{self.why}; {other.why}",
        )


class Extractor:
    """Runs the prefix of a cut: uint8 images (B, 3, S, S) to the tensors that cross the cut, as they are stored.

    Maps (B, C, H, W) come as (B, H, W, C), which is channels_last without a copy when it is read back.

    Args:
        stored: the format of the rows; `auto` keeps the one that the prefix computes in, so that nothing is lost.
        key: of the notes on how long compiling this prefix took here, and how quick it was then.
    """

    def __init__(
        self,
        prefix: nn.Module,
        preprocessing: Preprocessing,
        accelerator: torch.device,
        numerics: ComputeFormat,
        stored: CacheDtype,
        store: Store,
        key: str,
    ) -> None:
        self._plain = _FromPixels(prefix, preprocessing)
        self._preprocessing = preprocessing
        self._accelerator = accelerator
        self._store = store
        self._key = key
        self._stored = {CacheDtype.auto: None, CacheDtype.fp32: torch.float32, CacheDtype.bf16: torch.bfloat16}[stored]
        self.numerics = numerics
        self.batch_size = BATCH[accelerator.type]
        self._run: _FromPixels | None = None
        self._tried = False
        self._expected = 0
        self._columns: tuple[Column, ...] | None = None
        self.why = ""

    def columns(self) -> tuple[Column, ...]:
        """What one row has."""
        if self._columns is None:
            size = self._preprocessing.size
            rows = self._forward(self._plain, torch.zeros(1, 3, size, size, dtype=torch.uint8))
            self._columns = tuple(Column(SHORT[t.dtype], tuple(t.shape[1:])) for t in rows)
        return self._columns

    def expect(self, images: int) -> None:
        """So many more images are going to be run: that decides whether compiling pays."""
        self._expected += images

    def about(self, images: int, speed: float) -> float:
        """Seconds that so many images take, about, at this speed (images/s) or compiled where that pays."""
        cost, compiled_speed = _known(self._store.read_notes(NOTES).get(self._key), speed)
        return min(images / speed, cost + images / compiled_speed)

    def prepare(self, reporter: Reporter) -> None:
        """Get ready for the images that are expected: as the network is with its BatchNorm folded, or compiled."""
        if self._run is None:
            self._run, folded = _folded(self._plain)
            self.why = "BatchNorm folded" if folded else "as the network is"
        speed = self.numerics.images_per_second or 1.0
        eager = self._expected / speed
        cost, compiled_speed = _known(self._store.read_notes(NOTES).get(self._key), speed)
        gain = eager - (cost + self._expected / compiled_speed)
        if gain > 0 and not self._tried:
            self._tried = True
            reporter.note(f"extraction: compiling, about {cost:.0f} s to save {cost + gain:.0f} s of {eager:.0f} s")
            self._compile(self._run)

    def _compile(self, network: "_FromPixels") -> None:
        """Try torch.compile with its weights frozen; what it took and brought is noted for the next time.

        The weights are given in half precision where that is computed with: inductor folds and packs them then. It
        would make slow work of the pixels' bytes, so that normalising them stays outside.
        """
        start = time.perf_counter()
        size = self._preprocessing.size
        sample = torch.randint(0, 256, (self.batch_size, 3, size, size), dtype=torch.uint8)
        prefix = copy.deepcopy(network.prefix).to(self.numerics.dtype)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # inductor's advice is for whoever wrote the network
                from torch._inductor import config as inductor  # here: it takes most of a second

                compiled = _FromPixels(torch.compile(prefix, dynamic=False), self._preprocessing)  # type: ignore[arg-type]
                with inductor.patch(freezing=True):
                    found = self._forward(compiled, sample)
            seconds = time.perf_counter() - start
        except Exception as error:  # no C++ compiler, or a network that inductor does not take: the run goes on
            self.why += f", not compiled ({type(error).__name__})"
            return
        if not self._as_exact(found, sample):
            self.why += ", not compiled: the compiled network is less exact"
            return
        start = time.perf_counter()
        for _ in range(2):
            self._forward(compiled, sample)
        speed = 2 * self.batch_size / (time.perf_counter() - start)
        self._store.add_note(NOTES, self._key, {"seconds": round(seconds, 2), "images_per_second": round(speed, 2)})
        self._run, self.why = compiled, f"compiled in {seconds:.0f} s"

    def _as_exact(self, found: tuple[Tensor, ...], sample: Tensor) -> bool:
        """Whether these rows are about as near to those in float32 as the network's own in this format."""
        x = sample.to(self._accelerator).contiguous(memory_format=self.numerics.memory_format)
        with torch.inference_mode():
            exact = tuple(self._as_stored(t) for t in self._plain(x))
        own = self._forward(self._plain, sample)
        return all(
            bool(_distance(a, e) <= 2 * _distance(b, e) + SAME) for a, b, e in zip(found, own, exact, strict=True)
        )

    def __call__(self, images: Tensor) -> tuple[Tensor, ...]:
        """The rows of a batch, on the CPU. A short batch is filled up: a compiled network takes one size."""
        assert self._run is not None
        n = len(images)
        self._expected = max(0, self._expected - n)
        if n < self.batch_size:
            images = torch.cat([images, images[-1:].expand(self.batch_size - n, -1, -1, -1)])
        return tuple(t[:n].cpu() for t in self._forward(self._run, images))

    def _forward(self, network: Callable[[Tensor], Any], images: Tensor) -> tuple[Tensor, ...]:
        x = images.to(self._accelerator, non_blocking=True).contiguous(memory_format=self.numerics.memory_format)
        with torch.inference_mode(), autocast(self._accelerator, self.numerics.dtype):
            rows = network(x)
        return tuple(self._as_stored(t) for t in rows)

    def _as_stored(self, t: Tensor) -> Tensor:
        t = t if self._stored is None else t.to(self._stored)
        return (t.permute(0, 2, 3, 1) if t.ndim == 4 else t).contiguous()


class _FromPixels(nn.Module):
    """uint8 images to what crosses the cut."""

    def __init__(self, prefix: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.prefix = prefix
        self.preprocessing = preprocessing

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        out: tuple[Tensor, ...] = self.prefix(self.preprocessing.normalise(images))
        return out


def _known(note: object, eager_speed: float) -> tuple[float, float]:
    """Seconds to compile, and images a second then: as measured here before, else as they usually are."""
    if isinstance(note, dict) and {"seconds", "images_per_second"} <= note.keys():
        return float(note["seconds"]), float(note["images_per_second"])
    return COMPILE_SECONDS, COMPILE_GAIN * eager_speed


def _folded(network: _FromPixels) -> tuple[_FromPixels, int]:
    """The network with each BatchNorm folded into the convolution before it, and how many; as it is where that would
    change what it gives by more than rounding."""
    if not isinstance(network.prefix, fx.GraphModule):
        return network, 0
    prefix = copy.deepcopy(network.prefix)
    count = sum(_fold(prefix, conv, norm) for conv, norm in list(_pairs(prefix)))
    folded = _FromPixels(prefix, network.preprocessing)
    size = network.preprocessing.size
    device = next((p.device for p in prefix.parameters()), torch.device("cpu"))
    sample = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8, device=device)
    with torch.inference_mode():
        pairs = zip(folded(sample), network(sample), strict=True)
        same = count > 0 and all(bool(_distance(a, b) <= SAME) for a, b in pairs)
    return (folded, count) if same else (network, 0)


def _pairs(graph: fx.GraphModule) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Each convolution with the BatchNorm that alone reads it."""
    users: dict[str, int] = {}
    for node in graph.graph.nodes:
        if node.op == "call_module":
            users[str(node.target)] = users.get(str(node.target), 0) + 1
    for node in graph.graph.nodes:
        if node.op != "call_module" or not isinstance(graph.get_submodule(str(node.target)), nn.BatchNorm2d):
            continue
        before = next(iter(node.all_input_nodes), None)
        if (
            before is not None
            and before.op == "call_module"
            and type(graph.get_submodule(str(before.target))).__name__ in ("Conv2d", "Conv2dSame")
            and len(before.users) == 1
            and users[str(before.target)] == users[str(node.target)] == 1
        ):
            yield before, node


def _fold(graph: fx.GraphModule, conv: fx.Node, norm: fx.Node) -> bool:
    """Put the fused convolution in place of the two; what a norm does beside (timm's have an activation) stays."""
    module: Any = graph.get_submodule(str(norm.target))
    if not module.track_running_stats:
        return False
    convolution: Any = graph.get_submodule(str(conv.target))
    fused = fuse_conv_bn_eval(convolution, module)
    rest = [getattr(module, name) for name in ("drop", "act") if hasattr(module, name)]
    _replace(graph, str(conv.target), fused)
    _replace(graph, str(norm.target), nn.Sequential(*rest) if rest else nn.Identity())
    return True


def _replace(graph: fx.GraphModule, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(graph.get_submodule(parent), last, module)


def _distance(found: Tensor, wanted: Tensor) -> Tensor:
    """The relative difference, in the mean."""
    relative: Tensor = (found.float() - wanted.float()).norm() / wanted.float().norm().clamp_min(1e-6)
    return relative
