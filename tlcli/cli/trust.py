"""What config files that are not tlcli's may do: set values of tlcli's keys, and very little of Hydra's own node.

A config, like a checkpoint, can come from anyone. It cannot name code, read the environment, or change how Hydra runs.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, grammar_parser
from omegaconf.grammar.gen.OmegaConfGrammarParser import OmegaConfGrammarParser

from tlcli.errors import UsageError
from tlcli.files import read_yaml

RESOLVERS = frozenset(
    {"now", "hydra", "python_version", "oc.select", "oc.dict.keys", "oc.dict.values", "oc.deprecated"}
)
"""Functions that a file may call to compute a value: they read only the config and the clock."""

_PLUGINS = "hydra_plugins.hydra_"
_SAMPLERS = "TPE Random Grid CmaEs NSGAII NSGAIII QMC GP BruteForce MOTPE PartialFixed"
ALLOWED_CLASSES = frozenset(
    {
        "hydra._internal.core_plugins.basic_launcher.BasicLauncher",
        "hydra._internal.core_plugins.basic_sweeper.BasicSweeper",
        "hydra.experimental.callbacks.LogJobReturnCallback",
        "hydra.experimental.callbacks.PickleJobInfoCallback",
        f"{_PLUGINS}joblib_launcher.joblib_launcher.JoblibLauncher",
        f"{_PLUGINS}submitit_launcher.submitit_launcher.LocalLauncher",
        f"{_PLUGINS}submitit_launcher.submitit_launcher.SlurmLauncher",
        f"{_PLUGINS}ray_launcher.ray_launcher.RayLauncher",
        f"{_PLUGINS}rq_launcher.rq_launcher.RQLauncher",
        f"{_PLUGINS}optuna_sweeper.optuna_sweeper.OptunaSweeper",
        f"{_PLUGINS}ax_sweeper.ax_sweeper.AxSweeper",
        f"{_PLUGINS}nevergrad_sweeper.nevergrad_sweeper.NevergradSweeper",
        *(f"optuna.samplers.{name}Sampler" for name in _SAMPLERS.split()),
    }
)
"""The classes that the config may name for Hydra itself: launchers, sweepers, samplers and callbacks."""

OWN_DEFAULTS = {"hydra/output": "tlcli", "hydra/job_logging": "none", "hydra/hydra_logging": "none"}
"""Choices of Hydra's groups in train.yaml, which a copy of it may repeat."""

_NAME = re.compile(r"[\w.-]+")


def check_folder(folder: Path) -> None:
    """Raise UsageError for a YAML file in a folder that is unreadable, has aliases, or sets what it must not."""
    seen: set[str] = set()
    for place, folders, names in os.walk(folder, followlinks=True):  # Hydra follows links, too
        if (real := os.path.realpath(place)) in seen:
            folders.clear()
            continue
        seen.add(real)
        for file in sorted(Path(place, name) for name in names if name.endswith(".yaml")):
            try:
                content = read_yaml(file)
            except UnicodeDecodeError as exc:
                raise UsageError(f"{file}: cannot be read as YAML: not UTF-8 text") from exc
            except OSError as exc:
                raise UsageError(f"{file}: cannot be read as YAML: {(exc.strerror or str(exc)).lower()}") from exc
            except ValueError as exc:
                if " alias *" in str(exc):
                    raise UsageError(f"{file}: {exc}") from exc
                continue  # an error only if Hydra reads it, which reports it
            _check_content(file, file.relative_to(folder), content)


def _check_content(file: Path, path: Path, content: dict[str, Any]) -> None:
    """Raise UsageError if a file sets what is Hydra's own, wherever in the config its keys end up."""
    in_launcher = path.parts[:2] == ("hydra", "launcher")
    packages = re.findall(r"^\s*#.*@package\s*:?\s*(.*)", file.read_text(encoding="utf-8"), re.MULTILINE)
    if ("hydra" in path.parts[:-1] and not in_launcher) or (in_launcher and packages):
        _refuse(file, path.with_suffix("").as_posix())
    for package in packages:
        if "hydra" in package:
            _refuse(file, f"@package {package}")
    entries = content.get("defaults")
    for entry in entries if isinstance(entries, list) else []:
        for key, choice in entry.items() if isinstance(entry, dict) else [(entry, "")]:
            group = re.sub(r"^(override|optional) +|^/", "", str(key)).lstrip("/")
            named = f"{key} {choice}"
            own = group == "hydra/launcher" or OWN_DEFAULTS.get(group) == choice
            if ".." in named or (in_launcher and re.search(r"[@/]", named)):
                _refuse(file, f"{key} in its defaults")
            if ("hydra" in str(key) or "${" in str(key)) and not (own and _NAME.fullmatch(str(choice))):
                _refuse(file, f"{key} in its defaults")
    node = {"launcher": {key: v for key, v in content.items() if key != "defaults"}} if in_launcher else {}
    hydra = node or content.get("hydra") or {}
    for key, value in hydra.items() if isinstance(hydra, dict) else [("", hydra)]:
        for name, item in value.items() if isinstance(value, dict) else [("", value)]:
            plain = item is None or isinstance(item, bool | int | float) or _NAME.fullmatch(str(item))
            allowed = key == "launcher" and name and plain and not str(name).startswith("_")
            if key == "sweeper" and name == "params" and isinstance(item, dict):
                allowed = not any(str(param).lstrip("+~").startswith("hydra") for param in item)
            if not allowed:
                _refuse(file, f"hydra.{key}.{name}".rstrip("."))


def _refuse(file: Path, what: str) -> None:
    raise UsageError(
        f"{file}: {what} is refused: of Hydra's own settings a file may give the choice of hydra/launcher, numbers and "
        "names under hydra.launcher, and hydra.sweeper.params; give the rest on the command line"
    )


def refuse_code(values: Any) -> None:
    """Raise UsageError if plain values name a class or a function, except for the allowed ones of Hydra."""
    for key, value in _leaves(values):
        name = key.rpartition(".")[2]
        if name in ("_target_", "()") and not (key.startswith("hydra.") and value in ALLOWED_CLASSES):
            raise UsageError(f"{key}={value} is refused: a config cannot name code to run")


def refuse_environment(config: DictConfig, overrides: Sequence[str]) -> None:
    """Raise UsageError if a file has a value computed from anything outside of the config.

    The value of ${oc.env:TOKEN} would be saved with the run. A user who types it on the command line wants that.
    """
    typed = ["".join(override.split()) for override in overrides]
    for key, text in references(OmegaConf.to_container(config, resolve=False)):
        waiting: list[Any] = [grammar_parser.parse(text)]
        while waiting:
            node = waiting.pop()
            waiting += getattr(node, "children", None) or []
            if not isinstance(node, OmegaConfGrammarParser.InterpolationResolverContext):
                continue
            call: Any = node
            name, words = call.resolverName().getText(), "".join(call.getText().split())
            if name not in RESOLVERS and not any(words in override for override in typed):
                raise UsageError(
                    f"{key}={text} is refused: a config file that calls {name} could have a secret saved with the run; "
                    f"give the value on the command line"
                )


def references(values: Any) -> Iterator[tuple[str, str]]:
    """Yield the keys whose values OmegaConf would compute, and these values: ${oc.env:HOME}."""
    return ((key, value) for key, value in _leaves(values) if isinstance(value, str) and "${" in value)


def _leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the full key of each value that is not a list or a mapping; an item of a list has its index as its key."""
    items = node if isinstance(node, Mapping) else dict(enumerate(node)) if isinstance(node, list) else None
    if items is None:
        yield prefix.rstrip("."), node
        return
    for key, value in items.items():
        yield from _leaves(value, f"{prefix}{key}.")
