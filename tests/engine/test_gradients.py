"""Gradients computed by hand are those of PyTorch: of a linear loss, and of depthwise convolutions in bfloat16."""

from contextlib import nullcontext

import pytest
import torch
from timm.layers import Conv2dSame
from torch import Tensor, nn
from torch.nn import functional as F

from tlcli.engine.gradients import LinearLoss, _Depthwise, fast_depthwise_backward

CPU = torch.device("cpu")


def gradients(network: nn.Module, x: Tensor, *, dtype: torch.dtype, quick: bool) -> tuple[Tensor, list[Tensor]]:
    """Return the output and the gradients of its weighted sum by x and by the parameters."""
    network.zero_grad()
    x = x.detach().requires_grad_()
    fast = fast_depthwise_backward(CPU, dtype) if quick else nullcontext()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32), fast:
        out = network(x)
    (out.float() * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    return out.detach(), [x.grad, *(p.grad for p in network.parameters())]  # type: ignore[list-item]


@pytest.mark.parametrize(
    "network",
    [
        nn.Conv2d(6, 6, 5, padding=2, groups=6),
        nn.Conv2d(6, 6, 3, stride=2, padding=1, groups=6, bias=False),
        nn.Conv2d(6, 12, 3, padding=2, dilation=2, groups=6),
        Conv2dSame(6, 6, 3, stride=2, groups=6),  # type: ignore[no-untyped-call]
        nn.Sequential(nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 7, padding=3, groups=6)),
    ],
    ids=["5x5", "stride", "dilation and multiplier", "timm's", "behind another"],
)
@pytest.mark.parametrize("size", [9, 12])
def test_forward_is_the_same_and_gradients_are_as_exact(network: nn.Module, size: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 6, size, size)
    plain, native = gradients(network, x, dtype=torch.bfloat16, quick=False)
    out, found = gradients(network, x, dtype=torch.bfloat16, quick=True)
    _, exact = gradients(network, x, dtype=torch.float32, quick=False)
    assert torch.equal(out, plain)
    for ours, theirs, wanted in zip(found, native, exact, strict=True):
        assert ours.dtype == wanted.dtype
        assert (ours - wanted).norm() <= 1.2 * (theirs - wanted).norm()


def test_only_depthwise_convolutions_in_bfloat16_that_need_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    apply = _Depthwise.apply

    def counted(x: Tensor, weight: Tensor, *rest: object) -> Tensor:
        seen.append(weight.shape[-1])
        out: Tensor = apply(x, weight, *rest)
        return out

    monkeypatch.setattr(_Depthwise, "apply", counted)
    parts = [nn.Conv2d(4, 4, 5, groups=4), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 2, groups=2), nn.Conv2d(4, 4, 1)]
    network = nn.Sequential(*parts)
    x = torch.randn(2, 4, 12, 12)
    gradients(network, x, dtype=torch.float32, quick=True)
    with torch.no_grad(), fast_depthwise_backward(CPU, torch.bfloat16):
        network(x)
    assert seen == []
    gradients(network, x, dtype=torch.bfloat16, quick=True)
    assert seen == [5]


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


def test_frozen_weights_get_no_gradient() -> None:
    layer, conv = nn.Linear(3, 2), nn.Conv2d(4, 4, 5, groups=4)
    for module in (layer, conv):
        module.weight.requires_grad_(False)
    LinearLoss(layer, 0.0, None).backward(torch.randn(4, 3), torch.tensor([0, 1, 1, 0]), 4)
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16), fast_depthwise_backward(CPU, torch.bfloat16):
        conv(x).sum().backward()
    assert layer.weight.grad is None and conv.weight.grad is None
    assert layer.bias.grad is not None and conv.bias is not None and conv.bias.grad is not None and x.grad is not None
