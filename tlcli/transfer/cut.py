"""Split a network in two: a prefix that training cannot change, so that it runs once, and the suffix that trains.

1. `graph` traces the network with torch.fx twice, as it trains and as it evaluates, because tracing fixes
   `self.training` in functional calls, and runs both on a few images of noise.
2. `MatchedGraphs` has the operations that are frozen and the same in both.
3. `find_boundary` chooses the tensors that cross from prefix to suffix, where that costs least: a minimum cut.
4. `_partition` makes prefix and suffix and compares them with the network before they are used.
"""

import copy
import functools
import math
import operator
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from tlcli.models.classifier import eval_mode
from tlcli.text import one_line
from tlcli.transfer.graph import (
    CutError,
    GraphAnalyzer,
    Traced,
    dependencies,
    digest_of_graph,
    full_precision,
    minimum_cut,
    module_of,
    preserve_state,
    trace_train_and_eval,
)

FIRST_BATCH, SECOND_BATCH = (0, 1, 2), (2, 0)
"""The images of the two batches of every analysis: of different sizes, and no image at the same index in both."""

# Costs in floating point operations. The input of a residual block then beats two maps inside it.
FLOPS_PER_BYTE = 4000  # of a row that is stored: 200 GFLOP/s, two CPU cores, against 50 MB/s, a slow disk
DECODE_FLOPS_PER_PIXEL = 20_000  # of a JPEG file that is decoded again: about 5 ms for 224 x 224
MIN_ROW_BYTES = 16384  # smaller rows are read as slowly: the input of a head crosses, not a smaller one before it


@dataclass(frozen=True)
class Cut:
    """A network in two for images of one size: suffix(*prefix(images)) are the network's logits.

    Their tensors are the network's: move it before it is cut.
    """

    prefix: fx.GraphModule  # (B, 3, S, S) to a tuple of tensors (B, ...), always in eval mode; without gradients
    suffix: nn.Module  # these to logits, in the network's present mode
    suffix_start: str  # the names of the first modules of the suffix
    shapes: tuple[tuple[int, ...], ...]  # of the tensors between them, for one image

    def digest(self) -> str:
        """Return the sha256 of the prefix, the same in every process."""
        return digest_of_graph(self.prefix)


@dataclass(frozen=True)
class NoCut:
    """The absence of a cut; `reason` is one line."""

    reason: str


def split_frozen(network: nn.Module, size: int, trainable: frozenset[str] | None = None) -> Cut | NoCut:
    """Split a network for images of one size in pixels; see `Splitter`."""
    return Splitter(network, trainable).split(size)


class Splitter:
    """Splits a network for images of several sizes.

    What cannot change is told by requires_grad and the modules' modes. The network is in the mode that it trains in
    (FreezeContract.train_mode()) and on its device; it is not changed. `trainable`, names of parameters, replaces
    requires_grad; all modules count as in eval mode then: for features. A second size costs less: the network is traced
    once, and parts that are the same for both sizes are verified in evaluation only.
    """

    def __init__(self, network: nn.Module, trainable: frozenset[str] | None = None) -> None:
        self.network, self.trainable = network, trainable
        self._traced: tuple[Traced, Traced] | None = None
        self._verified: set[str] = set()

    def split(self, size: int) -> Cut | NoCut:
        """Cut off what training cannot change, for images of `size` pixels."""
        network, trainable = self.network, self.trainable
        named = network.named_parameters(remove_duplicate=False)
        trained = {id(p) for name, p in named if (p.requires_grad if trainable is None else name in trainable)}
        like = next((p for p in network.parameters() if p.is_floating_point()), torch.empty(0))
        noise = torch.randn(len(FIRST_BATCH), 3, size, size, generator=torch.Generator().manual_seed(0))
        images = noise.to(like.device, like.dtype)
        mode = nullcontext() if trainable is None else eval_mode(network)
        try:
            with preserve_state(network), mode, full_precision(network), torch.no_grad():
                self._traced = self._traced or trace_train_and_eval(network)
                graphs = MatchedGraphs(network, *self._traced, trained, images)
                return _partition(graphs, find_boundary(graphs, size * size), images, self._verified)
        except CutError as error:
            return NoCut(str(error))
        except Exception as error:  # the trace does not run, or not at another batch size
            return NoCut(f"cannot be split: {type(error).__name__}: {one_line(error)}"[:160])


class PerImage(NamedTuple):
    """A number that is `n` per image of the batch."""

    n: int


NOT_CONSTANT = object()  # a value that cannot be written into a graph


class MatchedGraphs:
    """The training and the evaluation graph of a network, and the operations that are frozen in both."""

    def __init__(
        self, network: nn.Module, training: Traced, evaluation: Traced, trained: Collection[int], images: Tensor
    ) -> None:
        self.network, self.training, self.evaluation = network, training, evaluation
        texts: dict[str, int] = {}
        train = GraphAnalyzer(training, trained, images[list(SECOND_BATCH)], texts)
        with eval_mode(network):
            evaluated = GraphAnalyzer(evaluation, trained, images, texts)
        self.dynamic = train.dynamic  # as those below, by operation of the training graph
        if training.output not in self.dynamic:
            raise CutError("nothing that trains reaches the output")
        by_number: dict[int, list[fx.Node]] = {}
        for node, number in evaluated.numbers.items():
            if node not in evaluated.dynamic:
                by_number.setdefault(number, []).append(node)
        numbers = {node: number for node, number in train.numbers.items() if node not in self.dynamic}
        self.eval_nodes = {node: by_number[number] for node, number in numbers.items() if number in by_number}
        self.flops = {node: flops // len(SECOND_BATCH) for node, flops in train.flops.items()}  # for one image
        self.constants: dict[fx.Node, Any] = {}  # values that do not depend on the images, at any batch size
        for node, (same, *_) in self.eval_nodes.items():
            if node in train.values and same in evaluated.values:
                value = _fold(train.values[node], evaluated.values[same])
                if value is not NOT_CONSTANT:
                    self.constants[node] = value
        self.data: dict[fx.Node, None] = {training.images: None}  # in order: what is frozen and depends on the images
        for node in training.graph.nodes:
            is_frozen = node not in self.dynamic and node not in self.constants
            if is_frozen and any(source in self.data for source in node.all_input_nodes):
                self.data[node] = None
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}  # of what can cross the boundary, for one image
        for node, (same, *_) in self.eval_nodes.items():
            two, three = train.shapes.get(node, ()), evaluated.shapes.get(same, ())
            has_rows = (two[:1], three[:1]) == ((len(SECOND_BATCH),), (len(FIRST_BATCH),)) and two[1:] == three[1:]
            is_overwritten = any(n not in self.dynamic and training.inplace_input(n) is node for n in node.users)
            if node in self.data and has_rows and not is_overwritten:
                self.shapes[node] = two[1:]


def _fold(two: Any, three: Any) -> Any:
    """Return a value at any batch size, given those of two batches: a constant or a multiple of the size."""
    if isinstance(two, tuple | list) and type(two) is type(three) and len(two) == len(three):
        items = tuple(map(_fold, two, three))
        return NOT_CONSTANT if NOT_CONSTANT in items else items
    if type(two) is type(three) and isinstance(two, bool | int | float | str | None) and two == three:
        return two
    if type(two) is type(three) is int and two * len(FIRST_BATCH) == three * len(SECOND_BATCH):
        return PerImage(two // len(SECOND_BATCH))
    return NOT_CONSTANT


def find_boundary(graphs: MatchedGraphs, n_pixels: int) -> list[fx.Node]:
    """Return the frozen tensors that cross: few bytes, and little work for the suffix to repeat; or raise CutError."""
    images = graphs.training.images
    store_cost: dict[fx.Node, int | None] = dict.fromkeys(graphs.data)
    for node, shape in graphs.shapes.items():
        store_cost[node] = max(4 * math.prod(shape), MIN_ROW_BYTES) * FLOPS_PER_BYTE  # float32
    store_cost[images] = (store_cost[images] or 0) + n_pixels * DECODE_FLOPS_PER_PIXEL
    users = {node: [user for user in node.users if user in graphs.data] for node in graphs.data}
    needed = {node for node in graphs.data if any(user in graphs.dynamic for user in node.users)}
    crossing = minimum_cut(users, needed, store_cost, graphs.flops)
    prefix = dependencies((graphs.eval_nodes[node][0] for node in crossing), ())
    if images not in crossing and any(map(graphs.evaluation.parameters_of, prefix)):
        return crossing
    reason = next(reason for reason in graphs.dynamic.values() if reason is not None)
    if any(map(graphs.training.parameters_of, dependencies(needed, ()))):
        raise CutError(f"{reason}, and the frozen layers before it cost less to run again than to store")
    raise CutError(f"no frozen layers at the input: {reason}")


class _Suffix(nn.Module):
    """The rest: the tensors of the boundary to logits, in the mode that the network is in."""

    def __init__(self, network: nn.Module, functions: dict[bool, Callable[..., Any]]) -> None:
        super().__init__()
        self._network = (network,)  # in a tuple: its parameters are the network's, not the suffix's
        self._functions = functions  # by `network.training`

    def forward(self, *activations: Tensor) -> Any:
        """(B, ...) each to logits (B, classes). The given tensors are not changed, even if layers work in place."""
        return self._functions[self._network[0].training](*(a.clone() for a in activations))


def _partition(graphs: MatchedGraphs, boundary: Sequence[fx.Node], images: Tensor, verified: set[str]) -> Cut:
    """Return the network in two. Raise CutError if the parts differ from it in evaluation or in training.

    Parts in `verified`, to which these are added, are compared in evaluation only: a size does not change what they do.
    """
    network, training, evaluation = graphs.network, graphs.training, graphs.evaluation
    eval_boundary = [graphs.eval_nodes[node] for node in boundary]
    prefix_graph = _subgraph(evaluation, [[evaluation.images]], [nodes[0] for nodes in eval_boundary], {})
    train_prefix = _subgraph(training, [[training.images]], boundary, {})
    suffix_nodes = [*graphs.dynamic, training.output]  # one that returns nothing may draw random numbers
    train_suffix = _subgraph(training, [[node] for node in boundary], suffix_nodes, graphs.constants)
    constants = {same: value for node, value in graphs.constants.items() for same in graphs.eval_nodes[node]}
    eval_suffix = _subgraph(evaluation, eval_boundary, [evaluation.output], constants)
    prefix = fx.GraphModule(_share(evaluation.root, {}), prefix_graph).eval()
    suffix = _Suffix(network, {True: _function(training, train_suffix), False: _function(evaluation, eval_suffix)})
    cut = Cut(prefix, suffix, _suffix_start(graphs, boundary), tuple(graphs.shapes[node] for node in boundary))
    second = list(SECOND_BATCH)
    few = images[second]
    with eval_mode(network):
        few_activations = prefix(few.clone())
        if any(a.shape[:1] != few.shape[:1] for a in few_activations):
            raise CutError("the frozen part does not give one row per image")
        differs = not _close(suffix(*few_activations), network(few.clone()))
        text = "".join(map(str, (prefix_graph, train_prefix, train_suffix, eval_suffix)))
        if text in verified and not differs:
            return cut
        activations = prefix(images.clone())
        if not _close([a[second] for a in activations], few_activations):
            raise CutError("the frozen part's values for an image depend on the other images of the batch")
        if differs or not _close(suffix(*activations), network(images.clone())):
            raise CutError("prefix and suffix do not give the network's logits")
    if network.training:
        if not _close(_function(training, train_prefix)(few), few_activations):
            raise CutError("the frozen part gives other values in training than in evaluation")
        with preserve_state(network):
            torch.manual_seed(0)
            expected = network(images.clone())
        torch.manual_seed(0)
        if not _close(suffix(*activations), expected):
            raise CutError("prefix and suffix do not train as the network does")
    verified.add(text)
    return cut


def _function(traced: Traced, graph: fx.Graph) -> Callable[..., Any]:
    """Return a part of a traced network as a function that looks up modules and tensors in it at each call."""
    return functools.partial(type(fx.GraphModule(traced.root, graph)).forward, traced.root)  # not GraphModule's copies


def _share(module: nn.Module, known: dict[nn.Module, nn.Module]) -> nn.Module:
    """Return a copy of a module and its submodules that shares parameters and buffers but has its own modes."""
    if module not in known:
        known[module] = view = copy.copy(module)
        view._modules = {
            name: child if child is None else _share(child, known) for name, child in view._modules.items()
        }
    return known[module]


def _subgraph(
    traced: Traced, inputs: Sequence[Sequence[fx.Node]], targets: Sequence[fx.Node], constants: dict[fx.Node, Any]
) -> fx.Graph:
    """Return the graph from inputs (each the operations that give it) to the network's output or a tuple of targets."""
    needed = dependencies(targets, {*constants, *(node for nodes in inputs for node in nodes)})
    if traced.images in needed:
        raise CutError("training and evaluation are different computations before the place to cut")
    graph = fx.Graph()
    copies: dict[fx.Node, Any] = {}
    for i, nodes in enumerate(inputs):
        copies |= dict.fromkeys(nodes, graph.placeholder(f"input_{i}"))
    size = graph.call_method("size", (copies[inputs[0][0]], 0))

    def written(value: Any) -> Any:
        if isinstance(value, PerImage):  # computed from the number of images
            return size if value.n == 1 else graph.call_function(operator.mul, (size, value.n))
        return tuple(map(written, value)) if isinstance(value, tuple) else value

    for node, value in constants.items():
        if any(user in needed for user in node.users):
            copies.setdefault(node, written(value))
    for node in traced.graph.nodes:
        if node in needed:
            copies[node] = graph.node_copy(node, lambda n: copies[n])
    if traced.output not in needed:
        graph.output(tuple(copies[node] for node in targets))
    if not size.users:
        graph.erase_node(size)
    return graph


def _suffix_start(graphs: MatchedGraphs, boundary: Sequence[fx.Node]) -> str:
    """Name the largest modules that are wholly in the suffix and take what crosses, or else come next."""

    def parents(node: fx.Node) -> list[str]:  # a, a.b and a.b.c of a.b.c
        return list(accumulate(module_of(node).split("."), "{}.{}".format))

    inside = dependencies(graphs.dynamic, {*boundary, *graphs.constants})
    before = {module for node in graphs.data if node not in inside for module in parents(node)}
    ahead = [node for node in inside if set(boundary).intersection(node.all_input_nodes)]
    names: dict[fx.Node, str] = {}
    while ahead and not names:
        for node in ahead:
            name = next((module for module in parents(node) if module not in before), "")
            if name and any(True for _ in graphs.network.get_submodule(name).parameters()):
                names[node] = name
        ahead = [user for node in ahead for user in dict.fromkeys(node.users) if user in inside]
    ordered = dict.fromkeys(names[node] for node in graphs.training.graph.nodes if node in names)
    return ", ".join(list(ordered)[:3]) or "the output"


def _close(one: Any, other: Any) -> bool:
    """Return True if two tensors, or sequences of them, are equal up to rounding."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        scale = max(1.0, float(other.abs().max())) if other.numel() and other.isfinite().all() else 1.0
        return one.shape == other.shape and torch.allclose(one, other, rtol=1e-4, atol=1e-5 * scale, equal_nan=True)
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) == len(other) and all(_close(a, b) for a, b in zip(one, other, strict=True))
    return False
