"""Weights of a whole network in a file, with what is needed to use them; the state of training in another."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tlcli.models.tensorfile import read_tensors, write_tensors

_TENSOR = "$tensor"
"""The key of what stands for a tensor in a state's facts."""


def save_weights(
    path: Path, network: nn.Module, facts: Mapping[str, Any], instead: Mapping[str, Tensor] | None = None
) -> None:
    """Write every tensor of a network, and the facts as JSON in the file's metadata, in one atomic step.

    `instead` has tensors to write in place of those that the network has by now.
    """
    write_tensors(path, {**network.state_dict(), **(instead or {})}, facts)


def changeable(network: nn.Module) -> dict[str, Tensor]:
    """What training can change: the parameters that train, and the buffers."""
    frozen = {name for name, parameter in network.named_parameters() if not parameter.requires_grad}
    return {name: tensor for name, tensor in network.state_dict().items() if name not in frozen}


def snapshot(network: nn.Module) -> dict[str, Tensor]:
    """Copies of what training can change."""
    return {name: tensor.detach().clone() for name, tensor in changeable(network).items()}


def load_weights_into(path: Path, network: nn.Module) -> None:
    """Put the tensors of a checkpoint of ours back into the network that they are from. Raises TlcliError where the
    file is damaged."""
    network.load_state_dict(read_tensors(path)[0])


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write nested mappings and sequences of tensors and of what JSON can hold, in one atomic step."""
    tensors: dict[str, Tensor] = {}
    facts = _without_tensors(state, "", tensors)
    write_tensors(path, tensors, facts)


def load_state(path: Path) -> dict[str, Any]:
    """What `save_state` wrote: keys are strings and sequences are lists. Raises TlcliError where it is damaged."""
    tensors, facts = read_tensors(path)
    state: dict[str, Any] = _with_tensors(facts, tensors)
    return state


def _without_tensors(value: Any, at: str, tensors: dict[str, Tensor]) -> Any:
    """The same with a reference in the place of each tensor, which goes to `tensors`."""
    if isinstance(value, Tensor):
        tensors[at] = value
        return {_TENSOR: at}
    if isinstance(value, Mapping):
        return {str(key): _without_tensors(item, f"{at}/{key}", tensors) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_without_tensors(item, f"{at}/{i}", tensors) for i, item in enumerate(value)]
    return value


def _with_tensors(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The same with tensors in the place of references."""
    if isinstance(value, dict):
        if value.keys() == {_TENSOR}:
            return tensors[value[_TENSOR]]
        return {key: _with_tensors(item, tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_tensors(item, tensors) for item in value]
    return value
