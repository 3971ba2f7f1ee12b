"""What a run's result depends on beside its config: its images, and the machine. For a run that goes on later."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from tlcli import __version__
from tlcli.data.dataset import Dataset
from tlcli.data.source import Split
from tlcli.device import machine_name
from tlcli.errors import UsageError

SPLITS = ("train", "val", "test")
DIGITS = 16
"""Of a class's fingerprint: for telling a change, not for keeping somebody out."""


def images_of(data: Dataset) -> dict[str, Any]:
    """The classes, and for each split and class the number of images and their fingerprint."""
    return {
        "classes": list(data.classes),
        **{name: _by_class(getattr(data, name), len(data.classes)) for name in SPLITS},
    }


def _by_class(split: Split, classes: int) -> list[list[Any]]:
    places = [np.flatnonzero(split.labels == label) for label in range(classes)]
    return [[len(own), split.fingerprint(own)[:DIGITS]] for own in places]


def require_same_images(then: Mapping[str, Any], data: Dataset, where: str) -> None:
    """Raise UsageError, with what changed, unless these are the images of `images_of`."""
    if changes := list(_changes(then, images_of(data))):
        more = f" and {len(changes) - 3} more changes" if len(changes) > 3 else ""
        raise UsageError(
            f"{where}: the data set is not the one that the run began with: {'; '.join(changes[:3])}{more}. "
            f"Put it back as it was, or start a new run"
        )


def _changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """A line for each class of a split that differs."""
    if then["classes"] != now["classes"]:
        gone = [name for name in then["classes"] if name not in now["classes"]]
        new = [name for name in now["classes"] if name not in then["classes"]]
        words = [f"classes {what}: {', '.join(names[:5])}" for what, names in (("gone", gone), ("new", new)) if names]
        yield "; ".join(words) or "its classes are in another order"
        return
    for split in SPLITS:
        for name, (count, content), (count_now, content_now) in zip(
            now["classes"], then[split], now[split], strict=True
        ):
            if count != count_now:
                yield f"{split} has {count_now:,} images of {name}, it had {count:,}"
            elif content != content_now:
                yield f"images of {name} in {split} have other names or contents"


def machine_of(accelerator: torch.device) -> dict[str, Any]:
    """What decides on the last bit of a result: two machines that agree in it are taken to compute alike."""
    return {
        "tlcli": __version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": accelerator.type,
        "machine": machine_name(accelerator),
    }


def machine_changes(then: Mapping[str, Any], accelerator: torch.device) -> list[str]:
    """`torch 2.13.0, then 2.12.1` for each thing that is not as it was."""
    now = machine_of(accelerator)
    names = {"device": "the device is", "machine": "the machine is"}
    before = {"tlcli": "0.4.0", **then}  # which did not say so
    return [f"{names.get(key, key)} {now[key]}, it was {before[key]}" for key in now if before.get(key) != now[key]]
