"""Split a network in two: a prefix that training cannot change, so that it runs once, and the suffix that trains.

`graph` traces the network with torch.fx twice, as it trains and as it evaluates, because tracing fixes `self.training`
in functional calls. `boundary` runs both on a few random images to find out what is frozen, and cuts where that costs
least: a minimum cut. This module makes prefix and suffix and compares them with the network before they are used.
"""

import copy
import functools
import operator
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from tlcli.models.classifier import eval_mode
from tlcli.text import one_line
from tlcli.transfer.boundary import FIRST_BATCH, SECOND_BATCH, MatchedGraphs, PerImage, find_boundary
from tlcli.transfer.graph import (
    CutError,
    Traced,
    dependencies,
    digest_of_graph,
    full_precision,
    module_of,
    preserve_state,
    set_buffers,
    trace_train_and_eval,
)

RTOL, ATOL = 1e-4, 1e-5
"""Tolerances of prefix and suffix against the network; ATOL is for values of order one and grows with larger ones."""
MAX_NAMED_MODULES = 3


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
        """Return the sha256 of the prefix: of its operations, settings and tensors, the same in every process."""
        return digest_of_graph(self.prefix)


@dataclass(frozen=True)
class NoCut:
    """The absence of a cut; `why` is the reason, in one line."""

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
            graphs = MatchedGraphs(network, *trace_train_and_eval(network), trained, images)
            return _partition(graphs, find_boundary(graphs), images)
    except CutError as error:
        return NoCut(str(error))
    except Exception as error:  # the trace does not run, or not at another batch size
        return NoCut(f"cannot be split: {type(error).__name__}: {one_line(error)}"[:160])


class _Prefix(fx.GraphModule):
    """The frozen part: images to the tensors of the boundary, always in eval mode."""

    def train(self, mode: bool = True) -> "_Prefix":
        """Do nothing: there is no training mode."""
        return self


_Function = Callable[..., Any]


class _Suffix(nn.Module):
    """The rest: the tensors of the boundary to logits, in the mode that the network is in."""

    def __init__(self, network: nn.Module, training: _Function, evaluation: _Function, copied: set[int]) -> None:
        super().__init__()
        self._network = (network,)  # in a tuple: its parameters are the network's, not the suffix's
        self._training, self._evaluation, self._copied = training, evaluation, copied

    def forward(self, *activations: Tensor) -> Any:
        """(B, ...) each to logits (B, classes). The given tensors are not changed."""
        function = self._training if self._network[0].training else self._evaluation
        return function(*(a.clone() if i in self._copied else a for i, a in enumerate(activations)))


def _function(traced: Traced, graph: fx.Graph) -> _Function:
    """Return a part of a traced network as a function that looks up modules and tensors in it at each call."""
    return functools.partial(type(fx.GraphModule(traced.root, graph)).forward, traced.root)  # not GraphModule's copies


def _partition(graphs: MatchedGraphs, boundary: Sequence[fx.Node], images: Tensor) -> Cut:
    """Return the network in two. Raise CutError if the parts differ from it in evaluation, training or another batch.

    `suffix_start` names the largest modules with parameters that are wholly in the suffix, of those that take what
    crosses or else of those that come next.
    """
    network, training, evaluation = graphs.network, graphs.training, graphs.evaluation
    same = [graphs.eval_nodes[node] for node in boundary]
    prefix = _Prefix(_share(evaluation.root, {}), _prefix_graph(evaluation, [nodes[0] for nodes in same]))
    nn.Module.train(prefix, False)
    train_prefix = _function(training, _prefix_graph(training, boundary))
    each = [[node] for node in boundary]
    train_suffix = _function(training, _suffix_graph(training, each, graphs.dynamic, graphs.constants))
    constants = {same: value for node, value in graphs.constants.items() for same in graphs.eval_nodes[node]}
    eval_suffix = _function(evaluation, _suffix_graph(evaluation, same, (), constants))
    results = []
    with eval_mode(network):
        for batch in (images, images[list(SECOND_BATCH)]):
            results.append(prefix(batch.clone()))
            if any(a.shape[:1] != batch.shape[:1] for a in results[-1]):
                raise CutError("the frozen part does not give one row per image")
            if not _close(eval_suffix(*(a.clone() for a in results[-1])), network(batch.clone())):
                raise CutError("prefix and suffix do not give the network's logits")
    activations, fewer = results
    if not _close([a[list(SECOND_BATCH)] for a in activations], fewer):
        raise CutError("the frozen part gives an image other values in another batch")
    if not _close(train_prefix(images[list(SECOND_BATCH)]), fewer):
        raise CutError("the frozen part gives other values in training than in evaluation")
    copied = set()
    for function in (train_suffix, eval_suffix):
        clones = [a.clone() for a in activations]
        versions = [a._version for a in clones]
        function(*clones)
        copied |= {i for i, a in enumerate(clones) if a._version != versions[i]}  # changed in place
    suffix = _Suffix(network, train_suffix, eval_suffix, copied)
    if network.training:
        buffers = [(buffer, buffer.clone()) for buffer in network.buffers()]
        torch.manual_seed(0)
        expected = network(images.clone())
        set_buffers(buffers)
        torch.manual_seed(0)
        if not _close(suffix(*activations), expected):
            raise CutError("prefix and suffix do not train as the network does")
    return Cut(prefix, suffix, _suffix_start(graphs, boundary), tuple(graphs.shape(node) for node in boundary))


def _share(module: nn.Module, known: dict[nn.Module, nn.Module]) -> nn.Module:
    """Return a copy of a module and its submodules that shares parameters and buffers but has its own modes."""
    if module not in known:
        known[module] = view = copy.copy(module)
        view._modules = {
            name: child if child is None else _share(child, known) for name, child in view._modules.items()
        }
    return known[module]


def _suffix_start(graphs: MatchedGraphs, boundary: Sequence[fx.Node]) -> str:
    inside = dependencies(graphs.dynamic, {*boundary, *graphs.constants})
    before = {module for node in graphs.data if node not in inside for module in _parents(module_of(node))}
    ahead = [node for node in inside if set(boundary).intersection(node.all_input_nodes)]
    names: dict[fx.Node, str] = {}
    while ahead and not names:
        for node in ahead:
            name = next((module for module in _parents(module_of(node)) if module not in before), "")
            if name and any(True for _ in graphs.network.get_submodule(name).parameters()):
                names[node] = name
        ahead = [user for node in ahead for user in dict.fromkeys(node.users) if user in inside]
    ordered = dict.fromkeys(names[node] for node in graphs.training.nodes if node in names)
    return ", ".join(list(ordered)[:MAX_NAMED_MODULES]) or "the output"


def _parents(module: str) -> list[str]:
    """Return [a, a.b, a.b.c] for `a.b.c`."""
    parts = module.split(".") if module else []
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _prefix_graph(traced: Traced, boundary: Sequence[fx.Node]) -> fx.Graph:
    needed = dependencies(boundary, ())
    graph, copies = fx.Graph(), {}
    copies[traced.images] = graph.placeholder("images")
    for node in traced.nodes:
        if node in needed and node is not traced.images:
            copies[node] = graph.node_copy(node, lambda n: copies[n])
    graph.output(tuple(copies[node] for node in boundary))
    return graph


def _suffix_graph(
    traced: Traced, boundary: Sequence[Sequence[fx.Node]], dynamic: Collection[fx.Node], constants: dict[fx.Node, Any]
) -> fx.Graph:
    """Return the graph from the boundary (for each tensor the operations that give it) to the output.

    It has all dynamic operations: one that returns nothing may draw random numbers.
    """
    needed = dependencies([*dynamic, traced.output], {*constants, *(node for nodes in boundary for node in nodes)})
    if traced.images in needed:
        raise CutError("training and evaluation are different computations before the place to cut")
    graph = fx.Graph()
    copies: dict[fx.Node, Any] = {}
    for i, nodes in enumerate(boundary):
        activation = graph.placeholder(f"activation_{i}")
        for node in nodes:
            copies.setdefault(node, activation)
    size = graph.call_method("size", (copies[boundary[0][0]], 0))

    def written(value: Any) -> Any:
        if isinstance(value, PerImage):  # computed from the number of images
            return size if value.n == 1 else graph.call_function(operator.mul, (size, value.n))
        return tuple(map(written, value)) if isinstance(value, tuple) else value

    for node, value in constants.items():
        if any(user in needed for user in node.users):
            copies.setdefault(node, written(value))
    for node in traced.nodes:
        if node in needed:
            copies[node] = graph.node_copy(node, lambda n: copies[n])
    if not size.users:
        graph.erase_node(size)
    return graph


def _close(one: Any, other: Any) -> bool:
    """Return True if two tensors, or sequences of them, are equal up to rounding."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        scale = max(1.0, float(other.abs().max())) if other.numel() and other.isfinite().all() else 1.0
        return one.shape == other.shape and torch.allclose(one, other, RTOL, ATOL * scale, equal_nan=True)
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) == len(other) and all(_close(a, b) for a, b in zip(one, other, strict=True))
    return False
