"""Export of a run's model: the formats, and the check that an export computes what PyTorch does. Imports no torch."""

import json
import math
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlcli import __version__
from tlcli.errors import TlcliError, UsageError
from tlcli.runs.run_dir import RunDir, number, pair, read_predictions
from tlcli.specs import DatasetSpec, Fit
from tlcli.text import evenly_spaced, one_line

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tlcli.runs.load import LoadedRun

TOLERANCE = 1e-4  # largest difference of a float32 logit: ten times what another order of summation causes
SAMPLE_IMAGES = 16  # for the check: seconds with any network
METADATA_FILE = "tlcli.json"  # in a .pt2 archive: classes, preprocessing and temperature
PAD_NOTE = "timm fills the borders of padded images with the mean color; the run filled them with black"
REMOVED = {
    "torchscript": "TorchScript is deprecated in PyTorch; use --to pt2, which torch.export.load reads",
    "safetensors": "use RUN/checkpoints/best.safetensors, which holds the weights, classes and preprocessing",
}

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
        graphs = ", ".join(f.name for f in FORMATS.values() if f.has_graph)
        network_name = f"{kind}'s {run.classifier.name}"
        raise UsageError(f"timm has no network with the tensors of {network_name}: use --to {graphs}") from exc
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


def check_format(name: str) -> str:
    """Return the name. Raise UsageError if that format was removed or its packages are not installed."""
    if name in REMOVED:
        raise UsageError(f"--to {name} was removed: {REMOVED[name]}")
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
    metadata |= {"temperature": run.temperature, "input": contents}
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
