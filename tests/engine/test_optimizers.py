"""A step is PyTorch's own, to the last bit, whichever way it is made."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from tests.conftest import Compose
from tlcli.engine.optimizers import build_optimizer, take_step
from tlcli.transfer.groups import Group


def trained(step: Callable[[Optimizer], object], spec: Compose, *overrides: str) -> dict[str, torch.Tensor]:
    """Weights and the optimizer's state after six steps of two groups; one layer's gradient is there in some."""
    torch.manual_seed(0)
    often, seldom = nn.Linear(7, 5), nn.Linear(5, 3)
    groups = [
        Group("often", tuple(often.parameters()), lr=1e-2, weight_decay=0.1),
        Group("seldom", tuple(seldom.parameters()), lr=1e-3, weight_decay=0.0),
    ]
    optimizer = build_optimizer(spec(*overrides).optimizer, groups)
    for number in range(6):
        for parameter in (*often.parameters(), *seldom.parameters()):
            parameter.grad = None
        hidden = often(torch.randn(4, 7))
        (seldom(hidden) if number in (1, 4) else hidden).square().sum().backward()
        optimizer.param_groups[0]["lr"] *= 0.9  # as a schedule does
        step(optimizer)
    state = {f"{i}/{key}": t for i, own in optimizer.state_dict()["state"].items() for key, t in own.items()}
    return {**often.state_dict(), **{f"seldom.{name}": t for name, t in seldom.state_dict().items()}, **state}


@pytest.mark.parametrize("overrides", [("optimizer=adamw",), ("optimizer=adam",), ("optimizer=sgd",)], ids=str)
def test_a_step_is_pytorchs(spec: Compose, overrides: tuple[str, ...]) -> None:
    wanted = trained(lambda optimizer: optimizer.step(), spec, *overrides)
    found = trained(take_step, spec, *overrides)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(torch.as_tensor(found[name]), torch.as_tensor(tensor)), name


@pytest.mark.parametrize("kind", ["adam", "adamw"])
def test_pytorch_makes_the_first_step_alone(spec: Compose, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, steps = nn.Linear(3, 2), []
    group = Group("head", tuple(layer.parameters()), lr=1e-3, weight_decay=0.0)
    optimizer = build_optimizer(spec(f"optimizer={kind}").optimizer, [group])
    own = optimizer.step
    monkeypatch.setattr(optimizer, "step", lambda: steps.append(1) or own())
    for _ in range(3):
        layer(torch.ones(1, 3)).sum().backward()
        take_step(optimizer)
    assert len(steps) == 1
