"""Export of a run's model: the formats, and the check that an export computes what PyTorch does. Imports no torch."""

import io
import json
import logging
import math
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from timeit import repeat
from typing import TYPE_CHECKING, Any

from tlcli import __version__
from tlcli.errors import TlcliError, UsageError
from tlcli.reporter import Reporter
from tlcli.runs.run_dir import RunDir, number, pair, read_predictions
from tlcli.specs import DatasetSpec, Fit
from tlcli.text import evenly_spaced, one_line

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tlcli.data.dataset import Dataset
    from tlcli.data.images import Split
    from tlcli.runs.load import LoadedRun

TOLERANCE = 1e-4  # largest difference of a float32 logit: ten times what another order of summation causes
SAMPLE_IMAGES = 16  # for the check: seconds with any network
METHODS = ("MinMax", "Entropy", "Percentile")  # of calibration, in onnxruntime; the first is the fastest
MAX_LOSS = 0.01  # of accuracy in int8
CALIBRATION_IMAGES, MAX_JUDGED = 200, 1000
BATCH_SIZE, TIMINGS = 32, 10  # of int8; the fastest batch counts, as other processes slow some
METADATA_FILE = "tlcli.json"  # in a .pt2 archive: classes, preprocessing and temperature
PAD_NOTE = "timm fills the borders of padded images with the mean color; the run filled them with black"

FORMATS: dict[str, "ExportFormat"] = {}
Model = Callable[["Tensor"], "Tensor"]
Writer = Callable[["ExportJob", Path], Model]  # writes a job to a path and returns the model as read back from there


@dataclass(frozen=True, eq=False)
class ExportJob:
    """A run, its network and metadata to write, and the logits that the written network has to compute."""

    run: "LoadedRun"
    network: "nn.Module"  # with normalization in front, if asked for
    inputs: "Tensor"
    reference: "Tensor"  # logits of the inputs
    source: str  # of the images of the inputs, for people
    metadata: Mapping[str, Any]
    take: Model  # pixels uint8 (N, 3, S, S) to what the network takes


@dataclass
class ExportFormat:
    """A format; as a decorator, it registers the function that writes the format."""

    name: str
    file_name: str  # in the export/ directory of a run
    summary: str
    load: str  # line of Python that loads {path!r}
    packages: tuple[str, ...] = ()  # of the extra [export], to write and to check
    has_graph: bool = True  # of which the normalization can be part
    write: Writer = field(init=False)

    def __call__(self, write: Writer) -> Writer:
        self.write = write
        FORMATS[self.name] = self
        return write


@ExportFormat(
    "onnx",
    "model.onnx",
    "one file for ONNX runtimes, any batch size; needs the extra [export]",
    load="import onnxruntime; session = onnxruntime.InferenceSession({path!r})",
    packages=("onnx", "onnxscript", "onnxruntime"),
)
def write_onnx(job: ExportJob, path: Path) -> Model:
    """Write an ONNX file; return what onnxruntime computes from it."""
    import onnxruntime
    import torch

    program: Any = torch.onnx.export(
        _export_program(job),
        input_names=["images"],
        output_names=["logits"],
        opset_version=18,  # the oldest that the exporter writes without conversion; most runtimes have it
        dynamo=True,
        verbose=False,
    )
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in job.metadata.items()}
    program.model.metadata_props.update(texts)
    program.save(path, external_data=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


@ExportFormat(
    "pt2",
    "model.pt2",
    "one file for torch.export.load, any batch size",
    load="import torch; model = torch.export.load({path!r}).module()",
)
def write_pt2(job: ExportJob, path: Path) -> Model:
    """Write an exported program of PyTorch; return it as loaded from the file."""
    import torch

    torch.export.save(_export_program(job), path, extra_files={METADATA_FILE: json.dumps(job.metadata)})
    return torch.export.load(path).module()  # noqa: TID251  written one line above


def _export_program(job: ExportJob) -> Any:
    import torch

    # zeros: no pixel of an image gets into a file; two: with one, the batch size may be taken for a constant
    example = torch.zeros_like(job.inputs[:1]).repeat(2, 1, 1, 1)
    program = torch.export.export(job.network, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine, half of some files
    return program


@ExportFormat(
    "timm",
    "timm",
    'a folder for timm.create_model("local-dir:FOLDER", pretrained=True), with a model card',
    load="import timm; model = timm.create_model('local-dir:' + {path!r}, pretrained=True).eval()",
    has_graph=False,
)
def write_timm(job: ExportJob, path: Path) -> Model:
    """Write config.json, model.safetensors and README.md; return the network that timm builds from them."""
    import timm
    from safetensors.torch import save

    run = job.run
    name, kind = run.classifier.name.split(".")[0], run.info["backbone_kind"]
    architecture = f"tf_{name}" if kind == "lite" else name
    published: Mapping[str, Any] = getattr(run.model, "pretrained_cfg", {})
    arguments = {"img_size": run.preprocessing.size} if published.get("fixed_input_size") else {}
    try:
        network: Any = timm.create_model(architecture, num_classes=len(run.classes), **arguments)
        network.load_state_dict(run.model.state_dict())
    except RuntimeError as exc:  # for an unknown name and for tensors that do not fit
        network_name = f"{kind}'s {run.classifier.name}"
        raise UsageError(f"timm has no network with the tensors of {network_name}: use --to {GRAPHS}") from exc
    config = {
        "architecture": architecture,
        "num_classes": len(run.classes),
        "num_features": network.num_features,
        "label_names": list(run.classes),
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [3, run.preprocessing.size, run.preprocessing.size],
            "fixed_input_size": bool(arguments),
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "crop_mode": {Fit.crop: "center", Fit.squash: "squash", Fit.pad: "border"}[run.preprocessing.fit],
            "mean": list(run.preprocessing.mean),
            "std": list(run.preprocessing.std),
            "num_classes": len(run.classes),
            **{key: network.pretrained_cfg.get(key) for key in ("first_conv", "classifier")},
        },
    }
    path.mkdir()
    tensors = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    (path / "model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
    (path / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (path / "README.md").write_text(_model_card(run, architecture), encoding="utf-8")
    loaded: Model = timm.create_model(f"local-dir:{path}", pretrained=True).eval()
    return loaded


def _model_card(run: "LoadedRun", architecture: str) -> str:
    from jinja2 import StrictUndefined, Template

    test = RunDir(run.path).test()
    template = Path(__file__).with_name("model_card.md.j2").read_text(encoding="utf-8")
    card: str = Template(template, undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True).render(
        run=run,
        architecture=architecture,
        version=__version__,
        accuracy=number(test.get("accuracy")),
        interval=pair(test.get("accuracy_ci95")),
        n=test.get("n"),
        classes=json.dumps(list(run.classes), ensure_ascii=False, indent=2),
        pad_note=PAD_NOTE,
        is_calibrated=bool(run.info.get("calibration")) and run.is_kept,
    )
    return card


GRAPHS = ", ".join(form.name for form in FORMATS.values() if form.has_graph)


def check_format(name: str) -> str:
    """Return the name. Raise UsageError if packages of that format are not installed."""
    packages = FORMATS[name].packages if name in FORMATS else ()
    if missing := [package for package in packages if find_spec(package) is None]:
        raise UsageError(f"--to {name} needs {', '.join(missing)}: pip install 'tlcli[export]'")
    return name


def check_not_existing(path: Path) -> None:
    """Raise UsageError if there is something at the path: nothing is overwritten."""
    if path.exists() or path.is_symlink():
        raise UsageError(f"{path} already exists: choose another --output")


def find_samples(run: "LoadedRun", dataset: "DatasetSpec | None") -> tuple["Tensor", str]:
    """Return test images of the run, or else random ones, uint8 (N, 3, S, S), and a text that says which they are."""
    import torch

    from tlcli.data.dataset import images_by_key
    from tlcli.data.decode import read_image

    value_range, images = run.preprocessing.range, {}
    with suppress(TlcliError, OSError):
        if dataset is not None:
            images = images_by_key(dataset, value_range)
    try:
        tested = read_predictions(RunDir(run.path).test_predictions)
        keys = evenly_spaced(tested.keys, SAMPLE_IMAGES)
        pixels = [images[k]() if k in images else read_image(Path(tested.root + k), value_range) for k in keys]
        return run.preprocessing.apply_batch(pixels).contiguous(), f"{len(pixels)} test images of the run"
    except (TlcliError, OSError, ValueError, IndexError):  # BadImage is a ValueError; IndexError: no image was tested
        shape, generator = (SAMPLE_IMAGES, 3, *[run.preprocessing.size] * 2), torch.Generator().manual_seed(0)
        noise = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        return noise, f"{SAMPLE_IMAGES} random images (the run's test images were not found)"


def prepare(run: "LoadedRun", dataset: "DatasetSpec | None", with_preprocessing: bool) -> ExportJob:
    """Return the job that exports a run; with preprocessing, the model takes uint8 (N, S, S, 3) RGB."""
    import torch

    from tlcli.runs.checkpointing import weights_metadata

    images, source = find_samples(run, dataset)
    size, normalize = run.preprocessing.size, run.preprocessing.normalize
    network, contents = run.model, f"images float32 (N, 3, {size}, {size}) normalized"
    take: Model = lambda pixels: normalize(pixels).contiguous()  # noqa: E731
    if with_preprocessing:
        network = _with_normalization(run.model, run.preprocessing.mean, run.preprocessing.std).eval()
        contents = f"images uint8 (N, {size}, {size}, 3) RGB"
        take = lambda pixels: pixels.permute(0, 2, 3, 1).contiguous()  # noqa: E731
    metadata = weights_metadata(run.classifier, run.info["backbone_kind"], run.preprocessing)
    metadata |= {"temperature": run.temperature, "tta": run.info.get("tta", "none"), "input": contents}
    with torch.inference_mode():
        return ExportJob(run, network, take(images), run.model(normalize(images)), source, metadata, take)


def export(job: ExportJob, chosen: ExportFormat, path: Path) -> float:
    """Write a model, compare it with PyTorch, and return the largest difference of a logit; an error leaves no file."""
    with draft_folder(path, chosen.name) as folder:
        draft = folder / path.name
        model = chosen.write(job, draft)
        difference = compare(model, job.inputs, job.reference, f"{chosen.name}, {job.source}")
        check_not_existing(path)
        draft.rename(path)
    return difference


@contextmanager
def draft_folder(path: Path, form: str) -> Iterator[Path]:
    """Yield a folder next to a path, which is removed at the end. Raise TlcliError for whatever an exporter raises."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft_folder = tempfile.TemporaryDirectory(prefix=".export-", dir=path.parent, ignore_cleanup_errors=True)
        with draft_folder as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # exporters warn of their own code; the comparison finds errors
            yield Path(folder)
    except TlcliError:
        raise
    except OSError as exc:
        raise TlcliError(f"{path}: cannot write ({exc.strerror or exc})") from exc
    except Exception as exc:  # exporters raise anything
        reason = one_line(str(exc).strip().split("\n")[0] or type(exc).__name__)[:200]
        raise TlcliError(f"cannot write this network as {form} ({reason}); try another format") from exc


def _with_normalization(network: "nn.Module", mean: Sequence[float], std: Sequence[float]) -> "nn.Module":
    """Return the network with normalization in front: uint8 (N, S, S, 3) RGB to logits (N, classes)."""
    import torch

    means, deviations = torch.tensor(mean), torch.tensor(std)

    class Normalized(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, images: "Tensor") -> "Tensor":
            values = (images.to(torch.float32) / 255 - means) / deviations  # the order of operations of Preprocessing
            logits: Tensor = self.network(values.permute(0, 3, 1, 2))
            return logits

    return Normalized()


def compare(model: Model, inputs: "Tensor", reference: "Tensor", description: str) -> float:
    """Return the largest difference of a logit from the reference (N, classes). Raise TlcliError if it is too large."""
    import torch

    with torch.inference_mode():
        logits = torch.cat([model(inputs), model(inputs[:1])])  # in one batch, and one image alone
    expected = torch.cat([reference, reference[:1]])
    largest = float((logits - expected).abs().max()) if logits.shape == expected.shape else math.inf  # or NaN
    if not largest <= TOLERANCE or not torch.equal(logits.argmax(dim=1), expected.argmax(dim=1)):
        reason = f"classes differ from PyTorch's, or logits by more than {TOLERANCE:g}: by {largest:.2g}"
        raise TlcliError(f"{description}: {reason}; nothing was written")
    return largest


# -- int8


@dataclass(frozen=True, eq=False)
class Labeled:
    """Images of a split with labels (N), for people named `name`; `pixels` are uint8 (N, 3, S, S)."""

    name: str
    pixels: "Tensor"
    labels: "Tensor"


@dataclass(frozen=True)
class Int8Result:
    """The calibration method of an int8 model, and (float32, int8) of what was measured on this machine."""

    method: str
    nbytes: tuple[int, int]
    images_per_second: tuple[float, float]
    accuracies: Mapping[str, tuple[float, float]]  # by the name of the images


def int8_images(run: "LoadedRun", data: "Dataset", reporter: Reporter) -> tuple[Labeled, Labeled, Labeled | None]:
    """Return images to calibrate on, to judge on, and of the test split, evenly spaced in their splits."""
    import torch

    from tlcli.data.images import tracked_map

    def read(name: str, split: "Split", rows: Sequence[int]) -> Labeled:
        decode = lambda i: run.preprocessing.apply(split.read(i))  # noqa: E731
        pixels = torch.stack(list(tracked_map(decode, rows, 8, reporter, f"reading {name}")))
        return Labeled(f"{len(rows):,} {name}", pixels, torch.from_numpy(split.labels)[list(rows)])

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

    logging.getLogger().addHandler(logging.NullHandler())  # else onnxruntime adds one that prints our notes again
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
        batch = next(_batches(job, judged))
        seconds = [min(repeat(lambda s=s: s.run(None, batch), number=1, repeat=TIMINGS)) for s in sessions]  # type: ignore[misc]
        nbytes = exact.stat().st_size, draft.stat().st_size
        check_not_existing(path)
        draft.rename(path)
    speeds = len(batch["images"]) / seconds[0], len(batch["images"]) / seconds[1]
    return Int8Result(f"{method} on {calibration.name}", nbytes, speeds, accuracies)


def _batches(job: ExportJob, images: Labeled) -> Iterator[dict[str, Any]]:
    import torch

    return ({"images": job.take(part).numpy()} for part in torch.split(images.pixels, BATCH_SIZE))


def _accuracy(session: Any, job: ExportJob, images: Labeled) -> float:
    import numpy as np  # here: `tlcli export --help` has no time for it

    labels = [session.run(None, batch)[0].argmax(axis=1) for batch in _batches(job, images)]
    return float((np.concatenate(labels) == images.labels.numpy()).mean())


def _quantize(file: Path, output: Path, batches: Iterator[dict[str, Any]], method: str) -> None:
    """Write an ONNX file in int8, with ranges of activations from batches by a method of onnxruntime."""
    from onnxruntime.quantization import CalibrationMethod, QuantType, quantize_static

    class Reader(list[dict[str, Any]]):  # as onnxruntime asks for batches: one at a time, or all activations add up
        def set_range(self, start_index: int, end_index: int) -> None:
            self.rest = self[start_index:end_index]

        def get_next(self) -> dict[str, Any] | None:
            return self.rest.pop(0) if self.rest else None

    quantize_static(
        file,
        output,
        Reader(batches),
        per_channel=True,
        activation_type=QuantType.QUInt8,
        calibrate_method=CalibrationMethod[method],
        extra_options={"CalibStridedMinMax": 1},
    )
