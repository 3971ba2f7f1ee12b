"""Tensors and JSON metadata in one safetensors file, with a checksum over both. Reading runs no code from the file."""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from tlcli.errors import UsageError
from tlcli.files import atomic_write

KEY, CHECKSUM = "tlcli", "crc32"
"""The one key of a file's metadata (safetensors does not keep the order of two); its JSON ends with the checksum."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write tensors and metadata that JSON can hold, in one atomic step that survives a power failure."""
    state: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():  # safetensors refuses tensors that share memory
        content = tensor.detach().cpu().contiguous()
        storage = content.untyped_storage().data_ptr()
        state[name] = content.clone() if storage in storages else content
        storages.add(storage)
    file_content = save(state, metadata={KEY: json.dumps({**metadata, CHECKSUM: _checksum(metadata, state)})})
    atomic_write(path, file_content, durable=True)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of a file and tlcli's metadata ({} if third-party). Raise UsageError if it is damaged."""
    try:
        with safe_open(path, framework="pt") as content:
            text = (content.metadata() or {}).get(KEY)
            state = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118 - not a mapping
        metadata = json.loads(text) if text else {}
    except (SafetensorError, ValueError, RecursionError) as error:
        raise damaged(path, str(error)) from error
    if not isinstance(metadata, dict):
        return state, {}
    checksum = metadata.pop(CHECKSUM, None)  # None in files of tlcli 0.3 and earlier
    if checksum is not None and checksum != _checksum(metadata, state):
        raise damaged(path, "checksum mismatch")
    return state, metadata


def class_names(value: object) -> tuple[str, ...]:
    """Return the classes that a checkpoint names. Raise ValueError unless they are names without repetition."""
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ValueError("the classes are not a list of names")
    if len(set(value)) < len(value):
        raise ValueError("a class is named twice")
    return tuple(value)


def damaged(path: Path, reason: str) -> UsageError:
    """Return the error of a file that is not as it was written."""
    return UsageError(f"{path}: damaged, or not a safetensors file ({' '.join(reason.split())})")


def _checksum(metadata: Mapping[str, Any], state: Mapping[str, Tensor]) -> str:
    """Return the CRC-32 of the metadata and of names, dtypes, shapes and bytes of the tensors (0.2 s per GB)."""
    crc = zlib.crc32(json.dumps(metadata).encode())
    for name in sorted(state):
        tensor = state[name]
        crc = zlib.crc32(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode(), crc)
        crc = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, crc)
    return f"{crc:08x}"
