"""Checkpoints that are cut short, empty or of something else are refused when trained from, loaded or compared."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor, nn

from tests.faults.refusals import refused, untouched
from tests.runs.test_predictions import SOME
from tlcli.models.backbones import TimmBackboneSpec
from tlcli.models.build import build_model, read_weights
from tlcli.models.classifier import Classifier
from tlcli.models.tensorfile import write_tensors
from tlcli.runs.load import load_run
from tlcli.runs.run_dir import RunDir, read_predictions

CLASSES = ("ant", "bee", "cat")
PREPROCESSING = {"size": 32, "fit": "squash", "mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2]}
METADATA = {"backbone": "test_resnet", "backbone_kind": "timm", "classes": list(CLASSES), "epoch": 3,
            "preprocessing": PREPROCESSING}  # fmt: skip


def backbone(weights: str = "none") -> TimmBackboneSpec:
    return TimmBackboneSpec(
        name="test_resnet", weights=weights, reinit=[], size=None, dropout=0.0, imagenet_top1=None, license=None
    )


def train_from(file: Path) -> Classifier:
    return build_model(backbone(str(file)), CLASSES, size=None, seed=0)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return train_from(Path("none")).network


@pytest.fixture
def state(network: nn.Module) -> dict[str, Tensor]:
    return dict(network.state_dict())


@pytest.fixture
def run(network: nn.Module, tmp_path: Path) -> RunDir:
    """Write a finished run, as far as loading needs it."""
    run = RunDir(tmp_path / "run")
    run.start(command="tlcli train", overrides=[], config="seed: 1\n")
    write_tensors(run.best_checkpoint, network.state_dict(), METADATA)
    write_tensors(run.last_checkpoint, network.state_dict(), METADATA)
    run.update(best={"epoch": 3}, calibration={"temperature": 1.5})
    run.end("done")
    return run


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "a byte more": lambda content: content + b"\0",
    "a header of 16 exabytes": lambda content: b"\xff" * 8 + content[8:],
    "another bit": lambda content: content[:-3] + bytes([content[-3] ^ 1]) + content[-2:],
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_checkpoint_is_said_to_be(case: str, run: RunDir, tmp_path: Path) -> None:
    content = DAMAGES[case](run.best_checkpoint.read_bytes())
    for file in (run.best_checkpoint, run.last_checkpoint):
        file.write_bytes(content)
    for checkpoint in ("best", "last"):
        message = f"{checkpoint}.safetensors: damaged"
        refused(lambda which=checkpoint: load_run(run.path, which), 2, message, keeps=tmp_path)
    refused(lambda: train_from(run.path), 2, "backbone.weights=", "best.safetensors: damaged", keeps=tmp_path)


def swapped(change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda state: {**state, "conv1.0.weight": change(state["conv1.0.weight"])}


TENSORS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "without data": (swapped(lambda t: t.to("meta")), "is not a plain tensor"),
    "sparse": (swapped(lambda t: t.to_sparse()), "is not a plain tensor"),
    "too large for float32": (swapped(lambda t: t.double() * 1e300), "has values that are not finite"),
    "not finite": (swapped(lambda t: t * math.nan), "conv1.0.weight has values that are not finite"),
    "missing": (lambda state: dict(list(state.items())[1:]), "no tensor conv1.0.weight"),
    "unknown": (lambda state: {**state, "extra": torch.zeros(1)}, "unknown tensor extra"),
    "a list": (lambda state: list(state.values()), "does not hold a state dict"),
    "another architecture": (lambda state: {f"layer9.{n}": t for n, t in state.items()}, "of another architecture?"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_are_no_weights(case: str, state: dict[str, Tensor], tmp_path: Path) -> None:
    change, words = TENSORS[case]
    torch.save(change(state), tmp_path / "w.pth")
    refused(lambda: train_from(tmp_path / "w.pth"), 2, "backbone.weights=", "w.pth: ", words, keeps=tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e5m2])
def test_other_precisions_are_taken(dtype: torch.dtype, state: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save({n: t.to(dtype) if t.is_floating_point() else t for n, t in state.items()}, tmp_path / "w.pth")
    with untouched(tmp_path):
        model = train_from(tmp_path / "w.pth")
    assert model.network.state_dict()["conv1.0.weight"].dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"backbone": "test_vit"}, "best.safetensors: does not fit test_vit with 3 classes"),
        ({"classes": ["ant", "bee"]}, "does not fit test_resnet with 2 classes"),
    ],
)
def test_a_checkpoint_of_another_network(change: dict[str, Any], words: str, run: RunDir, state, tmp_path) -> None:
    run.best_checkpoint.write_bytes(save(state, metadata={"tlcli": json.dumps({**METADATA, **change})}))
    refused(lambda: load_run(run.path), 2, words, keeps=tmp_path)


@pytest.mark.parametrize("text", ["{a: '('}", "{a: 3}", "&x {a: *x}", "!!python/object/apply:os.getcwd []"])
def test_a_config_that_does_not_describe_the_network(text: str, run: RunDir, state, tmp_path) -> None:
    run.config_file.write_text(f"backbone:\n  head: fc\n  stages: {text}\n")
    words = "is not a regular expression" if "(" in text else "config.yaml: does not describe the backbone"
    claims = json.dumps({**METADATA, "backbone": "resnet18", "backbone_kind": "torchvision"})
    run.best_checkpoint.write_bytes(save(state, metadata={"tlcli": claims}))
    refused(lambda: load_run(run.path), 2, words, keeps=tmp_path)


@pytest.mark.parametrize("value", [0, "2", None, 1e12])
def test_a_temperature_that_is_none(value: Any, run: RunDir, tmp_path: Path) -> None:
    run.update(calibration={"temperature": value})
    refused(lambda: load_run(run.path), 2, "run.json: damaged (calibration.temperature: ", keeps=tmp_path)


@pytest.mark.parametrize(
    ("make", "words"),
    [(os.mkfifo, "no such file"), (Path.mkdir, "not a run directory"), (Path.touch, "cannot be read as plain tensors")],
)
def test_weights_that_are_not_there(make: Callable[[Path], None], words: str, tmp_path: Path) -> None:
    make(tmp_path / "w.pth")
    refused(lambda: read_weights(tmp_path / "w.pth"), 2, "w.pth: ", words, keeps=tmp_path)


@pytest.mark.parametrize(
    ("changes", "tensors"),
    [
        ({}, {"labels": torch.tensor([0, 1, 2])}),  # a label beyond the classes
        ({}, {"logits": torch.zeros(3, 2, 1)}),
        ({"classes": "ab"}, {}),
        ({"keys": [1, 2, 3]}, {}),
    ],
)
def test_predictions_that_do_not_hang_together(changes: dict[str, Any], tensors: dict[str, Tensor], tmp_path) -> None:
    own = {"classes": SOME.classes, "keys": list(SOME.keys), "names": SOME.names}
    file = tmp_path / "p.safetensors"
    metadata = {"tlcli": json.dumps({**own, **changes})}
    file.write_bytes(save({"logits": SOME.logits, "labels": SOME.labels, **tensors}, metadata=metadata))
    refused(lambda: read_predictions(file), 2, "p.safetensors: damaged", keeps=tmp_path)
