"""Checks of config files that are not tlcli's: they may set values of tlcli's keys, and very little for Hydra.

A config, like a checkpoint, can come from anyone. It cannot name code, read the environment, or change how Hydra runs.
"""

import os
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from tlcli import text
from tlcli.errors import UsageError
from tlcli.files import is_dir, read_yaml
from tlcli.runs.run_dir import SWEEP_FILE

_PLUGINS = "hydra_plugins.hydra_"
_SAMPLERS = "TPE Random Grid CmaEs NSGAII NSGAIII QMC GP BruteForce MOTPE PartialFixed"
ALLOWED_CLASSES = (  # that the config may name for Hydra itself: launchers, sweepers, samplers and callbacks
    "hydra._internal.core_plugins.basic_launcher.BasicLauncher",
    "hydra._internal.core_plugins.basic_sweeper.BasicSweeper",
    "hydra.experimental.callbacks.LogJobReturnCallback",
    f"{_PLUGINS}joblib_launcher.joblib_launcher.JoblibLauncher",
    f"{_PLUGINS}submitit_launcher.submitit_launcher.LocalLauncher",
    f"{_PLUGINS}submitit_launcher.submitit_launcher.SlurmLauncher",
    "hydra_plugins.tlcli.RayLauncher",
    f"{_PLUGINS}rq_launcher.rq_launcher.RQLauncher",
    f"{_PLUGINS}optuna_sweeper.optuna_sweeper.OptunaSweeper",
    f"{_PLUGINS}ax_sweeper.ax_sweeper.AxSweeper",
    f"{_PLUGINS}nevergrad_sweeper.nevergrad_sweeper.NevergradSweeper",
    *(f"optuna.samplers.{name}Sampler" for name in _SAMPLERS.split()),
)

# All that a file may say to Hydra. The choices of output and logging are those of train.yaml, for copies of it.
_ALLOWED_DEFAULT = re.compile(r"(override +)?/?hydra/(launcher: *[\w.-]+|output: *tlcli|(job|hydra)_logging: *none)")
_ALLOWED = re.compile(r"hydra\.launcher\.[^_.=][^.=]*=[\w.-]*")
_PARAMS = "hydra.sweeper.params."  # overrides of the jobs of a sweep
# What a recorded command line may say, too: it resumes a sweep in the folder that the user names
_OF_COMMAND = re.compile(
    r"\+*hydra\.launcher\.[^_.=][^.=]*=[\w.:-]*|hydra/launcher=[\w.-]+|hydra\.(mode|(run|sweep)\.dir|sweep\.subdir)=.*"
)
RECORD = re.compile(r"(?i)(?<![\w-])multirun(\.yaml)?(?![\w./-])")  # names multirun.yaml, which `check_folder` skips
_HARMLESS_CALL = re.compile(r"\$\{(now|hydra|oc\.select|oc\.dict\.(keys|values)):[^${}]*\}")


def check_folder(folder: Path, folders: Sequence[Path]) -> None:
    """Raise UsageError for a YAML file in a folder that is unreadable, has aliases, or sets what it must not.

    `folders` are all that Hydra searches.
    """
    seen: set[str] = set()
    for place, below, names in os.walk(folder, followlinks=True):  # Hydra follows links, too
        if (real := os.path.realpath(place)) in seen:
            below.clear()
            continue
        seen.add(real)
        below[:] = [name for name in below if name != ".hydra"]  # records of runs: no file may name them
        for file in sorted(Path(place, name) for name in names if name.lower().endswith(".yaml")):
            if file.name == "multirun.yaml" and (file.parent / SWEEP_FILE).exists():
                continue
            try:
                content = read_yaml(file)
            except (OSError, UnicodeDecodeError) as exc:
                reason = (exc.strerror or str(exc)).lower() if isinstance(exc, OSError) else "not UTF-8 text"
                raise UsageError(f"{file}: cannot be read as YAML: {reason}") from exc
            except ValueError as exc:
                tree = None
                with suppress(yaml.YAMLError, RecursionError):
                    tree = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
                # Hydra's loader takes mappings that this one refuses: dates of no calendar, pathlib's tags, %YAML 1.3
                if " alias *" in str(exc) or isinstance(tree, yaml.MappingNode):
                    raise UsageError(f"{file}: {exc}") from exc
                continue  # an error only if Hydra reads it, which reports it
            _check_content(file, file.relative_to(folder), content, folders)


def _check_content(file: Path, path: Path, content: dict[str, Any], folders: Sequence[Path]) -> None:
    """Raise UsageError if a file has to do with Hydra, wherever in the config its keys end up, or calls a function."""
    entries = content.pop("defaults", None)
    named, records = [str(path.parent), *re.findall(r"@package.*", file.read_text(encoding="utf-8"))], list[str]()
    for entry in entries if isinstance(entries, list) else [entries]:
        pairs = [f"{key}: {choice}" for key, choice in entry.items()] if isinstance(entry, dict) else [str(entry)]
        named += [pair for pair in pairs if not _ALLOWED_DEFAULT.fullmatch(pair)]
        records += filter(RECORD.search, pairs)
    refused = [text for text in named if re.search(r"(?i)hydra|\.\.|//|\$\{", text)]
    refused += records
    words = [f"{key}={value}" for key, value in leaves(content)]
    for word in words:
        if word.startswith("hydra") and not (word.startswith(_PARAMS) or _ALLOWED.fullmatch(word)):
            refused.append(word.partition("=")[0])
    if refused:
        allowed = "the choice of hydra/launcher, numbers and names under hydra.launcher, and hydra.sweeper.params"
        raise UsageError(f"{file}: {refused[0]} is refused: of Hydra's own settings a file may give {allowed}")
    for word in words:
        if _calls_function(word):
            reason = "a function that a file calls could save a secret with the run"
            raise UsageError(f"{file}: {word} is refused: {reason}; give the value on the command line")
    check_words([word.removeprefix(_PARAMS) for word in words if word.startswith(_PARAMS)], file, folders)


def check_words(words: Iterable[str], place: Path, folders: Sequence[Path], *, of_command: bool = False) -> None:
    """Raise UsageError for overrides in a file that only the command line may give.

    Unlike a key, an override can set all that Hydra has, and choose any file below the folders that Hydra searches.
    `of_command`: a recorded command line may name the launcher and the directories of a sweep.
    """
    refused = []
    for word in words:
        key, _, value = word.partition("=")
        group = key.lstrip("+~").partition("@")[0]
        is_group = any((folder / group).is_dir() for folder in folders)
        names_file = is_group and re.search(r"(?i)hydra|multirun|glob\s*\(|\.\.|//|\$", value)
        is_setting = re.search(r"(?i)^-|hydra", key) and not (of_command and _OF_COMMAND.fullmatch(word))
        if names_file or is_setting or _calls_function(word):
            refused.append(word)
    if refused:
        raise UsageError(f"{place}: refused in a file; give on the command line: {shlex.join(refused)}")


def return_to(folder: str, place: Path) -> None:
    """Change to the folder in which the sweep or search at `place` was started. Raise UsageError if it is not there.

    Processes that are started there import nothing from it.
    """
    if not is_dir(folder):
        raise UsageError(f"{place}: was started in {folder}, which is not there; create it, or a link with that name")
    os.environ["PYTHONSAFEPATH"] = "1"
    text.typed_in = text.typed_in or Path.cwd()
    os.chdir(folder)


def _calls_function(word: str) -> bool:
    r"""Return True if OmegaConf would call a function for a value. Hydra's grammar reads $\{ as ${."""
    return re.search(r"(?s)\$\\*\{.*:", _HARMLESS_CALL.sub("", word)) is not None


def refuse_code(values: Any) -> None:
    """Raise UsageError if plain values name a class or a function, except for the allowed ones of Hydra."""
    for key, value in leaves(values):
        name = key.rpartition(".")[2]
        if name in ("_target_", "()") and not (key.startswith("hydra.") and value in ALLOWED_CLASSES):
            raise UsageError(f"{key}={value} is refused: a config cannot name code to run")


def leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the full key of each value that is not a list or a mapping; an item of a list has its index as its key."""
    items = node if isinstance(node, Mapping) else dict(enumerate(node)) if isinstance(node, list | tuple) else None
    if items is None:
        yield prefix.rstrip("."), node
        return
    for key, value in items.items():
        yield from leaves(value, f"{prefix}{key}.")
