"""What a run's network gave for every image of a split, kept with the run: raw logits, and which image each row is."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tlcli.data.source import Split
from tlcli.errors import TlcliError, UsageError
from tlcli.models.tensorfile import read_tensors, write_tensors

LARGEST = 60_000_000
"""Characters of metadata up to which the names are written beside the keys; safetensors takes 100 MB."""


@dataclass(frozen=True, eq=False)
class SplitPredictions:
    """Logits (N, C) float32 and labels (N) int64 of a split, in its order; keys and names have a string a row.

    A key stays when the data moves: the path below the data set's root, or a name such as digits/17. A name is the
    path that the image had when the run read it.
    """

    logits: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    keys: tuple[str, ...]
    names: tuple[str, ...]

    @classmethod
    def of(cls, split: Split, logits: Tensor, labels: Tensor, classes: Sequence[str]) -> "SplitPredictions":
        """The logits and labels of a split, with the image of each row."""
        keys, names = (tuple(of(i) for i in range(len(split))) for of in (split.key, split.name))
        return cls(logits, labels, tuple(classes), keys, names)


def write_predictions(path: Path, predictions: SplitPredictions) -> None:
    """Write a split's predictions as safetensors, in one atomic step."""
    facts: dict[str, Any] = {"classes": predictions.classes, "keys": predictions.keys, "names": predictions.names}
    if len(json.dumps(facts)) > LARGEST:
        facts["names"] = None
    write_tensors(path, {"logits": predictions.logits.float(), "labels": predictions.labels}, facts)


def read_predictions(path: Path) -> SplitPredictions:
    """The predictions in a file of `write_predictions`.

    Raises UsageError where there is no such file, or where it is damaged.
    """
    if not path.is_file():
        raise UsageError(f"{path}: no such file; runs of tlcli 0.3.0 and later write it when they are tested")
    try:
        tensors, facts = read_tensors(path)
        return _checked(tensors["logits"], tensors["labels"], facts)
    except TlcliError as error:
        raise UsageError(str(error)) from error
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{path}: damaged, or no predictions of tlcli ({type(error).__name__}: {error})") from error


def _checked(logits: Tensor, labels: Tensor, facts: Mapping[str, Any]) -> SplitPredictions:
    """The predictions, once their parts are known to belong together; ValueError where they do not."""
    classes, keys = _texts(facts["classes"]), _texts(facts["keys"])
    names = keys if facts["names"] is None else _texts(facts["names"])
    if not logits.is_floating_point() or labels.dtype != torch.int64:
        raise ValueError(f"logits are {logits.dtype}, labels {labels.dtype}")
    if not (logits.shape == (len(keys), len(classes)) and labels.shape == (len(keys),) and len(names) == len(keys)):
        raise ValueError(f"{tuple(logits.shape)} logits for {len(keys)} images and {len(classes)} classes")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(classes):
        raise ValueError(f"labels beyond the {len(classes)} classes")
    return SplitPredictions(logits, labels, classes, keys, names)


def _texts(value: object) -> tuple[str, ...]:
    """The strings of a list; ValueError for anything else."""
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise ValueError("classes, keys and names are not all lists of texts")
    return tuple(value)
