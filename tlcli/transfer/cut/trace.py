"""A network as graphs of torch.fx, as it trains and as it evaluates; what cannot be traced into is one operation."""

import copy
import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.layers import get_notrace_functions, get_notrace_modules
from torch import Tensor, fx, nn

from tlcli.models.classifier import Float32Linear
from tlcli.transfer.cut.graph import Refusal, Traced, mutated, one_line
from tlcli.transfer.cut.state import device_of, eval_mode, random_state


@dataclass
class _Leaves:
    """Modules that are called as they are, not traced into."""

    modules: set[nn.Module]
    types: set[type] = field(default_factory=lambda: set(get_notrace_modules()))

    def __contains__(self, module: nn.Module) -> bool:
        return module in self.modules or type(module) in self.types or isinstance(module, Float32Linear)

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


def both_forms(network: nn.Module) -> tuple[Traced, Traced]:
    """The network as it trains, in the modes that it is in, and as it evaluates; with the same leaves."""
    classifier: Any = getattr(network, "get_classifier", tuple)  # timm's
    head = classifier()  # a tuple where distilled
    leaves = _Leaves({m for m in (head if isinstance(head, tuple | list) else (head,)) if isinstance(m, nn.Module)})
    leaves.modules.discard(network)
    while True:
        training = _traced(network, leaves)
        before = len(leaves.modules), len(leaves.types)
        with eval_mode(network):
            evaluation = _traced(network, leaves)
        if before == (len(leaves.modules), len(leaves.types)):
            return training, evaluation


def _traced(network: nn.Module, leaves: _Leaves) -> Traced:
    """The network's graph in its present modes. A module that cannot be traced into becomes a leaf."""
    before = random_state(device_of(network)), random.getstate()
    while True:
        tracer, shell = _Tracer(leaves), copy.copy(network)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # models warn of what tracing fixes; the trials find what matters
                graph = tracer.trace(shell)
        except Exception as error:  # forward runs on proxies, so anything can be raised
            if not leaves.grow(tracer.failed):
                raise Refusal(f"cannot be traced: {one_line(error)}") from error
            continue
        if not torch.equal(before[0], random_state(device_of(network))) or before[1] != random.getstate():
            raise Refusal("cannot be traced: forward draws random numbers that a trace would fix")
        _drop_other_arguments(graph)
        _chain_mutations(graph, shell)
        return Traced(shell, graph)


def _drop_other_arguments(graph: fx.Graph) -> None:
    for extra in [node for node in graph.nodes if node.op == "placeholder"][1:]:
        if not extra.users:
            graph.erase_node(extra)


def _chain_mutations(graph: fx.Graph, shell: nn.Module) -> None:
    """What reads a tensor after an operation changed it in place reads that operation's result, which is that tensor:
    a graph has edges for what is returned alone."""
    place = {node: i for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if (changed := mutated(node, shell)) is not None:
            for user in list(changed.users):
                if place[user] > place[node]:
                    user.replace_input_with(changed, node)
