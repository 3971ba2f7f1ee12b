"""The predictions of a run for every image of a split, stored with the run: raw logits, labels and image names."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tlcli.data.images import Split
from tlcli.errors import TlcliError, UsageError
from tlcli.models.tensorfile import read_tensors, write_tensors

MAX_METADATA_CHARS = 60_000_000
"""Length of the metadata above which names are left out; safetensors takes 100 MB."""


@dataclass(frozen=True, eq=False)
class SplitPredictions:
    """Logits (N, C) float32 and labels (N) int64 of a split, in its order; keys and names have a string per row.

    A key does not change if the data moves: the path below the root of the dataset, or a name such as digits/17. A name
    is the path that the image had when the run read it.
    """

    logits: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    keys: tuple[str, ...]
    names: tuple[str, ...]

    @classmethod
    def of(cls, split: Split, logits: Tensor, labels: Tensor, classes: Sequence[str]) -> "SplitPredictions":
        """Return the predictions of a split."""
        keys, names = (tuple(of(i) for i in range(len(split))) for of in (split.key, split.name))
        return cls(logits, labels, tuple(classes), keys, names)


def write_predictions(path: Path, predictions: SplitPredictions) -> None:
    """Write predictions as safetensors, in one atomic step."""
    metadata: dict[str, Any] = {"classes": predictions.classes, "keys": predictions.keys, "names": predictions.names}
    if len(json.dumps(metadata)) > MAX_METADATA_CHARS:
        metadata["names"] = None
    write_tensors(path, {"logits": predictions.logits.float(), "labels": predictions.labels}, metadata)


def read_predictions(path: Path) -> SplitPredictions:
    """Return the predictions in a file. Raise UsageError if it is missing or damaged."""
    if not path.is_file():
        raise UsageError(f"{path}: no such file; runs of tlcli 0.3.0 and later write it when they are tested")
    try:
        tensors, metadata = read_tensors(path)
        logits, labels = tensors["logits"], tensors["labels"]
        classes, keys = _strings(metadata["classes"]), _strings(metadata["keys"])
        names = keys if metadata["names"] is None else _strings(metadata["names"])
        if not logits.is_floating_point() or labels.dtype != torch.int64:
            raise ValueError(f"logits are {logits.dtype}, labels {labels.dtype}")
        if not (logits.shape == (len(keys), len(classes)) and labels.shape == (len(keys),) and len(names) == len(keys)):
            raise ValueError(f"{tuple(logits.shape)} logits for {len(keys)} images and {len(classes)} classes")
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(classes):
            raise ValueError(f"labels beyond the {len(classes)} classes")
    except TlcliError as error:
        raise UsageError(str(error)) from error
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{path}: damaged, or not predictions of tlcli ({type(error).__name__}: {error})") from error
    return SplitPredictions(logits, labels, classes, keys, names)


def _strings(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError("classes, keys and names must be lists of strings")
    return tuple(value)
