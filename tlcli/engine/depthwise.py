"""The backward pass of depthwise convolutions, which PyTorch's CPU kernels have no quick form of in bfloat16."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


def fp32_depthwise_backward(accelerator: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """In the block, where a CPU computes in bfloat16, depthwise convolutions take their gradients in float32.

    What they compute forward is unchanged; the gradients are those of the same values, less rounded. oneDNN falls back
    to reference loops in bfloat16 where the kernel is larger than 3 x 3 or the stride is more than 1, and is 4 to 100
    times as quick in float32, on processors with AMX, with AVX512-BF16, and without either.
    """
    return _Float32Gradients() if accelerator.type == "cpu" and dtype == torch.bfloat16 else nullcontext()


class _Float32Gradients(TorchFunctionMode):
    """Sees each call of torch.conv2d, by a module or in a graph that was cut, and replaces the depthwise ones."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.conv2d and torch.is_grad_enabled():
            return _conv2d(*args, **kwargs)
        return func(*args, **kwargs)


def _conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """torch.conv2d, with gradients in float32 where the convolution is depthwise."""
    is_depthwise = groups > 1 and weight.shape[1] == 1 and not isinstance(padding, str)
    if not is_depthwise or input.ndim != 4 or not (input.requires_grad or weight.requires_grad):
        return torch.conv2d(input, weight, bias, stride, padding, dilation, groups)
    low = (None if t is None else t.to(torch.bfloat16) for t in (input, weight, bias))  # what autocast would do
    apply: Any = _Depthwise.apply
    out: Tensor = apply(*low, _pair(stride), _pair(padding), _pair(dilation), groups)
    return out


def _pair(value: int | Sequence[int]) -> list[int]:
    """Of height and width."""
    values = [value] if isinstance(value, int) else list(value)
    return values * 2 if len(values) == 1 else values


class _Depthwise(torch.autograd.Function):
    """A convolution whose gradients are computed in float32 and then rounded to the format of what they belong to."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        groups: int,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias_sizes = None if bias is None else list(bias.shape)
        ctx.geometry = stride, padding, dilation, False, [0, 0], groups
        return torch.conv2d(x, weight, bias, stride, padding, dilation, groups)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        [gradient] = gradients
        wanted = list(ctx.needs_input_grad[:3])
        found = torch.ops.aten.convolution_backward(
            gradient.float(), x.float(), weight.float(), ctx.bias_sizes, *ctx.geometry, wanted
        )
        rounded = (g.to(x.dtype) if need else None for g, need in zip(found, wanted, strict=True))
        return *rounded, None, None, None, None
