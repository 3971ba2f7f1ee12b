"""Formats that hold weights for a library's own network: safetensors, and a folder that timm loads."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from safetensors.torch import load_file, save
from torch import Tensor, nn

from tlcli.errors import UsageError
from tlcli.exporting.card import model_card
from tlcli.runs.load import LoadedRun
from tlcli.specs import Fit

CROP_MODES = {Fit.crop: "center", Fit.squash: "squash", Fit.pad: "border"}
"""What timm calls the ways in which an image becomes a square."""


def plain_state(network: nn.Module) -> dict[str, Tensor]:
    """The tensors of a network, each with memory of its own."""
    return {name: tensor.detach().clone().contiguous() for name, tensor in network.state_dict().items()}


def write_safetensors(run: LoadedRun, facts: Mapping[str, Any], path: Path) -> nn.Module:
    """Write the weights with the facts as their metadata; the library's own network with what the file has."""
    # not save_file: its files are their owner's alone, whatever the umask
    path.write_bytes(save(plain_state(run.model), metadata={"tlcli": json.dumps(facts)}))
    network = _fresh(run)
    network.load_state_dict(load_file(path))
    return network.eval()


def loading_safetensors(run: LoadedRun, path: Path) -> str:
    """The line of Python that builds the library's own network and fills it from the file."""
    library, name, arguments = _call(run)
    words = ", ".join([repr(name), *(f"{key}={value!r}" for key, value in arguments.items())])
    build = f"timm.create_model({words})" if library == "timm" else f"torchvision.models.get_model({words})"
    load = f"model.load_state_dict(safetensors.torch.load_file({str(path)!r}))"
    return f"import safetensors.torch, {library}; model = {build}.eval(); {load}"


def _fresh(run: LoadedRun) -> nn.Module:
    """The library's own network for the run's classes, with random weights."""
    library, name, arguments = _call(run)
    if library == "timm":
        return timm.create_model(name, **arguments)  # type: ignore[no-any-return]
    import torchvision

    return torchvision.models.get_model(name, **arguments)  # type: ignore[no-any-return]


def _call(run: LoadedRun) -> tuple[str, str, dict[str, Any]]:
    """The library, the model's name there, and the arguments that build a network of the run's shape."""
    name, size = run.classifier.name, run.preprocessing.size
    arguments: dict[str, Any] = {"num_classes": len(run.classes)}
    if run.info["backbone_kind"] == "torchvision":
        return "torchvision", name, {**arguments, **({"image_size": size} if name.startswith("vit_") else {})}
    own: Any = run.model
    fixed = {"img_size": size} if own.pretrained_cfg.get("fixed_input_size") else {}
    return "timm", timm_name(run), {**arguments, **fixed}


def timm_name(run: LoadedRun) -> str:
    """The name of the architecture in timm, without the tag of its published weights."""
    name = run.classifier.name.split(".")[0]
    return f"tf_{name}" if run.info["backbone_kind"] == "lite" else name


def write_timm(run: LoadedRun, facts: Mapping[str, Any], folder: Path) -> nn.Module:
    """Write a folder that `timm.create_model("local-dir:FOLDER", pretrained=True)` loads; what that gives.

    Raises UsageError where timm has no network of the same name and the same tensors.
    """
    try:
        network = timm.create_model(timm_name(run), num_classes=len(run.classes), **_timm_arguments(run))
        network.load_state_dict(run.model.state_dict())
    except RuntimeError as exc:  # of both: an unknown name, and tensors that do not fit
        raise UsageError(
            f"timm has no network with the tensors of {run.info['backbone_kind']}'s {run.classifier.name}: "
            f"choose --to onnx, torchscript, pt2 or safetensors"
        ) from exc
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(save(plain_state(run.model), metadata={"format": "pt"}))
    config = json.dumps(_timm_config(run, network), indent=2, ensure_ascii=False)
    (folder / "config.json").write_text(config + "\n", encoding="utf-8")
    (folder / "README.md").write_text(model_card(run, facts, timm_name(run)), encoding="utf-8")
    loaded: nn.Module = timm.create_model(f"local-dir:{folder}", pretrained=True)
    return loaded.eval()


def _timm_arguments(run: LoadedRun) -> dict[str, Any]:
    """What timm's constructor needs beside the number of classes: the image size, where it has a table of positions."""
    return {key: value for key, value in _call(run)[2].items() if key == "img_size"}


def _timm_config(run: LoadedRun, network: Any) -> dict[str, Any]:
    """config.json as timm writes it, with our preprocessing instead of that of the published weights."""
    own, preprocessing = network.pretrained_cfg, run.preprocessing
    config = {
        "architecture": timm_name(run),
        "num_classes": len(run.classes),
        "num_features": network.num_features,
        "label_names": list(run.classes),
        "pretrained_cfg": {
            "tag": "tlcli",
            "custom_load": False,
            "input_size": [3, preprocessing.size, preprocessing.size],
            "fixed_input_size": bool(own.get("fixed_input_size")),
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "crop_mode": CROP_MODES[preprocessing.fit],
            "mean": list(preprocessing.mean),
            "std": list(preprocessing.std),
            "num_classes": len(run.classes),
            "pool_size": None,
            "first_conv": own.get("first_conv"),
            "classifier": own.get("classifier"),
        },
    }
    arguments = _timm_arguments(run)
    return {**config, "model_args": arguments} if arguments else config
