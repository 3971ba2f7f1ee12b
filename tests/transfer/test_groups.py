"""Parameter groups: rates by stage, decay where it belongs, everything trainable once."""

import pytest
import torch

from tests.conftest import Compose
from tlcli.models.build import build_model
from tlcli.models.classifier import Classifier
from tlcli.transfer.contract import apply_freeze
from tlcli.transfer.groups import freeze_table, parameter_groups


@pytest.fixture
def model(spec: Compose) -> Classifier:
    return build_model(spec("backbone=resnet18", "backbone.weights=none").backbone, ("a", "b"), size=None, seed=0)


def test_groups_hold_each_trainable_parameter_once(spec: Compose, model: Classifier) -> None:
    for strategy in ("none", "head", "last_stages", "norm", "bias"):
        apply_freeze(spec(f"freeze={strategy}").freeze, model)
        groups = parameter_groups(spec().optimizer, model)
        held = [id(p) for g in groups for p in g.parameters]
        assert len(held) == len(set(held))
        assert set(held) == {id(p) for p in model.network.parameters() if p.requires_grad}
        assert all(g.parameters for g in groups)


def test_rates_fall_towards_the_input(spec: Compose, model: Classifier) -> None:
    apply_freeze(spec().freeze, model)
    optimizer = spec("optimizer.lr=0.1", "optimizer.layer_decay=0.5", "optimizer.head_lr_mult=10").optimizer
    rates = {g.name: g.lr for g in parameter_groups(optimizer, model)}
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
            for parameter in group.parameters:
                assert group.weight_decay == (0.3 if parameter.ndim > 1 or asked else 0.0)


def test_table_counts_what_trains(spec: Compose, model: Classifier) -> None:
    apply_freeze(spec("freeze=last_stages").freeze, model)
    rows = {row.name: row for row in freeze_table(spec().optimizer, model)}
    assert sum(row.parameters for row in rows.values()) == sum(p.numel() for p in model.network.parameters())
    assert rows["layer4"].trainable == rows["layer4"].parameters
    assert rows["layer3"].trainable == 0
    assert rows["layer3"].lr is None


@pytest.mark.parametrize(
    ("name", "kind"), [("adamw", torch.optim.AdamW), ("adam", torch.optim.Adam), ("sgd", torch.optim.SGD)]
)
def test_optimizers_get_what_the_spec_says(spec: Compose, model: Classifier, name: str, kind: type) -> None:
    apply_freeze(spec("freeze=head").freeze, model)
    of = spec(f"optimizer={name}", "optimizer.lr=0.25").optimizer
    optimizer = of.build(parameter_groups(of, model))
    assert type(optimizer) is kind
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {
        id(p) for p in model.network.parameters() if p.requires_grad
    }
    assert all(g["lr"] == 0.25 for g in optimizer.param_groups)
