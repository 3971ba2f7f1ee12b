"""Split a network in two: a prefix that training cannot change, so that it runs once, and the suffix that trains.

`graph` traces the network with torch.fx twice, as it trains and as it evaluates, because tracing fixes `self.training`
in functional calls. `boundary` runs both on a few random images to find out what is frozen, and cuts where that costs
least: a minimum cut. `partition` makes prefix and suffix and compares them with the network before they are used.
"""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import fx, nn

from tlcli.models.classifier import eval_mode
from tlcli.transfer.cut.boundary import FIRST_BATCH, MatchedGraphs, find_boundary
from tlcli.transfer.cut.graph import (
    CutError,
    digest_of_graph,
    full_precision,
    one_line,
    preserve_state,
    trace_train_and_eval,
)
from tlcli.transfer.cut.partition import Partition


@dataclass(frozen=True)
class Cut:
    """A network in two for images of one size: suffix(*prefix(images)) are the network's logits.

    `prefix` maps images (B, 3, S, S) to a tuple of tensors (B, ...), always in eval mode; call it without gradients.
    `suffix` maps these to logits, in the mode that the network is in at that time. Their tensors are the network's, so
    move the network before it is cut, and set its modes and optimize its parameters only.
    `suffix_start` names the first modules of the suffix, `shapes` are those of the boundary's tensors for one image.
    """

    prefix: fx.GraphModule
    suffix: nn.Module
    suffix_start: str
    shapes: tuple[tuple[int, ...], ...]

    def digest(self) -> str:
        """Return the sha256 of the prefix: its operations with their settings, and its tensors.

        It is the same in every process and does not depend on the suffix.
        """
        return digest_of_graph(self.prefix)


@dataclass(frozen=True)
class NoCut:
    """There is no prefix; `why` is the reason, one line for people."""

    why: str


def split_frozen(network: nn.Module, size: int, trainable: frozenset[str] | None = None) -> Cut | NoCut:
    """Cut off what training cannot change, by requires_grad and the modules' modes, for images of `size` pixels.

    The network is in the mode that it trains in (FreezeContract.train_mode()) and on its device; it is not changed.
    `trainable`, names of parameters, replaces requires_grad; all modules count as in eval mode then: for features.
    """
    trained = frozenset(
        id(parameter)
        for name, parameter in network.named_parameters(remove_duplicate=False)
        if (parameter.requires_grad if trainable is None else name in trainable)
    )
    like = next((p for p in network.parameters() if p.is_floating_point()), torch.empty(0))
    noise = torch.randn(len(FIRST_BATCH), 3, size, size, generator=torch.Generator().manual_seed(0))
    images = noise.to(like.device, like.dtype)
    mode = nullcontext() if trainable is None else eval_mode(network)
    try:
        with preserve_state(network), mode, full_precision(network), torch.no_grad():
            traced = trace_train_and_eval(network)
            try:
                graphs = MatchedGraphs(network, *traced, trained, images)
                partition = Partition(graphs, find_boundary(graphs))
                suffix = partition.verified_suffix(images)
            except CutError:
                raise
            except Exception as error:  # the trace does not run, or not at another batch size
                raise CutError(f"cannot be split: {one_line(error)}") from error
    except CutError as error:
        return NoCut(str(error))
    return Cut(partition.prefix, suffix, partition.suffix_start, partition.shapes)
