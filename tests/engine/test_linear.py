"""Loss and gradient by formula are what PyTorch's cross-entropy and autograd give."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tlcli.engine.linear import LinearLoss


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("bias", [True, False])
def test_formula_and_autograd_agree(smoothing: float, weighted: bool, bias: bool) -> None:
    """Over two batches whose gradients add up, in float64 but for the targets."""
    torch.manual_seed(0)
    layer = nn.Linear(6, 4, bias=bias).double()
    weights = torch.tensor([0.5, 2.0, 1.0, 0.25], dtype=torch.float64) if weighted else None
    formula = LinearLoss(layer, smoothing, weights)
    formula._minus_targets = formula._minus_targets.double()
    batches = [(torch.randn(n, 6, dtype=torch.float64), torch.randint(0, 4, (n,))) for n in (5, 3)]
    found = [formula.backward(x, y, 8) for x, y in batches]
    gradients = [p.grad for p in layer.parameters()]

    layer.zero_grad(set_to_none=True)
    for (x, y), (losses, logits) in zip(batches, found, strict=True):
        own = layer(x)
        wanted = F.cross_entropy(own, y, weights, reduction="sum", label_smoothing=smoothing)
        (wanted / 8).backward()
        torch.testing.assert_close(losses, wanted.detach(), rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(logits, own.detach(), rtol=1e-6, atol=1e-7)
    for parameter, gradient in zip(layer.parameters(), gradients, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-6, atol=1e-7)


def test_what_does_not_train_has_no_gradient() -> None:
    layer = nn.Linear(3, 2)
    layer.weight.requires_grad_(False)
    LinearLoss(layer, 0.0, None).backward(torch.randn(4, 3), torch.tensor([0, 1, 1, 0]), 4)
    assert layer.weight.grad is None
    assert layer.bias.grad is not None
