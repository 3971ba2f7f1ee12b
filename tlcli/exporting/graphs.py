"""Formats that hold the network as a graph: ONNX, TorchScript, PyTorch's exported program."""

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tlcli.errors import TlcliError

OPSET = 18
"""The oldest version of ONNX's operators for which PyTorch's exporter translates directly: most runtimes have it."""

FACTS = "tlcli.json"
"""The file inside a TorchScript or .pt2 archive that has classes, preprocessing and temperature."""

Model = Callable[[Tensor], Tensor]


class Normalised(nn.Module):
    """A network with normalisation before it: uint8 (N, S, S, 3) RGB to logits (N, classes)."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """The same arithmetic as `Preprocessing.normalise`, in the same order."""
        values = images.permute(0, 3, 1, 2).to(torch.float32)
        logits: Tensor = self.network((values / 255 - self.mean) / self.std)
        return logits


def write_onnx(model: nn.Module, inputs: Tensor, facts: Mapping[str, Any], path: Path) -> Model:
    """Write an ONNX file with any batch size; what onnxruntime makes of it, for the check."""
    program: Any = torch.onnx.export(
        _program(model, inputs),
        input_names=["images"],
        output_names=["logits"],
        opset_version=OPSET,
        dynamo=True,
        verbose=False,
    )
    program.model.metadata_props.update({key: _text(value) for key, value in facts.items()})
    program.save(path, external_data=False)
    return _onnxruntime(path)


def _onnxruntime(path: Path) -> Model:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])

    return run


def write_torchscript(model: nn.Module, inputs: Tensor, facts: Mapping[str, Any], path: Path) -> Model:
    """Write a TorchScript file; the network as that file has it."""
    traced: Any = torch.jit.trace(model, inputs, check_trace=False)  # type: ignore[no-untyped-call]
    torch.jit.save(traced, path, _extra_files={FACTS: json.dumps(facts)})
    loaded: Model = torch.jit.load(path)  # type: ignore[no-untyped-call]
    return loaded


def write_pt2(model: nn.Module, inputs: Tensor, facts: Mapping[str, Any], path: Path) -> Model:
    """Write an exported program with any batch size; the network as that file has it."""
    torch.export.save(_program(model, inputs), path, extra_files={FACTS: json.dumps(facts)})
    return torch.export.load(path).module()


def _program(model: nn.Module, inputs: Tensor) -> torch.export.ExportedProgram:
    """The network as a graph that takes any number of images."""
    program = torch.export.export(model, (inputs,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # where source files are on this machine: half of some files
    return program


WRITERS: dict[str, Callable[[nn.Module, Tensor, Mapping[str, Any], Path], Model]] = {
    "onnx": write_onnx,
    "torchscript": write_torchscript,
    "pt2": write_pt2,
}
LOADING = {
    "onnx": "import onnxruntime; session = onnxruntime.InferenceSession({path!r})",
    "torchscript": "import torch; model = torch.jit.load({path!r})",
    "pt2": "import torch; model = torch.export.load({path!r}).module()",
}
"""The line of Python that loads a file of each format."""


def write_graph(to: str, model: nn.Module, inputs: Tensor, facts: Mapping[str, Any], path: Path) -> Model:
    """Write a graph in one of the formats; what the file computes. Raises TlcliError where the network has none."""
    try:
        with warnings.catch_warnings():
            # what exporters warn of is either theirs to mend (TorchScript's age) or found by the check
            warnings.simplefilter("ignore")
            return WRITERS[to](model, inputs, facts, path)
    except Exception as exc:  # exporters raise anything; few networks are beyond them
        reason = (str(exc) or type(exc).__name__).strip().split("\n")[0]
        raise TlcliError(f"this network cannot be written as {to} ({reason[:200]}); try another format") from exc


def _text(value: object) -> str:
    """As metadata of ONNX has it: text as it is, all else as JSON."""
    return value if isinstance(value, str) else json.dumps(value)
