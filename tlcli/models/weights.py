"""Sources of pretrained weights: published ones, a file, an earlier run. No code in a file is run."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
from huggingface_hub.constants import HF_HUB_CACHE  # timm depends on it
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tlcli.errors import TlcliError, UsageError
from tlcli.files import is_dir, is_file
from tlcli.models.classifier import Architecture
from tlcli.models.tensorfile import read_tensors
from tlcli.specs import BackboneSpec, parse_image_stats

RUN_CHECKPOINT = Path("checkpoints", "best.safetensors")


@dataclass(frozen=True)
class PretrainedWeights:
    """Tensors by name and where they are from. The rest is None except for tlcli's own checkpoints: `preprocessing` has
    the size, mean and std of the images that they were trained on."""

    source: str
    state: Mapping[str, Tensor]
    backbone: str | None = None
    classes: tuple[str, ...] | None = None
    preprocessing: Mapping[str, Any] | None = None


def published_weights(spec: BackboneSpec, architecture: Architecture, n_classes: int, size: int) -> PretrainedWeights:
    """Return the weights that were published with this backbone.

    Raises UsageError if their package is not installed, TlcliError if a download fails or has another checksum.
    """
    try:
        source, state = spec.published(architecture, n_classes, size)
    except (OSError, RuntimeError, SafetensorError) as error:  # both libraries and the hub client raise these
        reason = str(error.reason if isinstance(error, URLError) else error).split("\n")[0]
        raise TlcliError(
            f"cannot download the weights of {spec.name} ({reason}). Offline, set backbone.weights=FILE or "
            "backbone=efficientnet_lite0, whose weights are installed."
        ) from error
    return PretrainedWeights(source, state)


def read_weights(path: Path) -> PretrainedWeights:
    """Return the tensors of a .safetensors file, of a state dict in a .pth or .pt file, or the best ones of a run."""
    path = path.expanduser()
    is_run = is_dir(path)
    file = path / RUN_CHECKPOINT if is_run else path
    if not is_file(file):
        raise UsageError(f"backbone.weights={path}: no such file{' (not a run directory)' if is_run else ''}")
    try:
        if file.suffix == ".safetensors":
            return _safetensors(file, str(path))
        state = torch.load(file, map_location="cpu", weights_only=True)
    except UsageError:
        raise
    except TlcliError as error:
        raise UsageError(f"backbone.weights={error}") from error
    except Exception as error:  # torch.load raises many kinds
        raise UsageError(
            f"backbone.weights={path}: cannot be read as plain tensors ({type(error).__name__}); "
            f"give a state dict saved with torch.save, or .safetensors"
        ) from error
    return PretrainedWeights(str(path), _tensors(state, path))


def read_metadata(file: Path) -> dict[str, Any]:
    """Return tlcli's metadata of a checkpoint: classes, preprocessing, backbone; empty for third-party files.

    Raises UsageError if the file cannot be read or is damaged.
    """
    try:
        with safe_open(file, framework="pt") as content:
            text = (content.metadata() or {}).get("tlcli")
        value = json.loads(text) if text else {}
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{file}: not a safetensors file, or damaged ({error})") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{file}: its tlcli metadata is damaged") from error
    return value if isinstance(value, dict) else {}


def _safetensors(file: Path, source: str) -> PretrainedWeights:
    state, facts = read_tensors(file)
    try:
        return PretrainedWeights(source, state, **_checked(facts))
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{file}: its tlcli metadata is damaged ({type(error).__name__}: {error})") from error


def _checked(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metadata of a checkpoint with the right types. Raise KeyError, TypeError or ValueError otherwise."""
    checked: dict[str, Any] = {}
    if "backbone" in facts:
        if not isinstance(facts["backbone"], str):
            raise ValueError("the backbone is not a name")
        checked["backbone"] = facts["backbone"]
    if "classes" in facts:
        checked["classes"] = class_names(facts["classes"])
    if "preprocessing" in facts:
        checked["preprocessing"] = parse_image_stats(facts["preprocessing"])
    return checked


def class_names(value: object) -> tuple[str, ...]:
    """Return the classes that a checkpoint names. Raise ValueError unless they are names without repetition."""
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ValueError("the classes are not a list of names")
    if len(set(value)) < len(value):
        raise ValueError("a class is named twice")
    return tuple(value)


def _tensors(state: object, path: Path) -> dict[str, Tensor]:
    """Return the state dict that torch.load returned, itself or under one of the names that trainers use."""
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()) or not state:
        raise UsageError(f"backbone.weights={path}: does not hold a state dict (names and tensors)")
    for name, tensor in state.items():
        if tensor.is_nested or tensor.is_quantized or tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise UsageError(
                f"backbone.weights={path}: {name} is not a plain tensor (nested, quantized, sparse or without data); "
                "save the dense one"
            )
    return {str(name).removeprefix("module."): tensor for name, tensor in state.items()}


# --- Files of the Hugging Face hub, where timm's weights are


def cached_models(author: str) -> list[str]:
    """Return the names of this author's models that have a file in the hub's cache."""
    folders = Path(HF_HUB_CACHE).glob(f"models--{author}--*")
    return sorted(path.name.removeprefix(f"models--{author}--") for path in folders if any(path.glob("snapshots/*/*")))


def verify_published(model: str) -> None:
    """Raise TlcliError unless the files of a model (`timm/NAME`) have the digests that the hub published for them.

    The hub's client names each large file by its SHA-256 digest, compares only its size, and links the file of a
    revision to that name. On systems without links there is nothing to compare with.
    """
    folder = Path(HF_HUB_CACHE, f"models--{model.replace('/', '--')}")
    current = folder / "refs" / "main"
    revision = current.read_text().strip() if current.is_file() else "*"
    for file in sorted(folder.glob(f"snapshots/{revision}/*")):
        # Follow one link only: the name in the model's own folder is the digest; if the client shares files between
        # models, that is a link too, to a name that means something else
        digest = file.readlink().name if file.is_symlink() else ""
        if not file.is_file() or not re.fullmatch(r"[0-9a-f]{64}", digest):
            continue
        with file.open("rb") as content:
            if hashlib.file_digest(content, "sha256").hexdigest() != digest:
                raise TlcliError(
                    f"{file}: checksum differs from the published file of {model}: remove this file and "
                    f"{file.resolve()}, and the next run downloads it again"
                )
