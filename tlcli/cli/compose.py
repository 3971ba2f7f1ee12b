"""Compose a config from argv or from the config.yaml of a run, and convert it to a TrainSpec."""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

import msgspec
from hydra import initialize_config_dir
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tlcli.cli.completion import TRAIN
from tlcli.cli.conf_files import ConfFiles, conf_dir, files_for
from tlcli.cli.explain import error_message, explain_value
from tlcli.cli.trust import RECORD, check_folder, leaves, refuse_code
from tlcli.errors import UsageError
from tlcli.files import expand_user, read_yaml
from tlcli.runs.loggers import check_address
from tlcli.runs.run_dir import RunDir
from tlcli.specs import HOMES, VAL_FRACTION, TrainSpec, classes_of, leaf_types, options, spec_from

# what Hydra's grammar reads as a number or a truth value
NOT_TEXT = re.compile(r"(?i)[+-]?([\d_]+\.?[\d_]*|\.[\d_]+)(e[+-]?[\d_]+)?|[+-]?inf|nan|true|false")


@dataclass(frozen=True)
class Flags:
    """The command line for Hydra. `flags`: the words that are not overrides; `runs`: False if it only prints."""

    flags: tuple[str, ...]
    overrides: tuple[str, ...]
    files: ConfFiles
    config_name: str = "train"
    multirun: bool = False
    runs: bool = False

    @property
    def keys(self) -> set[str]:
        """The keys and groups that the overrides set."""
        return {word.lstrip("+").partition("=")[0] for word in self.overrides}


def parse_flags(argv: Sequence[str]) -> Flags:
    """Read the flags of `tlcli train`. Flags and overrides may stand in any order. Raises UsageError."""
    words = []
    for word in argv:  # KEY=~/PLACE with the home directory, which shells write out only at the start of a word
        key, equals, value = word.partition("=")
        words.append(f"{key}={expand_user(value)}" if equals and re.match("~(/|$)", value) else word)
    args = TRAIN.parse_intermixed_args(words)
    if args.resolve and not args.cfg:
        raise UsageError("--resolve goes with --cfg job")
    return Flags(
        flags=tuple(word for word in words if word not in args.overrides),
        overrides=tuple(_text_as_typed(override) for override in args.overrides),
        files=files_for(args.config_dir),
        config_name=args.config_name,
        multirun=args.multirun or "hydra.mode=MULTIRUN" in args.overrides,
        runs=not (args.cfg or args.info or args.hydra_help),
    )


def _text_as_typed(override: str) -> str:
    """Quote the values of a key whose type is text where Hydra would read a number or a truth value: 2024_01, true."""
    key, equals, value = override.partition("=")
    name = key.lstrip("+~").partition("@")[0]
    types = leaf_types(name) or leaf_types(name.rpartition(".")[0])  # backbone.stages.stem is an entry of a dict
    if name in ("hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir"):
        types = [str]
    if not equals or str not in types:
        return override
    words = re.findall(r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|[^\[\]{},'"]+|.""", value)

    def join(needs_quotes: Callable[[str], object]) -> str:
        return "".join(quoted(word.strip()) if needs_quotes(word) else word for word in words)

    tries = [join(lambda word: NOT_TEXT.fullmatch(word.strip()))]
    if value[:1] == "[":  # then quotes around each word, for those that Hydra's grammar does not have: it's, a(b, é
        tries.append(join(lambda word: word.strip() and word[0] not in "[]{},'\""))
    elif value[:1] not in "'\"{":
        tries.append(",".join(map(quoted, value.split(","))))
    for typed in tries:
        with suppress(OverrideParseException):
            OverridesParser.create().parse_overrides([f"{key}={typed}"])
            return f"{key}={typed}"
    return override


def resolve_paths(values: Any, folder: Path) -> None:
    """Make the relative paths in the values of a config absolute, in place."""
    for key in ("dataset.root", "dataset.file", "backbone.weights", "logger.uri"):
        group, _, name = key.partition(".")
        node = values.get(group)
        text = node.get(name) if isinstance(node, dict | DictConfig) else None
        if not isinstance(text, str):
            continue
        scheme, path = ("sqlite:///", text[10:]) if text.startswith("sqlite:///") else ("", text)
        if path.startswith(("~", "${")):
            continue
        is_path = scheme or key != "logger.uri" or not re.match(r"[A-Za-z][\w+.-]+:|databricks", text)
        is_word = key == "backbone.weights" and path in ("default", "none")
        if path and not is_word and "://" not in path and is_path:
            node[name] = f"{scheme}{folder / path}"


def quoted(text: object) -> str:
    """Return a text as a value of an override that is nothing but text."""
    return "'" + re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), str(text)) + "'"


def compose_config(flags: Flags) -> tuple[DictConfig, ConfigLoader]:
    """Return the checked config, with Hydra's own node, and the loader that composes that of each job of a sweep."""
    if re.search(r"(?i)^/|\.\.|hydra|multirun", flags.config_name):
        raise UsageError(f"--config-name={flags.config_name}: name a file in the folder of --config-dir")
    with composing(flags.files):
        overrides, folders = [], [f"file://{folder}" for folder in flags.files.folders[1:]]
        for word in flags.overrides:
            override = parse_override(word, flags.files)
            if override.key_or_group in flags.files.groups and RECORD.search(word):
                raise UsageError(f"{word}: multirun.yaml is the record of a sweep, not an option")
            if override.key_or_group == "hydra.searchpath":
                value = override.value()
                folders += map(str, value if isinstance(value, list) else [value])
            else:
                overrides.append(word)
        places = [conf_dir()]
        for folder in folders:
            scheme, _, place = folder.rpartition("://")
            try:
                places.append(Path(str(package_files(place.replace("/", "."))) if scheme == "pkg" else place))
            except ImportError as exc:
                raise UsageError(f"hydra.searchpath: there is no package {place!r}") from exc
        for own in places[1:]:
            check_folder(own, places)
        if folders:  # composing has no other argument for --config-dir
            overrides.append(f"hydra.searchpath=[{','.join(map(quoted, folders))}]")
        mode = RunMode.MULTIRUN if flags.multirun else RunMode.RUN
        with initialize_config_dir(str(conf_dir()), job_name="tlcli", version_base="1.3"):
            hydra = GlobalHydra.instance().hydra
            assert hydra is not None
            config = hydra.compose_config(flags.config_name, overrides, mode, from_shell=False)
        refuse_code(OmegaConf.to_container(config, resolve=False))
    with suppress(OmegaConfBaseException):  # `build_spec` reports wrong values
        check_address(str(OmegaConf.select(config, "logger.uri")))
    fill_val_fraction(config)
    HydraConfig.instance().set_config(config)  # for references to it in the names of directories
    return config, hydra.config_loader


def compose_spec(words: Sequence[str]) -> TrainSpec:
    """Return the spec that a command line of `tlcli train` composes. Raises UsageError."""
    flags = parse_flags(words)
    if flags.multirun or not flags.runs:
        raise UsageError("this command takes no flags of a sweep: give KEY=VALUE and GROUP=OPTION words only")
    return require_one_process(build_spec(compose_config(flags)[0], flags.files))


def require_one_process(spec: TrainSpec) -> TrainSpec:
    """Return the spec; raise UsageError if it asks for several processes, for commands other than `tlcli train`."""
    if spec.device.processes > 1:
        raise UsageError(f"device.processes={spec.device.processes}: only `tlcli train` runs in several processes")
    return spec


@contextmanager
def composing(files: ConfFiles, *, runs: bool = False) -> Iterator[None]:
    """Turn exceptions of Hydra, OmegaConf and PyYAML into usage errors of one line. `runs`: the block also trains."""
    try:
        yield
    except Exception as exc:
        # a plain ValueError is Hydra's about its flags
        message = error_message(exc, files) or (str(exc) if type(exc) is ValueError and not runs else None)
        if message is None:
            raise
        raise UsageError(message) from exc


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
        if isinstance(value, bool | int | float) or (isinstance(value, list | None) and not optional):
            known = ", ".join(files.groups[group])
            raise UsageError(f"{text}: choose one of {known}; to sweep over several: tlcli train -m {group}=A,B")
    return override


def fill_val_fraction(config: DictConfig, *, is_sweep: bool = False) -> bool:
    """Set a null dataset.val_fraction to VAL_FRACTION, in place, if a sweep or a key reads validation images.

    Return True if it was set.
    """
    with suppress(OmegaConfBaseException, AttributeError, KeyError, TypeError):  # build_spec reports wrong values
        reads = options("scheduler")[config.scheduler.kind].reads_validation or config.early_stop is not None
        if (is_sweep or reads) and config.dataset.val_fraction is None and config.folds is None:
            config.dataset.val_fraction = VAL_FRACTION
            return True
    return False


def build_spec(config: DictConfig, files: ConfFiles) -> TrainSpec:
    """Return the spec of a composed config. Raise UsageError for a missing or wrong value, and for an unknown key."""
    task = config.copy()
    OmegaConf.set_struct(task, False)
    task.pop("hydra", None)
    with composing(files):
        values: Any = OmegaConf.to_container(task, resolve=True, throw_on_missing=True)
    try:
        spec = spec_from(values)
    except msgspec.ValidationError as exc:
        key, message = explain_value(exc, values, files)
        raise UsageError(message + _origin(key, config, files)) from exc
    for key, value in leaves(msgspec.to_builtins(spec)):
        if isinstance(value, float) and not math.isfinite(value):  # ranges of msgspec let NaN and infinity pass
            raise UsageError(f"{re.sub(r'[.][0-9]+$', '', key)}={value} is not a finite number")
    for word in map(str, HydraConfig.get().overrides.task):
        if spec.epochs is not None and word.lstrip("+").startswith(("min_epochs=", "min_steps=")):
            raise UsageError(f"{word} has no effect with epochs={spec.epochs}: give one of the two")
    return spec


def _origin(key: str, config: DictConfig, files: ConfFiles) -> str:
    """Return " (in FILE)" if a chosen file of the user, and no word of the command line, sets this key, else ""."""
    words = OmegaConf.select(config, "hydra.overrides.task") or []
    if any(word.lstrip("+").startswith((f"{key}=", f"{key}.")) for word in words):
        return ""
    for group, name in (OmegaConf.select(config, "hydra.runtime.choices") or {}).items():
        option = files.groups.get(group, {}).get(name)
        if option is None or option.path.is_relative_to(conf_dir()):
            continue
        if {key, key.removeprefix(f"{group}.")} & {own.name for own in option.keys}:
            return f" (in {group}/{name}.yaml)"
    return ""


def load_spec(run: RunDir, overrides: Sequence[str] = ()) -> TrainSpec:
    """Return the spec that a run was trained with, from its config.yaml, with overrides on it.

    A key that is newer than the run has its default. A relative path is below the directory that run.json names.
    """
    flags = parse_flags(list(overrides))
    if flags.flags:
        raise UsageError(f"{flags.flags[0]} has no meaning for a run that exists: leave it out")
    file, files = run.config_file, ConfFiles()
    try:
        values = read_yaml(file)
    except FileNotFoundError:
        raise UsageError(f"{run.path}: no config.yaml here; give the directory of a run") from None
    except (OSError, ValueError) as exc:
        raise UsageError(f"{file}: cannot be read as YAML: {getattr(exc, 'strerror', None) or exc}") from exc
    values = {str(key): value for key, value in values.items() if key != "hydra"}
    for key, value in leaves(values):
        if isinstance(value, str) and "${" in value:
            raise UsageError(f"{file}: {key}={value} is refused: the config of a run holds only values")
    with suppress(UsageError):  # run.json is damaged: a command that needs it reports that
        if isinstance(start := run.info.get("cwd"), str):
            resolve_paths(values, Path(start))
    try:
        spec = _merged_spec(values, (), files)
    except UsageError as exc:
        raise UsageError(f"{file}: {exc}") from exc
    return _merged_spec(values, flags.overrides, files) if flags.overrides else spec


def _merged_spec(values: Mapping[str, Any], words: Sequence[str], files: ConfFiles) -> TrainSpec:
    """Return the spec: the defaults of the run's options, the file's values over them, the overrides over these."""
    chosen: dict[str, str] = {}
    given: dict[str, Any] = {}
    for word in words:
        with composing(files):
            override = parse_override(word, files)
            name = override.key_or_group
            if override.is_sweep_override() or override.is_delete():
                raise UsageError(f"{word}: give one value for each key: KEY=VALUE or GROUP=OPTION")
            if classes_of(name) and name in files.groups:
                chosen[name] = word
            elif name in files.groups or name.split(".")[0].split("/")[0] == "hydra":
                raise UsageError(f"{word} has no meaning for a run that exists: leave it out")
            else:
                given[name] = override.value()
    own = []  # of each group the option of the name in the file, otherwise that of its kind
    for group in [group for group in HOMES if group in values.keys() - chosen.keys()]:
        node = values[group]
        if not isinstance(node, dict):
            raise UsageError(f"{group}={node}: {group} has keys of its own")
        kind = str(node.get("kind"))
        if kind not in options(group):
            raise UsageError(f"{group}.kind={kind} is none of {', '.join(options(group))}")
        names = files.options_with(group, {kind})
        own.append(f"{group}={next((name for name in (node.get('name'), kind) if name in names), names[0])}")
    config, _ = compose_config(Flags((), (*own, *chosen.values()), files))
    with composing(files):
        OmegaConf.set_struct(config, False)  # build_spec reports unknown keys
        for name, value in values.items():
            items = value if classes_of(name) and isinstance(value, dict) else {"": value}
            for key, item in items.items() if name not in chosen else ():
                OmegaConf.update(config, f"{name}.{key}".rstrip("."), item, merge=False)
        for name, value in given.items():
            OmegaConf.update(config, name, value, merge=False)
    return build_spec(config, files)
