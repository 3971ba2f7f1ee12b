"""Classify image files with a finished run: a prediction per image, in order, however many there are."""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
from torch import Tensor, nn

from tlcli.data.batches import Preprocessing
from tlcli.data.decode import Pixels
from tlcli.data.images import map_in_threads
from tlcli.data.listing import MissingPath, Named
from tlcli.device import DTYPE_NAMES, DTYPES, ComputeFormat, autocast, cpu_has_bfloat16
from tlcli.engine.decisions import recorded_decisions
from tlcli.engine.extraction import BATCH, Extractor
from tlcli.engine.loaders import from_stored
from tlcli.engine.metrics import calibrated, energy, without_positions
from tlcli.reporter import Reporter
from tlcli.runs.load import LoadedRun, pixels_of
from tlcli.runs.run_dir import RunDir
from tlcli.specs import Precision, Tta
from tlcli.store import Store
from tlcli.transfer.cut import Cut, split_frozen
from tlcli.transfer.graph import full_precision

MIN_BATCH_SIZE = 4  # in bfloat16, padded if there are fewer images: other kernels, for one image, round differently

Images = Iterable[Named | Pixels]


@dataclass(frozen=True)
class Prediction:
    """The prediction for an image: classes with calibrated probabilities, the most likely first; or its error."""

    path: str
    top: tuple[tuple[str, float], ...] = ()
    error: str | None = None
    unknown_score: float | None = None
    is_unknown: bool | None = None  # the score is above the run's threshold; None if the run has none


class ImageMapper(ABC):
    """Computes a row per image with an extractor, in batches, of which at most a few are read ahead.

    The extractor is compiled if `compiled` is True, or None and that is faster for the number of images.
    """

    def __init__(self, extractor: Extractor, batch_size: int | None, compiled: bool | None) -> None:
        self._extractor, self._batch_size, self._compiled = extractor, batch_size, compiled

    @property
    def description(self) -> str:
        """The dtype and the optimizations in use."""
        return f"{DTYPE_NAMES[self._extractor.compute_format.dtype]}, {self._extractor.reason or 'not run yet'}"

    @abstractmethod
    def _rows(self, images: Tensor) -> Tensor:
        """Return the rows (B, ...) of images, uint8 (B, 3, S, S)."""

    def _map(
        self, images: Images, total: int | None, reporter: Reporter
    ) -> Iterator[tuple[str, Tensor | None, Tensor | str]]:
        """Yield path, pixels uint8 (3, S, S) and row of each image, in order, or path, None and its error."""
        extractor = self._extractor
        batch_size = self._batch_size or min(BATCH[extractor.accelerator.type], max(1, total or BATCH["cuda"]))
        is_exact = extractor.compute_format.dtype == torch.float32
        extractor.batch_size = batch_size if is_exact else max(MIN_BATCH_SIZE, batch_size)
        extractor.compiled = bool(self._compiled)
        extractor.prepare(reporter)
        decode = partial(decode_image, preprocessing=extractor.preprocessing)
        decoded = map_in_threads(decode, images, 1, ahead=2 * batch_size)  # decoded while the network is busy
        n_batches = n_images = 0
        shortest = float("inf")  # seconds of a batch
        next_check = 3 if self._compiled is None else None  # batch at which compiling is considered
        while batch := list(islice(decoded, batch_size)):
            rows: Iterator[Tensor] = iter(())
            if pixels := [image for _, image in batch if isinstance(image, Tensor)]:
                with full_precision(extractor.prefix), torch.inference_mode():
                    if n_batches == next_check:
                        # At this speed compiling may be worthwhile. If the total is unknown, as many images are
                        # expected as have been read, each time that their number doubles.
                        speed = extractor.batch_size / shortest
                        expected = n_images if total is None else max(0, total - n_images)
                        extractor.compiled |= extractor.estimate_seconds(expected, speed) < expected / speed
                        extractor.prepare(reporter)
                        next_check = 2 * n_batches if total is None else None
                    start = time.perf_counter()
                    rows = iter(self._rows(torch.stack(pixels)))
                    if n_batches > 0:  # the first one is slow
                        shortest = min(shortest, time.perf_counter() - start)
                n_batches, n_images = n_batches + 1, n_images + len(pixels)
            for path, image in batch:
                yield (path, image, next(rows)) if isinstance(image, Tensor) else (path, None, image)


class Predictor(ImageMapper):
    """A run's classifier, whose network is moved to an accelerator.

    In float32 the probabilities of an image depend on the batch by rounding only, of about 1e-6. In bfloat16 the order
    of operations changes them by a few percent if the network is unsure: `auto` computes as the run was evaluated, if
    this machine has the dtype, and so predicts the same classes. `tta` is that of the run's test unless given.
    """

    def __init__(
        self,
        run: LoadedRun,
        accelerator: torch.device,
        store: Store,
        *,
        precision: Precision = Precision.auto,
        tta: Tta | None = None,
        batch_size: int | None = None,
    ) -> None:
        self._run = run
        self._mirrors = (tta or run.info.get("tta")) == Tta.flip
        if self._mirrors:
            RunDir(run.path).check_mirrors("--tta flip")
        form = choose_format(run, accelerator, precision)
        run.model.to(device=accelerator, memory_format=form.memory_format)  # type: ignore[call-overload]
        prefix, self._suffix, self._suffix_dtype, compiled = _pipeline(run, precision, form.dtype)
        if run.unknown is not None and isinstance(prefix, _UncutNetwork):
            compiled = False  # else the layer that `_rows` listens to would be a copy
        name = f"predict {run.classifier.name}"
        super().__init__(Extractor(name, prefix, run.preprocessing, accelerator, form, store), batch_size, compiled)

    def predict(
        self, images: Images, *, top: int = 5, total: int | None = None, reporter: Reporter | None = None
    ) -> Iterator[Prediction]:
        """Yield a prediction per image, in order, or its error. The path of pixels is empty."""
        classes, threshold = self._run.classes, self._run.threshold
        for path, _, row in self._map(images, total, reporter or Reporter()):
            if isinstance(row, str):
                yield Prediction(path, error=row)
            else:
                values, indices = row[1:].topk(min(top, len(classes)))
                named = tuple((classes[i], p) for i, p in zip(indices.tolist(), values.tolist(), strict=True))
                score = row[0].item()
                yield Prediction(path, named, None, score, None if threshold is None else score > threshold)

    def _rows(self, images: Tensor) -> Tensor:
        """Return the unknown score and the probabilities of each image, (B, 1 + classes)."""
        unknown, inputs = self._run.unknown, list[Tensor]()
        layer = self._run.model.get_submodule(unknown.layer) if unknown else nn.Identity()
        with layer.register_forward_pre_hook(lambda _, x: inputs.append(without_positions(x[0]))):
            logits = self._logits(self._extractor(images))
        if self._mirrors:
            logits = (logits + self._logits(self._extractor(images.flip(3)))) / 2
        n = len(images)  # inputs may have more rows, which fill a batch
        score = energy(logits) if unknown is None else unknown(inputs[0][:n].cpu(), logits)
        return torch.cat([score[:, None], calibrated(logits, self._run.temperature)], dim=1)

    def _logits(self, activations: Iterable[Tensor]) -> Tensor:
        """Return the logits (B, classes) for the activations at the cut, float32 on the CPU."""
        dtype, accelerator = self._suffix_dtype, self._extractor.accelerator
        layout = self._extractor.compute_format.memory_format
        inputs = [from_stored(rows.to(accelerator), dtype, layout) for rows in activations]
        with autocast(accelerator, dtype):
            logits: Tensor = self._suffix(*inputs)
        return logits.float().cpu()


def choose_format(run: LoadedRun, accelerator: torch.device, precision: Precision) -> ComputeFormat:
    """Return the dtype and memory format to predict in; for auto those of the run, in float32 if they are not here."""
    decisions = recorded_decisions(run.info)
    recorded = decisions.eval_format if decisions else ComputeFormat(torch.float32, torch.channels_last)
    dtype = DTYPES.get(precision, recorded.dtype)
    if precision is Precision.auto and dtype != torch.float32:
        if accelerator.type == "cuda":
            is_native = dtype == torch.float16 or torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            is_native = dtype == torch.bfloat16 and accelerator.type == "cpu" and cpu_has_bfloat16()
        dtype = dtype if is_native else torch.float32
    is_mps = accelerator.type == "mps"
    return ComputeFormat(dtype, torch.contiguous_format if is_mps else recorded.memory_format)


class _UncutNetwork(nn.Sequential):
    def forward(self, images: Tensor) -> tuple[Tensor]:
        return (self[0](images),)


def _pipeline(
    run: LoadedRun, precision: Precision, dtype: torch.dtype
) -> tuple[nn.Module, nn.Module, torch.dtype, bool | None]:
    """Return the prefix, the suffix and its dtype, and if the prefix is compiled (None: if that is faster).

    It is the order of operations of the run's own test if another would change the classes; else the fastest.
    """
    uncut = _UncutNetwork(run.model), nn.Identity(), torch.float32
    if precision is Precision.auto and dtype != torch.float32:
        decisions = recorded_decisions(run.info)
        if decisions is None or "test" not in decisions.cached or run.info.get("tta") == Tta.flip:  # which none caches
            return *uncut, False
        rows = {row["name"]: row for row in run.info.get("stages", ())}
        trained = [stage for stage in run.classifier.stages if rows.get(stage.name, {}).get("trainable")]
        # run.json only counts how many parameters of a stage trained: it must be none or all
        if all(rows[stage.name]["trainable"] == rows[stage.name]["parameters"] for stage in trained):
            names = frozenset().union(*(stage.tensors for stage in trained))
            cut = split_frozen(run.model, run.preprocessing.size, names)
            if isinstance(cut, Cut) and cut.suffix_start == run.info["cache"].get("at"):
                return cut.prefix, cut.suffix, decisions.suffix_dtype, "test" in decisions.compiled
    names = run.classifier.head_parameters()
    if run.unknown is not None:  # its layer must be in the suffix, where it is no copy
        ordered = [name for name, _ in run.model.named_parameters()]
        names = frozenset(ordered[next(i for i, n in enumerate(ordered) if n.startswith(f"{run.unknown.layer}.")) :])
    cut = split_frozen(run.model, run.preprocessing.size, names)
    return (cut.prefix, cut.suffix, torch.float32, None) if isinstance(cut, Cut) else (*uncut, None)


def decode_image(image: Named | Pixels, preprocessing: Preprocessing) -> tuple[str, Tensor | str]:
    """Return a path with the pixels that the network takes, uint8 (3, S, S), or with the reason why there are none."""
    if isinstance(image, MissingPath):
        return image.path, image.reason
    path = image if isinstance(image, str) else ""
    try:
        return path, preprocessing.apply(pixels_of(image, preprocessing.range))
    except ValueError as error:  # a BadImage, or a NUL in the path
        return path, str(error)
