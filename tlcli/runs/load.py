"""A finished run, ready for use: its network with its weights, its classes, and what an image goes through before.

The network is rebuilt from what the run recorded. Nothing that a file brings is run as code, and nothing is fetched.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml  # type: ignore[import-untyped]
from PIL import Image
from torch import Tensor, nn

from tlcli.data.decode import Pixels, read_image, to_rgb
from tlcli.data.preprocess import Preprocessing
from tlcli.errors import TlcliError, UsageError
from tlcli.models.backbones import build_architecture
from tlcli.models.classifier import Classifier
from tlcli.models.tensorfile import read_tensors
from tlcli.models.weights import class_names
from tlcli.registry import options
from tlcli.runs.run_dir import RunDir, open_run
from tlcli.specs import BackboneSpec, TorchvisionBackboneSpec

CHECKPOINTS = ("best", "last")
KINDS: dict[str, type[BackboneSpec]] = options("backbone")


@dataclass(frozen=True, eq=False)
class LoadedRun:
    """A run's classifier on the CPU, in eval mode and float32; `info` is its run.json.

    `temperature` divides logits before the softmax (Guo et al. 2017). It was fitted to the best epoch's, and is 1 for
    another epoch and where the run has none.
    """

    path: Path
    info: Mapping[str, Any]
    checkpoint: str
    classifier: Classifier
    preprocessing: Preprocessing
    temperature: float

    @property
    def model(self) -> nn.Module:
        """Normalised images (N, 3, S, S) float32 to raw logits (N, classes)."""
        return self.classifier.network

    @property
    def classes(self) -> tuple[str, ...]:
        """Their names, in the order of the logits."""
        return self.classifier.classes

    def preprocess(self, image: str | Path | Image.Image | Pixels) -> Tensor:
        """A file, a PIL image or RGB pixels, uint8 (height, width, 3) -> (1, 3, S, S) float32, as in training: but
        that of a large JPEG all pixels are looked at where it is in memory.

        Raises BadImage, a ValueError, for a file that does not decode, and TypeError or ValueError for anything else.
        """
        return self.preprocessing.normalise(self.preprocessing.apply(pixels_of(image))[None])

    def predict(self, image: str | Path | Image.Image | Pixels, top: int = 5) -> list[tuple[str, float]]:
        """The likeliest classes of an image with their calibrated probabilities, the likeliest first."""
        with torch.inference_mode():
            logits = self.model(self.preprocess(image))
        values, places = calibrated(logits, self.temperature)[0].topk(min(top, len(self.classes)))
        return [(self.classes[place], value) for place, value in zip(places.tolist(), values.tolist(), strict=True)]


def calibrated(logits: Tensor, temperature: float) -> Tensor:
    """Logits (N, classes) -> probabilities (N, classes), float64: softmax(logits / temperature)."""
    return torch.softmax(logits.double() / temperature, dim=1)


def pixels_of(image: str | Path | Image.Image | Pixels) -> Pixels:
    """RGB pixels of a file, of a PIL image, or as they are given: uint8 (height, width, 3)."""
    if isinstance(image, str | Path):
        return read_image(Path(image))
    if isinstance(image, Image.Image):
        return to_rgb(image)
    if not isinstance(image, np.ndarray):
        raise TypeError(f"an image is a path, a PIL image or a uint8 array, not {type(image).__name__}")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"pixels are uint8 (height, width, 3), RGB, not {image.dtype} {image.shape}")
    return image if image.flags.writeable else image.copy()  # torch warns of memory that it may not write to


def load_run(path: str | Path, checkpoint: str = "best") -> LoadedRun:
    """The classifier that a run left, with the weights of its best epoch or its last one (`best`, `last`).

    Raises UsageError, one line, where there is no run, where it has no such checkpoint, and where that is damaged.
    """
    if checkpoint not in CHECKPOINTS:
        raise UsageError(f"checkpoint={checkpoint}: give one of {', '.join(CHECKPOINTS)}")
    run = open_run(path)
    info = run.info
    file = run.best_checkpoint if checkpoint == "best" else run.last_checkpoint
    if not file.is_file():
        raise UsageError(f"{run.path}: has no {file.relative_to(run.path).as_posix()}; {_status_words(info)}")
    try:
        state, facts = read_tensors(file)
        preprocessing = Preprocessing.from_json(facts["preprocessing"])
        classes = class_names(facts["classes"])
    except TlcliError as error:
        raise UsageError(str(error)) from error
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{file}: damaged, or no checkpoint of tlcli ({type(error).__name__}: {error})") from error
    classifier = _rebuilt(_backbone(run, facts), classes, preprocessing, state, file)
    return LoadedRun(run.path, info, checkpoint, classifier, preprocessing, _temperature(run, info, facts))


def _status_words(info: Mapping[str, Any]) -> str:
    """Why a run may have no checkpoint."""
    status = info.get("status", "unknown")
    error = f" ({info['error']})" if info.get("error") else ""
    return f"its status is {status}{error}"


def _backbone(run: RunDir, facts: Mapping[str, Any]) -> BackboneSpec:
    """The spec of the network in a checkpoint. What torchvision's need beside a name is in the run's config."""
    kind, name = str(facts.get("backbone_kind")), str(facts.get("backbone"))
    if kind not in KINDS:
        raise UsageError(f"{run.path}: backbone kind {kind!r} is unknown to this tlcli ({', '.join(KINDS)})")
    common: dict[str, Any] = {"name": name, "weights": "none", "dropout": 0.0, "reinit": []}
    if KINDS[kind] is not TorchvisionBackboneSpec:
        return KINDS[kind](**common)
    try:
        own = yaml.safe_load(run.config_file.read_text(encoding="utf-8"))["backbone"]
        head, stages = own["head"], dict(own["stages"])
        if not all(isinstance(text, str) for text in (head, *stages, *stages.values())):
            raise ValueError("head and stages are not all texts")
        return TorchvisionBackboneSpec(**common, head=head, stages=stages)
    except (OSError, KeyError, TypeError, AttributeError, ValueError, RecursionError, yaml.YAMLError) as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UsageError(f"{run.config_file}: does not describe the backbone ({why})") from error


def _rebuilt(
    spec: BackboneSpec, classes: tuple[str, ...], preprocessing: Preprocessing, state: dict[str, Tensor], file: Path
) -> Classifier:
    """The network of a spec with these weights, in eval mode."""
    with torch.random.fork_rng(devices=[]):  # the first weights are random and thrown away: the caller's numbers stay
        built = build_architecture(spec, len(classes), preprocessing.size)
    try:
        built.network.load_state_dict(state)
    except RuntimeError as error:
        why = " ".join(str(error).split())
        raise UsageError(f"{file}: does not fit {spec.name} with {len(classes)} classes: {why[:300]}") from error
    loaded = built.network.state_dict()  # in float32, which may hold less than what the file has
    if bad := next((n for n, t in state.items() if t.is_complex() or not loaded[n].isfinite().all()), None):
        raise UsageError(f"{file}: {bad} has values that are not finite; the checkpoint is damaged")
    built.network.eval().requires_grad_(False)
    own = replace(built, size=preprocessing.size, mean=preprocessing.mean, std=preprocessing.std)
    return Classifier(spec.name, own, classes, pretrained=frozenset(state), head_loaded=True)


def _temperature(run: RunDir, info: Mapping[str, Any], facts: Mapping[str, Any]) -> float:
    """What logits of these weights are divided by: what was fitted, if it was to this epoch."""
    calibration, best = info.get("calibration"), info.get("best")
    if not (isinstance(calibration, Mapping) and isinstance(best, Mapping) and best.get("epoch") == facts.get("epoch")):
        return 1.0
    value = calibration.get("temperature", 1.0)
    if not isinstance(value, int | float) or not 0 < value < 1e9:
        raise UsageError(f"{run.info_file}: damaged (calibration.temperature is {value!r:.40}, no number above 0)")
    return float(value)
