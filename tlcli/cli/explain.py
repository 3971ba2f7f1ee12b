"""One line for each exception of Hydra and OmegaConf: what is wrong, where, and what to write instead."""

import difflib
import re
from enum import Enum, EnumMeta
from typing import Any, Literal, get_args, get_origin

import yaml  # type: ignore[import-untyped]
from hydra.errors import CompactHydraException, HydraException, MissingConfigException, OverrideParseException
from msgspec import ValidationError
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationResolutionError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from tlcli.cli.conf_files import ConfFiles
from tlcli.registry import HOMES
from tlcli.specs import all_keys, classes_of, leaf_types
from tlcli.text import did_you_mean, one_line


def error_message(exc: BaseException, files: ConfFiles) -> str | None:
    """Return the line for an exception of Hydra, OmegaConf or PyYAML, and None for any other exception."""
    key = str(exc.full_key or "") if isinstance(exc, OmegaConfBaseException) else ""
    match exc:
        case RecursionError():
            return "a config file has too many levels of lists and keys"
        case OverrideParseException():
            return _unreadable(exc.override, files)
        case MissingConfigException():
            return _missing_config(exc, files)
        case yaml.MarkedYAMLError():
            mark = exc.problem_mark or exc.context_mark
            where = f"{mark.name}:{mark.line + 1}: " if mark else ""
            return f"{where}{exc.problem or exc.context}"
        case ConfigAttributeError() | ConfigKeyError():
            return f"unknown key {key!r}.{unknown_key(key, files)}"
        case MissingMandatoryValue():
            return f"{key} has no value yet; give it one: {key}=..."
        case InterpolationResolutionError() if key:
            return f"{key} refers to a key that does not exist: {_first_line(exc)}"
        case OmegaConfBaseException():
            return f"{key}: {_first_line(exc)}" if key else _first_line(exc)
        case CompactHydraException():
            for cause in (exc.__cause__, exc.__context__):
                if isinstance(cause, OmegaConfBaseException):
                    return error_message(cause, files)
            return _hydra(str(exc), files)
        case yaml.YAMLError():
            return one_line(str(exc))
        case HydraException():
            return _first_line(exc)
    return None


def unknown_key(key: str, files: ConfFiles) -> str:
    """Return a hint, after a blank, for an unknown key: the options that have it, the nearest key, or the keys."""
    parent, _, name = key.rpartition(".")
    owners = {kind for kind, cls in classes_of(parent).items() if name in cls.__struct_fields__}
    if parent in HOMES and (options := files.options_with(parent, owners)):
        return f" It belongs to {' and '.join(f'{parent}={option}' for option in options)}."
    everywhere = {known: known.rpartition(".")[2] for known in [*all_keys(), *files.groups]}
    siblings = [own for known, own in everywhere.items() if known.rpartition(".")[0] == parent]
    if leaf_types(parent) and not siblings:
        return f" {parent} holds a value, not keys of its own."
    near = [known for known, own in everywhere.items() if own == name]
    if not near and (own_names := difflib.get_close_matches(name, siblings, n=1)):
        near = [f"{parent}.{own_names[0]}".lstrip(".")]
    if not near and (names := difflib.get_close_matches(name, everywhere.values(), n=1, cutoff=0.75)):
        near = [known for known, own in everywhere.items() if own == names[0]][:1]
    if near:
        return f" Did you mean {' or '.join(map(repr, near))}?"
    listed = f" The keys of {parent}: {', '.join(siblings)}." if siblings else ""
    return listed if parent else " `tlcli train --help` lists the keys."


def _unreadable(override: str, files: ConfFiles) -> str:
    """Return the line for an override that does not follow the grammar; a bare word may be an option."""
    key, equals, value = override.partition("=")
    if equals:
        remedy = f"""write '{key}="{value}"'"""
        if value[:1] in ("[", "{"):
            closed = value[-1:] in ("]", "}")
            remedy = f"""quote its values: {key}="['...']\"""" if closed else "close its brackets"
        return f"cannot read {override!r}: {remedy}"
    near = [f"{group}={override}" for group, options in files.groups.items() if override in options]
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    return f"cannot read {override!r}: write KEY=VALUE or GROUP=OPTION.{hint}"


def _missing_config(exc: MissingConfigException, files: ConfFiles) -> str:
    """Return the line for an option, or a whole file, that does not exist."""
    missing = (exc.missing_cfg_file or "").lstrip("/")
    if found := re.match(r"schema/(?:(\w+)/)?(\w+)", missing):
        where = re.match(r"In '([^']+)'", str(exc))
        kind = f", and add the key `kind: {found[2]}`" if found[1] not in (None, "device") else ""
        return f"{where[1] if where else 'config'}.yaml: remove the line with {missing}@_here_ from its defaults{kind}"
    group = next((group for group in files.groups if missing.startswith(f"{group}/")), None)
    if group:
        option, options = missing.removeprefix(f"{group}/"), list(files.groups[group])
        named = f"{group} has no option {option!r}" if option else f"{group}= names no option"
        return f"{named}.{did_you_mean(option, options)} Choose from {', '.join(options)}"
    if plugin := re.match(r"(hydra/\w+)/(\w+)", missing):
        return f"{plugin[1]} has no option {plugin[2]!r}: is its plugin installed?"
    return f"there is no config {missing!r}" if missing else _first_line(exc)


def _hydra(text: str, files: ConfFiles) -> str:
    """Return Hydra's own message in fewer words."""
    if found := re.match(r"Ambiguous value for argument '(.+)'", text):
        key, _, values = found[1].partition("=")
        as_list = "" if key in files.groups else f", or write {key}=[{values}]"
        return f"{found[1]} is a list of values: add -m to sweep over them{as_list}"
    if found := re.match(r"Sweep parameters '(.+)' requires --multirun", text):
        return f"{found[1]} is a sweep: add -m"
    if found := re.match(r"Could not override '([^']+)'", text):
        key = found[1].partition("@")[0]
        return f"unknown key {found[1]!r}.{unknown_key(key, files)}"
    return text.strip().split("\n")[0]


def explain_value(exc: ValidationError, key: str, value: Any, files: ConfFiles) -> tuple[str, str]:
    """Return the key that msgspec refuses and a line about it; `value` is that of `key`, the error may be within it."""
    text, _, path = str(exc).partition(" - at `")
    for name, index in re.findall(r"\.(\w+)|\[(\d+)\]", path):
        value = value[name or int(index)]
        key += f".{name}" if name else ""
    if found := re.match(r"Object contains unknown field `(.+)`", text):
        key = f"{key}.{found[1]}"
        return key, f"unknown key {key!r}.{unknown_key(key, files)}"
    if found := re.match(r"Object missing required field `(.+)`", text):
        choice = f" Choose from {', '.join(classes_of(key))}" if found[1] == "kind" else ""
        key = f"{key}.{found[1]}"
        return key, f"{key} has no value yet; give it one: {key}=...{choice}"
    return key, _wrong_value(text, key, value)


def _wrong_value(text: str, key: str, value: Any) -> str:
    shown = f"{key}={_as_written(value)}"
    types = leaf_types(key)
    choices = [str(member.value) for hint, _ in types if isinstance(hint, EnumMeta) for member in list[Enum](hint)]
    choices += [choice for hint, _ in types if get_origin(hint) is Literal for choice in get_args(hint)]
    if text.startswith("Invalid value"):  # of a tag
        return f"{shown} is none of {', '.join(classes_of(key.rpartition('.')[0]))}"
    if choices and not isinstance(value, list | dict):
        hint = did_you_mean(str(value), choices)
        return f"{key} has no value {_as_written(value)!r}.{hint} Choose from {', '.join(choices)}"
    if found := re.match(r"Expected `array` of length (\d+)", text):
        return f"{key} takes {found[1]} values, as [{','.join('abc'[: int(found[1])])}]: it has {len(value)}"
    if re.match(r"Expected `\w+` [<>]", text):
        return out_of_range(key, value)
    if found := re.match(r"Expected `(\w+).*`, got `(\w+)`", text):
        if found[2] == "object":
            return f"unknown key: {key} holds a value, not keys of its own"
        if found[2] == "null":
            return f"{shown} is not possible: it needs a value"
        return f"{shown} " + {
            "int": "is not a whole number",
            "float": "is not a number",
            "bool": "is neither true nor false",
            "array": f"is not a list: write {key}=[{_as_written(value)}]",
            "object": f"does not fit: {key} has keys of its own",
        }.get(found[1], "is not a text: write it in quotes")
    return f"{key}.{text}" if isinstance(value, dict) else f"{shown}: {text}"


def out_of_range(key: str, value: object) -> str:
    """Return the line for a number that is out of its key's range, or not finite."""
    limits = [
        f"{word} {limit:g}" if isinstance(limit, float) else f"{word} {limit}"
        for _, meta in leaf_types(key)
        if meta
        for word, limit in (("at least", meta.ge), ("above", meta.gt), ("at most", meta.le), ("below", meta.lt))
        if limit is not None
    ]
    return f"{key}={value} is out of range: give {' and '.join(dict.fromkeys(limits)) or 'a finite number'}"


def _as_written(value: object) -> str:
    """Return a value as it is written in YAML."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _first_line(exc: BaseException) -> str:
    return str(exc).strip().split("\n")[0].strip() or type(exc).__name__
