"""From argv to a TrainSpec: the flags, the composed config, and its conversion."""

import argparse
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union

import msgspec
import yaml  # type: ignore[import-untyped]
from hydra import initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.types import RunMode
from msgspec import structs
from omegaconf import DictConfig, OmegaConf, grammar_parser
from omegaconf.grammar.gen.OmegaConfGrammarParser import OmegaConfGrammarParser

from tlcli.cli.conf_files import MAIN, ConfFiles, conf_dir
from tlcli.cli.explain import explain, explain_value, out_of_range, unknown_key
from tlcli.cli.yaml_size import check_yaml
from tlcli.errors import UsageError
from tlcli.registry import HOMES
from tlcli.specs import TrainSpec, classes_of
from tlcli.text import did_you_mean, flat_keys

RESOLVERS = frozenset(
    {"now", "hydra", "python_version", "oc.select", "oc.dict.keys", "oc.dict.values", "oc.deprecated"}
)
"""What a config file may call to compute a value: nothing that reads anything but the config and the clock."""

TRUSTED = ("hydra._internal.core_plugins.", "hydra.experimental.callbacks.", "hydra_plugins.")
"""Where a class may come from that the config names for Hydra itself: its sweeper, launcher and callbacks."""

REFUSED_FLAGS = ("--config-path", "--experimental-rerun")
"""Flags of Hydra that tlcli lacks: the one would replace conf/, the other unpickles a file."""


@dataclass(frozen=True)
class Flags:
    """What argv asks of Hydra. `flags`: its words that are no overrides; `runs`: whether something is to be run."""

    flags: tuple[str, ...]
    overrides: tuple[str, ...]
    config_name: str
    config_dir: Path | None
    multirun: bool
    runs: bool

    @property
    def files(self) -> ConfFiles:
        """The YAML files that these flags make available."""
        return ConfFiles([conf_dir(), *([self.config_dir] if self.config_dir else [])])


def parse_flags(argv: Sequence[str]) -> Flags:
    """Read Hydra's flags. Flags and overrides may stand in any order. Raises UsageError."""
    parser = get_args_parser()
    parser.exit_on_error = False
    try:
        args, strange = parser.parse_known_intermixed_args([_at_home(word) for word in argv])
    except argparse.ArgumentError as exc:
        raise UsageError(str(exc).removeprefix("argument ")) from exc
    strange += [flag for flag in REFUSED_FLAGS if getattr(args, flag[2:].replace("-", "_"))]
    if strange:
        known = {flag for action in parser._actions for flag in action.option_strings}.difference(REFUSED_FLAGS)
        raise UsageError(f"unknown flag {strange[0]!r}.{did_you_mean(strange[0], known)}")
    if args.resolve and not args.cfg:
        raise UsageError("--resolve goes with --cfg job")
    folder = Path(args.config_dir).absolute() if args.config_dir else None
    if folder and not folder.is_dir():
        raise UsageError(f"--config-dir={args.config_dir}: there is no such folder")
    shows = args.cfg or args.info or args.hydra_help or args.shell_completion
    return Flags(
        flags=tuple(_without(argv, args.overrides)),
        overrides=tuple(args.overrides),
        config_name=args.config_name or MAIN.removesuffix(".yaml"),
        config_dir=folder,
        multirun=args.multirun or "hydra.mode=MULTIRUN" in args.overrides,
        runs=not shows,
    )


def _at_home(word: str) -> str:
    """KEY=~/PLACE with the home directory written out, which shells do only at the start of a word."""
    key, equals, value = word.partition("=")
    return f"{key}={Path(value).expanduser()}" if equals and value.startswith("~/") else word


def _without(argv: Sequence[str], overrides: Sequence[str]) -> Iterator[str]:
    """The words that are no overrides."""
    left = list(overrides)
    for word in map(_at_home, argv):
        if word in left:
            left.remove(word)
        else:
            yield word


def composed(flags: Flags) -> DictConfig:
    """Return the whole config, Hydra's own node included; for a sweep, what its jobs share. Raises UsageError."""
    return compose_for_launch(flags)[0]


def compose_for_launch(flags: Flags) -> tuple[DictConfig, ConfigLoader]:
    """Return the whole config, and the loader with which Hydra composes the config of each job of a sweep.

    It is checked before Hydra makes an object of any class that the config names. Raises UsageError.
    """
    for folder in _folders_of_others(flags):
        _check_files(folder)
    parsed = [parse_override(override, flags.files) for override in flags.overrides]
    overrides = _with_searchpath([str(override.input_line) for override in parsed], flags.config_dir)
    mode = RunMode.MULTIRUN if flags.multirun else RunMode.RUN
    with initialize_config_dir(str(conf_dir()), job_name="tlcli", version_base="1.3"):
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        config = hydra.compose_config(flags.config_name, overrides, mode, from_shell=False)
        loader = hydra.config_loader
    refuse_code(config)
    refuse_environment(config, flags.overrides)
    HydraConfig.instance().set_config(config)  # for references to it in the names of directories
    return config, loader


def _folders_of_others(flags: Flags) -> Iterator[Path]:
    """The folders of config files that the command line names: none of these files is tlcli's own."""
    if flags.config_dir:
        yield flags.config_dir
    for override in flags.overrides:
        if override.startswith("hydra.searchpath="):
            yield from (Path(found) for found in re.findall(r"file://([^'\",\]]+)", override))


def _check_files(folder: Path) -> None:
    """Raise UsageError for a file in a folder of configs that cannot be read, or stands for too much."""
    for file in sorted(folder.rglob("*.yaml")):
        try:
            check_yaml(file)
        except yaml.YAMLError:
            continue  # of no concern unless it is composed, and then Hydra says so
        except (OSError, UnicodeDecodeError) as exc:
            why = getattr(exc, "strerror", None) or "not UTF-8 text"
            raise UsageError(f"{file}: cannot be read as YAML: {why.lower()}") from exc


@contextmanager
def composing(files: ConfFiles) -> Iterator[None]:
    """Turn what Hydra, OmegaConf and PyYAML raise within into usage errors of one line."""
    try:
        yield
    except Exception as exc:
        # a plain ValueError is Hydra's about its flags
        message = explain(exc, files) or (str(exc) if type(exc) is ValueError else None)
        if message is None:
            raise
        raise UsageError(message) from exc


def _with_searchpath(overrides: list[str], folder: Path | None) -> list[str]:
    """The overrides with --config-dir among them, for `compose` has no such argument."""
    if folder is None:
        return overrides
    own = [o for o in overrides if o.startswith("hydra.searchpath=[")]
    others = [o for o in overrides if o not in own]
    more = "," + own[0].split("[", 1)[1].rstrip("]") if own else ""
    return [*others, f"hydra.searchpath=[{quoted(f'file://{folder}')}{more}]"]


PATH_KEYS = ("dataset.root", "dataset.file", "backbone.weights", "logger.uri")
"""Keys whose values are paths, relative to the folder in which the run was started."""


def resolve_paths(values: Any, folder: Path) -> None:
    """Make the relative paths in the values of a config absolute, in place."""
    for key in PATH_KEYS:
        group, _, name = key.partition(".")
        node = values.get(group)
        text = node.get(name) if isinstance(node, dict | DictConfig) else None
        if not isinstance(text, str) or not text or text.startswith(("~", "${")):
            continue
        scheme, path = ("sqlite:///", text[10:]) if text.startswith("sqlite:///") else ("", text)
        no_path = {"backbone.weights": ("default", "none"), "logger.uri": ("databricks",)}.get(key, ())
        if path not in no_path and (scheme or "://" not in text):
            node[name] = f"{scheme}{folder / path}"


def quoted(text: object) -> str:
    """A text as a value of an override that is nothing but text."""
    return "'" + str(text).replace("'", "\\'") + "'"


def parse_override(text: str, files: ConfFiles) -> Override:
    """One override, parsed. UsageError where it cannot be read, or gives a group something that is not an option."""
    if text.startswith("=") or not text.strip():
        raise UsageError(f"cannot read {text!r}: write KEY=VALUE or GROUP=OPTION")
    override: Override = OverridesParser.create().parse_overrides([text])[0]
    group = override.key_or_group
    owner, _, name = group.rpartition(".")
    if owner in HOMES and name == "kind":
        raise UsageError(f"{text}: the kind follows from the option; choose one with {owner}=...")
    if group in files.groups and not override.is_sweep_override():
        value = override.value()
        optional = files.defaults.get(group, "null") == "null"
        if isinstance(value, bool | int | float) or (value is None and not optional):
            shown = override.get_value_element_as_str()
            raise UsageError(f"{group} has no option '{shown}'. Choose from {', '.join(files.groups[group])}")
        if isinstance(value, list) and not optional:
            swept = text.translate({ord("["): None, ord("]"): None})
            raise UsageError(f"{text}: {group} takes one option; to sweep over several, tlcli train -m {swept}")
    return override


def refuse_code(config: DictConfig) -> None:
    """Raise UsageError where the config names a class or a function, but for Hydra's own parts."""
    plain = OmegaConf.to_container(config, resolve=False)
    assert isinstance(plain, dict)
    for key, target in named_code(plain):
        if not key.startswith("hydra.") or not str(target).startswith(TRUSTED):
            raise UsageError(f"{key}={target} is refused: a config cannot name code to run")


def refuse_environment(config: DictConfig, overrides: Sequence[str]) -> None:
    """Raise UsageError where a config file would have a value computed from what is outside of the config.

    The value of ${oc.env:TOKEN} would be saved with the run. Whoever types it on the command line wants that; a file
    may be from anybody.
    """
    for key, text in references(OmegaConf.to_container(config, resolve=False)):
        for name, call in calls(text):
            if name not in RESOLVERS and not any(_blankless(call) in _blankless(override) for override in overrides):
                raise UsageError(
                    f"{key}={text} is refused: a config file that calls {name} could have a secret saved with the run; "
                    f"give the value on the command line"
                )


def _blankless(text: str) -> str:
    return "".join(text.split())


def references(node: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """The keys whose values OmegaConf would replace by something else, and these values: ${oc.env:HOME}."""
    if isinstance(node, str) and "${" in node:
        yield prefix.rstrip("."), node
    if isinstance(node, list):
        node = dict(enumerate(node))
    if isinstance(node, dict):
        for key, value in node.items():
            yield from references(value, f"{prefix}{key}.")


def calls(text: str) -> Iterator[tuple[str, str]]:
    """The functions that a text of OmegaConf's grammar calls, and each call: oc.env and ${oc.env:HOME}. A name may have
    references in it."""
    waiting: list[Any] = [grammar_parser.parse(text)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, OmegaConfGrammarParser.InterpolationResolverContext):
            named: Any = node
            yield named.resolverName().getText(), named.getText()
        waiting += getattr(node, "children", None) or []


def named_code(node: Any, prefix: str = "") -> Iterator[tuple[str, object]]:
    """The keys that name a class or a function to whoever makes objects from a config, and what they name."""
    if isinstance(node, list):
        node = dict(enumerate(node))
    if isinstance(node, dict):
        for key, value in node.items():
            if key in ("_target_", "()"):
                yield f"{prefix}{key}", value
            yield from named_code(value, f"{prefix}{key}.")


def build(config: DictConfig, files: ConfFiles | None = None) -> TrainSpec:
    """Return the spec of a composed config.

    Raises UsageError for a value that is missing, of a wrong type or out of its range, and for an unknown key.
    """
    files = files or ConfFiles([conf_dir()])
    task = config.copy()
    OmegaConf.set_struct(task, False)
    task.pop("hydra", None)
    with composing(files):
        values = OmegaConf.to_container(task, resolve=True, throw_on_missing=True)
    assert isinstance(values, dict)
    known = {field.name: field.type for field in structs.fields(TrainSpec)}
    for key in values:
        if key not in known:
            raise UsageError(f"unknown key {key!r}.{unknown_key(str(key), files)}{origin(str(key), config, files)}")
    built = {}
    for key, hint in known.items():
        if key not in values:
            raise UsageError(f"{key} has no value yet; give it one: {key}=...")
        hint = Union[tuple(classes_of(key).values())] if key in HOMES else hint  # noqa: UP007
        try:
            built[key] = msgspec.convert(values[key], hint, strict=False)
        except msgspec.ValidationError as exc:
            found, message = explain_value(exc, key, values[key], files)
            raise UsageError(message + origin(found, config, files)) from exc
    for key, value in flat_keys(msgspec.to_builtins(built)).items():
        for item in value if isinstance(value, list | tuple) else [value]:
            if isinstance(item, float) and not math.isfinite(item):  # ranges of msgspec let NaN and infinity pass
                raise UsageError(out_of_range(key, item))
    return TrainSpec(**built)


def origin(key: str, config: DictConfig, files: ConfFiles) -> str:
    """Return " (in FILE)" if a chosen file of the user, and no word of the command line, sets this key, else ""."""
    words = OmegaConf.select(config, "hydra.overrides.task") or []
    if any(word.lstrip("+").startswith((f"{key}=", f"{key}.")) for word in words):
        return ""
    for group, name in (OmegaConf.select(config, "hydra.runtime.choices") or {}).items():
        option = files.groups.get(group, {}).get(name)
        if option is None or option.path.is_relative_to(conf_dir()):
            continue
        own = yaml.safe_load(option.text)
        if isinstance(own, dict) and {key, key.removeprefix(f"{group}.")} & {*own, *flat_keys(own)}:
            return f" (in {group}/{name}.yaml)"
    return ""
