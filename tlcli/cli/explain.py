"""One line for each exception of Hydra, OmegaConf and msgspec: what is wrong, where, and what to write instead."""

import difflib
import math
import re
from enum import Enum, EnumMeta
from typing import Any, Literal, get_args, get_origin

import yaml  # type: ignore[import-untyped]
from hydra.errors import CompactHydraException, HydraException, MissingConfigException, OverrideParseException
from msgspec import ValidationError
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from tlcli.cli.conf_files import ConfFiles
from tlcli.registry import HOMES
from tlcli.specs import all_keys, classes_of, leaf_types
from tlcli.text import did_you_mean, one_line

EXPECTED = {
    "int": "is not a whole number",
    "float": "is not a number",
    "bool": "is neither true nor false",
    "str": "is not a text: write it in quotes",
    "array": "is not a list: write {key}=[{value}]",
    "object": "does not fit: {key} has keys of its own",
}  # what is wrong with a value, by the type that msgspec expected


def error_message(exc: BaseException, files: ConfFiles) -> str | None:
    """Return the line for an exception of Hydra, OmegaConf or PyYAML, and None for any other exception."""
    key = str(exc.full_key or "") if isinstance(exc, OmegaConfBaseException) else ""
    text = str(exc).strip().split("\n")[0].strip() or type(exc).__name__
    match exc:
        case RecursionError():
            return "a config file has too many levels of lists and keys"
        case OverrideParseException(override=word) if "=" in word:
            name, _, value = word.partition("=")
            return f"""cannot read {word!r}: close its brackets and quotes, or write '{name}="{value}"'"""
        case OverrideParseException(override=word):
            near = [f"{group}={word}" for group, options in files.groups.items() if word in options]
            hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
            return f"cannot read {word!r}: write KEY=VALUE or GROUP=OPTION.{hint}"
        case MissingConfigException():
            return _missing_config(exc.missing_cfg_file or "", text, files)
        case yaml.MarkedYAMLError():
            mark = exc.problem_mark or exc.context_mark
            return (f"{mark.name}:{mark.line + 1}: " if mark else "") + str(exc.problem or exc.context)
        case ConfigAttributeError() | ConfigKeyError():
            return f"unknown key {key!r}.{unknown_key(key, files)}"
        case MissingMandatoryValue():
            return f"{key} has no value yet; give it one: {key}=..."
        case OmegaConfBaseException():
            return f"{key}: {text}" if key else text
        case CompactHydraException():
            for cause in (exc.__cause__, exc.__context__):
                if isinstance(cause, OmegaConfBaseException):
                    return error_message(cause, files)
            if found := re.match(r"(?:Ambiguous value for argument|Sweep parameters) '(.+)'", text):
                name, _, values = found[1].partition("=")
                return f"{found[1]} has several values: add -m to sweep over them, or write a list, {name}=[{values}]"
            if found := re.match(r"Could not override '([^']+)'", text):
                return f"unknown key {found[1]!r}.{unknown_key(found[1].partition('@')[0], files)}"
            return text
        case yaml.YAMLError():
            return one_line(exc)
        case HydraException():
            return text
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
    if not near and (names := difflib.get_close_matches(name, siblings, n=1)):
        near = [f"{parent}.{names[0]}".lstrip(".")]
    if not near and (names := difflib.get_close_matches(name, everywhere.values(), n=1, cutoff=0.75)):
        near = [known for known, own in everywhere.items() if own == names[0]][:1]
    if near:
        return f" Did you mean {' or '.join(map(repr, near))}?"
    listed = f" The keys of {parent}: {', '.join(siblings)}." if siblings else ""
    return listed if parent else " `tlcli train --help` lists the keys."


def _missing_config(missing: str, text: str, files: ConfFiles) -> str:
    """Return the line for an option, or a whole file, that does not exist."""
    group, _, option = missing.lstrip("/").rpartition("/")
    if found := re.match(r"/?schema/(?:(\w+)/)?(\w+)", missing):
        where = re.match(r"In '([^']+)'", text)
        kind = f", and add the key `kind: {found[2]}`" if found[1] not in (None, "device") else ""
        file = f"{where[1] if where else 'config'}.yaml"
        return f"{file}: remove the line with {missing.lstrip('/')}@_here_ from its defaults{kind}"
    if known := next((known for known in files.groups if f"{group}/".startswith(f"{known}/")), None):
        options, option = list(files.groups[known]), missing.lstrip("/").removeprefix(f"{known}/")
        return f"{known} has no option {option!r}.{did_you_mean(option, options)} Choose from {', '.join(options)}"
    if group.startswith("hydra/"):
        return f"{group} has no option {option!r}: is its plugin installed?"
    return f"there is no config {missing!r}" if missing else text


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
        choices = f" Choose from {', '.join(classes_of(key))}" if found[1] == "kind" else ""
        key = f"{key}.{found[1]}"
        return key, f"{key} has no value yet; give it one: {key}=...{choices}"
    written = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    shown, types = f"{key}={written}", leaf_types(key)
    allowed = [str(member.value) for hint, _ in types if isinstance(hint, EnumMeta) for member in list[Enum](hint)]
    allowed += [choice for hint, _ in types if get_origin(hint) is Literal for choice in get_args(hint)]
    if text.startswith("Invalid value"):  # of a tag
        allowed = list(classes_of(key.rpartition(".")[0]))
    if allowed and not isinstance(value, list | dict):
        return key, f"{shown} is none of {', '.join(allowed)}.{did_you_mean(written, allowed)}"
    if isinstance(value, float) and not math.isfinite(value):
        return key, f"{shown} is not a finite number"
    if re.match(r"Expected `\w+` [<>]", text):
        limits = [
            f"{word} {limit:g}" if isinstance(limit, float) else f"{word} {limit}"
            for _, meta in types
            if meta
            for word, limit in (("at least", meta.ge), ("above", meta.gt), ("at most", meta.le), ("below", meta.lt))
            if limit is not None
        ]
        return key, f"{shown} is out of range: give {' and '.join(dict.fromkeys(limits))}"
    if not (found := re.match(r"Expected `(\w+).*`, got `(\w+)`", text)):  # of a class that checks itself: "range=..."
        return key, f"{key}.{text}" if isinstance(value, dict) else f"{shown}: {text}".replace("`", "")
    if found[2] == "object":
        return key, f"unknown key: {key} holds a value, not keys of its own"
    if found[2] == "null":
        return key, f"{shown} is not possible: it needs a value"
    return key, f"{shown} {EXPECTED.get(found[1], EXPECTED['str']).format(key=key, value=written)}"
