"""The two halves of a network: the graphs on either side of a boundary, as modules."""

import copy
import operator
from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor, fx, nn

from tlcli.transfer.cut.graph import Refusal, Traced, closure, module_of
from tlcli.transfer.cut.pair import Pair, PerImage


class Form:
    """A part of a traced network as a function; its modules and tensors are looked up in the network with each call."""

    def __init__(self, shell: nn.Module, graph: fx.Graph) -> None:
        self._shell = shell
        self._run = type(fx.GraphModule(shell, graph)).forward  # its code; what GraphModule copies would go stale

    def __call__(self, *args: Tensor) -> Any:
        return self._run(self._shell, *args)


class _Prefix(fx.GraphModule):
    """The frozen part: images to the boundary's tensors, in eval form whatever mode the network is in."""

    def train(self, mode: bool = True) -> "_Prefix":
        """Nothing: it has no training mode."""
        return self


def _view(module: nn.Module, known: dict[nn.Module, nn.Module]) -> nn.Module:
    """A module, with all in it, that shares its parameters and buffers and has a mode of its own."""
    if module not in known:
        known[module] = view = copy.copy(module)
        view._modules = {name: child if child is None else _view(child, known) for name, child in view._modules.items()}
    return known[module]


class Suffix(nn.Module):
    """The rest: the boundary's tensors to what the network returns, in the form of the network's present mode."""

    def __init__(self, network: nn.Module, training: Form, evaluation: Form, copied: Collection[int]) -> None:
        super().__init__()
        self._network = (network,)  # in a tuple: its parameters are the network's, not the suffix's
        self._training = training
        self._evaluation = evaluation
        self._copied = copied

    def forward(self, *activations: Tensor) -> Any:
        """(B, ...) each to logits (B, classes). The tensors given are left as they are."""
        form = self._training if self._network[0].training else self._evaluation
        return form(*(a.clone() if i in self._copied else a for i, a in enumerate(activations)))


class Partition:
    """The graphs on either side of a boundary, in both forms."""

    def __init__(self, pair: Pair, boundary: Sequence[fx.Node]) -> None:
        self.pair = pair
        self.boundary = boundary
        twins = [pair.twin[node] for node in boundary]
        self.prefix = _Prefix(_view(pair.evaluation.shell, {}), _leading(pair.evaluation, twins))
        nn.Module.train(self.prefix, False)
        self.training_prefix = Form(pair.training.shell, _leading(pair.training, boundary))
        crossing = [[node] for node in boundary]
        self.training = Form(pair.training.shell, _following(pair.training, crossing, pair.live, pair.folded))
        crossing = [pair.twins[node] for node in boundary]
        folded = {twin: value for node, value in pair.folded.items() for twin in pair.twins[node]}
        self.evaluation = Form(pair.evaluation.shell, _following(pair.evaluation, crossing, (), folded))

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of the boundary's tensors, for one image."""
        return tuple(self.pair.shape(node) for node in self.boundary)

    @property
    def at(self) -> str:
        """The largest modules with parameters that are wholly in the suffix: those that take what crosses, or else
        those that come next."""
        inside = closure(self.pair.live, {*self.boundary, *self.pair.folded})
        before = {m for node in self.pair.data if node not in inside for m in _and_above(module_of(node))}
        ahead = [node for node in inside if set(self.boundary).intersection(node.all_input_nodes)]
        names: dict[fx.Node, str] = {}
        while ahead and not names:
            named = {node: next((m for m in _and_above(module_of(node)) if m not in before), "") for node in ahead}
            names = {node: name for node, name in named.items() if name and self._has_parameters(name)}
            ahead = [user for node in ahead for user in dict.fromkeys(node.users) if user in inside]
        ordered = dict.fromkeys(names[node] for node in self.pair.training.nodes if node in names)
        return ", ".join(list(ordered)[:3]) or "the output"

    def _has_parameters(self, module: str) -> bool:
        return any(True for _ in self.pair.network.get_submodule(module).parameters())


def _and_above(module: str) -> list[str]:
    """`a.b.c` gives a, a.b, a.b.c."""
    parts = module.split(".") if module else []
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _leading(traced: Traced, boundary: Sequence[fx.Node]) -> fx.Graph:
    """Images to the boundary."""
    needed = closure(boundary, ())
    graph, copies = fx.Graph(), {}
    copies[traced.images] = graph.placeholder("images")
    for node in traced.nodes:
        if node in needed and node is not traced.images:
            copies[node] = graph.node_copy(node, lambda n: copies[n])
    graph.output(tuple(copies[node] for node in boundary))
    return graph


def _following(
    traced: Traced, boundary: Sequence[Sequence[fx.Node]], live: Collection[fx.Node], folded: dict[fx.Node, Any]
) -> fx.Graph:
    """The boundary, at each place the operations that give the same, to the output, with all that is live: what returns
    nothing may draw random numbers."""
    needed = closure([*live, traced.output], {*folded, *(node for nodes in boundary for node in nodes)})
    if traced.images in needed:
        raise Refusal("training and evaluation are different computations before the place to cut")
    graph = fx.Graph()
    copies: dict[fx.Node, Any] = {}
    for i, nodes in enumerate(boundary):
        activation = graph.placeholder(f"activation_{i}")
        for node in nodes:
            copies.setdefault(node, activation)
    size = graph.call_method("size", (copies[boundary[0][0]], 0))
    for node, value in folded.items():
        if any(user in needed for user in node.users):
            copies.setdefault(node, _written(value, graph, size))
    for node in traced.nodes:
        if node in needed:
            copies[node] = graph.node_copy(node, lambda n: copies[n])
    if not size.users:
        graph.erase_node(size)
    return graph


def _written(value: Any, graph: fx.Graph, size: fx.Node) -> Any:
    """A folded value for the suffix: a constant, or computed from the number of images there."""
    if isinstance(value, tuple):
        return tuple(_written(item, graph, size) for item in value)
    if not isinstance(value, PerImage):
        return value
    return size if value.n == 1 else graph.call_function(operator.mul, (size, value.n))
