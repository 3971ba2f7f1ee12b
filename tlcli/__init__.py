"""Transfer learning for image classification from the shell, driven by YAML."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from tlcli.runs.load import LoadedRun

__version__ = "0.26.0"


def load_run(path: "str | Path", checkpoint: str = "best") -> "LoadedRun":
    """Return the model, preprocessing and classes of a run: `tlcli.load_run(RUN).predict("image.jpg")`.

    `checkpoint` is `best` or `last`. Raises UsageError if there is no run or no such checkpoint.
    """
    from tlcli.runs.load import load_run  # imports torch

    return load_run(path, checkpoint)
