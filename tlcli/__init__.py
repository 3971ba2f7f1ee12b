"""Transfer learning for image classification from the shell, driven by YAML."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from tlcli.runs.load import LoadedRun

__version__ = "0.5.0"


def load_run(path: "str | Path", checkpoint: str = "best") -> "LoadedRun":
    """A finished run's model, preprocessing and classes: `tlcli.load_run(RUN).predict("image.jpg")`.

    `checkpoint` is `best` or `last`. Raises UsageError, one line, where there is no run, or no such checkpoint.
    """
    from tlcli.runs.load import load_run  # here: whoever wants the version alone need not wait for torch

    return load_run(path, checkpoint)
