"""Operations, settings and tensors in words that are the same in every process."""

import hashlib
import operator
from typing import Any

import torch
from torch import Tensor, fx, nn


def digest_of(prefix: fx.GraphModule) -> str:
    """The sha256 of a prefix's text and its tensors."""
    whole = hashlib.sha256()
    number: dict[fx.Node, int] = {}
    for node in prefix.graph.nodes:
        number[node] = len(number)
        whole.update((text_of_node(node, prefix, number) + "\n").encode())
        if node.op == "call_module":
            module = prefix.get_submodule(str(node.target))
            whole.update(_text_of_module(module).encode())
            tensors = [*module.named_parameters(), *module.named_buffers()]
            for name, tensor in sorted(tensors, key=operator.itemgetter(0)):
                whole.update(f"{name} {digest_of_tensor(tensor)}\n".encode())
        elif node.op == "get_attr":
            whole.update(digest_of_tensor(attribute(prefix, str(node.target))).encode())
    return whole.hexdigest()


def digest_of_tensor(tensor: Tensor) -> str:
    """The sha256 of a tensor's dtype, shape and values."""
    content = tensor.detach().cpu().contiguous()
    sha = hashlib.sha256(f"{content.dtype} {tuple(content.shape)} ".encode())
    sha.update(content.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def attribute(shell: nn.Module, path: str) -> Any:
    """What a dotted path names."""
    return operator.attrgetter(path)(shell)


def text_of_node(node: fx.Node, shell: nn.Module, number: dict[fx.Node, int]) -> str:
    """An operation in words that are the same in every process; its inputs by number. A constant that tracing made is
    named by its value."""
    target = node.target if isinstance(node.target, str) else _name_of(node.target)
    if node.op == "get_attr" and target.startswith("_tensor_constant"):
        target = digest_of_tensor(attribute(shell, target))
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
        return digest_of_tensor(value)
    return _name_of(value)


def _name_of(value: Any) -> str:
    """The full name of a function or a class; of anything else that of its class."""
    value = value if hasattr(value, "__qualname__") else type(value)
    return f"{getattr(value, '__module__', None)}.{value.__qualname__}"
