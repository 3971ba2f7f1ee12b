"""Gradients computed by hand where PyTorch's are slow: of a linear layer's loss, and of depthwise convolutions.

A step of a small head on cached features takes a few hundred microseconds, most of them in autograd. oneDNN has only
reference loops for bfloat16 gradients of depthwise convolutions: of kernels above 3 x 3, and of inputs with strides
above 1. In float32, too, the gradient of a kernel of 5 x 5 takes ten times as long as the convolution.
"""

from contextlib import AbstractContextManager, nullcontext
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

BLOCK = 3  # rows and columns of a kernel whose gradient is fast


class LinearLoss:
    """Loss and gradient of `layer`, with label smoothing and class weights as in torch's cross_entropy.

    With t the target distribution of an image, weighted by class, and p the softmax of its logits, the loss is
    -sum(t log p) and its gradient by the logits is sum(t) p - t (Bishop, Pattern Recognition, 4.3.4).
    """

    def __init__(self, layer: nn.Linear, label_smoothing: float, class_weights: Tensor | None) -> None:
        self._layer, classes = layer, layer.out_features
        weights = torch.ones(classes, device=layer.weight.device) if class_weights is None else class_weights
        by_label = (label_smoothing - 1) * torch.diag(weights) - label_smoothing / classes * weights
        self._minus_targets = by_label.t().contiguous()  # (C, label)

    def backward(self, features: Tensor, labels: Tensor, n_images: int) -> tuple[Tensor, Tensor]:
        """Add the gradient of the mean over `n_images`; return the sum of the losses, and the logits (B, C)."""
        weight, bias = self._layer.weight, self._layer.bias
        with torch.no_grad():  # (C, B) instead of (B, C): products of such shapes take a fifth less time
            logits = weight @ features.t()
            if bias is not None:
                logits += bias[:, None]
            log_p = logits.log_softmax(dim=0)
            minus_targets = self._minus_targets.index_select(1, labels)
            gradient = torch._log_softmax_backward_data(minus_targets, log_p, 0, log_p.dtype).div_(n_images)
            if weight.requires_grad:
                weight_gradient = gradient @ features
                weight.grad = weight_gradient if weight.grad is None else weight.grad + weight_gradient
            if bias is not None and bias.requires_grad:
                bias_gradient = gradient.sum(dim=1)
                bias.grad = bias_gradient if bias.grad is None else bias.grad + bias_gradient
            return minus_targets.mul_(log_p).sum(), logits.t()


def fast_depthwise_backward(accelerator: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Return a context in which bfloat16 depthwise convolutions on a CPU have gradients that are 4 to 100 x faster."""
    return _FastDepthwise() if accelerator.type == "cpu" and dtype == torch.bfloat16 else nullcontext()


class _FastDepthwise(TorchFunctionMode):
    """Replaces depthwise calls of torch.conv2d, by a module or in a graph that was cut."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_conv = func is torch.conv2d and torch.is_grad_enabled()
        return (_conv2d if is_conv else func)(*args, **(kwargs or {}))


def _conv2d(
    input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> Tensor:
    is_depthwise = groups > 1 and weight.shape[1] == 1 and not isinstance(padding, str)
    if not is_depthwise or input.ndim != 4 or not (input.requires_grad or weight.requires_grad):
        return torch.conv2d(input, weight, bias, stride, padding, dilation, groups)
    tensors = (None if t is None else t.to(torch.bfloat16) for t in (input, weight, bias))  # as autocast does
    sizes = ([n] * 2 if isinstance(n, int) else list(n) * (2 // len(n)) for n in (stride, padding, dilation))
    out: Tensor = _Depthwise.apply(*tensors, *sizes, groups)  # type: ignore[no-untyped-call]
    return out


class _Depthwise(torch.autograd.Function):
    """A bfloat16 convolution whose gradients are sums in float32 that are rounded to bfloat16, as oneDNN's are."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias_sizes = None if bias is None else list(bias.shape)
        ctx.geometry = geometry  # stride, padding, dilation, groups
        return torch.conv2d(x, weight, bias, *geometry)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,), (x, weight), needed = gradients, ctx.saved_tensors, ctx.needs_input_grad
        stride, padding, dilation, groups = ctx.geometry

        def native(dtype: torch.dtype, *mask: bool) -> Any:
            arguments = (t.to(dtype) for t in (gradient, x, weight))
            return torch.ops.aten.convolution_backward(
                *arguments, None, stride, padding, dilation, False, [0, 0], groups, [*mask, False]
            )

        of_x = of_weight = of_bias = None
        if needed[0]:
            is_fast = stride == dilation == [1, 1]
            of_x = native(x.dtype if is_fast else torch.float32, True, False)[0].to(x.dtype)
        if needed[1] and dilation == [1, 1]:
            of_weight = _weight_gradient(gradient, x, weight, stride, padding, groups)
        elif needed[1]:
            of_weight = native(torch.float32, False, True)[1].to(weight.dtype)
        if needed[2]:
            of_bias = gradient.sum((0, 2, 3), dtype=torch.float32).to(gradient.dtype)
        return of_x, of_weight, of_bias, None, None, None, None


def _weight_gradient(
    gradient: Tensor, x: Tensor, weight: Tensor, stride: list[int], padding: list[int], groups: int
) -> Tensor:
    """Return the gradient of a depthwise kernel, computed as those of its parts of at most 3 x 3.

    oneDNN is about ten times as fast for these; where two parts overlap they agree.
    """
    sides = [min(BLOCK, side) for side in weight.shape[2:]]
    rows, columns = ([*range(0, k - n, n), k - n] for k, n in zip(weight.shape[2:], sides, strict=True))
    height, width = (s * (n - 1) + k for s, n, k in zip(stride, gradient.shape[2:], sides, strict=True))
    x, result = functional.pad(x, (padding[1], padding[1], padding[0], padding[0])), torch.empty_like(weight)
    for i, j in product(rows, columns):
        block = result[:, :, i : i + sides[0], j : j + sides[1]]
        block.copy_(
            torch.ops.aten.convolution_backward(
                *(gradient, x[:, :, i : i + height, j : j + width], block.contiguous(), None),
                *(stride, [0, 0], [1, 1], False, [0, 0], groups, [False, True, False]),
            )[1]
        )
    return result
