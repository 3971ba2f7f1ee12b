"""The two sides of a boundary as modules, verified against the network."""

import copy
import operator
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from tlcli.models.classifier import eval_mode
from tlcli.transfer.cut.boundary import SECOND_BATCH, MatchedGraphs, PerImage
from tlcli.transfer.cut.graph import CutError, Traced, dependencies, module_of, set_buffers

RTOL, ATOL = 1e-4, 1e-5
"""How close prefix and suffix must come to the network; ATOL is for values of order one and grows with larger ones."""
MAX_NAMED_MODULES = 3


class GraphFunction:
    """A part of a traced network as a function, which looks up modules and tensors in the network at each call."""

    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        self._root = root
        self._run = type(fx.GraphModule(root, graph)).forward  # only its code: what GraphModule copies would go stale

    def __call__(self, *args: Tensor) -> Any:
        return self._run(self._root, *args)


class _Prefix(fx.GraphModule):
    """The frozen part: images to the tensors of the boundary, always in eval mode."""

    def train(self, mode: bool = True) -> "_Prefix":
        """Do nothing: there is no training mode."""
        return self


class Suffix(nn.Module):
    """The rest: the tensors of the boundary to logits, in the mode that the network is in."""

    def __init__(
        self, network: nn.Module, training: GraphFunction, evaluation: GraphFunction, copied: Collection[int]
    ) -> None:
        super().__init__()
        self._network = (network,)  # in a tuple: its parameters are the network's, not the suffix's
        self._training, self._evaluation = training, evaluation
        self._copied = copied

    def forward(self, *activations: Tensor) -> Any:
        """(B, ...) each to logits (B, classes). The given tensors are not changed."""
        function = self._training if self._network[0].training else self._evaluation
        return function(*(a.clone() if i in self._copied else a for i, a in enumerate(activations)))


class Partition:
    """Prefix and suffix of a network at a boundary.

    Attributes:
        suffix_start: the largest modules with parameters that are wholly in the suffix, of those that take what crosses
            or else of those that come next.
        shapes: of the boundary's tensors for one image.
    """

    def __init__(self, graphs: MatchedGraphs, boundary: Sequence[fx.Node]) -> None:
        self._network = graphs.network
        training, evaluation = graphs.training, graphs.evaluation
        self.shapes = tuple(graphs.shape(node) for node in boundary)
        self.suffix_start = _suffix_start(graphs, boundary)
        same = [graphs.eval_nodes[node] for node in boundary]
        self.prefix = _Prefix(_share(evaluation.root, {}), _prefix_graph(evaluation, [nodes[0] for nodes in same]))
        nn.Module.train(self.prefix, False)
        self._training_prefix = GraphFunction(training.root, _prefix_graph(training, boundary))
        graph = _suffix_graph(training, [[node] for node in boundary], graphs.dynamic, graphs.constants)
        self._training = GraphFunction(training.root, graph)
        constants = {same: value for node, value in graphs.constants.items() for same in graphs.eval_nodes[node]}
        self._evaluation = GraphFunction(evaluation.root, _suffix_graph(evaluation, same, (), constants))

    def verified_suffix(self, images: Tensor) -> Suffix:
        """Return the suffix after comparing it, with the prefix, with the network on a few images.

        Raises CutError if they differ in evaluation, in training, or in another batch.
        """
        network, second = self._network, list(SECOND_BATCH)
        with eval_mode(network):
            activations = self._run_prefix(images)
            fewer = self._run_prefix(images[second])
        if not _close([a[second] for a in activations], fewer):
            raise CutError("the frozen part gives an image other values in another batch")
        if not _close(self._training_prefix(images[second]), fewer):
            raise CutError("the frozen part gives other values in training than in evaluation")
        copied = set()
        for function in (self._training, self._evaluation):
            clones = [a.clone() for a in activations]
            versions = [a._version for a in clones]
            function(*clones)
            copied |= {i for i, a in enumerate(clones) if a._version != versions[i]}  # changed in place
        suffix = Suffix(network, self._training, self._evaluation, copied)
        if network.training:
            buffers = [(buffer, buffer.clone()) for buffer in network.buffers()]
            torch.manual_seed(0)
            expected = network(images.clone())
            set_buffers(buffers)
            torch.manual_seed(0)
            if not _close(suffix(*activations), expected):
                raise CutError("prefix and suffix do not train as the network does")
        return suffix

    def _run_prefix(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the prefix's tensors. Raise CutError unless the suffix turns them into the network's logits."""
        activations: tuple[Tensor, ...] = self.prefix(images.clone())
        if any(a.shape[:1] != images.shape[:1] for a in activations):
            raise CutError("the frozen part does not give one row per image")
        if not _close(self._evaluation(*(a.clone() for a in activations)), self._network(images.clone())):
            raise CutError("prefix and suffix do not give the network's logits")
        return activations


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
    """Return the graph from the images to the boundary."""
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
