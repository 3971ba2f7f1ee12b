"""Every optimizer of the registry trains its groups at their own rates, as PyTorch's plain implementation does."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import Compose
from tlcli.specs import options

PLAIN: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": lambda groups: torch.optim.AdamW(groups, betas=(0.9, 0.999), foreach=False),
    "adam": lambda groups: torch.optim.Adam(groups, betas=(0.9, 0.999), foreach=False),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=1.0, momentum=0.9, foreach=False),
}


def trained(
    make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
) -> tuple[list[Tensor], torch.optim.Optimizer]:
    """Return the weights after five steps of two groups, and the optimizer."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3))
    body, head = tuple(network[0].parameters()), tuple(network[2].parameters())
    groups = [{"name": "body", "params": body, "lr": 1e-3, "weight_decay": 0.0}]
    optimizer = make([*groups, {"name": "head", "params": head, "lr": 1e-2, "weight_decay": 0.1}])
    for _ in range(5):
        optimizer.zero_grad()
        network(torch.randn(4, 7)).square().sum().backward()
        optimizer.step()
    return [p.detach() for p in network.parameters()], optimizer


@pytest.mark.parametrize("kind", options("optimizer"))
def test_steps_are_those_of_pytorch(spec: Compose, kind: str) -> None:
    found, optimizer = trained(spec(f"optimizer={kind}").optimizer.build)
    assert [(group["name"], group["lr"]) for group in optimizer.param_groups] == [("body", 1e-3), ("head", 1e-2)]
    for ours, theirs in zip(found, trained(PLAIN[kind])[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
