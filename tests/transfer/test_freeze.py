"""Freeze strategies, and the contract that proves that frozen tensors do not change."""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from timm.models.beit import Beit
from torch import nn
from torchvision.models import VisionTransformer

from tests.conftest import Compose
from tlcli.errors import FrozenTensorError, UsageError
from tlcli.models.build import build_model
from tlcli.models.classifier import Classifier, Stage
from tlcli.transfer.contract import apply_freeze

CLASSES = ("a", "b")


@pytest.fixture(scope="module")
def built(spec: Compose) -> Classifier:
    """Lite0 with its pretrained weights."""
    return build_model(spec().backbone, CLASSES, size=32, seed=0)


@pytest.fixture
def model(built: Classifier) -> Classifier:
    """Copy it, to change it."""
    return replace(built, network=copy.deepcopy(built.network))


HEAD = {"classifier.weight", "classifier.bias"}
EARLY = ("conv_stem", "bn1", *(f"blocks.{i}" for i in range(4)))  # 7.5 % of the parameters; with blocks.4 21 %
TRAINS: dict[str, Callable[[str], bool]] = {
    "freeze=early": lambda name: not name.startswith(EARLY),
    "freeze=early freeze.share=0.22": lambda name: not name.startswith((*EARLY, "blocks.4")),
    "freeze=early freeze.share=0.0001": lambda name: True,
    "freeze=none": lambda name: True,
    "freeze=head": lambda name: False,
    "freeze=last_stages freeze.n=2": lambda name: name.startswith(("blocks.5", "blocks.6", "conv_head", "bn2")),
    "freeze=stages freeze.stages=[stem,blocks.6]": lambda name: name.startswith(
        ("conv_stem", "bn1", "blocks.6", "conv_head", "bn2")
    ),
    "freeze=stages freeze.stages=[]": lambda name: False,
    "freeze=pattern freeze.train=['blocks\\.6'] freeze.keep=['bn','classifier']": lambda name: (
        "blocks.6" in name and "bn" not in name
    ),
    "freeze=norm": lambda name: name.split(".")[-2].startswith("bn"),
    "freeze=bias": lambda name: name.endswith(".bias"),
}


@pytest.mark.parametrize("words", TRAINS)
def test_what_trains(spec: Compose, model: Classifier, words: str) -> None:
    names = {name for name, _ in model.network.named_parameters()}
    assert spec(*words.split()).freeze.trainable(model) == HEAD | {name for name in names if TRAINS[words](name)}


VITS = {
    "torchvision": partial(VisionTransformer, 32, 16, 1, 2, 8, 16),
    "timm": partial(Beit, 32, embed_dim=8, depth=1, num_heads=2),
}


@pytest.mark.parametrize(("library", "biases"), [("torchvision", {"in_proj_bias"}), ("timm", {"q_bias", "v_bias"})])
def test_biases_of_attention_train_by_whatever_name(spec: Compose, library: str, biases: set[str]) -> None:
    network = VITS[library]()
    model = Classifier(library, network, (), (Stage("head", frozenset()),), 32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    found = spec("freeze=bias").freeze.trainable(model)
    assert biases < {name.rpartition(".")[2] for name in found}
    assert found == {n for n, p in network.named_parameters() if p.ndim == 1 and not n.endswith("weight")}


@pytest.mark.parametrize(
    ("words", "frozen"),
    [("weights=none", ()), ("reinit=[blocks.0]", ("conv_stem", "bn1")), ("reinit=[head]", EARLY)],
)
def test_early_stages_train_from_the_first_one_that_is_not_pretrained(spec: Compose, words: str, frozen) -> None:
    model = build_model(spec(f"backbone.{words}").backbone, CLASSES, size=32, seed=0)
    names = {name for name, _ in model.network.named_parameters()}
    assert names - spec().freeze.trainable(model) == {name for name in names if name.startswith(frozen)}


WRONG = {
    "freeze=stages freeze.stages=[stm]": r"has no stage 'stm'\. Did you mean 'stem'",
    "freeze=last_stages freeze.n=9": "has 8 stages before its head",
    "freeze=pattern freeze.train=['blokcs.6']": "matches no parameter.*Did you mean 'blocks.6'",
    "freeze=pattern freeze.train=['(']": "not a regular expression",
}


@pytest.mark.parametrize("words", WRONG)
def test_a_strategy_that_does_not_suit_the_network_says_so(spec: Compose, model: Classifier, words: str) -> None:
    with pytest.raises(UsageError, match=WRONG[words]):
        apply_freeze(spec(*words.split()).freeze, model)


@pytest.mark.parametrize(("bn_stats", "updates"), [("auto", False), ("frozen", False), ("update", True)])
def test_statistics_of_layers_that_train_and_of_frozen_ones(spec: Compose, model, bn_stats, updates) -> None:
    model.network.get_submodule("blocks.0").add_module("noise", nn.Dropout(0.5))
    contract = apply_freeze(spec("freeze=last_stages", f"freeze.bn_stats={bn_stats}").freeze, model)
    contract.seal()
    contract.train_mode()
    assert not model.network.get_submodule("blocks.0.noise").training
    before = {n: b.clone() for n, b in model.network.named_buffers()}
    model.network(torch.randn(4, 3, 32, 32))
    changed = {n.split(".0.")[0] for n, b in model.network.named_buffers() if not torch.equal(b, before[n])}
    assert changed == (
        {"blocks.6", "bn2.running_mean", "bn2.running_var", "bn2.num_batches_tracked"} if updates else set()
    )
    contract.verify()


def test_the_layers_that_update_statistics_are_those_of_training_whatever_the_mode(spec: Compose, model) -> None:
    contract = apply_freeze(spec("freeze=last_stages", "freeze.bn_stats=update").freeze, model)
    model.network.eval()
    updated = contract.updated_norms()
    assert not any(module.training for module in model.network.modules()), "the modes are as before"
    contract.train_mode()
    norms = {n: m for n, m in model.network.named_modules() if isinstance(m, nn.BatchNorm2d) and m.training}
    assert norms and updated == norms


def test_auto_updates_statistics_that_were_not_loaded(spec: Compose) -> None:
    model = build_model(spec("backbone.reinit=[blocks.6]").backbone, CLASSES, size=32, seed=0)
    apply_freeze(spec().freeze, model).train_mode()
    assert not model.network.get_submodule("blocks.5.0.bn1").training
    assert model.network.get_submodule("blocks.6.0.bn1").training


@pytest.mark.parametrize("name", ["conv_stem.weight", "blocks.3.0.bn1.running_mean"])
def test_a_breach_is_named(spec: Compose, model: Classifier, name: str) -> None:
    contract = apply_freeze(spec("freeze=head").freeze, model)
    contract.seal()
    with torch.no_grad():
        model.network.state_dict()[name].view(-1)[0] += 1e-3
    with pytest.raises(FrozenTensorError, match=name):
        contract.check()
    with pytest.raises(FrozenTensorError, match=name):
        contract.verify()


def test_a_breach_behind_pytorchs_back_is_found_at_the_end(spec: Compose, model: Classifier) -> None:
    contract = apply_freeze(spec("freeze=head").freeze, model)
    contract.seal()
    model.network.get_parameter("conv_stem.weight").detach().numpy().flat[0] += 1e-3
    with pytest.raises(FrozenTensorError, match="conv_stem"):
        contract.verify()
