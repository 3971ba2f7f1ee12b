"""A network in two: a prefix that training cannot change, so that it runs once, and the suffix that trains.

torch.fx writes the network down as a graph, twice: as it trains and as it evaluates, for tracing fixes `self.training`
in functional calls. Both graphs run on a few random images to see what each operation is: which are frozen, which
tensors have an image a row, what each costs. A minimum cut through the frozen part gives the boundary, and prefix and
suffix are compared with the whole network before anybody gets them. docs/cutting.md says what was tried.
"""

import copy
import hashlib
import math
import operator
import random
import warnings
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.layers import get_notrace_functions, get_notrace_modules
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from tlcli.models.classifier import Head

FLOPS_A_BYTE = 4000
"""So many operations run again cost as much as one more byte kept: 200 GFLOP/s, two CPU cores, against 50 MB/s, a slow
disk. A residual block's input then beats two maps inside it, and a deep map is never given up for the images."""
DECODING = 20_000
"""Operations that reading a pixel of an image again, from a JPEG file, is worth: some 5 ms for 224 x 224."""
ROW = 16384
"""Bytes: a smaller row is read as slowly as this one. So the input of a head crosses, not the somewhat smaller input of
a layer before it."""
RTOL, ATOL = 1e-4, 1e-5
"""How near prefix and suffix must come to the network; ATOL is for values of order one and grows with larger ones."""
TRIED = (0, 1, 2)
TRIED_AGAIN = (2, 0)
"""The images of the two batches of every trial, of different sizes; none is at the same place in both."""


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
        return _digest(self.prefix)


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
        with _as_found(network), _exact_arithmetic(network), torch.no_grad():
            return _split(network, size, trainable)
    except _Refusal as refusal:
        return NoCut(str(refusal))


class _Refusal(Exception):
    """Why there is no cut."""


def _split(network: nn.Module, size: int, trainable: frozenset[str] | None) -> Cut:
    """The cut, tried out. Raises _Refusal."""
    trains = frozenset(
        id(parameter)
        for name, parameter in network.named_parameters(remove_duplicate=False)
        if (parameter.requires_grad if trainable is None else name in trainable)
    )
    if trainable is not None:
        network.eval()
    training, evaluation = _both_forms(network)
    pair = _Pair(network, training, evaluation)
    images = _images(network, size)
    try:
        pair.observe(trains, images)
        boundary = _boundary(pair)
        return _tried(network, _Halves(pair, boundary), images)
    except _Refusal:
        raise
    except Exception as error:  # what tracing wrote down does not run, or not at another batch size
        raise _Refusal(f"cannot be run apart: {_one_line(error)}") from error


def _images(network: nn.Module, size: int) -> Tensor:
    """Noise (3, 3, S, S) for trials, always the same, where and of the type that the network's parameters are."""
    like = next((p for p in network.parameters() if p.is_floating_point()), torch.empty(0))
    generator = torch.Generator().manual_seed(0)
    return torch.randn(len(TRIED), 3, size, size, generator=generator).to(like.device, like.dtype)


# --- Leaving everything as it was found


@contextmanager
def _as_found(network: nn.Module) -> Iterator[None]:
    """Afterwards modes, buffers (BatchNorm's statistics) and random number generators are what they were."""
    modes = _modes(network)
    buffers = [(buffer, buffer.clone()) for buffer in network.buffers()]
    device = _device(network)
    python, mps = random.getstate(), torch.mps.get_rng_state() if device.type == "mps" else None
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        _set_modes(modes)
        _set_buffers(buffers)
        random.setstate(python)
        if mps is not None:
            torch.mps.set_rng_state(mps)


@contextmanager
def _exact_arithmetic(network: nn.Module) -> Iterator[None]:
    """Full float32 in the trials: no autocast, no TF32, whose rounding depends on the batch size."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    found = cudnn.allow_tf32, matmul.allow_tf32
    cudnn.allow_tf32 = matmul.allow_tf32 = False
    try:
        with torch.autocast(_device(network).type, enabled=False):
            yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = found


@contextmanager
def _evaluating(modules: Iterable[nn.Module]) -> Iterator[None]:
    """These modules, each for itself, in eval mode for a while."""
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _modes(network: nn.Module) -> list[tuple[nn.Module, bool]]:
    return [(module, module.training) for module in network.modules()]


def _set_modes(modes: Iterable[tuple[nn.Module, bool]]) -> None:
    for module, mode in modes:
        module.training = mode


def _set_buffers(buffers: Iterable[tuple[Tensor, Tensor]]) -> None:
    with torch.no_grad():
        for buffer, value in buffers:
            if not torch.equal(buffer, value):
                buffer.copy_(value)


def _device(network: nn.Module) -> torch.device:
    return next((parameter.device for parameter in network.parameters()), torch.device("cpu"))


def _random_state(device: torch.device) -> Tensor:
    """The state of the generator that draws on this device."""
    if device.type == "cuda":
        return torch.cuda.get_rng_state(device)
    return torch.mps.get_rng_state() if device.type == "mps" else torch.get_rng_state()


def _one_line(error: BaseException) -> str:
    """The first line of an error, in brief."""
    line = next(iter(str(error).strip().splitlines()), "")
    return (f"{type(error).__name__}: {line}" if line else type(error).__name__)[:160]


# --- Tracing


@dataclass(frozen=True)
class _Traced:
    """A network as a graph. `shell` is a shallow copy that shares all modules and tensors with it, and holds the
    constants that tracing adds, so that the network itself stays clean."""

    shell: nn.Module
    graph: fx.Graph

    @property
    def nodes(self) -> list[fx.Node]:
        """In the order in which they run."""
        return list(self.graph.nodes)

    @property
    def images(self) -> fx.Node:
        """The network's input."""
        return self._only("placeholder")

    @property
    def output(self) -> fx.Node:
        """What the network returns."""
        return self._only("output")

    def _only(self, op: str) -> fx.Node:
        return next(node for node in self.nodes if node.op == op)


@dataclass
class _Leaves:
    """Modules that are called as they are, not traced into."""

    modules: set[nn.Module]
    types: set[type] = field(default_factory=lambda: set(get_notrace_modules()))

    def __contains__(self, module: nn.Module) -> bool:
        return module in self.modules or type(module) in self.types or isinstance(module, Head)

    def grow(self, failed: Sequence[nn.Module]) -> bool:
        """Take in the innermost of the modules in which tracing failed; False where all of them are leaves already."""
        for module in failed:
            if module not in self:
                # All of a class fail alike, but a container fails by what is in it
                if type(module).__module__.startswith("torch.nn"):
                    self.modules.add(module)
                else:
                    self.types.add(type(module))
                return True
        return False


class _Tracer(fx.Tracer):
    """torch.fx's tracer with these leaves; only the first argument of forward varies, others keep their defaults."""

    def __init__(self, leaves: _Leaves) -> None:
        super().__init__(autowrap_functions=tuple(get_notrace_functions()), param_shapes_constant=True)
        self.proxy_buffer_attributes = True  # a buffer's value now must not become a constant
        self.leaves = leaves
        self.failed: list[nn.Module] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m in self.leaves or super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.failed.append(m)
            raise

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        fn, args = super().create_args_for_root(root_fn, is_module, concrete_args)
        return (fn, args[:2]) if fn is root_fn else (fn, args)  # fx has changed fn where it takes *args

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        self.param_shapes_constant = not isinstance(attr_val, Tensor) or isinstance(attr_val, nn.Parameter)
        return super().getattr(attr, attr_val, parameter_proxy_cache)  # fx has constant shapes for parameters alone


def _both_forms(network: nn.Module) -> tuple[_Traced, _Traced]:
    """The network as it trains, in the modes that it is in, and as it evaluates; with the same leaves."""
    classifier: Any = getattr(network, "get_classifier", tuple)  # timm's
    head = classifier()  # a tuple where distilled
    leaves = _Leaves({m for m in (head if isinstance(head, tuple | list) else (head,)) if isinstance(m, nn.Module)})
    leaves.modules.discard(network)
    modes = _modes(network)
    while True:
        training = _traced(network, leaves)
        before = len(leaves.modules), len(leaves.types)
        network.eval()
        evaluation = _traced(network, leaves)
        _set_modes(modes)
        if before == (len(leaves.modules), len(leaves.types)):
            return training, evaluation


def _traced(network: nn.Module, leaves: _Leaves) -> _Traced:
    """The network's graph in its present modes. A module that cannot be traced into becomes a leaf."""
    before = _random_state(_device(network)), random.getstate()
    while True:
        tracer, shell = _Tracer(leaves), copy.copy(network)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # models warn of what tracing fixes; the trials find what matters
                graph = tracer.trace(shell)
        except Exception as error:  # forward runs on proxies, so anything can be raised
            if not leaves.grow(tracer.failed):
                raise _Refusal(f"cannot be traced: {_one_line(error)}") from error
            continue
        if not torch.equal(before[0], _random_state(_device(network))) or before[1] != random.getstate():
            raise _Refusal("cannot be traced: forward draws random numbers that a trace would fix")
        _drop_other_arguments(graph)
        _chain_mutations(graph, shell)
        return _Traced(shell, graph)


def _drop_other_arguments(graph: fx.Graph) -> None:
    for extra in [node for node in graph.nodes if node.op == "placeholder"][1:]:
        if not extra.users:
            graph.erase_node(extra)


def _chain_mutations(graph: fx.Graph, shell: nn.Module) -> None:
    """What reads a tensor after an operation changed it in place reads that operation's result, which is that tensor:
    a graph has edges for what is returned alone."""
    place = {node: i for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if (changed := _mutated(node, shell)) is not None:
            for user in list(changed.users):
                if place[user] > place[node]:
                    user.replace_input_with(changed, node)


def _mutated(node: fx.Node, shell: nn.Module) -> fx.Node | None:
    """The input that an operation changes in place and returns, as far as its name or its `inplace` says so."""
    first = node.args[0] if node.args else None
    if not isinstance(first, fx.Node):
        return None
    if node.op == "call_module":
        inplace = getattr(shell.get_submodule(str(node.target)), "inplace", False) is True
    else:
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        inplace = (name.endswith("_") and not name.endswith("__")) or node.kwargs.get("inplace") is True
        inplace = inplace or name in ("iadd", "isub", "imul", "itruediv")
    return first if inplace else None


# --- What each operation is


@dataclass(frozen=True)
class _Map:
    """A tensor, by its shape."""

    shape: tuple[int, ...]


class _Other:
    """Anything that is neither a tensor nor a plain value."""


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts floating point operations, and sees what acts as in training or changes one of the network's tensors."""

    def __init__(self, owned: Collection[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._owned = owned
        self.flops = 0
        self.trains = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        value = func(*args, **kwargs)
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.flops += int(count(*args, **kwargs, out_val=value))
        for argument, given in zip(func._schema.arguments, args, strict=False):
            if argument.name in ("training", "train") and given is True and not self._owns(args[0]):
                self.trains = True  # BatchNorm on the batch's own statistics; standardised weights are no batch
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written and self._owns(given):
                self.trains = True
        return value

    def _owns(self, value: Any) -> bool:
        return isinstance(value, Tensor) and _storage(value) in self._owned


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class _Observer(fx.Interpreter):
    """Runs what is frozen of a traced network. `live`: what is not, each with the reason or None where it only depends
    on such; `values`: what the others give; `flops` of each; `same`: what returns its input as it is; `turned`: what
    only looks at its input in another order."""

    def __init__(self, traced: _Traced, trains: Collection[int]) -> None:
        super().__init__(traced.shell, graph=traced.graph)
        self.extra_traceback = False
        self._trains = trains
        self._watch = _Watch({_storage(t) for t in _tensors_of(traced.shell)})
        self.live: dict[fx.Node, str | None] = {}
        self.values: dict[fx.Node, Any] = {}
        self.flops: dict[fx.Node, int] = {}
        self.same: dict[fx.Node, fx.Node] = {}
        self.turned: set[fx.Node] = set()

    def observe(self, images: Tensor) -> None:
        """Run on these images."""
        self._device = images.device
        with self._watch:
            self.run(images.clone(), enable_io_processing=False)

    def run_node(self, n: fx.Node) -> Any:
        """One operation, unless it is live."""
        if any(source in self.live for source in n.all_input_nodes):
            self.live[n] = self._trainable(n)
            return None
        if (held := self._trainable(n)) is not None:
            self.live[n] = held
            return None
        if n.op == "output":
            return None
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        before = _random_state(self._device), _version(args)
        self._watch.flops, self._watch.trains = 0, False
        value = getattr(self, n.op)(n.target, args, kwargs)
        if not torch.equal(before[0], _random_state(self._device)):
            self.live[n] = f"{_module_of(n) or n.name} is random in training"
        elif self._watch.trains:
            self.live[n] = f"{_module_of(n) or n.name} depends on the batch or keeps statistics"
        self._note(n, value, args, before[1])
        return value

    def _trainable(self, node: fx.Node) -> str | None:
        """Which parameter of the operation trains, in words; None where none does."""
        if node.op == "call_module":
            module = self.fetch_attr(str(node.target))
            return f"{node.target} trains" if any(id(p) in self._trains for p in module.parameters()) else None
        if node.op == "get_attr" and id(self.fetch_attr(str(node.target))) in self._trains:
            return f"{node.target} trains"
        return None

    def _note(self, node: fx.Node, value: Any, args: Sequence[Any], version: int | None) -> None:
        self.flops[node] = self._watch.flops
        if isinstance(value, Tensor):
            self.values[node] = _Map(tuple(value.shape))
            view = _is_view(value, args) and (value is not args[0] or value._version == version)
            self.flops[node] += 0 if view else value.numel()
            if view and value is args[0] and isinstance(node.args[0], fx.Node):
                self.same[node] = node.args[0]
            elif view and value.numel() == args[0].numel() and not value.is_contiguous():
                self.turned.add(node)
        else:
            self.values[node] = value if _is_plain(value) else _Other()


def _tensors_of(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _version(args: Sequence[Any]) -> int | None:
    return args[0]._version if args and isinstance(args[0], Tensor) else None


def _is_view(value: Tensor, args: Sequence[Any]) -> bool:
    """Whether a result only looks at its first input's memory in another way."""
    return bool(args) and isinstance(args[0], Tensor) and _storage(args[0]) == _storage(value)


def _is_plain(value: Any) -> bool:
    """Whether a value is a number, a shape or the like, which can be written into a graph."""
    if isinstance(value, tuple | list):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str)


def _module_of(node: fx.Node) -> str:
    """The path of the module that an operation belongs to; "" is the network itself."""
    if node.op == "call_module":
        return str(node.target)
    if node.op == "get_attr":
        return str(node.target).rpartition(".")[0]
    stack = node.meta.get("nn_module_stack")
    return str(next(reversed(stack.values()))[0]) if stack else ""


# --- The two forms together


@dataclass(frozen=True)
class _PerImage:
    """A number that is `n` for each image of the batch."""

    n: int


class _Unknown:
    """A value that cannot be told from the size of the batch alone."""


class _Pair:
    """A network's two forms, and what is frozen in both of them: the parts of which the boundary can be made."""

    def __init__(self, network: nn.Module, training: _Traced, evaluation: _Traced) -> None:
        self.network = network
        self.training = training
        self.evaluation = evaluation

    def observe(self, trains: Collection[int], images: Tensor) -> None:
        """Run both on batches of different size, and match their operations."""
        train = _Observer(self.training, trains)
        train.observe(images[list(TRIED_AGAIN)])
        with _evaluating(self.network.modules()):
            evaluated = _Observer(self.evaluation, trains)
            evaluated.observe(images)
        self.live, self._turned = train.live, train.turned
        if self.training.output not in self.live:
            raise _Refusal("nothing that trains reaches the output")
        self.twins = _twins((self.training, train), (self.evaluation, evaluated))
        self.twin = {node: twins[0] for node, twins in self.twins.items()}
        self.flops = {node: n // len(TRIED_AGAIN) for node, n in train.flops.items()}
        self._values = {node: (train.values[node], evaluated.values[twin]) for node, twin in self.twin.items()}
        self.folded = {node: value for node in self.twin if (value := self._folded(node)) is not None}
        self.data = self._from_images()
        self.width = {node: self._bytes(node) for node in self.data}

    def _folded(self, node: fx.Node) -> Any:
        """What a shape-like value is for any number of images, as (value,); None where it is no such value."""
        value = _fold(*self._values[node])
        return None if isinstance(value, _Unknown) else (value,)

    def _from_images(self) -> list[fx.Node]:
        """What is frozen and not known without the images, in order: no constants, and no shapes."""
        found: dict[fx.Node, None] = {self.training.images: None}
        for node in self.training.nodes:
            if node not in self.live and node not in self.folded and any(s in found for s in node.all_input_nodes):
                found[node] = None
        return list(found)

    def _bytes(self, node: fx.Node) -> int | None:
        """What a tensor takes for one image in float32; None where it cannot be at the boundary: it is no tensor, has
        no image a row, is not in both forms, or changes later; or is a transposed view, stored as it does not lie."""
        two, three = self._values.get(node, (None, None))
        if not isinstance(two, _Map) or not isinstance(three, _Map) or two.shape[1:] != three.shape[1:]:
            return None
        if two.shape[:1] != (len(TRIED_AGAIN),) or three.shape[:1] != (len(TRIED),):
            return None
        overwritten = any(u not in self.live and _mutated(u, self.training.shell) is node for u in node.users)
        if node in self._turned or overwritten:
            return None
        return 4 * math.prod(two.shape[1:])

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """Of a tensor of the boundary, for one image."""
        shape: tuple[int, ...] = self._values[node][0].shape
        return shape[1:]


def _fold(two: Any, three: Any) -> Any:
    """A value at any batch size from its values at the two that were tried: a constant or a multiple of the size."""
    if isinstance(two, _Map | _Other) or type(two) is not type(three):
        return _Unknown()
    if isinstance(two, tuple | list):
        if len(two) != len(three):
            return _Unknown()
        items = [_fold(a, b) for a, b in zip(two, three, strict=True)]
        return _Unknown() if any(isinstance(item, _Unknown) for item in items) else tuple(items)
    if two == three:
        return two
    if isinstance(two, int) and two * len(TRIED) == three * len(TRIED_AGAIN) and two % len(TRIED_AGAIN) == 0:
        return _PerImage(two // len(TRIED_AGAIN))
    return _Unknown()


def _twins(training: tuple[_Traced, _Observer], evaluation: tuple[_Traced, _Observer]) -> dict[fx.Node, list[fx.Node]]:
    """For each frozen operation of the first form those of the second that do the same: same inputs, same arguments.

    An operation that returned its input as it is (dropout in eval mode) stands for that input.
    """
    numbers: dict[str, int] = {}
    found: dict[int, list[fx.Node]] = {}
    for node, number in _numbered(*evaluation, numbers).items():
        if node in evaluation[1].values and node not in evaluation[1].live:
            found.setdefault(number, []).append(node)
    mine = _numbered(*training, numbers)
    return {node: found[n] for node, n in mine.items() if n in found and node not in training[1].live}


def _numbered(traced: _Traced, observer: _Observer, numbers: dict[str, int]) -> dict[fx.Node, int]:
    """Each operation's number; those that do the same with the same have the same."""
    found: dict[fx.Node, int] = {}
    for node in traced.nodes:
        if node in observer.same:
            found[node] = found[observer.same[node]]
        else:
            text = _text_of_node(node, traced.shell, found)
            found[node] = numbers.setdefault(text, len(numbers))
    return found


# --- Where to cut


def _boundary(pair: _Pair) -> list[fx.Node]:
    """The frozen tensors that cross, in order: fewest bytes, with a price for frozen work that the suffix does again.

    Raises _Refusal where the images themselves would cross.
    """
    price = {node: pair.flops.get(node, 0) for node in pair.data}
    width = {node: None if n is None else max(n, ROW) * FLOPS_A_BYTE for node, n in pair.width.items()}
    _, *sides = pair.shape(pair.training.images)
    width[pair.training.images] = (width[pair.training.images] or 0) + math.prod(sides) * DECODING
    users = {node: [user for user in node.users if user in pair.width] for node in pair.data}
    live = {node for node in pair.data if any(user in pair.live for user in node.users)}
    crossing = _minimum_cut(pair.data, users, live, width, price)
    prefix = _closure((pair.twin[node] for node in crossing), ())
    if pair.training.images in crossing or not any(_weighs(node, pair.evaluation.shell) for node in prefix):
        raise _Refusal(_nothing_leads(pair, live))
    return crossing


def _weighs(node: fx.Node, shell: nn.Module) -> bool:
    """Whether an operation uses a parameter."""
    if node.op == "get_attr":
        return True
    return node.op == "call_module" and any(True for _ in shell.get_submodule(str(node.target)).parameters())


def _nothing_leads(pair: _Pair, live: Collection[fx.Node]) -> str:
    why = next(reason for reason in pair.live.values() if reason is not None)
    if all(not _weighs(node, pair.training.shell) for node in _closure(live, ())):
        return f"nothing leads: {why}"
    return f"too little leads: {why}, and what is frozen before it costs less to run again than to keep"


def _minimum_cut(
    nodes: Sequence[fx.Node],
    users: dict[fx.Node, list[fx.Node]],
    needed: Collection[fx.Node],
    width: dict[fx.Node, int | None],
    price: dict[fx.Node, int],
) -> list[fx.Node]:
    """The nodes whose results cross. Of several least cuts the latest.

    Node i is an edge from 2i to 2i+1 as wide as its result: where that is cut, the result crosses. An edge from the
    source to 2i is as wide as the price of running it again: where that is cut, the suffix runs it. The first node is
    the input.
    """
    endless = 1 + sum(n for n in width.values() if n is not None) + sum(price.values())
    number = {node: i for i, node in enumerate(nodes)}
    flow = _Flow(2 * len(nodes) + 2)
    source, sink = 2 * len(nodes), 2 * len(nodes) + 1
    near = _near(nodes, users, needed, price, _upper_bound(nodes, users, needed, width, price))
    for node, i in number.items():
        w = width[node]
        flow.edge(2 * i, 2 * i + 1, endless if w is None else w)
        flow.edge(source, 2 * i, price[node] if node in near and i > 0 else endless)
        if node in needed:
            flow.edge(2 * i + 1, sink, endless)
        for user in users[node]:
            flow.edge(2 * i + 1, 2 * number[user], endless)
    late = flow.sink_side(source, sink)
    return [node for node, i in number.items() if 2 * i not in late and 2 * i + 1 in late]


def _upper_bound(
    nodes: Sequence[fx.Node],
    users: dict[fx.Node, list[fx.Node]],
    needed: Collection[fx.Node],
    width: dict[fx.Node, int | None],
    price: dict[fx.Node, int],
) -> int:
    """What the latest cut costs: whatever is needed crosses, or runs again where it cannot."""
    again: set[fx.Node] = set()
    cost = 0
    for node in reversed(nodes):
        if node in needed or any(user in again for user in users[node]):
            w = width[node]
            if w is None:
                again.add(node)
            cost += price[node] if w is None else w
    return cost


def _near(
    nodes: Sequence[fx.Node],
    users: dict[fx.Node, list[fx.Node]],
    needed: Collection[fx.Node],
    price: dict[fx.Node, int],
    bound: int,
) -> set[fx.Node]:
    """The nodes that the suffix could run again within this bound; with one it runs all on some way to what is live."""
    least: dict[fx.Node, int] = {}
    for node in reversed(nodes):
        ahead = [least[user] for user in users[node] if user in least] + [0] * (node in needed)
        if ahead and price[node] + min(ahead) <= bound:
            least[node] = price[node] + min(ahead)
    return set(least)


class _Flow:
    """A flow network; the largest flow by shortest augmenting paths (Edmonds and Karp 1972)."""

    def __init__(self, n: int) -> None:
        self._edges: list[list[int]] = [[] for _ in range(n)]
        self._to: list[int] = []
        self._room: list[int] = []

    def edge(self, start: int, end: int, room: int) -> None:
        """An edge; at the next number is its reverse."""
        if room:
            for a, b, r in ((start, end, room), (end, start, 0)):
                self._edges[a].append(len(self._to))
                self._to.append(b)
                self._room.append(r)

    def sink_side(self, source: int, sink: int) -> set[int]:
        """The smallest set with the sink in it that a least cut parts from the source."""
        while path := self._path(source, sink):
            room = min(self._room[edge] for edge in path)
            for edge in path:
                self._room[edge] -= room
                self._room[edge ^ 1] += room
        side, todo = {sink}, [sink]
        while todo:
            for edge in self._edges[todo.pop()]:
                if self._room[edge ^ 1] and self._to[edge] not in side:
                    side.add(self._to[edge])
                    todo.append(self._to[edge])
        return side

    def _path(self, source: int, sink: int) -> list[int]:
        """The edges of a shortest way with room, from the sink back; empty where there is none."""
        came: dict[int, int] = {source: -1}
        todo = deque([source])
        while todo and sink not in came:
            for edge in self._edges[todo.popleft()]:
                if self._room[edge] and self._to[edge] not in came:
                    came[self._to[edge]] = edge
                    todo.append(self._to[edge])
        path, place = [], sink
        while place in came and came[place] >= 0:
            path.append(came[place])
            place = self._to[came[place] ^ 1]
        return path


# --- Prefix and suffix


class _Form:
    """A part of a traced network as a function; its modules and tensors are looked up in the network with each call."""

    def __init__(self, shell: nn.Module, graph: fx.Graph) -> None:
        self.shell = shell
        self.graph = graph
        self._run = type(fx.GraphModule(shell, graph)).forward  # its code; what GraphModule copies would go stale

    def __call__(self, *args: Tensor) -> Any:
        return self._run(self.shell, *args)


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


class _Suffix(nn.Module):
    """The rest: the boundary's tensors to what the network returns, in the form of the network's present mode."""

    def __init__(self, network: nn.Module, training: _Form, evaluation: _Form, copied: Collection[int]) -> None:
        super().__init__()
        self._network = (network,)  # in a tuple: its parameters are the network's, not the suffix's
        self._training = training
        self._evaluation = evaluation
        self._copied = copied

    def forward(self, *activations: Tensor) -> Any:
        """(B, ...) each to logits (B, classes). The tensors given are left as they are."""
        form = self._training if self._network[0].training else self._evaluation
        return form(*(a.clone() if i in self._copied else a for i, a in enumerate(activations)))


class _Halves:
    """The graphs on either side of a boundary, in both forms."""

    def __init__(self, pair: _Pair, boundary: Sequence[fx.Node]) -> None:
        self.pair = pair
        self.boundary = boundary
        twins = [pair.twin[node] for node in boundary]
        self.prefix = _Prefix(_view(pair.evaluation.shell, {}), _leading(pair.evaluation, twins))
        nn.Module.train(self.prefix, False)
        self.training_prefix = _Form(pair.training.shell, _leading(pair.training, boundary))
        crossing = [[node] for node in boundary]
        self.training = _Form(pair.training.shell, _following(pair.training, crossing, pair.live, pair.folded))
        crossing = [pair.twins[node] for node in boundary]
        folded = {twin: value for node, value in pair.folded.items() for twin in pair.twins[node]}
        self.evaluation = _Form(pair.evaluation.shell, _following(pair.evaluation, crossing, (), folded))

    @property
    def at(self) -> str:
        """The largest modules with parameters that are wholly in the suffix: those that take what crosses, or else
        those that come next."""
        inside = _closure(self.pair.live, {*self.boundary, *self.pair.folded})
        before = {m for node in self.pair.data if node not in inside for m in _and_above(_module_of(node))}
        takers = [node for node in inside if set(self.boundary).intersection(node.all_input_nodes)]
        names: dict[fx.Node, str] = {}
        ahead = takers
        while ahead and not names:
            named = {node: next((m for m in _and_above(_module_of(node)) if m not in before), "") for node in ahead}
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


def _closure(nodes: Iterable[fx.Node], known: Collection[fx.Node]) -> set[fx.Node]:
    """These and all that they need, but for what is known."""
    found: set[fx.Node] = set()
    todo = [node for node in nodes if node not in known]
    while todo:
        if (node := todo.pop()) not in found:
            found.add(node)
            todo.extend(source for source in node.all_input_nodes if source not in known)
    return found


def _leading(traced: _Traced, boundary: Sequence[fx.Node]) -> fx.Graph:
    """Images to the boundary."""
    needed = _closure(boundary, ())
    graph, copies = fx.Graph(), {}
    copies[traced.images] = graph.placeholder("images")
    for node in traced.nodes:
        if node in needed and node is not traced.images:
            copies[node] = graph.node_copy(node, lambda n: copies[n])
    graph.output(tuple(copies[node] for node in boundary))
    return graph


def _following(
    traced: _Traced, boundary: Sequence[Sequence[fx.Node]], live: Collection[fx.Node], folded: dict[fx.Node, Any]
) -> fx.Graph:
    """The boundary, at each place the operations that give the same, to the output, with all that is live: what returns
    nothing may draw random numbers."""
    needed = _closure([*live, traced.output], {*folded, *(node for nodes in boundary for node in nodes)})
    if traced.images in needed:
        raise _Refusal("training and evaluation are different computations before the place to cut")
    graph = fx.Graph()
    copies: dict[fx.Node, Any] = {}
    for i, nodes in enumerate(boundary):
        activation = graph.placeholder(f"activation_{i}")
        for node in nodes:
            copies.setdefault(node, activation)
    size = graph.call_method("size", (copies[boundary[0][0]], 0))
    for node, (value,) in folded.items():
        copies.setdefault(node, _written(value, graph, size))
    for node in traced.nodes:
        if node is traced.output:
            graph.output(_copied(node.args[0], copies))
        elif node in needed:
            copies[node] = _node_copy(graph, node, copies)
    for node in reversed(list(graph.nodes)):
        if not node.users and (node is size or node.meta.get("written")):
            graph.erase_node(node)
    return graph


def _written(value: Any, graph: fx.Graph, size: fx.Node) -> Any:
    """A folded value for the suffix: a constant, or computed from the number of images there."""
    if isinstance(value, tuple):
        return tuple(_written(item, graph, size) for item in value)
    if not isinstance(value, _PerImage):
        return value
    product = size if value.n == 1 else graph.call_function(operator.mul, (size, value.n))
    product.meta["written"] = True
    return product


def _node_copy(graph: fx.Graph, node: fx.Node, copies: dict[fx.Node, Any]) -> fx.Node:
    """As Graph.node_copy, where an input may have become a constant."""
    copied = graph.create_node(
        node.op, node.target, _copied(node.args, copies), _copied(node.kwargs, copies), node.name, node.type
    )
    copied.meta = copy.copy(node.meta)
    return copied


def _copied(argument: Any, copies: dict[fx.Node, Any]) -> Any:
    return fx.node.map_arg(argument, lambda node: copies[node])


# --- The trial


def _tried(network: nn.Module, halves: _Halves, images: Tensor) -> Cut:
    """The cut, after prefix and suffix gave what the network gives. Raises _Refusal where they do not."""
    prefix = halves.prefix
    with _evaluating(network.modules()):
        several = _same_logits(network, prefix, halves.evaluation, images)
        fewer = _same_logits(network, prefix, halves.evaluation, images[list(TRIED_AGAIN)])
    if not _close([a[list(TRIED_AGAIN)] for a in several], fewer):
        raise _Refusal("what is frozen gives an image other values in another batch")
    if not _close(halves.training_prefix(images[list(TRIED_AGAIN)]), fewer):
        raise _Refusal("what is frozen gives other values in training than in evaluation")
    copied = _changed(halves.training, several, network) | _changed(halves.evaluation, several, network)
    suffix = _Suffix(network, halves.training, halves.evaluation, copied)
    if network.training:
        _same_training(network, suffix, several, images)
    shapes = tuple(halves.pair.shape(node) for node in halves.boundary)
    return Cut(prefix, suffix, halves.at, shapes)


def _same_logits(network: nn.Module, prefix: nn.Module, rest: _Form, images: Tensor) -> tuple[Tensor, ...]:
    """The prefix's tensors for these images, from which the rest gave the network's logits."""
    activations: tuple[Tensor, ...] = prefix(images.clone())
    if any(a.shape[:1] != images.shape[:1] for a in activations):
        raise _Refusal("what is frozen does not give an image a row")
    if not _close(rest(*(a.clone() for a in activations)), network(images.clone())):
        raise _Refusal("prefix and suffix do not give the network's logits")
    return activations


def _same_training(network: nn.Module, suffix: nn.Module, activations: Sequence[Tensor], images: Tensor) -> None:
    """Raises _Refusal unless the suffix, with the same random numbers, gives what the network gives in training."""
    found = [(buffer, buffer.clone()) for buffer in network.buffers()]
    torch.manual_seed(0)
    wanted = network(images.clone())
    _set_buffers(found)
    torch.manual_seed(0)
    if not _close(suffix(*activations), wanted):
        raise _Refusal("prefix and suffix do not train as the network does")


def _changed(form: _Form, activations: Sequence[Tensor], network: nn.Module) -> frozenset[int]:
    """Which of the tensors that it is given a form changes in place."""
    given = [a.clone() for a in activations]
    before = [a._version for a in given]
    form(*given)
    return frozenset(i for i, a in enumerate(given) if a._version != before[i])


def _close(one: Any, other: Any) -> bool:
    """Whether two results are the same numbers, but for rounding."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        scale = max(1.0, float(other.abs().max())) if other.numel() and other.isfinite().all() else 1.0
        return one.shape == other.shape and torch.allclose(one, other, RTOL, ATOL * scale, equal_nan=True)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_close(one[k], other[k]) for k in one)
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) == len(other) and all(_close(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)


# --- The digest


def _digest(prefix: fx.GraphModule) -> str:
    """The sha256 of a prefix's text and its tensors."""
    whole = hashlib.sha256()
    number: dict[fx.Node, int] = {}
    for node in prefix.graph.nodes:
        number[node] = len(number)
        whole.update((_text_of_node(node, prefix, number) + "\n").encode())
        if node.op == "call_module":
            module = prefix.get_submodule(str(node.target))
            whole.update(_text_of_module(module).encode())
            tensors = [*module.named_parameters(), *module.named_buffers()]
            for name, tensor in sorted(tensors, key=operator.itemgetter(0)):
                whole.update(f"{name} {_digest_of_tensor(tensor)}\n".encode())
        elif node.op == "get_attr":
            whole.update(_digest_of_tensor(_attribute(prefix, str(node.target))).encode())
    return whole.hexdigest()


def _digest_of_tensor(tensor: Tensor) -> str:
    content = tensor.detach().cpu().contiguous()
    sha = hashlib.sha256(f"{content.dtype} {tuple(content.shape)} ".encode())
    sha.update(content.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def _attribute(shell: nn.Module, path: str) -> Any:
    """What a dotted path names."""
    return operator.attrgetter(path)(shell)


def _text_of_node(node: fx.Node, shell: nn.Module, number: dict[fx.Node, int]) -> str:
    """An operation in words that are the same in every process; its inputs by number. A constant that tracing made is
    named by its value."""
    target = node.target if isinstance(node.target, str) else _name_of(node.target)
    if node.op == "get_attr" and target.startswith("_tensor_constant"):
        target = _digest_of_tensor(_attribute(shell, target))
    if node.op == "placeholder":
        target = "images"
    return f"{node.op} {target} {_text(node.args, number)} {_text(node.kwargs, number)}"


def _text_of_module(module: nn.Module) -> str:
    """The classes and the plain settings (stride, eps) of a module and all in it."""
    lines = []
    for name, part in module.named_modules():
        settings = {k: v for k, v in sorted(vars(part).items()) if k not in _NO_SETTINGS}
        lines.append(f"{name} {_name_of(type(part))} {_text(settings, {})}\n")
    return "".join(lines)


_NO_SETTINGS = frozenset(vars(nn.Module()))


def _text(value: Any, number: dict[fx.Node, int]) -> str:
    """A value in words without addresses."""
    if isinstance(value, fx.Node):
        return f"%{number[value]}"
    if isinstance(value, tuple | list):
        return f"({', '.join(_text(item, number) for item in value)})"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_text(item, number)}' for key, item in value.items())}}}"
    if isinstance(value, slice):
        return f"slice{_text((value.start, value.stop, value.step), number)}"
    if value is None or isinstance(value, bool | int | float | str | torch.dtype | torch.device):
        return repr(value)
    if isinstance(value, Tensor):
        return _digest_of_tensor(value)
    return _name_of(value)


def _name_of(value: Any) -> str:
    """The full name of a function or a class; of anything else that of its class."""
    value = value if hasattr(value, "__qualname__") else type(value)
    return f"{getattr(value, '__module__', None)}.{value.__qualname__}"
