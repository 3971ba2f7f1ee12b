"""Runs a traced network on a few images: what each operation gives, what it costs and whether it can change."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from tlcli.transfer.cut.graph import Traced, module_of
from tlcli.transfer.cut.state import random_state


@dataclass(frozen=True)
class Map:
    """A tensor, by its shape."""

    shape: tuple[int, ...]


class Unknown:
    """A value that cannot be written into a graph."""


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


class Observer(fx.Interpreter):
    """Runs what is frozen of a traced network. `live`: what is not, each with the reason or None where it only depends
    on such; `values`: what the others give; `flops` of each; `same`: what returns its input as it is; `turned`: what
    only looks at its input in another order."""

    def __init__(self, traced: Traced, trains: Collection[int]) -> None:
        super().__init__(traced.shell, graph=traced.graph)
        self.extra_traceback = False
        self._trains = trains
        self._watch = _Watch({_storage(t) for t in (*traced.shell.parameters(), *traced.shell.buffers())})
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
        reason = self._trainable(n)
        if reason is not None or any(source in self.live for source in n.all_input_nodes):
            self.live[n] = reason
            return None
        if n.op == "output":
            return None
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        before = random_state(self._device), _version(args)
        self._watch.flops, self._watch.trains = 0, False
        value = getattr(self, n.op)(n.target, args, kwargs)
        if not torch.equal(before[0], random_state(self._device)):
            self.live[n] = f"{module_of(n) or n.name} is random in training"
        elif self._watch.trains:
            self.live[n] = f"{module_of(n) or n.name} depends on the batch or keeps statistics"
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
            self.values[node] = Map(tuple(value.shape))
            view = _is_view(value, args) and (value is not args[0] or value._version == version)
            self.flops[node] += 0 if view else value.numel()
            if view and value is args[0] and isinstance(node.args[0], fx.Node):
                self.same[node] = node.args[0]
            elif view and value.numel() == args[0].numel() and not value.is_contiguous():
                self.turned.add(node)
        else:
            self.values[node] = value if _is_plain(value) else Unknown()


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


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
