"""Depthwise convolutions in bfloat16: the same forward, gradients as near to exact ones as bfloat16 can say."""

import pytest
import torch
from timm.layers import Conv2dSame
from torch import Tensor, nn

from tlcli.engine.depthwise import _Depthwise, fp32_depthwise_backward

CPU = torch.device("cpu")


def gradients(network: nn.Module, x: Tensor, *, dtype: torch.dtype, quick: bool) -> tuple[Tensor, list[Tensor]]:
    """The output, and the gradients of its weighted sum by x and by the parameters."""
    network.zero_grad()
    x = x.detach().requires_grad_()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        if quick:
            with fp32_depthwise_backward(CPU, dtype):
                out = network(x)
        else:
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
    with torch.no_grad(), fp32_depthwise_backward(CPU, torch.bfloat16):
        network(x)
    assert seen == []
    gradients(network, x, dtype=torch.bfloat16, quick=True)
    assert seen == [5]


def test_frozen_weights_get_no_gradient() -> None:
    network = nn.Conv2d(4, 4, 5, groups=4)
    network.weight.requires_grad_(False)
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16), fp32_depthwise_backward(CPU, torch.bfloat16):
        network(x).sum().backward()
    assert network.weight.grad is None
    assert x.grad is not None and network.bias is not None and network.bias.grad is not None
