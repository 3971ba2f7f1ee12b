"""What of this machine matters to tlcli, and what does not work here: for the user, and to paste into an issue.

Each check stands alone, so that one that fails hides no other. Nothing is fetched, and nothing is left behind. Home
directories and the user's name are written as ~ and $USER.
"""

from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path

from tlcli.doctor.findings import Fact, Finding, Problem, private
from tlcli.doctor.system import cache, disk, machine, settings, versions

__all__ = ["Fact", "Finding", "Problem", "examine"]

Check = Callable[[], Iterator[Finding]]


def examine(outputs: Path, backbones: Mapping[str, str]) -> list[Finding]:
    """Everything that the checks find, in their order.

    Args:
        outputs: where runs are written.
        backbones: the options of backbone=, and the kind of each.
    """
    checks: dict[str, Check] = {
        "versions": versions,
        "machine": machine,
        "settings": settings,
        "outputs": lambda: disk(outputs),
        "cache": cache,
        "PyTorch": lambda: _with_torch(backbones),
    }
    return [finding for name, check in checks.items() for finding in _guarded(name, check)]


def _guarded(name: str, check: Check, *, needed: bool = False) -> Iterator[Finding]:
    """What a check finds, and its own failure as a problem."""
    try:
        yield from check()
    except Exception as error:
        yield Problem(f"{name}: the check failed ({_reason(error)})", needed)


def _with_torch(backbones: Mapping[str, str]) -> Iterator[Finding]:
    """The checks that need PyTorch, or the reason why it does not load."""
    try:
        libraries = import_module("tlcli.doctor.libraries")
    except Exception as error:  # a missing library, a wrong build: whatever it is, it is the answer
        advice = "pip install --force-reinstall torch torchvision timm"
        yield Problem(f"PyTorch, or what builds on it, does not load ({_reason(error)}): {advice}", True)
        return
    yield from _guarded("devices", libraries.devices)
    yield from _guarded("weights", lambda: libraries.weights(backbones))
    yield from _guarded("precision", libraries.precision)
    yield from _guarded("network", libraries.trial, needed=True)


def _reason(error: Exception) -> str:
    """An exception in one line."""
    return private(f"{type(error).__name__}: {' '.join(str(error).split())}"[:300])
