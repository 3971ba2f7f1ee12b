"""A network in two: a prefix that training cannot change, so that it runs once, and the suffix that trains.

`trace` writes the network down as a graph of torch.fx, twice: as it trains and as it evaluates, for tracing fixes
`self.training` in functional calls. `observe` runs both on a few random images to see what each operation is, and
`pair` what is frozen in both. `place` finds the boundary, a minimum cut through the frozen part; `halves` makes prefix
and suffix of it; `trial` compares them with the whole network before anybody gets them. `graph`, `state` and `digest`
serve these. docs/cutting.md says what was tried.
"""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from tlcli.transfer.cut.digest import digest_of
from tlcli.transfer.cut.graph import Refusal, one_line
from tlcli.transfer.cut.halves import Partition
from tlcli.transfer.cut.pair import TRIED, Pair
from tlcli.transfer.cut.place import boundary_of
from tlcli.transfer.cut.state import as_found, eval_mode, exact_arithmetic
from tlcli.transfer.cut.trace import both_forms
from tlcli.transfer.cut.trial import tried


@dataclass(frozen=True)
class Cut:
    """A network in two for images of one size: suffix(*prefix(images)) are the network's logits.

    `prefix` maps images (B, 3, S, S) to a tuple of tensors (B, ...), always in eval form; call it without gradients.
    `suffix` maps these to logits, in training or eval form as the network itself is in at that time. Their tensors are
    the network's, so move it before it is cut, and set its modes and optimise its parameters alone.
    `at` names the first modules of the suffix, `shapes` are those of the boundary's tensors for one image.
    """

    prefix: fx.GraphModule
    suffix: nn.Module
    at: str
    shapes: tuple[tuple[int, ...], ...]

    def digest(self) -> str:
        """The sha256 of the prefix: its operations with all that configures them, and each tensor's name, dtype, shape
        and values. The same in every process; nothing of the suffix is in it."""
        return digest_of(self.prefix)


@dataclass(frozen=True)
class NoCut:
    """`why`: one line for people: why nothing can be cut off."""

    why: str


def split_frozen(network: nn.Module, size: int, trainable: frozenset[str] | None = None) -> Cut | NoCut:
    """Cut off what training cannot change, for images of `size` pixels a side: by requires_grad and the modules' modes.

    The network is in the mode that it trains in (Contract.train_mode()) and on its device; it is left as it was found.
    With `trainable`, names of parameters, these are what trains, and all modules count as in eval mode: for features.
    """
    try:
        with (
            as_found(network),
            nullcontext() if trainable is None else eval_mode(network),
            exact_arithmetic(network),
            torch.no_grad(),
        ):
            return _split(network, size, trainable)
    except Refusal as refusal:
        return NoCut(str(refusal))


def _split(network: nn.Module, size: int, trainable: frozenset[str] | None) -> Cut:
    """The cut, tried out. Raises Refusal."""
    trains = frozenset(
        id(parameter)
        for name, parameter in network.named_parameters(remove_duplicate=False)
        if (parameter.requires_grad if trainable is None else name in trainable)
    )
    training, evaluation = both_forms(network)
    images = _images(network, size)
    try:
        pair = Pair(network, training, evaluation, trains, images)
        halves = Partition(pair, boundary_of(pair))
        return Cut(halves.prefix, tried(network, halves, images), halves.at, halves.shapes)
    except Refusal:
        raise
    except Exception as error:  # what tracing wrote down does not run, or not at another batch size
        raise Refusal(f"cannot be run apart: {one_line(error)}") from error


def _images(network: nn.Module, size: int) -> Tensor:
    """Noise (3, 3, S, S) for trials, always the same, where and of the type that the network's parameters are."""
    like = next((p for p in network.parameters() if p.is_floating_point()), torch.empty(0))
    generator = torch.Generator().manual_seed(0)
    return torch.randn(len(TRIED), 3, size, size, generator=generator).to(like.device, like.dtype)
