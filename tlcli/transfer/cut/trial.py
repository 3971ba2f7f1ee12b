"""Nobody gets a prefix and a suffix that do not give what the network gives: they are tried on a few images."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tlcli.transfer.cut.graph import Refusal
from tlcli.transfer.cut.halves import Form, Partition, Suffix
from tlcli.transfer.cut.pair import TRIED_AGAIN
from tlcli.transfer.cut.state import eval_mode, set_buffers

RTOL, ATOL = 1e-4, 1e-5
"""How near prefix and suffix must come to the network; ATOL is for values of order one and grows with larger ones."""


def tried(network: nn.Module, halves: Partition, images: Tensor) -> Suffix:
    """The suffix, after it gave with the prefix what the network gives. Raises Refusal where it does not."""
    prefix = halves.prefix
    with eval_mode(network):
        several = _same_logits(network, prefix, halves.evaluation, images)
        fewer = _same_logits(network, prefix, halves.evaluation, images[list(TRIED_AGAIN)])
    if not _close([a[list(TRIED_AGAIN)] for a in several], fewer):
        raise Refusal("what is frozen gives an image other values in another batch")
    if not _close(halves.training_prefix(images[list(TRIED_AGAIN)]), fewer):
        raise Refusal("what is frozen gives other values in training than in evaluation")
    copied = _changed(halves.training, several, network) | _changed(halves.evaluation, several, network)
    suffix = Suffix(network, halves.training, halves.evaluation, copied)
    if network.training:
        _same_training(network, suffix, several, images)
    return suffix


def _same_logits(network: nn.Module, prefix: nn.Module, rest: Form, images: Tensor) -> tuple[Tensor, ...]:
    """The prefix's tensors for these images, from which the rest gave the network's logits."""
    activations: tuple[Tensor, ...] = prefix(images.clone())
    if any(a.shape[:1] != images.shape[:1] for a in activations):
        raise Refusal("what is frozen does not give an image a row")
    if not _close(rest(*(a.clone() for a in activations)), network(images.clone())):
        raise Refusal("prefix and suffix do not give the network's logits")
    return activations


def _same_training(network: nn.Module, suffix: nn.Module, activations: Sequence[Tensor], images: Tensor) -> None:
    """Raises Refusal unless the suffix, with the same random numbers, gives what the network gives in training."""
    found = [(buffer, buffer.clone()) for buffer in network.buffers()]
    torch.manual_seed(0)
    wanted = network(images.clone())
    set_buffers(found)
    torch.manual_seed(0)
    if not _close(suffix(*activations), wanted):
        raise Refusal("prefix and suffix do not train as the network does")


def _changed(form: Form, activations: Sequence[Tensor], network: nn.Module) -> frozenset[int]:
    """Which of the tensors that it is given a form changes in place."""
    given = [a.clone() for a in activations]
    before = [a._version for a in given]
    form(*given)
    return frozenset(i for i, a in enumerate(given) if a._version != before[i])


def _close(one: Any, other: Any) -> bool:
    """Whether two tensors, or several of them, are the same numbers, but for rounding."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        scale = max(1.0, float(other.abs().max())) if other.numel() and other.isfinite().all() else 1.0
        return one.shape == other.shape and torch.allclose(one, other, RTOL, ATOL * scale, equal_nan=True)
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) == len(other) and all(_close(a, b) for a, b in zip(one, other, strict=True))
    return False
