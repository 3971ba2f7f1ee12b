"""The cross-entropy of one linear layer and its gradient by their formulas.

A step of a small head on cached features is a few hundred microseconds, most of them autograd's own. The formula gives
the same numbers but for rounding; a test compares the two.
"""

import torch
from torch import Tensor, nn

from tlcli.models.classifier import Head


class LinearLoss:
    """Loss and gradient for `layer`, with label smoothing and class weights as torch's cross_entropy has them.

    With t the target distribution of an image, weighted by class, and p the softmax of its logits, the loss is
    -sum(t log p) and its gradient by the logits sum(t) p - t (Bishop, Pattern Recognition and Machine Learning, 4.3.4):
    what the backward pass of log_softmax makes of -t.
    """

    def __init__(self, layer: nn.Linear, label_smoothing: float, class_weights: Tensor | None) -> None:
        self._layer = layer
        classes = layer.out_features
        weights = torch.ones(classes, device=layer.weight.device) if class_weights is None else class_weights
        by_label = (label_smoothing - 1) * torch.diag(weights) - label_smoothing / classes * weights
        self._minus_targets = by_label.t().contiguous()  # (C, label)

    def backward(self, features: Tensor, labels: Tensor, total: int) -> tuple[Tensor, Tensor]:
        """Add the gradient of the mean over `total` images; the sum of these images' losses, and their logits (B, C).

        features (B, D) float32, labels (B).
        """
        weight, bias = self._layer.weight, self._layer.bias
        with torch.no_grad():  # classes come first within: a fifth less time for products of such shapes
            logits = weight @ features.t()
            if bias is not None:
                logits += bias[:, None]
            log_p = logits.log_softmax(dim=0)
            minus_targets = self._minus_targets.index_select(1, labels)
            gradient = torch._log_softmax_backward_data(minus_targets, log_p, 0, log_p.dtype).div_(total)
            if weight.requires_grad:
                _add(weight, gradient @ features)
            if bias is not None and bias.requires_grad:
                _add(bias, gradient.sum(dim=1))
            return minus_targets.mul_(log_p).sum(), logits.t()


def is_plain_linear(layer: nn.Module) -> bool:
    """Whether a layer is linear and nothing else: a subclass may do more, and our own head has dropout."""
    return type(layer) is nn.Linear or (isinstance(layer, Head) and layer.dropout == 0)


def _add(parameter: Tensor, gradient: Tensor) -> None:
    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
