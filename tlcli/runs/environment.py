"""What a run ran on and with, for its record."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from tlcli import __version__
from tlcli.device import processor_name

PACKAGES = ("torch", "torchvision", "timm", "hydra-core", "omegaconf", "numpy", "scikit-learn", "Pillow", "safetensors")


def environment() -> dict[str, Any]:
    """Versions, machine and git commit; no host name, user name or environment variable among them."""
    return {
        "versions": {"tlcli": __version__, "python": platform.python_version(), **_versions()},
        "machine": {
            "system": platform.system(),
            "architecture": platform.machine(),
            "processor": processor_name(),
            "cores": os.cpu_count(),
        },
        "git_commit": _git_commit(),
    }


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _git_commit() -> str | None:
    """The commit that is checked out in the working directory, where there is one."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
