"""Export of a run's model: the formats, and the check that what was written computes what PyTorch does.

A format is one function with the decorator `ExportFormat`; checks, help and tests iterate over FORMATS. This module
imports without torch.
"""

import json
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlcli import __version__
from tlcli.errors import TlcliError, UsageError
from tlcli.runs.run_dir import RunDir, number, pair
from tlcli.specs import DatasetSpec, Fit
from tlcli.text import did_you_mean, evenly_spaced, one_line

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tlcli.runs.load import LoadedRun

TOLERANCE = 1e-4  # largest difference of a float32 logit: ten times what another order of summation causes
SAMPLE_IMAGES = 16  # for the check: seconds with any network
METADATA_FILE = "tlcli.json"  # in a .pt2 archive: classes, preprocessing and temperature
ONNX_OPSET = 18  # the oldest that PyTorch's exporter writes without conversion; most runtimes have it
PAD_NOTE = "timm fills the borders of padded images with the mean color; the run filled them with black"
REMOVED = {
    "torchscript": "TorchScript is deprecated in PyTorch; use --to pt2, which torch.export.load reads",
    "safetensors": "use RUN/checkpoints/best.safetensors, which holds the weights, classes and preprocessing",
}

Model = Callable[["Tensor"], "Tensor"]


@dataclass(frozen=True, eq=False)
class ExportJob:
    """The input of a format: a run, its network (with the normalization in front if asked for), and metadata as JSON.

    `example` has two inputs of zeros: no pixel of an image gets into a file, and with one input an exporter may take
    the batch size for a constant.
    """

    run: "LoadedRun"
    network: "nn.Module"
    example: "Tensor"
    metadata: Mapping[str, Any]


Writer = Callable[[ExportJob, Path], Model]  # writes a job to a path and returns the model as read back from there


@dataclass
class ExportFormat:
    """A format; as a decorator, it registers the function that writes the format.

    Args:
        file_name: name in the export/ directory of a run.
        load: line of Python that loads {path!r}.
        packages: packages of the extra [export] that are needed to write and to check.
        has_graph: the format holds a graph, of which the normalization can be part.
    """

    name: str
    file_name: str
    summary: str
    load: str
    packages: tuple[str, ...] = ()
    has_graph: bool = True
    write: Writer = field(init=False)

    def __call__(self, write: Writer) -> Writer:
        self.write = write
        FORMATS[self.name] = self
        return write


FORMATS: dict[str, ExportFormat] = {}


# -- the formats


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
        opset_version=ONNX_OPSET,
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
    return torch.export.load(path).module()


def _export_program(job: ExportJob) -> Any:
    import torch

    program = torch.export.export(job.network, (job.example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
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
    """Write config.json, model.safetensors and README.md; return the network that timm builds from them.

    Raises:
        UsageError: timm has no network of this name with the same tensors.
    """
    import timm
    from jinja2 import StrictUndefined, Template
    from safetensors.torch import save

    run, preprocessing, test = job.run, job.run.preprocessing, RunDir(job.run.path).test()
    name, kind = run.classifier.name.split(".")[0], run.info["backbone_kind"]
    architecture = f"tf_{name}" if kind == "lite" else name
    published: Mapping[str, Any] = getattr(run.model, "pretrained_cfg", {})
    arguments = {"img_size": preprocessing.size} if published.get("fixed_input_size") else {}
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
            "tag": "tlcli",
            "custom_load": False,
            "input_size": [3, preprocessing.size, preprocessing.size],
            "fixed_input_size": bool(arguments),
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "crop_mode": {Fit.crop: "center", Fit.squash: "squash", Fit.pad: "border"}[preprocessing.fit],
            "mean": list(preprocessing.mean),
            "std": list(preprocessing.std),
            "num_classes": len(run.classes),
            "pool_size": None,
            **{key: network.pretrained_cfg.get(key) for key in ("first_conv", "classifier")},
        },
    }
    template = Path(__file__).with_name("model_card.md.j2").read_text(encoding="utf-8")
    card = Template(template, undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True).render(
        run=run,
        architecture=architecture,
        version=__version__,
        accuracy=number(test.get("accuracy")),
        interval=pair(test.get("accuracy_ci95")),
        n=test.get("n"),
        classes=json.dumps(list(run.classes), ensure_ascii=False, indent=2),
        pad_note=PAD_NOTE,
    )
    path.mkdir()
    tensors = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    (path / "model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
    (path / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (path / "README.md").write_text(card, encoding="utf-8")
    loaded: Model = timm.create_model(f"local-dir:{path}", pretrained=True).eval()
    return loaded


# -- export and check


@dataclass(frozen=True)
class ExportResult:
    """The exported path, the images of the check, and the largest difference of a logit from PyTorch's.

    `contents` are input and output of the model, `load` is the line of Python that loads it.
    """

    path: Path
    contents: str
    images: str
    max_difference: float
    load: str
    note: str | None


def find_format(name: str) -> ExportFormat:
    """Return the format of this name. Raise UsageError if there is none or its packages are not installed."""
    if name in REMOVED:
        raise UsageError(f"--to {name} was removed: {REMOVED[name]}")
    if name not in FORMATS:
        raise UsageError(f"--to {name}: unknown format.{did_you_mean(name, FORMATS)} Use one of {', '.join(FORMATS)}")
    if missing := [package for package in FORMATS[name].packages if find_spec(package) is None]:
        raise UsageError(f"--to {name} needs {', '.join(missing)}: pip install 'tlcli[export]'")
    return FORMATS[name]


def check_not_existing(path: Path) -> None:
    """Raise UsageError if there is something at the path: nothing is overwritten."""
    if path.exists() or path.is_symlink():
        raise UsageError(f"{path} already exists: choose another --output")


def find_samples(run: "LoadedRun", dataset: "DatasetSpec | None") -> tuple["Tensor", str]:
    """Return images before normalization, uint8 (N, 3, S, S), and a text that says where they come from.

    They are test images of the run, evenly spaced, or random images if the dataset cannot be read.
    """
    import torch

    from tlcli.data.dataset import images_by_key
    from tlcli.runs.run_dir import read_predictions

    try:
        keys = read_predictions(RunDir(run.path).test_predictions).keys
        images = images_by_key(dataset, run.preprocessing.range) if dataset is not None else {}
        pixels = [images[key]() for key in evenly_spaced(keys, SAMPLE_IMAGES)]
        return run.preprocessing.apply_batch(pixels).contiguous(), f"{len(pixels)} test images of the run"
    except (TlcliError, OSError, ValueError, KeyError):  # an image that does not decode is a ValueError
        shape, generator = (SAMPLE_IMAGES, 3, *[run.preprocessing.size] * 2), torch.Generator().manual_seed(0)
        noise = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        return noise, f"{SAMPLE_IMAGES} random images (the run's test images were not found)"


def export(
    run: "LoadedRun", chosen: ExportFormat, dataset: "DatasetSpec | None", path: Path, with_preprocessing: bool
) -> ExportResult:
    """Write the model of a run and compare what was written with PyTorch on test images of the dataset.

    Args:
        with_preprocessing: the model takes uint8 (N, S, S, 3) RGB and normalizes it.

    Raises:
        UsageError: the output exists or cannot be written, or timm has no such network.
        TlcliError: the network cannot be written in this format, or computes something else there. Nothing is left
            behind then.
    """
    import torch

    images, source = find_samples(run, dataset)
    size, normalized = run.preprocessing.size, run.preprocessing.normalize(images)
    network, inputs, contents = run.model, normalized.contiguous(), f"images float32 (N, 3, {size}, {size}) normalized"
    if with_preprocessing:
        network = _with_normalization(run.model, run.preprocessing.mean, run.preprocessing.std).eval()
        inputs, contents = images.permute(0, 2, 3, 1).contiguous(), f"images uint8 (N, {size}, {size}, 3) RGB"
    metadata = {
        "tlcli": __version__,
        "backbone": run.classifier.name,
        "backbone_kind": run.info["backbone_kind"],
        "classes": list(run.classes),
        "preprocessing": run.preprocessing.to_json(),
        "temperature": run.temperature,
        "input": contents,
    }
    job = ExportJob(run, network, torch.zeros_like(inputs[:1]).repeat(2, 1, 1, 1), metadata)
    with torch.inference_mode():
        reference = run.model(normalized)
    check_not_existing(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".export-", dir=path.parent, ignore_cleanup_errors=True) as folder:
            draft = Path(folder, path.name)
            model = _write(job, chosen, draft)
            difference = compare(model, inputs, reference, f"{chosen.name}, {source}")
            check_not_existing(path)
            draft.rename(path)
    except OSError as exc:
        raise TlcliError(f"{path}: cannot write ({exc.strerror or exc})") from exc
    note = PAD_NOTE if chosen.name == "timm" and run.preprocessing.fit is Fit.pad else None
    contents = f"{contents} -> logits (N, {len(run.classes)})"
    return ExportResult(path, contents, source, difference, chosen.load.format(path=str(path)), note)


def _write(job: ExportJob, chosen: ExportFormat, path: Path) -> Model:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # exporters warn of their own code; the comparison finds errors
            return chosen.write(job, path)
    except (TlcliError, OSError):
        raise
    except Exception as exc:  # exporters raise anything
        reason = one_line(str(exc).strip().split("\n")[0] or type(exc).__name__)[:200]
        raise TlcliError(f"cannot write this network as {chosen.name} ({reason}); try another format") from exc


def _with_normalization(network: "nn.Module", mean: tuple[float, ...], std: tuple[float, ...]) -> "nn.Module":
    """Return the network with normalization in front: uint8 (N, S, S, 3) RGB to logits (N, classes)."""
    import torch

    class Normalized(torch.nn.Module):
        mean: "Tensor"
        std: "Tensor"

        def __init__(self) -> None:
            super().__init__()
            self.network = network
            self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
            self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))

        def forward(self, images: "Tensor") -> "Tensor":
            values = images.permute(0, 3, 1, 2).to(torch.float32)  # the order of operations of Preprocessing
            logits: Tensor = self.network((values / 255 - self.mean) / self.std)
            return logits

    return Normalized()


def compare(model: Model, inputs: "Tensor", reference: "Tensor", description: str) -> float:
    """Return the largest difference of the model's logits from the reference (N, classes).

    The model computes all inputs in one batch, then the first input alone.

    Raises:
        TlcliError: a logit differs by more than TOLERANCE, or a class is different.
    """
    import torch

    with torch.inference_mode():
        logits = torch.cat([model(inputs), model(inputs[:1])])
    expected = torch.cat([reference, reference[:1]])
    if logits.shape != expected.shape:
        raise TlcliError(f"{description}: logits have another shape than PyTorch's; nothing was written")
    largest = float((logits - expected).abs().max())  # NaN if there is one
    wrong = int((logits.argmax(dim=1) != expected.argmax(dim=1)).sum())
    if not largest <= TOLERANCE or wrong:
        raise TlcliError(
            f"{description}: results differ from PyTorch, logits by up to {largest:.2g} ({TOLERANCE:g} is allowed), "
            f"classes of {wrong} images; nothing was written"
        )
    return largest
