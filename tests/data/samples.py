"""Specs and small images for the tests of the data layer."""

from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from tlcli.data.sources import DigitsSpec, ImageFolderSpec, ManifestSpec, TorchvisionDatasetSpec
from tlcli.specs import OnBad, Verify

CONF = Path(__file__).parents[2] / "conf"

COMMON: dict[str, Any] = yaml.safe_load((CONF / "common" / "dataset.yaml").read_text()) | {
    "name": "set",
    "val_fraction": 0.25,
    "test_fraction": 0.25,
    "on_bad": OnBad.error,
    "verify": Verify.changed,
}
"""The values that the configuration gives; larger fractions, so that a few images are enough."""


def folder_spec(root: Path, **changes: Any) -> ImageFolderSpec:
    return ImageFolderSpec(**COMMON | {"root": str(root)} | changes)


def manifest_spec(file: Path, **changes: Any) -> ManifestSpec:
    return ManifestSpec(**COMMON | {"file": str(file)} | changes)


def digits_spec(**changes: Any) -> DigitsSpec:
    return DigitsSpec(**COMMON | {"name": "digits"} | changes)


def torchvision_spec(class_name: str, root: Path, **changes: Any) -> TorchvisionDatasetSpec:
    kind = {"class_name": class_name, "root": str(root), "train": {}, "val": None, "test": None, "download": False}
    return TorchvisionDatasetSpec(**COMMON | kind | changes)


def save_image(path: Path, seed: int = 0, size: tuple[int, int] = (12, 10)) -> Path:
    """Write a small image of noise; folders are made as needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path
