"""Parameter groups: rates by stage, decay where it belongs, everything trainable once."""

import pytest

from tests.conftest import Compose, freeze_words
from tlcli.models.build import build_model
from tlcli.models.classifier import Classifier
from tlcli.specs import options
from tlcli.transfer.contract import apply_freeze, freeze_table, linear_head, parameter_groups


@pytest.fixture(scope="module")
def model(spec: Compose) -> Classifier:
    return build_model(spec("backbone=resnet18", "backbone.weights=none").backbone, ("a", "b"), size=None, seed=0)


def test_groups_hold_each_trainable_parameter_once(spec: Compose, model: Classifier) -> None:
    for strategy in options("freeze"):
        apply_freeze(spec(*freeze_words(strategy, "layer2")).freeze, model)
        groups = parameter_groups(spec().optimizer, model)
        held = [id(p) for g in groups for p in g["params"]]
        assert len(held) == len(set(held))
        assert set(held) == {id(p) for p in model.network.parameters() if p.requires_grad}
        assert all(g["params"] for g in groups)


def test_rates_fall_towards_the_input(spec: Compose, model: Classifier) -> None:
    apply_freeze(spec().freeze, model)
    optimizer = spec("optimizer.lr=0.1", "optimizer.layer_decay=0.5", "optimizer.head_lr_mult=10").optimizer
    rates = {g["name"]: g["lr"] for g in parameter_groups(optimizer, model)}
    assert rates["head"] == pytest.approx(1.0)
    assert rates["layer4"] == pytest.approx(0.05)
    assert rates["layer1"] == pytest.approx(0.1 * 0.5**4)
    assert rates["stem"] == pytest.approx(0.1 * 0.5**5)
    assert {row.name: row.lr for row in freeze_table(optimizer, model)}["layer1"] == pytest.approx(0.1 * 0.5**4)


def test_biases_and_norms_do_not_decay_unless_asked(spec: Compose, model: Classifier) -> None:
    apply_freeze(spec().freeze, model)
    for asked in (False, True):
        overrides = ("optimizer.weight_decay=0.3", f"optimizer.decay_norm_and_bias={str(asked).lower()}")
        for group in parameter_groups(spec(*overrides).optimizer, model):
            for parameter in group["params"]:
                assert group["weight_decay"] == (0.3 if parameter.ndim > 1 or asked else 0.0)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["backbone=timm", "backbone.name=test_vit"], {"cls_token", "pos_embed", "reg_token"}),
        pytest.param(["backbone=vit_b_16"], {"class_token", "encoder.pos_embedding"}, marks=pytest.mark.slow),
    ],
)
def test_tokens_and_positions_do_not_decay(spec: Compose, words: list[str], expected: set[str]) -> None:
    size = 160 if "backbone=timm" in words else 32
    model = build_model(spec(*words, "backbone.weights=none").backbone, ("a", "b"), size=size, seed=0)
    names = {id(p): name for name, p in model.network.named_parameters()}
    groups = parameter_groups(spec().optimizer, model)
    free = {names[id(p)] for g in groups for p in g["params"] if g["weight_decay"] == 0 and p.ndim > 1}
    assert free == expected & set(names.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["swin_t", "convnext_tiny"])
def test_only_weights_of_layers_decay(spec: Compose, name: str) -> None:
    words = f"backbone={name}", "backbone.weights=none"
    model = build_model(spec(*words).backbone, ("a", "b"), size=32, seed=0)
    names = {id(p): name for name, p in model.network.named_parameters()}
    groups = parameter_groups(spec("optimizer.weight_decay=0.3").optimizer, model)
    assert all(names[id(p)].endswith("weight") for g in groups for p in g["params"] if g["weight_decay"])


@pytest.mark.parametrize(("name", "is_single"), [("resnet10t", True), ("deit_tiny_distilled_patch16_224", False)])
def test_only_a_single_linear_head_can_be_probed(spec: Compose, name: str, is_single: bool) -> None:
    backbone = spec("backbone=timm", f"backbone.name={name}", "backbone.weights=none").backbone
    assert (linear_head(build_model(backbone, ("a", "b"), size=None, seed=0)) is not None) == is_single
