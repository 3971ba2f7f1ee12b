"""What is looked at before a run's directory is made and before torch is imported."""

import sys
from pathlib import Path

from tlcli import __version__
from tlcli.data.listing import check_dataset
from tlcli.errors import UsageError
from tlcli.runs.loggers import check_logger
from tlcli.runs.run_dir import RunDir
from tlcli.specs import TrainSpec

WEIGHT_FILES = (".safetensors", ".pth", ".pt")


def check(spec: TrainSpec) -> None:
    """Raise UsageError where the data set, the weights or the package that a spec names are not there."""
    check_logger(spec.logger)
    check_dataset(spec.dataset)
    check_weights(spec.backbone.weights)


def check_weights(weights: str) -> None:
    """Raise UsageError unless this is `default`, `none`, a file of weights or a run's directory."""
    if weights in ("default", "none"):
        return
    path = Path(weights).expanduser()
    key = f"backbone.weights={weights}"
    if path.is_dir():
        if not RunDir(path).best_checkpoint.is_file():
            raise UsageError(f"{key}: no checkpoints/best.safetensors here; give the directory of a finished run")
    elif not path.exists():
        raise UsageError(f"{key}: no such file or run; give default, none, a weights file or a run directory")
    elif path.suffix not in WEIGHT_FILES:
        raise UsageError(f"{key}: not a file of weights; these end in {', '.join(WEIGHT_FILES)}")


def first_line(spec: TrainSpec) -> str:
    """What a run is, in one line."""
    return f"tlcli {__version__}: {spec.dataset.name} {arrow()} {spec.backbone.name}, freeze={spec.freeze.kind}"


def arrow() -> str:
    """An arrow that the terminal's encoding has."""
    return "→" if (sys.stdout.encoding or "").lower().startswith("utf") else "->"
