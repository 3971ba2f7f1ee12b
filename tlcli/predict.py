"""A finished run over image files: an answer for each, in order, however many there are."""

import hashlib
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn

from tlcli.data.decode import BadImage, read_image
from tlcli.data.named import MissingPath, Named
from tlcli.data.preprocess import Preprocessing
from tlcli.data.threads import map_in_threads
from tlcli.device import DTYPES, SHORT, autocast, cpu_has_bfloat16, machine_name
from tlcli.engine.extraction import BATCH, Extractor
from tlcli.engine.formats import SURELY, recorded_decisions
from tlcli.engine.numerics import ComputeFormat
from tlcli.errors import UsageError
from tlcli.reporter import Reporter
from tlcli.runs.load import LoadedRun, calibrated
from tlcli.specs import CacheDtype, Precision
from tlcli.store import Store
from tlcli.transfer.cut import Cut, split_frozen
from tlcli.transfer.cut.state import exact_arithmetic

AHEAD = 2
"""Batches of images that are decoded while the network is busy."""
TIMED = 2
"""Batches after the first by which the network's speed is known."""
NEVER = -1
LEAST = 4
"""Images of a forward pass in a short format, the last one repeated if need be. Alone an image goes through
other kernels, which round differently."""


@dataclass(frozen=True)
class Answer:
    """What a run says of an image: classes with calibrated probabilities, the likeliest first; or what is wrong."""

    path: str
    top: tuple[tuple[str, float], ...] = ()
    error: str | None = None


class Predictor:
    """A run's classifier on an accelerator. It moves the run's network there.

    `precision` is float32, bfloat16, or `auto`: as the run was evaluated, where this machine has that format, else
    float32. In float32 an image's probabilities do not depend on the batch, but for 1e-6 or so of rounding. In bfloat16
    the order of operations matters as well, by a few percent where a network is unsure: so `auto` keeps to the order in
    which the run was evaluated, and gives the classes that it gave.

    Args:
        batch_size: images a forward pass; None: what is quick on this accelerator, or fewer where fewer come.
        store: where is noted how long compiling takes on this machine.
    """

    def __init__(
        self,
        run: LoadedRun,
        accelerator: torch.device,
        store: Store,
        *,
        precision: Precision = Precision.auto,
        batch_size: int | None = None,
    ) -> None:
        self._run = run
        self._accelerator = accelerator
        self._batch_size = batch_size
        self.numerics = numerics_for(run, accelerator, precision)
        layout = self.numerics.memory_format
        run.model.to(device=accelerator, memory_format=layout)  # type: ignore[call-overload]
        self._way = _way(run, precision, self.numerics.dtype)
        note = f"predict {run.classifier.name} {run.preprocessing} {self.numerics.words} {machine_name(accelerator)}"
        self._extractor = Extractor(
            self._way.prefix,
            run.preprocessing,
            accelerator,
            self.numerics,
            CacheDtype.auto,
            store,
            hashlib.sha256(f"{note} {torch.__version__}".encode()).hexdigest()[:32],
        )

    @property
    def how(self) -> str:
        """The number format, and what was done to be quick, in a few words."""
        return f"{SHORT[self.numerics.dtype]}, {self._extractor.why or 'not run yet'}"

    def answers(
        self, images: Iterable[Named], *, top: int = 5, total: int | None = None, reporter: Reporter | None = None
    ) -> Iterator[Answer]:
        """An answer for each image, in order. At most a few batches are read ahead; `total` says how many come.

        What does not decode, and what names no image, is answered with an error; the others are not held up by it.
        """
        batch_size = self._batch_size or min(BATCH[self._accelerator.type], max(1, total or BATCH["cuda"]))
        exact = self.numerics.dtype == torch.float32
        self._extractor.batch_size = batch_size if exact else max(LEAST, batch_size)
        pace = self._pace(total, reporter or Reporter())
        decode = _Decode(self._run.preprocessing)
        decoded = map_in_threads(decode, images, 1, ahead=AHEAD * batch_size)
        while some := list(islice(decoded, batch_size)):
            yield from self._answer(some, min(top, len(self._run.classes)), pace)

    def _answer(self, some: list[tuple[str, Tensor | str]], top: int, pace: "_Pace") -> Iterator[Answer]:
        pixels = [one for _, one in some if isinstance(one, Tensor)]
        rows = iter(self._best(torch.stack(pixels), top, pace)) if pixels else iter(())
        for path, one in some:
            yield Answer(path, next(rows)) if isinstance(one, Tensor) else Answer(path, error=one)

    def _best(self, images: Tensor, top: int, pace: "_Pace") -> list[tuple[tuple[str, float], ...]]:
        """The likeliest classes of each image of a batch, uint8 (B, 3, S, S)."""
        values, places = calibrated(self.logits(images, pace), self._run.temperature).topk(top)
        names = self._run.classes
        return [
            tuple((names[place], value) for place, value in zip(where, what, strict=True))
            for where, what in zip(places.tolist(), values.tolist(), strict=True)
        ]

    def logits(self, images: Tensor, pace: "_Pace | None" = None) -> Tensor:
        """uint8 (B, 3, S, S), B at most the batch size, to raw logits (B, classes), float32, on the CPU."""
        pace = pace or self._pace(len(images), Reporter())
        with exact_arithmetic(self._run.model), torch.inference_mode():
            with pace.over(len(images)):
                rows = self._extractor(images)
            with autocast(self._accelerator, self._way.dtype):
                found: Tensor = self._way.suffix(*map(self._ready, rows))
            return found.float().cpu()

    def _ready(self, row: Tensor) -> Tensor:
        """What the extractor gives, as the suffix takes it."""
        x = row.to(self._accelerator)
        x = x.float() if self._way.dtype == torch.float32 else x
        return x if x.ndim != 4 else x.permute(0, 3, 1, 2).contiguous(memory_format=self.numerics.memory_format)

    def _pace(self, total: int | None, reporter: Reporter) -> "_Pace":
        return _Pace(self._extractor, total, reporter, self._way.compiles)


def numerics_for(run: LoadedRun, accelerator: torch.device, precision: Precision) -> ComputeFormat:
    """The number and memory format to predict in. Raises UsageError for one that this accelerator does not have."""
    formats = recorded_decisions(run.info)
    dtype = DTYPES[precision] if precision is not Precision.auto else formats.eval_dtype if formats else torch.float32
    if precision is Precision.auto and not _is_native(dtype, accelerator):
        dtype = torch.float32
    if dtype == torch.float16 and accelerator.type == "cpu":
        raise UsageError("precision fp16 needs a GPU: on a CPU give fp32, bf16 or auto")
    layout = formats.memory_format if formats else torch.channels_last
    return ComputeFormat(dtype, torch.contiguous_format if accelerator.type == "mps" else layout)


def _is_native(dtype: torch.dtype, accelerator: torch.device) -> bool:
    """Whether the accelerator has this format in hardware."""
    if dtype == torch.bfloat16 and accelerator.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return {
        torch.float32: True,
        torch.bfloat16: accelerator.type == "cpu" and cpu_has_bfloat16(),
        torch.float16: accelerator.type == "cuda",
    }[dtype]


class _Whole(nn.Module):
    """A network that cannot be cut, as a prefix that leaves nothing to do."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor]:
        return (self.network(images),)


@dataclass(frozen=True)
class _Way:
    """How a network is run: `prefix` by the extractor, `suffix` after it in the format `dtype`. `compiles` says whether
    that is compiled: None where it pays."""

    prefix: nn.Module
    suffix: nn.Module
    dtype: torch.dtype
    compiles: bool | None


def _way(run: LoadedRun, precision: Precision, dtype: torch.dtype) -> _Way:
    """The quickest way where only rounding of float32 is at stake or bfloat16 was asked for; else the run's own."""
    if precision is Precision.auto and dtype != torch.float32:
        own = _as_evaluated(run)
        if own is not None:
            return own
    cut = _cut(run, run.classifier.head_parameters())
    if cut is None:
        return _Way(_Whole(run.model), nn.Identity(), torch.float32, None)
    return _Way(cut.prefix, cut.suffix, torch.float32, None)


def _as_evaluated(run: LoadedRun) -> _Way | None:
    """The order of operations in which the run was tested; None where that was on activations that cannot be had."""
    formats = recorded_decisions(run.info)
    if formats is None or "test" not in formats.cached:
        return _Way(_Whole(run.model), nn.Identity(), torch.float32, False)
    trained = _trained(run)
    cut = None if trained is None else _cut(run, trained)
    if cut is None or cut.at != run.info["cache"].get("at"):
        return None
    return _Way(cut.prefix, cut.suffix, formats.suffix_dtype, formats.compiled)


def _trained(run: LoadedRun) -> frozenset[str] | None:
    """The names of the parameters that trained; None where run.json tells only how many of a stage did."""
    rows = {row["name"]: row for row in run.info.get("stages", ())}
    names: set[str] = set()
    for stage in run.classifier.stages:
        row = rows.get(stage.name, {"trainable": 0, "parameters": 0})
        if row["trainable"] not in (0, row["parameters"]):
            return None
        names |= stage.tensors if row["trainable"] else set()
    return frozenset(names)


def _cut(run: LoadedRun, trains: frozenset[str]) -> Cut | None:
    cut = split_frozen(run.model, run.preprocessing.size, trains)
    return cut if isinstance(cut, Cut) else None


class _Decode:
    """A named image to the pixels that the network takes, uint8 (3, S, S), or what is wrong with it."""

    def __init__(self, preprocessing: Preprocessing) -> None:
        self._preprocessing = preprocessing

    def __call__(self, named: Named) -> tuple[str, Tensor | str]:
        if isinstance(named, MissingPath):
            return named.path, named.why
        try:
            return named, self._preprocessing.apply(read_image(Path(named)))
        except (BadImage, ValueError) as error:  # a ValueError: no path has a NUL in it
            return named, str(error)


class _Pace:
    """Gets the extractor ready, and tells it what is still to come once its speed is known: compiling may pay then.

    Of a stream without an end in sight as much is expected as has come, time and again.
    """

    def __init__(self, extractor: Extractor, total: int | None, reporter: Reporter, compiles: bool | None) -> None:
        self._extractor, self._total, self._watch = extractor, total, reporter
        self._batches = self._images = 0
        self._shortest = float("inf")
        self._next = TIMED + 1 if compiles is None else NEVER
        if compiles:
            extractor.expect(SURELY)
        extractor.prepare(reporter)

    @contextmanager
    def over(self, images: int) -> Iterator[None]:
        """A forward pass over so many images."""
        if self._batches == self._next:
            self._look_ahead()
        start = time.perf_counter()
        yield
        if self._batches > 0:  # the first one is slow
            self._shortest = min(self._shortest, time.perf_counter() - start)
        self._batches += 1
        self._images += images

    def _look_ahead(self) -> None:
        """What comes, so far as it is known."""
        speed = self._extractor.batch_size / self._shortest
        self._extractor.numerics = replace(self._extractor.numerics, images_per_second=speed)
        self._extractor.expect(self._images if self._total is None else max(0, self._total - self._images))
        self._extractor.prepare(self._watch)
        self._next = 2 * self._batches if self._total is None else NEVER
