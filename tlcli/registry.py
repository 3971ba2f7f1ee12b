"""The options of each config group: the classes that are decorated with `@option` in the home module of the group."""

from importlib import import_module
from typing import Any, TypeVar

T = TypeVar("T", bound=type[Any])

HOMES = {
    "dataset": "tlcli.data.sources",
    "backbone": "tlcli.models.backbones",
    "optimizer": "tlcli.engine.optimizers",
    "scheduler": "tlcli.engine.schedule",
    "augment": "tlcli.data.augment",
    "freeze": "tlcli.transfer.freeze",
    "logger": "tlcli.runs.loggers",
}
"""The module that defines the options of each group. It imports without torch, for help and completion read it."""

_options: dict[str, dict[str, Any]] = {group: {} for group in HOMES}


def option(cls: T) -> T:
    """Register a class as an option of its group, under its tag."""
    _options[cls.group][cls.__struct_config__.tag] = cls
    return cls


def options(group: str) -> dict[str, Any]:
    """Return the class of each `kind` of a group."""
    import_module(HOMES[group])
    return _options[group]
