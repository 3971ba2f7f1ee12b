"""From argv to a TrainSpec: the flags, the composed config, and its conversion."""

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any, Union

import msgspec
import yaml  # type: ignore[import-untyped]
from hydra import initialize_config_dir
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, QuotedString
from hydra.errors import OverrideParseException
from hydra.types import RunMode
from msgspec import structs
from omegaconf import DictConfig, OmegaConf

from tlcli.cli.conf_files import MAIN, ConfFiles, conf_dir
from tlcli.cli.explain import error_message, explain_value, out_of_range, unknown_key
from tlcli.cli.helptext import train_parser
from tlcli.cli.trust import check_folder, refuse_code, refuse_environment
from tlcli.errors import UsageError
from tlcli.registry import HOMES
from tlcli.specs import TrainSpec, classes_of, leaf_types
from tlcli.text import flat_keys


@dataclass(frozen=True)
class Flags:
    """What argv asks of Hydra. `flags`: the words that are not overrides; `runs`: whether anything is to be run."""

    flags: tuple[str, ...]
    overrides: tuple[str, ...]
    config_name: str = MAIN.removesuffix(".yaml")
    config_dir: Path | None = None
    multirun: bool = False
    runs: bool = False

    @property
    def files(self) -> ConfFiles:
        """The YAML files that these flags make available."""
        return ConfFiles([conf_dir(), *([self.config_dir] if self.config_dir else [])])


def parse_flags(argv: Sequence[str]) -> Flags:
    """Read the flags of `tlcli train`. Flags and overrides may stand in any order. Raises UsageError."""
    words = []
    for word in argv:  # KEY=~/PLACE with the home directory, which shells write out only at the start of a word
        key, equals, value = word.partition("=")
        words.append(f"{key}={Path(value).expanduser()}" if equals and value.startswith("~/") else word)
    parser = train_parser()
    args = parser.parse_intermixed_args(words)
    if args.resolve and not args.cfg:
        raise UsageError("--resolve goes with --cfg job")
    folder = Path(args.config_dir).absolute() if args.config_dir else None
    if folder and not folder.is_dir():
        raise UsageError(f"--config-dir={args.config_dir}: no such folder")
    flags = list(words)
    for override in args.overrides:
        flags.remove(override)
    return Flags(
        flags=tuple(flags),
        overrides=tuple(_text_as_typed(override) for override in args.overrides),
        config_name=args.config_name or MAIN.removesuffix(".yaml"),
        config_dir=folder,
        multirun=args.multirun or "hydra.mode=MULTIRUN" in args.overrides,
        runs=not (args.cfg or args.info or args.hydra_help or args.shell_completion),
    )


def _text_as_typed(override: str) -> str:
    """Quote the values of a key whose type is text where Hydra would read a number or a truth value: 2024_01, true."""
    key, equals, value = override.partition("=")
    name = key.lstrip("+~").partition("@")[0]
    types = leaf_types(name) or leaf_types(name.rpartition(".")[0])  # backbone.stages.stem is an entry of a dict
    return key + equals + _quote_words(value) if equals and str in [hint for hint, _ in types] else override


def _quote_words(text: str) -> str:
    """Quote the words of a value, of a list of values to sweep over, and of lists within it."""
    words, depth, quote, start = [], 0, "", 0
    for i, char in enumerate(f"{text},"):
        if quote:
            quote = "" if char == quote and text[i - 1] != "\\" else quote
        elif char in "'\"" and not text[start:i].strip(" [{("):
            quote = char
        elif char in "[{(":
            depth += 1
        elif char in "]})":
            depth -= 1
        elif char == "," and depth <= 0:
            words.append(text[start:i].strip())
            start = i + 1
    if start <= len(text):  # a quote or a bracket is open: for Hydra's parser to report, unless it is a part of a name
        return text if text[:1] in "'\"[{" else quoted(text)
    return ",".join(map(_quote_word, words))


def _quote_word(word: str) -> str:
    if word[:1] == "[" and word[-1:] == "]":
        return f"[{_quote_words(word[1:-1])}]" if word[1:-1].strip() else word
    if found := re.fullmatch(r"choice\((.*)\)", word):  # in which Hydra would drop the quotes
        return _quote_words(found[1])
    try:
        value = OverridesParser.create().parse_overrides([f"key={word}"])[0].value()
    except OverrideParseException:
        return quoted(word)
    if value is None or isinstance(value, str | QuotedString | dict) or re.match(r"\w+\(", word) or "${" in word:
        return word  # nothing to mend, or a function of Hydra's grammar, such as glob(*)
    return quoted(word)


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
    """Return a text as a value of an override that is nothing but text."""
    return "'" + re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), str(text)) + "'"


def compose_config(flags: Flags) -> DictConfig:
    """Return the whole config, with Hydra's own node; for a sweep, what its jobs share. Raises UsageError."""
    return compose_for_launch(flags)[0]


def compose_for_launch(flags: Flags) -> tuple[DictConfig, ConfigLoader]:
    """Return the whole config, and the loader with which Hydra composes the config of each job of a sweep.

    It is checked before Hydra makes an object of any class that the config names. Raises UsageError.
    """
    with composing(flags.files):
        for folder in _third_party_folders(flags):
            check_folder(folder)
        parsed = [parse_override(override, flags.files) for override in flags.overrides]
        overrides = _with_searchpath([str(override.input_line) for override in parsed], flags.config_dir)
        mode = RunMode.MULTIRUN if flags.multirun else RunMode.RUN
        with initialize_config_dir(str(conf_dir()), job_name="tlcli", version_base="1.3"):
            hydra = GlobalHydra.instance().hydra
            assert hydra is not None
            config = hydra.compose_config(flags.config_name, overrides, mode, from_shell=False)
            loader = hydra.config_loader
        refuse_code(OmegaConf.to_container(config, resolve=False))
        refuse_environment(config, flags.overrides)
    HydraConfig.instance().set_config(config)  # for references to it in the names of directories
    return config, loader


def compose_spec(flags: Flags) -> tuple[DictConfig, TrainSpec]:
    """Return the composed config and its spec: all that a command needs that runs one job. Raises UsageError."""
    config = compose_config(flags)
    return config, build_spec(config, flags.files)


def _third_party_folders(flags: Flags) -> Iterator[Path]:
    """Yield the folders of config files that the command line names."""
    if flags.config_dir:
        yield flags.config_dir
    for override in flags.overrides:
        if override.lstrip("+").startswith("hydra.searchpath="):
            value = parse_override(override, flags.files).value()
            for place in map(str, value if isinstance(value, list) else [value]):
                scheme, _, rest = place.rpartition("://")
                yield Path(str(package_files(rest.replace("/", ".")))) if scheme == "pkg" else Path(rest)


@contextmanager
def composing(files: ConfFiles) -> Iterator[None]:
    """Turn exceptions of Hydra, OmegaConf and PyYAML into usage errors of one line."""
    try:
        yield
    except Exception as exc:
        # a plain ValueError is Hydra's about its flags
        message = error_message(exc, files) or (str(exc) if type(exc) is ValueError else None)
        if message is None:
            raise
        raise UsageError(message) from exc


def _with_searchpath(overrides: list[str], folder: Path | None) -> list[str]:
    """Return the overrides with --config-dir as one of them: composing has no argument for it."""
    if folder is None:
        return overrides
    own = [o for o in overrides if o.startswith("hydra.searchpath=[")]
    others = [o for o in overrides if o not in own]
    more = "," + own[0].split("[", 1)[1].rstrip("]") if own else ""
    return [*others, f"hydra.searchpath=[{quoted(f'file://{folder}')}{more}]"]


def parse_override(text: str, files: ConfFiles) -> Override:
    """Return one parsed override. Raises UsageError if a group is given what is not an option."""
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


def build_spec(config: DictConfig, files: ConfFiles | None = None) -> TrainSpec:
    """Return the spec of a composed config.

    Raises UsageError for a value that is missing, of a wrong type or out of its range, and for an unknown key.
    """
    files = files or ConfFiles([conf_dir()])
    task = config.copy()
    OmegaConf.set_struct(task, False)
    task.pop("hydra", None)
    with composing(files):
        values: Any = OmegaConf.to_container(task, resolve=True, throw_on_missing=True)
    refuse_code(values)
    known = {field.name: field.type for field in structs.fields(TrainSpec)}
    for key in values:
        if key not in known:
            raise UsageError(f"unknown key {key!r}.{unknown_key(str(key), files)}{_origin(str(key), config, files)}")
    built = {}
    for key, hint in known.items():
        if key not in values:
            raise UsageError(f"{key} has no value yet; give it one: {key}=...")
        hint = Union[tuple(classes_of(key).values())] if key in HOMES else hint  # noqa: UP007
        try:
            built[key] = msgspec.convert(values[key], hint, strict=False)
        except msgspec.ValidationError as exc:
            found, message = explain_value(exc, key, values[key], files)
            raise UsageError(message + _origin(found, config, files)) from exc
    for key, value in flat_keys(msgspec.to_builtins(built)).items():
        for item in value if isinstance(value, list | tuple) else [value]:
            if isinstance(item, float) and not math.isfinite(item):  # ranges of msgspec let NaN and infinity pass
                raise UsageError(out_of_range(key, item))
    return TrainSpec(**built)


def _origin(key: str, config: DictConfig, files: ConfFiles) -> str:
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
