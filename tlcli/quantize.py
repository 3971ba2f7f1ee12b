"""ONNX with weights and activations in 8 bits, calibrated and judged on images of the run."""

import io
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tlcli.data.dataset import Dataset
from tlcli.data.images import Split, tracked_map
from tlcli.errors import TlcliError, UsageError
from tlcli.export import FORMATS, ExportJob, check_not_existing, draft_folder, export
from tlcli.reporter import Reporter
from tlcli.runs.load import LoadedRun
from tlcli.text import evenly_spaced

METHODS = ("MinMax", "Entropy", "Percentile")  # of onnxruntime; the first is the fastest
MAX_LOSS = 0.01  # of accuracy
CALIBRATION_IMAGES, MAX_JUDGED = 200, 1000
BATCH_SIZE, TIMING_SECONDS = 32, 3.0


@dataclass(frozen=True, eq=False)
class Labeled:
    """Images of a split with labels (N), for people named `name`; `pixels` are uint8 (N, 3, S, S)."""

    name: str
    pixels: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Int8Result:
    """The calibration method of an int8 model, and (float32, int8) of what was measured on this machine."""

    method: str
    nbytes: tuple[int, int]
    images_per_second: tuple[float, float]
    accuracies: Mapping[str, tuple[float, float]]  # by the name of the images


def int8_images(run: LoadedRun, data: Dataset, reporter: Reporter) -> tuple[Labeled, Labeled, Labeled | None]:
    """Return images to calibrate on, to judge on, and of the test split, evenly spaced in their splits."""

    def read(name: str, split: Split, rows: Sequence[int]) -> Labeled:
        decode = lambda i: run.preprocessing.apply(split.read(i))  # noqa: E731
        pixels = list(tracked_map(decode, rows, 8, reporter, f"reading {name}"))
        labels = torch.from_numpy(split.labels)[list(rows)]
        return Labeled(f"{len(rows):,} {name}", torch.stack(pixels), labels)

    if data.classes != run.classes:
        raise UsageError(f"--int8: the classes of {data.name} have changed since {run.path} was trained; restore them")
    n = len(data.train)
    chosen = evenly_spaced(range(n), min(CALIBRATION_IMAGES, n if len(data.val) else n // 2))
    others = evenly_spaced(sorted(set(range(n)) - set(chosen)), MAX_JUDGED)
    if not chosen:
        raise UsageError(f"--int8 needs at least two training images to calibrate on, and {data.name} has {n}")
    calibration = read("training images", data.train, chosen)
    judged = ("validation images", data.val, evenly_spaced(range(len(data.val)), MAX_JUDGED))
    if not len(data.val):
        judged = ("other training images (the run has no validation images)", data.train, others)
    test = evenly_spaced(range(len(data.test)), MAX_JUDGED)
    return calibration, read(*judged), read("test images", data.test, test) if test else None


def export_int8(
    job: ExportJob, images: tuple[Labeled, Labeled, Labeled | None], path: Path, reporter: Reporter, *, force: bool
) -> Int8Result:
    """Write an ONNX file with weights and activations in int8, and return what was measured.

    Weights are quantized per channel; ranges of activations are from calibration images, by the first of METHODS
    that loses at most MAX_LOSS of accuracy on images to judge on. If all lose more, the best is written with `force`,
    and else TlcliError is raised (Nagel et al., A white paper on neural network quantization, 2021).
    """
    import onnx
    from onnxruntime import InferenceSession
    from onnxruntime.quantization.shape_inference import quant_pre_process

    calibration, judged, test = images
    cpu = {"providers": ["CPUExecutionProvider"]}
    with draft_folder(path, "int8") as folder, redirect_stdout(io.StringIO()):  # onnxruntime prints its progress
        exact, prepared, draft = (folder / f"{name}.onnx" for name in ("float32", "prepared", "int8"))
        export(job, FORMATS["onnx"], exact)
        quant_pre_process(exact, prepared, skip_symbolic_shape=True)
        own, found = InferenceSession(exact, **cpu), dict[str, float]()
        reference = _accuracy(own, job, judged)
        for name in METHODS:
            reporter.note(f"int8: calibrating by {name}")
            _quantize(prepared, folder / f"{name}.onnx", _batches(job, calibration), name)
            found[name] = _accuracy(InferenceSession(folder / f"{name}.onnx", **cpu), job, judged)
            if is_good := found[name] >= reference - MAX_LOSS - 1e-9:
                break
        method, best = max(found.items(), key=lambda item: item[1])
        if not is_good and not force:
            lost = f"{100 * (reference - best):.1f} points on {judged.name} ({reference:.4f} to {best:.4f})"
            raise TlcliError(f"int8 loses {lost}; nothing was written; --force writes it")
        model = onnx.load(folder / f"{method}.onnx")
        onnx.helper.set_model_props(model, {item.key: item.value for item in onnx.load(exact).metadata_props})
        onnx.save(model, draft)
        sessions = own, InferenceSession(draft, **cpu)
        accuracies = {judged.name: (reference, best)}
        if test is not None:
            accuracies[test.name] = _accuracy(own, job, test), _accuracy(sessions[1], job, test)
        speeds = _images_per_second(sessions, next(_batches(job, judged)))
        nbytes = exact.stat().st_size, draft.stat().st_size
        check_not_existing(path)
        draft.rename(path)
    return Int8Result(f"{method} on {calibration.name}", nbytes, speeds, accuracies)


def _batches(job: ExportJob, images: Labeled) -> Iterator[dict[str, Any]]:
    return ({"images": job.take(part).numpy()} for part in torch.split(images.pixels, BATCH_SIZE))


def _accuracy(session: Any, job: ExportJob, images: Labeled) -> float:
    logits = [torch.from_numpy(session.run(None, batch)[0]) for batch in _batches(job, images)]
    return (torch.cat(logits).argmax(dim=1) == images.labels).double().mean().item()


def _quantize(file: Path, output: Path, batches: Iterator[dict[str, Any]], method: str) -> None:
    """Write an ONNX file in int8, with ranges of activations from batches by a method of onnxruntime."""
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    class Reader(list[dict[str, Any]]):  # as onnxruntime asks for batches: one at a time, or all activations add up
        def set_range(self, start_index: int, end_index: int) -> None:
            self.rest = self[start_index:end_index]

        def get_next(self) -> dict[str, Any] | None:
            return self.rest.pop(0) if self.rest else None

    quantize_static(
        file,
        output,
        Reader(batches),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        weight_type=QuantType.QInt8,
        activation_type=QuantType.QUInt8,
        calibrate_method=CalibrationMethod[method],
        extra_options={"CalibStridedMinMax": 1},
    )


def _images_per_second(sessions: tuple[Any, Any], batch: dict[str, Any]) -> tuple[float, float]:
    """Return the speeds of two sessions of onnxruntime in their fastest batch, as other processes slow some."""
    seconds, end = [math.inf, math.inf], time.perf_counter() + TIMING_SECONDS
    while time.perf_counter() < end:
        for i, session in enumerate(sessions):
            start = time.perf_counter()
            session.run(None, batch)
            seconds[i] = min(seconds[i], time.perf_counter() - start)
    n = len(batch["images"])
    return n / seconds[0], n / seconds[1]
