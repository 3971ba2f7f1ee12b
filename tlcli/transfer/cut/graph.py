"""A network written down as a graph, and what such a graph says of its operations."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from torch import fx, nn


class Refusal(Exception):
    """Why there is no cut."""


def one_line(error: BaseException) -> str:
    """The first line of an error, in brief."""
    line = next(iter(str(error).strip().splitlines()), "")
    return (f"{type(error).__name__}: {line}" if line else type(error).__name__)[:160]


@dataclass(frozen=True)
class Traced:
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


def module_of(node: fx.Node) -> str:
    """The path of the module that an operation belongs to; "" is the network itself."""
    if node.op == "call_module":
        return str(node.target)
    if node.op == "get_attr":
        return str(node.target).rpartition(".")[0]
    stack = node.meta.get("nn_module_stack")
    return str(next(reversed(stack.values()))[0]) if stack else ""


def weighs(node: fx.Node, shell: nn.Module) -> bool:
    """Whether an operation uses a parameter."""
    if node.op == "get_attr":
        return True
    return node.op == "call_module" and any(True for _ in shell.get_submodule(str(node.target)).parameters())


def mutated(node: fx.Node, shell: nn.Module) -> fx.Node | None:
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


def closure(nodes: Iterable[fx.Node], known: Collection[fx.Node]) -> set[fx.Node]:
    """These and all that they need, but for what is known."""
    found: set[fx.Node] = set()
    todo = [node for node in nodes if node not in known]
    while todo:
        if (node := todo.pop()) not in found:
            found.add(node)
            todo.extend(source for source in node.all_input_nodes if source not in known)
    return found
