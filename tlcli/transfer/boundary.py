"""The boundary of a cut: operations that are frozen in training and in evaluation, and the minimum cut among them."""

import math
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from tlcli.models.classifier import eval_mode
from tlcli.transfer.graph import (
    CutError,
    Traced,
    dependencies,
    has_parameters,
    inplace_input,
    module_of,
    rng_state,
    text_of_node,
)

FIRST_BATCH = (0, 1, 2)
SECOND_BATCH = (2, 0)
"""The images of the two batches of every analysis: of different sizes, and no image at the same index in both."""

FLOPS_PER_BYTE = 4000
"""Operations that cost as much to run again as one more byte costs to store: 200 GFLOP/s, two CPU cores, against
50 MB/s, a slow disk. The input of a residual block then beats two maps inside it, and a deep map beats the images."""
DECODE_FLOPS_PER_PIXEL = 20_000
"""Operations that cost as much as decoding a pixel of a JPEG file again: about 5 ms for 224 x 224."""
MIN_ROW_BYTES = 16384
"""Smaller rows are read as slowly as rows of this size. So the input of a head crosses, not the somewhat smaller input
of a layer before it."""


NOT_CONSTANT = object()  # a value that cannot be written into a graph


class TensorShape(NamedTuple):
    """Stands for a tensor value of an operation."""

    shape: tuple[int, ...]


class PerImage(NamedTuple):
    """A number that is `n` per image of the batch."""

    n: int


class _DispatchRecorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts floating point operations, and notices training behavior and writes into tensors of the network."""

    def __init__(self, owned: Collection[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._owned = owned
        self.flops = 0
        self.trains = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        value = func(*args, **kwargs)
        if (count := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += int(count(*args, **kwargs, out_val=value))
        for argument, given in zip(func._schema.arguments, args, strict=False):
            if argument.name in ("training", "train") and given is True and not self._owns(args[0]):
                self.trains = True  # BatchNorm on the statistics of the batch; standardized weights are not a batch
            if argument.alias_info is not None and argument.alias_info.is_write and self._owns(given):
                self.trains = True
        return value

    def _owns(self, value: Any) -> bool:
        return isinstance(value, Tensor) and _storage(value) in self._owned


class GraphAnalyzer(fx.Interpreter):
    """Runs the frozen operations of a traced network on a few images.

    Attributes:
        dynamic: operations that training can change, each with the reason; None if they only depend on such.
        values: of the others: a TensorShape, a plain value or NOT_CONSTANT.
        flops: operations that each costs.
        identity_of: operations that return their input as it is, with that input.
        transposed: operations that only view their input in another order.
    """

    def __init__(self, traced: Traced, trained: Collection[int], images: Tensor) -> None:
        super().__init__(traced.root, graph=traced.graph)
        self.extra_traceback = False
        self._trained = trained
        self._device = images.device
        self._recorder = _DispatchRecorder({_storage(t) for t in (*traced.root.parameters(), *traced.root.buffers())})
        self.dynamic: dict[fx.Node, str | None] = {}
        self.values: dict[fx.Node, Any] = {}
        self.flops: dict[fx.Node, int] = {}
        self.identity_of: dict[fx.Node, fx.Node] = {}
        self.transposed: set[fx.Node] = set()
        with self._recorder:
            self.run(images.clone(), enable_io_processing=False)

    def run_node(self, n: fx.Node) -> Any:
        """Run one operation unless it is dynamic."""
        parameters: Any = ()
        if n.op == "call_module":
            parameters = self.fetch_attr(str(n.target)).parameters()
        elif n.op == "get_attr":
            parameters = (self.fetch_attr(str(n.target)),)
        trains = any(id(parameter) in self._trained for parameter in parameters)
        if trains or any(source in self.dynamic for source in n.all_input_nodes):
            self.dynamic[n] = f"{n.target} trains" if trains else None
            return None
        if n.op == "output":
            return None
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        first = args[0] if args and isinstance(args[0], Tensor) else None
        version, state = first._version if first is not None else None, rng_state(self._device)
        self._recorder.flops, self._recorder.trains = 0, False
        value = getattr(self, n.op)(n.target, args, kwargs)
        if not torch.equal(state, rng_state(self._device)):
            self.dynamic[n] = f"{module_of(n) or n.name} is random in training"
        elif self._recorder.trains:
            self.dynamic[n] = f"{module_of(n) or n.name} depends on the batch or keeps statistics"
        self.flops[n] = self._recorder.flops
        if not isinstance(value, Tensor):
            self.values[n] = value if _is_plain(value) else NOT_CONSTANT
            return value
        self.values[n] = TensorShape(tuple(value.shape))
        is_view = first is not None and _storage(first) == _storage(value)
        if not is_view or (value is first and value._version != version):  # a new tensor, or one changed in place
            self.flops[n] += value.numel()
        elif value is first and isinstance(n.args[0], fx.Node):
            self.identity_of[n] = n.args[0]
        elif first is not None and value.numel() == first.numel() and not value.is_contiguous():
            self.transposed.add(n)
        return value


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _is_plain(value: Any) -> bool:
    """Return True for a number, a tuple or the like, which can be written into a graph."""
    if isinstance(value, tuple | list):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str)


class MatchedGraphs:
    """The training and the evaluation graph of a network, and the operations that are frozen in both.

    Attributes:
        dynamic: operations of the training graph that training can change.
        eval_nodes: for each frozen operation of the training graph those of the evaluation graph that do the same.
        constants: values that do not depend on the images, at any batch size.
        data: what is frozen and depends on the images, in order; the first is the images.
        bytes_per_image: of each of `data` in float32; None if it cannot cross the boundary.
    """

    def __init__(
        self, network: nn.Module, training: Traced, evaluation: Traced, trained: Collection[int], images: Tensor
    ) -> None:
        self.network, self.training, self.evaluation = network, training, evaluation
        train = GraphAnalyzer(training, trained, images[list(SECOND_BATCH)])
        with eval_mode(network):
            evaluated = GraphAnalyzer(evaluation, trained, images)
        self.dynamic = train.dynamic
        if training.output not in self.dynamic:
            raise CutError("nothing that trains reaches the output")
        texts: dict[str, int] = {}
        nodes: dict[int, list[fx.Node]] = {}
        for node, number in _value_numbers(evaluation, evaluated, texts).items():
            if node in evaluated.values and node not in evaluated.dynamic:
                nodes.setdefault(number, []).append(node)
        numbers = _value_numbers(training, train, texts)
        self.eval_nodes = {n: nodes[i] for n, i in numbers.items() if i in nodes and n not in self.dynamic}
        self.flops = {node: flops // len(SECOND_BATCH) for node, flops in train.flops.items()}
        self._values = {node: (train.values[node], evaluated.values[same[0]]) for node, same in self.eval_nodes.items()}
        folded = {node: _fold(*values) for node, values in self._values.items()}
        self.constants = {node: value for node, value in folded.items() if value is not NOT_CONSTANT}
        data = {training.images: None}
        for node in training.nodes:
            if node not in self.dynamic and node not in self.constants and any(s in data for s in node.all_input_nodes):
                data[node] = None
        self.data = list(data)
        self.bytes_per_image: dict[fx.Node, int | None] = dict.fromkeys(self.data)
        for node in self.data:
            two, three = self._values.get(node, (None, None))
            is_tensor = isinstance(two, TensorShape) and isinstance(three, TensorShape)
            if not is_tensor or node in train.transposed:  # it would be stored in another order
                continue
            has_rows = (two.shape[:1], three.shape[:1]) == ((len(SECOND_BATCH),), (len(FIRST_BATCH),))
            is_overwritten = any(n not in self.dynamic and inplace_input(n, training.root) is node for n in node.users)
            if has_rows and two.shape[1:] == three.shape[1:] and not is_overwritten:
                self.bytes_per_image[node] = 4 * math.prod(two.shape[1:])

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """Return the shape of a tensor of the boundary for one image."""
        shape: tuple[int, ...] = self._values[node][0].shape
        return shape[1:]


def _fold(two: Any, three: Any) -> Any:
    """Return a value at any batch size, given those of two batches: a constant or a multiple of the size."""
    if isinstance(two, TensorShape) or type(two) is not type(three):
        return NOT_CONSTANT
    if isinstance(two, tuple | list):
        if len(two) != len(three):
            return NOT_CONSTANT
        items = tuple(_fold(a, b) for a, b in zip(two, three, strict=True))
        return NOT_CONSTANT if NOT_CONSTANT in items else items
    if two is three or two == three:
        return two
    if isinstance(two, int) and two * len(FIRST_BATCH) == three * len(SECOND_BATCH) and two % len(SECOND_BATCH) == 0:
        return PerImage(two // len(SECOND_BATCH))
    return NOT_CONSTANT


def _value_numbers(traced: Traced, analyzer: GraphAnalyzer, texts: dict[str, int]) -> dict[fx.Node, int]:
    """Give each operation a number: those that do the same with the same inputs have the same number."""
    numbers: dict[fx.Node, int] = {}
    for node in traced.nodes:
        if node in analyzer.identity_of:  # such as dropout in eval mode
            numbers[node] = numbers[analyzer.identity_of[node]]
        else:
            numbers[node] = texts.setdefault(text_of_node(node, traced.root, numbers), len(texts))
    return numbers


def find_boundary(graphs: MatchedGraphs) -> list[fx.Node]:
    """Return the frozen tensors that cross, in order: fewest bytes, at a price for frozen work that the suffix repeats.

    Raises CutError if the images themselves would cross.
    """
    images, root = graphs.training.images, graphs.training.root
    recompute_cost = {node: graphs.flops[node] for node in graphs.data}
    store_cost = {
        node: None if nbytes is None else max(nbytes, MIN_ROW_BYTES) * FLOPS_PER_BYTE
        for node, nbytes in graphs.bytes_per_image.items()
    }
    _, *sides = graphs.shape(images)
    store_cost[images] = (store_cost[images] or 0) + math.prod(sides) * DECODE_FLOPS_PER_PIXEL
    users = {node: [user for user in node.users if user in graphs.bytes_per_image] for node in graphs.data}
    needed = {node for node in graphs.data if any(user in graphs.dynamic for user in node.users)}
    crossing = minimum_cut(graphs.data, users, needed, store_cost, recompute_cost)
    prefix = dependencies((graphs.eval_nodes[node][0] for node in crossing), ())
    if images not in crossing and any(has_parameters(node, graphs.evaluation.root) for node in prefix):
        return crossing
    reason = next(reason for reason in graphs.dynamic.values() if reason is not None)
    if any(has_parameters(node, root) for node in dependencies(needed, ())):
        raise CutError(f"{reason}, and the frozen layers before it cost less to run again than to store")
    raise CutError(f"no frozen layers at the input: {reason}")


def minimum_cut(
    nodes: Sequence[fx.Node],
    users: dict[fx.Node, list[fx.Node]],
    needed: Collection[fx.Node],
    store_cost: dict[fx.Node, int | None],
    recompute_cost: dict[fx.Node, int],
) -> list[fx.Node]:
    """Return the nodes whose results cross. Of several minimum cuts it is the latest.

    A node is an edge with the cost of storing its result (None: it cannot cross); if that edge is cut, the result
    crosses. An edge from the source to its start has the cost of running it again; if that is cut, the suffix runs it.
    The first node is the input.
    """
    import networkx  # here, because it takes 50 ms

    flow = networkx.DiGraph()
    for node in nodes:
        size = store_cost[node]
        flow.add_edge((node, "in"), (node, "out"), capacity=math.inf if size is None else size)
        flow.add_edge("source", (node, "in"), capacity=math.inf if node is nodes[0] else recompute_cost[node])
        if node in needed:
            flow.add_edge((node, "out"), "sink")  # without a capacity: never cut
        for user in users[node]:
            flow.add_edge((node, "out"), (user, "in"))
    # The sink's side is all that leads to it in the residual network: the smallest of all minimum cuts
    algorithm = networkx.algorithms.flow.boykov_kolmogorov
    _, (early, late) = networkx.minimum_cut(flow, "source", "sink", flow_func=algorithm)
    return [node for node in nodes if (node, "in") in early and (node, "out") in late]
