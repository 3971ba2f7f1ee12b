"""Load a finished run: its network is rebuilt from its record. No code from files runs, and nothing is downloaded."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from tlcli.data.batches import Preprocessing
from tlcli.data.decode import Pixels, ValueRange, raw_image, read_image
from tlcli.engine.heat_maps import draw_heat_map, heat_map
from tlcli.engine.metrics import ENERGY, calibrated
from tlcli.engine.unknown import UnknownScore
from tlcli.errors import TlcliError, UsageError
from tlcli.files import read_yaml
from tlcli.models.classifier import Classifier, check_state_dict
from tlcli.models.tensorfile import class_names, read_tensors
from tlcli.runs.run_dir import CHECKPOINTS, RunDir, integer, mapping, number, open_run
from tlcli.specs import BackboneSpec, Tta, options
from tlcli.text import join_limited, one_line
from tlcli.transfer.contract import linear_head
from tlcli.transfer.graph import device_of


@dataclass(frozen=True, eq=False)
class LoadedRun:
    """A run's classifier on the CPU, in eval mode and float32. `info` has the contents of run.json."""

    path: Path
    info: Mapping[str, Any]
    checkpoint: str
    epoch: int | None
    classifier: Classifier
    preprocessing: Preprocessing
    temperature: float  # divides logits before the softmax (Guo et al. 2017); 1 if not fitted to these weights
    unknown: UnknownScore | None  # None: the energy is the score
    threshold: float | None  # of the unknown score; None if no or too few images were held out
    is_kept: bool  # the weights are those that the run validated

    @property
    def model(self) -> nn.Module:
        """The network: normalized images (N, 3, S, S) float32 to raw logits (N, classes)."""
        return self.classifier.network

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names, in the order of the logits."""
        return self.classifier.classes

    def preprocess(self, image: str | Path | Image.Image | Pixels) -> Tensor:
        """Return the network's input (1, 3, S, S) for a file, a PIL image or uint8 RGB pixels (height, width, 3).

        It is the same as in training, except that a large JPEG in memory is reduced from all its pixels. Raise
        TypeError or ValueError if it is not an image, and BadImage, a ValueError, if the file does not decode.
        """
        return self.preprocessing.normalize(self.preprocessing.apply(pixels_of(image, self.preprocessing.range))[None])

    def predict(self, image: str | Path | Image.Image | Pixels, top: int = 5) -> list[tuple[str, float]]:
        """Return the most likely classes of an image with their calibrated probabilities, in descending order."""
        with torch.inference_mode():
            x = self.preprocess(image).to(device_of(self.model))
            logits = self.model(x)
            if self.info.get("tta") == Tta.flip:
                logits = (logits + self.model(x.flip(3))) / 2
        values, indices = calibrated(logits.cpu(), self.temperature)[0].topk(min(top, len(self.classes)))
        return [(self.classes[i], value) for i, value in zip(indices.tolist(), values.tolist(), strict=True)]

    def explain(self, image: str | Path | Image.Image | Pixels, name: str, side: int = 1024) -> Image.Image:
        """Return an image, at most `side` pixels wide and high, with a map of the evidence for a class.

        The map is that of the image as the network sees it: cropped, squashed or padded as in training. Raise as
        `preprocess`, ValueError for an unknown class, and TlcliError if no layer has positions.
        """
        if name not in self.classes:
            raise ValueError(f"{name!r} is not a class of {self.path}: {join_limited(self.classes)}")
        pixels = pixels_of(image, self.preprocessing.range)
        heat = heat_map(self.model, self.preprocess(pixels).to(device_of(self.model)), self.classes.index(name))
        picture = Image.fromarray(pixels)
        picture.thumbnail((side, side), Image.Resampling.LANCZOS)
        return draw_heat_map(picture, heat, self.preprocessing.fit)


def pixels_of(image: str | Path | Image.Image | Pixels, value_range: ValueRange | None = None) -> Pixels:
    """Return RGB pixels, uint8 (height, width, 3), of a file, a PIL image or pixels."""
    if isinstance(image, str | Path):
        return read_image(Path(image), value_range)
    if isinstance(image, Image.Image):
        return raw_image(image).to_pixels(value_range)
    if not isinstance(image, np.ndarray):
        raise TypeError(f"an image must be a path, a PIL image or a uint8 array, not {type(image).__name__}")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"pixels must be uint8 (height, width, 3), RGB, not {image.dtype} {image.shape}")
    return image if image.flags.writeable else image.copy()  # torch warns of memory that is not writable


def load_run(path: str | Path, checkpoint: str = "best") -> LoadedRun:
    """Return the classifier of a run, with the weights of its `best` or `last` epoch, or raise UsageError."""
    if checkpoint not in CHECKPOINTS:
        raise UsageError(f"checkpoint={checkpoint}: must be one of {', '.join(CHECKPOINTS)}")
    run = open_run(path)
    file = run.best_checkpoint if checkpoint == "best" else run.last_checkpoint
    if not file.is_file():
        error = f" ({run.info['error']})" if run.info.get("error") else ""
        status = f"its status is {run.status}{error}"
        raise UsageError(f"{run.path}: has no {file.relative_to(run.path).as_posix()}; {status}")
    try:
        state, metadata = read_tensors(file)
        preprocessing = Preprocessing.from_json(metadata["preprocessing"])
        classes = class_names(metadata["classes"])
    except (OSError, KeyError, TypeError, ValueError) as exc:
        raise UsageError(f"{file}: damaged, or not a checkpoint of tlcli ({type(exc).__name__}: {exc})") from exc
    spec = _backbone(run, metadata)
    with torch.random.fork_rng(devices=[]):  # the random initial weights must not advance the caller's generator
        classifier = spec.build(len(classes), preprocessing.size)
    network = classifier.network
    check_state_dict(state, network, f"{file}: does not fit {spec.name} with {len(classes)} classes")
    network.load_state_dict(state, strict=False)
    network.eval().requires_grad_(False)
    expected = {key: getattr(preprocessing, key) for key in ("size", "fit", "mean", "std")}
    classifier = replace(classifier, classes=classes, pretrained=frozenset(state), head_loaded=True, **expected)
    epoch, temperature, unknown, threshold = integer(metadata.get("epoch")), 1.0, None, None
    is_kept = epoch is not None and mapping(run.info.get("best")).get("epoch") == epoch
    if is_kept and checkpoint == "last":  # its weights may be those before averaging or interpolation
        is_kept = False
        with suppress(OSError, TlcliError):  # the best ones are missing or damaged
            is_kept = read_tensors(run.best_checkpoint)[1] == metadata
    if is_kept:
        temperature = mapping(run.info.get("calibration")).get("temperature", 1.0)
        if not 0 < (number(temperature) or 0) < 1e9:
            raise UsageError(f"{run.info_file}: damaged (calibration.temperature: {temperature!r:.40} is not above 0)")
        if linear_head(classifier) is not None and run.unknown_file.is_file():
            unknown = UnknownScore.read(run.unknown_file, classifier)
        recorded = mapping(run.info.get("unknown"))
        if (recorded.get("score") == ENERGY) == (unknown is None):
            threshold = number(recorded.get("threshold"))
    calibration = temperature, unknown, threshold, is_kept
    return LoadedRun(run.path, run.info, checkpoint, epoch, classifier, preprocessing, *calibration)


def _backbone(run: RunDir, metadata: Mapping[str, Any]) -> BackboneSpec:
    """Return the spec of a checkpoint's network. Keys other than its name are in the run's config."""
    kind = str(metadata.get("backbone_kind"))
    kinds: dict[str, type[BackboneSpec]] = options("backbone")
    if kind not in kinds:
        raise UsageError(f"{run.path}: backbone kind {kind!r} is unknown to this tlcli ({', '.join(kinds)})")
    values = {"name": str(metadata.get("backbone")), "weights": "none", "dropout": 0.0, "reinit": []}
    values |= {"size": None, "imagenet_top1": None, "license": None}
    missing = [key for key in kinds[kind].__struct_fields__ if key not in values]
    try:
        recorded = read_yaml(run.config_file)["backbone"] if missing else {}
        return msgspec.convert({"kind": kind, **values, **{key: recorded[key] for key in missing}}, kinds[kind])
    except (OSError, KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise UsageError(f"{run.config_file}: does not describe the backbone ({reason})") from error
