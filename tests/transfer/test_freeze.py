"""Freeze strategies and the contract that holds them to their word."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.conftest import Compose
from tlcli.errors import FrozenTensorError, UsageError
from tlcli.models.build import build_model
from tlcli.models.classifier import Classifier
from tlcli.transfer.contract import apply_freeze

CLASSES = ("a", "b")


@pytest.fixture
def model(spec: Compose) -> Classifier:
    """Lite0 with its pretrained weights."""
    return build_model(spec().backbone, CLASSES, size=32, seed=0)


def names(spec: Compose, model: Classifier, *overrides: str) -> frozenset[str]:
    return spec(*overrides).freeze.trainable(model)


def test_none_trains_everything(spec: Compose, model: Classifier) -> None:
    assert names(spec, model, "freeze=none") == {n for n, _ in model.network.named_parameters()}


def test_head_trains_the_head(spec: Compose, model: Classifier) -> None:
    assert names(spec, model, "freeze=head") == {"classifier.weight", "classifier.bias"}


def test_last_stages_counts_from_the_head(spec: Compose, model: Classifier) -> None:
    found = names(spec, model, "freeze=last_stages", "freeze.n=2")
    assert {n.split(".")[0] + "." + n.split(".")[1] for n in found if n.startswith("blocks")} == {
        "blocks.5",
        "blocks.6",
    }
    assert "conv_head.weight" in found
    with pytest.raises(UsageError, match="has 8 stages before its head"):
        names(spec, model, "freeze=last_stages", "freeze.n=9")


def test_stages_trains_the_named_stages_and_the_head(spec: Compose, model: Classifier) -> None:
    first, *_, last, _ = model.stages
    found = names(spec, model, "freeze=stages", f"freeze.stages=['{first.name}','{last.name}']")
    expected = (first.tensors | last.tensors | model.stages[-1].tensors) & model.parameter_names()
    assert found == expected
    assert names(spec, model, "freeze=stages", "freeze.stages=[]") == model.head_parameters()
    with pytest.raises(UsageError, match=r"has no stage 'stm'\. Did you mean 'stem'"):
        names(spec, model, "freeze=stages", "freeze.stages=[stm]")


def test_pattern_trains_what_matches_and_is_not_kept(spec: Compose, model: Classifier) -> None:
    found = names(spec, model, "freeze=pattern", "freeze.train=['blocks\\.6']", "freeze.keep=['bn']")
    assert "blocks.6.0.conv_dw.weight" in found
    assert "classifier.weight" in found
    assert not any("bn" in n for n in found)


@pytest.mark.parametrize(
    ("pattern", "words"),
    [("blokcs.6", "matches no parameter.*Did you mean 'blocks.6'"), ("(", "not a regular expression")],
)
def test_pattern_that_is_wrong_says_so(spec: Compose, model: Classifier, pattern: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        names(spec, model, "freeze=pattern", f"freeze.train=['{pattern}']")


def test_norm_and_bias(spec: Compose, model: Classifier) -> None:
    norm = names(spec, model, "freeze=norm")
    assert all(n.split(".")[-2].startswith(("bn", "classifier")) for n in norm)
    assert "bn1.weight" in norm
    bias = names(spec, model, "freeze=bias")
    assert all(n.endswith(".bias") or n == "classifier.weight" for n in bias)


def test_nothing_left_to_train_is_an_error(spec: Compose, model: Classifier) -> None:
    with pytest.raises(UsageError, match="nothing is left to train"):
        apply_freeze(spec("freeze=pattern", "freeze.keep=['.']").freeze, model)


def test_frozen_modules_are_in_eval_mode_and_do_not_change(spec: Compose, model: Classifier) -> None:
    contract = apply_freeze(spec("freeze=last_stages").freeze, model)
    contract.seal()
    contract.train_mode()
    assert not model.network.get_submodule("blocks.0").training
    assert model.network.get_submodule("blocks.6").training
    before = {n: b.clone() for n, b in model.network.named_buffers()}
    model.network(torch.randn(4, 3, 32, 32))
    assert all(torch.equal(b, before[n]) for n, b in model.network.named_buffers())  # auto: pretrained statistics
    contract.verify()


@pytest.mark.parametrize(("bn_stats", "updates"), [("auto", False), ("frozen", False), ("update", True)])
def test_statistics_of_layers_that_train(spec: Compose, model: Classifier, bn_stats: str, updates: bool) -> None:
    contract = apply_freeze(spec(f"freeze.bn_stats={bn_stats}").freeze, model)
    contract.seal()
    before = model.network.bn1.running_mean.clone()
    contract.train_mode()
    model.network(torch.randn(4, 3, 32, 32))
    assert torch.equal(before, model.network.bn1.running_mean) != updates
    contract.verify()


def test_auto_updates_statistics_that_were_not_loaded(spec: Compose) -> None:
    model = build_model(spec("backbone.reinit=[blocks.6]").backbone, CLASSES, size=32, seed=0)
    apply_freeze(spec().freeze, model).train_mode()
    assert not model.network.get_submodule("blocks.5.0.bn1").training
    assert model.network.get_submodule("blocks.6.0.bn1").training


def test_update_leaves_the_statistics_of_frozen_layers(spec: Compose, model: Classifier) -> None:
    contract = apply_freeze(spec("freeze=last_stages", "freeze.bn_stats=update").freeze, model)
    contract.seal()
    contract.train_mode()
    model.network(torch.randn(4, 3, 32, 32))
    contract.verify()
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


def test_a_breach_that_leaves_no_trace_is_found_at_the_end(spec: Compose, model: Classifier) -> None:
    contract = apply_freeze(spec("freeze=head").freeze, model)
    contract.seal()
    weight = model.network.get_parameter("conv_stem.weight")
    weight.detach().numpy().flat[0] += 1e-3  # behind PyTorch's back
    with pytest.raises(FrozenTensorError, match="conv_stem"):
        contract.verify()


def test_dropout_inside_a_frozen_module_is_off(spec: Compose, model: Classifier) -> None:
    model.network.get_submodule("blocks.0").add_module("noise", nn.Dropout(0.5))
    apply_freeze(spec("freeze=head").freeze, model).train_mode()
    assert not model.network.get_submodule("blocks.0.noise").training


def test_frozen_parts_take_no_gradient(spec: Compose, model: Classifier) -> None:
    apply_freeze(spec("freeze=head").freeze, model).train_mode()
    features = model.network.forward_features(torch.randn(2, 3, 32, 32))
    assert not features.requires_grad  # nothing is stored for backward
    F.cross_entropy(model.network.forward_head(features), torch.tensor([0, 1])).backward()
    assert {n for n, p in model.network.named_parameters() if p.grad is not None} == {
        "classifier.weight",
        "classifier.bias",
    }
