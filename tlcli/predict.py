"""Classify image files with a finished run: a prediction per image, in order, however many there are."""

import hashlib
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn

from tlcli.data.batches import Preprocessing
from tlcli.data.decode import BadImage, read_image
from tlcli.data.images import map_in_threads
from tlcli.data.listing import MissingPath, Named
from tlcli.device import DTYPE_NAMES, DTYPES, ComputeFormat, autocast, cpu_has_bfloat16, machine_name
from tlcli.engine.decisions import recorded_decisions
from tlcli.engine.extraction import BATCH, Extractor
from tlcli.errors import UsageError
from tlcli.reporter import Reporter
from tlcli.runs.load import LoadedRun, calibrated
from tlcli.specs import CacheDtype, Precision
from tlcli.store import Store
from tlcli.transfer.cut import Cut, split_frozen
from tlcli.transfer.graph import full_precision

PREFETCH_BATCHES = 2  # decoded while the network is busy
TIMED_BATCHES = 2  # after the first one; then compiling is considered
# Images per forward pass in bfloat16; the last image is repeated if there are fewer. A single image runs through other
# kernels, which round differently.
MIN_BATCH_SIZE = 4


@dataclass(frozen=True)
class Prediction:
    """The prediction for an image: classes with calibrated probabilities, the most likely first; or its error."""

    path: str
    top: tuple[tuple[str, float], ...] = ()
    error: str | None = None


class Predictor:
    """A run's classifier on an accelerator. The network of the run is moved there.

    `precision` is float32, bfloat16, or `auto`: the dtype in which the run was evaluated if this machine has it, else
    float32. In float32 the probabilities of an image do not depend on the batch, except for rounding of about 1e-6. In
    bfloat16 the order of operations changes them by a few percent if the network is unsure: `auto` computes in the
    order in which the run was evaluated, and so predicts the same classes.

    Args:
        batch_size: images per forward pass; None: the fastest for this accelerator, or fewer if there are fewer images.
        store: where the time that compiling takes on this machine is recorded.
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
        self.compute_format = choose_format(run, accelerator, precision)
        layout = self.compute_format.memory_format
        run.model.to(device=accelerator, memory_format=layout)  # type: ignore[call-overload]
        prefix, self._suffix, self._suffix_dtype, self._compiled = _pipeline(run, precision, self.compute_format.dtype)
        machine = f"{self.compute_format.description} {machine_name(accelerator)} {torch.__version__}"
        note = f"predict {run.classifier.name} {run.preprocessing} {machine}"
        self._extractor = Extractor(
            prefix,
            run.preprocessing,
            accelerator,
            self.compute_format,
            CacheDtype.auto,
            store,
            hashlib.sha256(note.encode()).hexdigest()[:32],
        )

    @property
    def description(self) -> str:
        """The dtype and the optimizations in use."""
        return f"{DTYPE_NAMES[self.compute_format.dtype]}, {self._extractor.reason or 'not run yet'}"

    def predict(
        self, images: Iterable[Named], *, top: int = 5, total: int | None = None, reporter: Reporter | None = None
    ) -> Iterator[Prediction]:
        """Yield a prediction per image, in order, with the `top` most likely classes.

        `total` is the number of images if it is known. At most a few batches are read ahead. A file that does not
        decode, or is missing, yields its error.
        """
        batch_size = self._batch_size or min(BATCH[self._accelerator.type], max(1, total or BATCH["cuda"]))
        is_exact = self.compute_format.dtype == torch.float32
        self._extractor.batch_size = batch_size if is_exact else max(MIN_BATCH_SIZE, batch_size)
        scheduler = _CompileScheduler(self._extractor, total, reporter or Reporter(), self._compiled)
        decode, classes = partial(decode_image, preprocessing=self._run.preprocessing), self._run.classes
        decoded = map_in_threads(decode, images, 1, ahead=PREFETCH_BATCHES * batch_size)
        while batch := list(islice(decoded, batch_size)):
            pixels = [image for _, image in batch if isinstance(image, Tensor)]
            rows: Iterator[tuple[list[float], list[int]]] = iter(())
            if pixels:
                probabilities = calibrated(self._logits(torch.stack(pixels), scheduler), self._run.temperature)
                values, indices = probabilities.topk(min(top, len(classes)))
                rows = zip(values.tolist(), indices.tolist(), strict=True)
            for path, image in batch:
                if isinstance(image, Tensor):
                    yield Prediction(path, tuple((classes[i], p) for p, i in zip(*next(rows), strict=True)))
                else:
                    yield Prediction(path, error=image)

    def _logits(self, images: Tensor, scheduler: "_CompileScheduler") -> Tensor:
        """uint8 (B, 3, S, S) to logits (B, classes), float32 on the CPU."""
        dtype, layout = self._suffix_dtype, self.compute_format.memory_format
        with full_precision(self._run.model), torch.inference_mode():
            with scheduler.timed(len(images)):
                rows = self._extractor(images)
            inputs = [row.to(self._accelerator) for row in rows]
            inputs = [x.float() if dtype == torch.float32 else x for x in inputs]
            inputs = [x.permute(0, 3, 1, 2).contiguous(memory_format=layout) if x.ndim == 4 else x for x in inputs]
            with autocast(self._accelerator, dtype):
                logits: Tensor = self._suffix(*inputs)
            return logits.float().cpu()


def choose_format(run: LoadedRun, accelerator: torch.device, precision: Precision) -> ComputeFormat:
    """Return the dtype and memory format to predict in. Raises UsageError if the accelerator does not have them."""
    decisions = recorded_decisions(run.info)
    if precision is not Precision.auto:
        dtype = DTYPES[precision]
    else:
        dtype = decisions.eval_format.dtype if decisions else torch.float32
        is_native = dtype == torch.float32 or accelerator.type == "cuda"
        if dtype == torch.bfloat16 and accelerator.type == "cuda":
            is_native = bool(torch.cuda.is_bf16_supported(including_emulation=False))
        elif dtype == torch.bfloat16:
            is_native = accelerator.type == "cpu" and cpu_has_bfloat16()
        dtype = dtype if is_native else torch.float32
    if dtype == torch.float16 and accelerator.type == "cpu":
        raise UsageError("--precision=fp16 needs a GPU; on a CPU set fp32, bf16 or auto")
    layout = decisions.eval_format.memory_format if decisions else torch.channels_last
    return ComputeFormat(dtype, torch.contiguous_format if accelerator.type == "mps" else layout)


class _UncutNetwork(nn.Module):
    """A whole network as a prefix."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor]:
        return (self.network(images),)


def _pipeline(
    run: LoadedRun, precision: Precision, dtype: torch.dtype
) -> tuple[nn.Module, nn.Module, torch.dtype, bool | None]:
    """Return the prefix, the suffix and its dtype, and if the prefix is compiled (None: if that is faster).

    It is the order of operations of the run's own test if another would change the classes; else the fastest.
    """
    if precision is Precision.auto and dtype != torch.float32:
        decisions = recorded_decisions(run.info)
        if decisions is None or "test" not in decisions.cached:
            return _UncutNetwork(run.model), nn.Identity(), torch.float32, False
        rows = {row["name"]: row for row in run.info.get("stages", ())}
        trained = [stage for stage in run.classifier.stages if rows.get(stage.name, {}).get("trainable")]
        # run.json only counts how many parameters of a stage trained: it must be none or all
        if all(rows[stage.name]["trainable"] == rows[stage.name]["parameters"] for stage in trained):
            names = frozenset().union(*(stage.tensors for stage in trained))
            cut = split_frozen(run.model, run.preprocessing.size, names)
            if isinstance(cut, Cut) and cut.suffix_start == run.info["cache"].get("at"):
                return cut.prefix, cut.suffix, decisions.suffix_dtype, "test" in decisions.compiled
    cut = split_frozen(run.model, run.preprocessing.size, run.classifier.head_parameters())
    if isinstance(cut, Cut):
        return cut.prefix, cut.suffix, torch.float32, None
    return _UncutNetwork(run.model), nn.Identity(), torch.float32, None


def decode_image(image: Named, preprocessing: Preprocessing) -> tuple[str, Tensor | str]:
    """Return a path with the pixels that the network takes, uint8 (3, S, S), or with the reason why there are none."""
    if isinstance(image, MissingPath):
        return image.path, image.reason
    try:
        return image, preprocessing.apply(read_image(Path(image), preprocessing.range))
    except (BadImage, ValueError) as error:  # a ValueError: a NUL in the path
        return image, str(error)


class _CompileScheduler:
    """Prepares the extractor, and again when the network's speed is known, because compiling may then be worthwhile.

    If the total is unknown, as many images are expected as have been read, each time that their number doubles.
    """

    def __init__(self, extractor: Extractor, total: int | None, reporter: Reporter, compiled: bool | None) -> None:
        self._extractor, self._total, self._reporter = extractor, total, reporter
        self._batches = self._images = 0
        self._shortest = float("inf")
        self._next_batch = TIMED_BATCHES + 1 if compiled is None else None
        extractor.always_compiles = bool(compiled)
        extractor.prepare(reporter)

    @contextmanager
    def timed(self, images: int) -> Iterator[None]:
        """Time a forward pass over these images."""
        if self._batches == self._next_batch:
            speed = self._extractor.batch_size / self._shortest
            self._extractor.compute_format = replace(self._extractor.compute_format, images_per_second=speed)
            self._extractor.add_expected_images(
                self._images if self._total is None else max(0, self._total - self._images)
            )
            self._extractor.prepare(self._reporter)
            self._next_batch = 2 * self._batches if self._total is None else None
        start = time.perf_counter()
        yield
        if self._batches > 0:  # the first one is slow
            self._shortest = min(self._shortest, time.perf_counter() - start)
        self._batches += 1
        self._images += images
