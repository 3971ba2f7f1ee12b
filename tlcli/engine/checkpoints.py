"""Weights as safetensors with what is needed to use them; the state of training beside them."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


def save_weights(
    path: Path, network: nn.Module, facts: Mapping[str, Any], instead: Mapping[str, Tensor] | None = None
) -> None:
    """Write every tensor of a network, and the facts as JSON in the file's metadata, in one atomic step.

    `instead` has tensors to write in place of those that the network has by now.
    """
    own = {**network.state_dict(), **(instead or {})}
    state = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in own.items()}
    draft = _draft(path)
    save_file(state, draft, metadata={"tlcli": json.dumps(facts)})
    draft.replace(path)


def snapshot(network: nn.Module) -> dict[str, Tensor]:
    """Copies of what training can change: the parameters that train, and the buffers."""
    frozen = {name for name, parameter in network.named_parameters() if not parameter.requires_grad}
    return {name: t.detach().clone() for name, t in network.state_dict().items() if name not in frozen}


def load_weights_into(path: Path, network: nn.Module) -> None:
    """Put the tensors of a checkpoint of ours back into the network that they are from."""
    network.load_state_dict(load_file(path))


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write what exact resume needs beside the weights: tensors, numbers and strings alone, in one atomic step."""
    draft = _draft(path)
    torch.save(dict(state), draft)
    draft.replace(path)


def _draft(path: Path) -> Path:
    """A temporary name beside a file, in a folder that is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name}.{os.getpid()}")
