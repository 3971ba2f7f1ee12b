"""A network as torch.fx graphs: traced, run on a few images to learn what each operation does, cut, and digested."""

import copy
import hashlib
import math
import operator
import random
import warnings
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from timm.layers import get_notrace_functions, get_notrace_modules
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from tlcli.models.classifier import InFloat32, eval_mode, head_modules
from tlcli.text import one_line


class CutError(Exception):
    """Raised if there is no cut; the message is the reason."""


class Traced(NamedTuple):
    """A network as a graph; `root` is a shallow copy of it that holds the constants which tracing adds."""

    root: nn.Module
    graph: fx.Graph
    images: fx.Node
    output: fx.Node

    def inplace_input(self, node: fx.Node) -> fx.Node | None:
        """Return the input that an operation changes in place and returns, as its name or its `inplace` tells."""
        first = node.args[0] if node.args else None
        if not isinstance(first, fx.Node):
            return None
        if node.op == "call_module":
            inplace = getattr(self.root.get_submodule(str(node.target)), "inplace", False) is True
        else:
            name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
            inplace = (name.endswith("_") and not name.endswith("__")) or node.kwargs.get("inplace") is True
            inplace = inplace or name in ("iadd", "isub", "imul", "itruediv")
        return first if inplace else None

    def parameters_of(self, node: fx.Node) -> list[Tensor]:
        if node.op == "get_attr":
            return [operator.attrgetter(str(node.target))(self.root)]
        return list(self.root.get_submodule(str(node.target)).parameters()) if node.op == "call_module" else []


class _Tracer(fx.Tracer):
    """Traces into all modules except `leaves`; only the first argument of forward varies."""

    def __init__(self, leaves: set[nn.Module]) -> None:
        super().__init__(autowrap_functions=tuple(get_notrace_functions()), param_shapes_constant=True)
        self.proxy_buffer_attributes = True  # the present value of a buffer must not become a constant
        self.leaves = leaves
        self.failed: list[nn.Module] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str = "") -> bool:
        return m in self.leaves or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().call_module(m, *args, **kwargs)
        except Exception:
            if not self.is_leaf_module(m):
                self.failed.append(m)
            raise

    def create_args_for_root(self, root_fn: Any, *args: Any, **kwargs: Any) -> tuple[Any, list[Any]]:
        fn, inputs = super().create_args_for_root(root_fn, *args, **kwargs)
        return (fn, inputs[:2]) if fn is root_fn else (fn, inputs)  # fx has replaced fn if it takes *args

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        self.param_shapes_constant = not isinstance(attr_val, Tensor) or isinstance(attr_val, nn.Parameter)
        return super().getattr(attr, attr_val, parameter_proxy_cache)  # fx has constant shapes for parameters only


def trace_train_and_eval(network: nn.Module) -> tuple[Traced, Traced]:
    """Return the network as it trains, in its present modes, and as it evaluates. Raise CutError if tracing fails."""
    # leaves are one operation each, the same in both: so are modules that cannot be traced into
    leaves = {m for m in network.modules() if type(m) in get_notrace_modules() or isinstance(m, InFloat32)}
    leaves |= {m for m in head_modules(network) if isinstance(m, nn.Module)}
    while True:
        training = _trace(network, leaves)
        n_leaves = len(leaves)
        with eval_mode(network):
            evaluation = _trace(network, leaves)
        if n_leaves == len(leaves):
            return training, evaluation


def _trace(network: nn.Module, leaves: set[nn.Module]) -> Traced:
    device = device_of(network)
    states = rng_state(device), random.getstate()
    while True:
        tracer, root = _Tracer(leaves), copy.copy(network)
        try:
            with warnings.catch_warnings(action="ignore"):  # about values that tracing fixes; verification finds them
                graph = tracer.trace(root)
            break
        except Exception as error:  # forward runs on proxies, so anything can be raised
            if not tracer.failed:
                raise CutError(f"cannot be traced: {type(error).__name__}: {one_line(error)}"[:160]) from error
            module = tracer.failed[0]
            leaves.add(module)
            if not type(module).__module__.startswith("torch.nn"):  # a container fails because of its contents
                leaves |= {other for other in network.modules() if type(other) is type(module)}
    if not torch.equal(states[0], rng_state(device)) or states[1] != random.getstate():
        raise CutError("cannot be traced: forward draws random numbers that a trace would fix")
    images, *others = graph.find_nodes(op="placeholder")
    for other in others:
        if not other.users:
            graph.erase_node(other)
    traced = Traced(root, graph, images, graph.output_node())
    # A reader of a tensor after an operation changed it in place must read that operation's result, which is the same
    # tensor: the edges of a graph are returned values only
    index = {node: i for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if (changed := traced.inplace_input(node)) is not None:
            for user in list(changed.users):
                if index[user] > index[node]:
                    user.replace_input_with(changed, node)
    return traced


def module_of(node: fx.Node) -> str:
    """Return the path of the module that an operation belongs to; "" is the network itself."""
    if node.op == "call_module":
        return str(node.target)
    if node.op == "get_attr":
        return str(node.target).rpartition(".")[0]
    stack = node.meta.get("nn_module_stack")
    return str(next(reversed(stack.values()))[0]) if stack else ""


def dependencies(nodes: Iterable[fx.Node], known: Collection[fx.Node]) -> set[fx.Node]:
    """Return these nodes and all that they need, except `known`."""
    needed: set[fx.Node] = set()
    stack = [node for node in nodes if node not in known]
    while stack:
        if (node := stack.pop()) not in needed:
            needed.add(node)
            stack.extend(source for source in node.all_input_nodes if source not in known)
    return needed


def minimum_cut(
    users: dict[fx.Node, list[fx.Node]],
    needed: Collection[fx.Node],
    store_cost: dict[fx.Node, int | None],
    recompute_cost: dict[fx.Node, int],
) -> list[fx.Node]:
    """Return the nodes whose results cross: of several minimum cuts the latest. The first node is the input.

    A node is an edge with the cost of storing its result (None: it cannot cross); if that edge is cut, the result
    crosses. An edge from the source to its start has the cost of running it again; if that is cut, the suffix runs it.
    """
    import networkx  # here, because it takes 50 ms

    flow, first = networkx.DiGraph(), next(iter(users))
    for node in users:
        size = store_cost[node]
        flow.add_edge((node, "in"), (node, "out"), capacity=math.inf if size is None else size)
        flow.add_edge("source", (node, "in"), capacity=math.inf if node is first else recompute_cost[node])
        if node in needed:
            flow.add_edge((node, "out"), "sink")  # without a capacity: never cut
        for user in users[node]:
            flow.add_edge((node, "out"), (user, "in"))
    # The sink's side is all that leads to it in the residual network: the smallest of all minimum cuts
    algorithm = networkx.algorithms.flow.boykov_kolmogorov
    _, (early, late) = networkx.minimum_cut(flow, "source", "sink", flow_func=algorithm)
    return [node for node in users if (node, "in") in early and (node, "out") in late]


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
    """Runs the frozen operations of a traced network on a few images. Graphs that are compared share `texts`."""

    def __init__(self, traced: Traced, trained: Collection[int], images: Tensor, texts: dict[str, int]) -> None:
        super().__init__(traced.root, graph=traced.graph)
        self.extra_traceback = False
        self._traced, self._trained, self._device, self._texts = traced, trained, images.device, texts
        self._recorder = _DispatchRecorder({_storage(t) for t in (*traced.root.parameters(), *traced.root.buffers())})
        self.dynamic: dict[fx.Node, str | None] = {}  # what training can change: why, None if it depends on such
        self.numbers: dict[fx.Node, int] = {}  # the same for operations that do the same with the same inputs
        self.flops: dict[fx.Node, int] = {}
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}  # of tensors, except the view of another in another order
        self.values: dict[fx.Node, Any] = {}  # that are not tensors
        with self._recorder:
            self.run(images.clone(), enable_io_processing=False)

    def run_node(self, n: fx.Node) -> Any:
        trains = any(id(parameter) in self._trained for parameter in self._traced.parameters_of(n))
        if trains or any(source in self.dynamic for source in n.all_input_nodes):
            self.dynamic[n] = f"{n.target} trains" if trains else None
        if n in self.dynamic or n.op == "output":
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
        text = _text_of_node(n, self._traced.root, self.numbers)
        self.numbers[n] = self._texts.setdefault(text, len(self._texts))
        self.flops[n] = self._recorder.flops
        if isinstance(value, Tensor):
            is_view = first is not None and _storage(first) == _storage(value)
            if not is_view or (value is first and value._version != version):  # a new tensor, or one changed in place
                self.flops[n] += value.numel()
            elif value is first:  # such as dropout in eval mode
                self.numbers[n] = self.numbers[n.all_input_nodes[0]]
            is_reordered = is_view and value is not first and value.numel() == args[0].numel()
            if not is_reordered or value.is_contiguous():
                self.shapes[n] = tuple(value.shape)
        else:
            self.values[n] = value
        return value


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@contextmanager
def preserve_state(network: nn.Module) -> Iterator[None]:
    """Restore buffers (BatchNorm statistics) and random number generators at the end of the block."""
    buffers = [(buffer, buffer.clone()) for buffer in network.buffers()]
    device, python_state = device_of(network), random.getstate()
    try:
        with torch.random.fork_rng([device] if device.type != "cpu" else [], device_type=device.type):
            yield
    finally:
        for buffer, value in buffers:
            if not torch.equal(buffer, value):
                with torch.no_grad():
                    buffer.copy_(value)
        random.setstate(python_state)


@contextmanager
def full_precision(network: nn.Module) -> Iterator[None]:
    """Compute in full float32: no autocast, no TF32, and the same kernels for batches of all sizes."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    previous = cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark
    cudnn.allow_tf32 = matmul.allow_tf32 = cudnn.benchmark = False
    try:
        with torch.autocast(device_of(network).type, enabled=False):
            yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark = previous


def device_of(network: nn.Module) -> torch.device:
    return next((parameter.device for parameter in network.parameters()), torch.device("cpu"))


def rng_state(device: torch.device) -> Tensor:
    if device.type == "cuda":
        return torch.cuda.get_rng_state(device)
    return torch.mps.get_rng_state() if device.type == "mps" else torch.get_rng_state()


def digest_of_graph(module: fx.GraphModule) -> str:
    """Return the sha256 of a graph's operations, of the settings of its modules, and of its tensors."""
    sha = hashlib.sha256()
    numbers: dict[fx.Node, int] = {}
    for node in module.graph.nodes:
        numbers[node] = len(numbers)
        sha.update((_text_of_node(node, module, numbers) + "\n").encode())
        if node.op == "call_module":
            submodule = module.get_submodule(str(node.target))
            for name, part in submodule.named_modules():
                settings = {key: value for key, value in sorted(vars(part).items()) if key not in _MODULE_ATTRIBUTES}
                sha.update(f"{name} {_name_of(type(part))} {_text(settings, {})}\n".encode())
            tensors = [*submodule.named_parameters(), *submodule.named_buffers()]
            for name, tensor in sorted(tensors, key=operator.itemgetter(0)):
                sha.update(f"{name} {digest_of_tensor(tensor)}\n".encode())
        elif node.op == "get_attr":
            sha.update(digest_of_tensor(operator.attrgetter(str(node.target))(module)).encode())
    return sha.hexdigest()


def digest_of_tensor(tensor: Tensor) -> str:
    """Return the sha256 of a tensor's dtype, shape and values."""
    content = tensor.detach().cpu().contiguous()
    sha = hashlib.sha256(f"{content.dtype} {tuple(content.shape)} ".encode())
    sha.update(content.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def _text_of_node(node: fx.Node, root: nn.Module, numbers: dict[fx.Node, int]) -> str:
    """Return an operation as text, its inputs as numbers, and constants that tracing made as digests."""
    target = node.target if isinstance(node.target, str) else _name_of(node.target)
    if node.op == "get_attr" and target.startswith("_tensor_constant"):
        target = digest_of_tensor(operator.attrgetter(target)(root))
    if node.op == "placeholder":
        target = "images"
    return f"{node.op} {target} {_text(node.args, numbers)} {_text(node.kwargs, numbers)}"


_MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))


def _text(value: Any, numbers: dict[fx.Node, int]) -> str:
    """Return a value as text without memory addresses."""
    if isinstance(value, fx.Node):
        return f"%{numbers[value]}"
    if isinstance(value, tuple | list):
        return f"({', '.join(_text(item, numbers) for item in value)})"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_text(item, numbers)}' for key, item in value.items())}}}"
    if isinstance(value, slice):
        return f"slice{_text((value.start, value.stop, value.step), numbers)}"
    if value is None or isinstance(value, bool | int | float | str | torch.dtype | torch.device):
        return repr(value)
    return digest_of_tensor(value) if isinstance(value, Tensor) else _name_of(value)


def _name_of(value: Any) -> str:
    """Return the full name of a function or a class, or of the class of another object."""
    value = value if hasattr(value, "__qualname__") else type(value)
    return f"{getattr(value, '__module__', None)}.{value.__qualname__}"
