"""A run's model in the formats of others. This module is light: what a format needs is looked at before torch is."""

from importlib.util import find_spec
from pathlib import Path

from tlcli.errors import UsageError
from tlcli.text import did_you_mean

FILES = {
    "onnx": "model.onnx",
    "torchscript": "model.torchscript.pt",
    "pt2": "model.pt2",
    "safetensors": "model.safetensors",
    "timm": "timm",
}
"""The formats, and the name that each has in a run's export/ directory."""

PREPROCESSES = ("onnx", "torchscript", "pt2")
"""The formats that hold a graph, in which normalisation can be a part."""

PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime")}
"""What a format needs that tlcli does not; onnxruntime is for the check."""


def check_format(name: str, *, with_preprocessing: bool) -> None:
    """Raise UsageError unless there is such a format, its packages are installed, and it can do what is asked."""
    if name not in FILES:
        raise UsageError(f"--to {name}: no such format.{did_you_mean(name, FILES)} Choose from {', '.join(FILES)}")
    if with_preprocessing and name not in PREPROCESSES:
        raise UsageError(
            f"--with-preprocessing goes with --to {', '.join(PREPROCESSES)}: {name} holds weights and no graph"
        )
    if missing := [package for package in PACKAGES.get(name, ()) if find_spec(package) is None]:
        raise UsageError(f"--to {name} needs {', '.join(missing)}: pip install 'tlcli[export]'")


def place_of(run: Path, to: str, output: Path | None = None) -> Path:
    """Where a run's export goes: where it is told to, else the run's own export/ directory."""
    return output or run / "export" / FILES[to]


def refuse_existing(path: Path) -> None:
    """Raise UsageError where there is something already: nothing is ever overwritten."""
    if path.exists() or path.is_symlink():
        raise UsageError(f"{path} is there already and stays as it is: give another --output")
