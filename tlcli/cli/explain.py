"""One line for each exception of Hydra and OmegaConf: what is wrong, where, and what to write instead."""

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

import yaml  # type: ignore[import-untyped]
from hydra.errors import CompactHydraException, HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationResolutionError,
    MissingMandatoryValue,
    OmegaConfBaseException,
    ValidationError,
)

from tlcli.cli.conf_files import ConfFiles
from tlcli.specs import SCHEMAS, TrainSpec
from tlcli.text import did_you_mean, one_line


def explain(exc: Exception, files: ConfFiles) -> str | None:
    """The line for an exception of Hydra, OmegaConf or PyYAML, or None for any other exception."""
    match exc:
        case OverrideParseException():
            return _unreadable(exc, files)
        case MissingConfigException():
            return _missing_config(exc, files)
        case yaml.MarkedYAMLError():
            mark = exc.problem_mark or exc.context_mark
            where = f"{mark.name}:{mark.line + 1}: " if mark else ""
            return f"{where}{exc.problem or exc.context}"
        case yaml.YAMLError():
            return one_line(str(exc))
        case OmegaConfBaseException():
            return _omegaconf(exc, files)
        case CompactHydraException():
            for cause in (exc.__cause__, exc.__context__):
                if isinstance(cause, OmegaConfBaseException):
                    return _omegaconf(cause, files) + _in_file(exc)
            return _hydra(exc, files)
        case HydraException():
            return _first_line(exc)
    return None


def unknown_key(key: str, files: ConfFiles) -> str:
    """A hint, after a blank, for a key that does not exist: the near key, the options that have it, or the keys."""
    parent, _, name = key.rpartition(".")
    owners = {schema for schema, kind in SCHEMAS.get(parent, {}).items() if name in _field_names(kind)}
    if options := files.options_with(parent, owners):
        return f" It belongs to {' and '.join(f'{parent}={option}' for option in options)}."
    everywhere = dict.fromkeys([*_dotted_keys(), *files.groups])
    siblings = {known.rpartition(".")[2]: known for known in everywhere if known.rpartition(".")[0] == parent}
    strangers = {known.rpartition(".")[2]: known for known in everywhere}
    same_name = [known for known in everywhere if known.rpartition(".")[2] == name]
    near = same_name or _near(name, siblings, 0.6) or _near(name, strangers, 0.75)
    if near:
        return f" Did you mean {' or '.join(map(repr, near))}?"
    listed = f" The keys of {parent}: {', '.join(siblings)}." if siblings else ""
    return listed if parent else " `tlcli train --help` lists the keys."


def _near(name: str, known: Mapping[str, str], cutoff: float) -> list[str]:
    """The full key of the nearest name, in a list, or an empty list."""
    return [known[near] for near in difflib.get_close_matches(name, known, n=1, cutoff=cutoff)]


def _dotted_keys() -> Iterator[str]:
    """The full name of every key that some config can have."""
    hints = get_type_hints(TrainSpec)
    for f in fields(TrainSpec):
        yield f.name
        kinds = [*SCHEMAS.get(f.name, {}).values()] or [hints[f.name]]
        for kind in kinds:
            yield from (f"{f.name}.{name}" for name in _field_names(kind))


def _field_names(kind: Any) -> list[str]:
    return [f.name for f in fields(kind)] if is_dataclass(kind) else []


def _unreadable(exc: OverrideParseException, files: ConfFiles) -> str:
    """An override that does not follow the grammar; a bare word may be an option."""
    if "=" in exc.override:
        key, _, value = exc.override.partition("=")
        remedy = f"""write '{key}="{value}"'"""
        if value[:1] in ("[", "{"):
            closed = value[-1:] in ("]", "}")
            remedy = f"""quote its values: {key}="['...']\"""" if closed else "close its brackets"
        return f"cannot read {exc.override!r}: {remedy}"
    near = [f"{group}={exc.override}" for group, options in files.groups.items() if exc.override in options]
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    return f"cannot read {exc.override!r}: write KEY=VALUE or GROUP=OPTION.{hint}"


def _missing_config(exc: MissingConfigException, files: ConfFiles) -> str:
    """An option, or a whole file, that is not there."""
    missing = exc.missing_cfg_file or ""
    group = next((group for group in files.groups if missing.startswith(f"{group}/")), None)
    if group:
        option, options = missing.removeprefix(f"{group}/"), list(files.groups[group])
        named = f"{group} has no option {option!r}" if option else f"{group}= names no option"
        return f"{named}.{did_you_mean(option, options)} Choose from {', '.join(options)}"
    return f"there is no config {missing!r}" if missing else _first_line(exc)


def _hydra(exc: Exception, files: ConfFiles) -> str:
    """What Hydra itself has to say, in fewer words."""
    text = str(exc)
    if found := re.match(r"Ambiguous value for argument '(.+)'", text):
        key, _, values = found[1].partition("=")
        as_list = "" if key in files.groups else f", or write {key}=[{values}]"
        return f"{found[1]} is a list of values: add -m to sweep over them{as_list}"
    if found := re.match(r"Sweep parameters '(.+)' requires --multirun", text):
        return f"{found[1]} is a sweep: add -m"
    if found := re.match(r"Could not override '([^']+)'", text):
        key = found[1].partition("@")[0]
        return f"unknown key {found[1]!r}.{unknown_key(key, files)}"
    return _first_line(exc)


def _omegaconf(exc: OmegaConfBaseException, files: ConfFiles) -> str:
    """A key or a value that does not fit its dataclass."""
    key = str(exc.full_key or "")
    match exc:
        case ConfigAttributeError() | ConfigKeyError():
            return f"unknown key {key!r}.{unknown_key(key, files)}"
        case MissingMandatoryValue():
            return f"{key} has no value yet; give it one: {key}=..."
        case ValidationError() if key:
            return _wrong_value(exc, key)
        case InterpolationResolutionError() if key:
            return f"{key} refers to something that is not there: {_first_line(exc)}"
    return f"{key}: {_first_line(exc)}" if key else _first_line(exc)


def _wrong_value(exc: ValidationError, key: str) -> str:
    """A value of a wrong type, or none of the choices."""
    text = _first_line(exc)
    if getattr(exc, "value", None) == {}:
        return f"unknown key: {key} holds a value, not keys of its own"
    shown = f"{key}={_as_written(getattr(exc, 'value', None))}"
    if found := re.match(r"Invalid value '(.*)', expected one of \[(.*)\]", text):
        hint = did_you_mean(found[1], found[2].split(", "))
        return f"{key} has no value {found[1]!r}.{hint} Choose from {found[2]}"
    for pattern, message in {
        "converted to Integer": "is not a whole number",
        "converted to Float": "is not a number",
        "is not a valid bool": "is neither true nor false",
        "is not Optional": "is not possible: it needs a value",
        "is not a ListConfig": f"is not a list: write {shown.replace('=', '=[', 1)}]",
        "Cannot convert .* to string": "is not a text",
        "is not a subclass of": f"does not fit: {key} has keys of its own",
    }.items():
        if re.search(pattern, text):
            return f"{shown} {message}"
    return f"{shown}: {text}"


def _as_written(value: object) -> str:
    """A value as YAML has it."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _in_file(exc: Exception) -> str:
    """The file that an error came from, where it came from one."""
    found = re.match(r"In '([^']+)': \w+ raised while", str(exc))
    return f" (in {found[1]}.yaml)" if found else ""


def _first_line(exc: BaseException) -> str:
    return str(exc).strip().split("\n")[0].strip() or type(exc).__name__
