"""One line for each exception of Hydra, OmegaConf and msgspec: what is wrong, where, and what to write instead."""

import difflib
import re
from typing import Any

import yaml  # type: ignore[import-untyped]
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from msgspec import ValidationError
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from tlcli.cli.conf_files import ConfFiles
from tlcli.specs import HOMES, all_keys, choices, classes_of, leaf_types
from tlcli.text import did_you_mean, one_line

EXTRAS = {"joblib": "joblib", "submitit_local": "submitit", "submitit_slurm": "submitit"}  # by launcher of Hydra
TYPES = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a text"}  # by msgspec's names
TYPES |= {"array": "a list", "object": "keys of its own"}


def error_message(exc: BaseException, files: ConfFiles) -> str | None:
    """Return the line for an exception of Hydra, OmegaConf or PyYAML, and None for any other exception."""
    key = str(exc.full_key or "") if isinstance(exc, OmegaConfBaseException) else ""
    text = str(exc).strip().split("\n")[0].strip() or type(exc).__name__
    match exc:
        case RecursionError():
            return "a config file has too many levels of lists and keys"
        case OverrideParseException(override=word):
            name, equals, value = word.partition("=")
            if equals:
                return f"""cannot read {word!r}: close its brackets and quotes, or write '{name}="{value}"'"""
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
            if (found := re.match(r"Interpolation key '(.+)' not found", text)) and found[1] in all_keys():
                return f"{found[1]} has no value, but {key or 'another key'} needs it; give it one: {found[1]}=..."
            return f"{key}: {text}" if key else text
        case yaml.YAMLError():
            return one_line(exc)
        case HydraException():
            for cause in (exc.__cause__, exc.__context__):
                if isinstance(cause, OmegaConfBaseException):
                    return error_message(cause, files)
            if found := re.match(r"(?:Ambiguous value for argument|Sweep parameters) '(.+)'", text):
                name, _, values = found[1].partition("=")
                ways = f"write a list, {name}=[{values}], or a text, '{name}=\"{values}\"'"
                return f"{found[1]} has several values: `tlcli train -m` sweeps over them; else {ways}"
            if found := re.match(r"Multiple values for ([^.]+)\.", text):
                return f"{found[1]} has an option: write {found[1]}=..., or `- override /{found[1]}: ...` in a file"
            if found := re.match(r"Could not override '([^']+)'", text):
                return f"unknown key {found[1]!r}.{unknown_key(found[1].partition('@')[0], files)}"
            return text
    return None


def unknown_key(key: str, files: ConfFiles) -> str:
    """Return a hint, after a blank, for an unknown key: the options that have it, the nearest key, or the keys."""
    if key == "experiment":
        return " The file of the experiment must begin with `# @package _global_`."
    parent, _, name = key.rpartition(".")
    owners = {kind for kind, cls in classes_of(parent).items() if name in cls.__struct_fields__}
    if parent in HOMES and (options := files.options_with(parent, owners)):
        return f" It belongs to {' and '.join(f'{parent}={option}' for option in options)}."
    everywhere = list(dict.fromkeys([*all_keys(), *files.groups]))
    by_name = {known.rpartition(".")[2]: known for known in reversed(everywhere)}
    siblings = {known.rpartition(".")[2]: known for known in everywhere if known.rpartition(".")[0] == parent}
    if leaf_types(parent) and not siblings:
        return f" {parent} holds a value, not keys of its own."
    near = [known for known in everywhere if known.rpartition(".")[2] == name]
    for known, cutoff in ((siblings, 0.6), (by_name, 0.75)):
        near = near or [known[close] for close in difflib.get_close_matches(name, known, 1, cutoff)]
    if near:
        return f" Did you mean {' or '.join(map(repr, near))}?"
    if not parent:
        return " `tlcli train --help` lists the keys."
    return f" The keys of {parent}: {', '.join(siblings)}." if siblings else ""


def _missing_config(missing: str, text: str, files: ConfFiles) -> str:
    group, _, option = missing.lstrip("/").rpartition("/")
    if known := next((known for known in files.groups if f"{group}/".startswith(f"{known}/")), None):
        options, option = list(files.groups[known]), missing.lstrip("/").removeprefix(f"{known}/")
        return f"{known} has no option {option!r}.{did_you_mean(option, options)} Choose from {', '.join(options)}"
    if group == "hydra/launcher" and option in EXTRAS:
        return f"{group}={option} is not installed: pip install 'tlcli[{EXTRAS[option]}]'"
    if group.startswith("hydra/"):
        return f"{group} has no option {option!r}: is its plugin installed?"
    return f"there is no config {missing!r}" if missing else text


def explain_value(exc: ValidationError, value: Any, files: ConfFiles) -> tuple[str, str]:
    """Return the key that msgspec refuses in the values of a config, and a line about it."""
    text, _, path = str(exc).partition(" - at `")
    key = ".".join(re.findall(r"\.(\w+)", path))
    for name, index in re.findall(r"\.(\w+)|\[(\d+)\]", path):
        value = value[name or int(index)]
    found = re.match(r"Object contains unknown field `(.+)`", text)
    if found or path.startswith("key` in "):  # all keys are texts
        key = f"{key}.{found[1] if found else next(k for k in value if not isinstance(k, str))}".lstrip(".")
        return key, f"unknown key {key!r}.{unknown_key(key, files)}"
    if found := re.match(r"Object missing required field `(.+)`", text):
        hint = f" Choose from {', '.join(classes_of(key))}" if found[1] == "kind" else ""
        key = f"{key}.{found[1]}".lstrip(".")
        return key, f"{key} has no value yet; give it one: {key}=...{hint}"
    written = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    is_tag = text.startswith("Invalid value")
    allowed = list(classes_of(key.rpartition(".")[0])) if is_tag else choices(key)
    if allowed and text.startswith(("Invalid", "Expected `str`,")):
        return key, f"{key}={written} is none of {', '.join(allowed)}.{did_you_mean(written, allowed)}"
    if not text.startswith("Expected"):  # of a class that checks itself: "range=..."
        return key, f"{key}.{text}" if isinstance(value, dict) else f"{key}={written}: {text}"
    expected = re.sub(r"\w+", lambda word: TYPES.get(word[0], word[0]), text.partition(", got `")[0])
    return key, f"{key}={written}: {expected[0].lower()}{expected[1:]}".replace("`", "").replace(" | ", " or ")
