"""Shell completion: `tlcli completion bash|zsh|fish` prints a script, which calls `tlcli completion query LINE`.

The candidates come from the parser of each command, the YAML files and the schema, without Hydra, so that Tab is fast.
"""

import argparse
import enum
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Literal, get_args, get_origin

from tlcli.cli.conf_files import ConfFiles, conf_dir, extra_folders
from tlcli.cli.helptext import train_parser
from tlcli.cli.parser import Parser
from tlcli.specs import classes_of, leaf_types

SCRIPTS = {
    "bash": r"""_tlcli() {
  local IFS=$'\n' line=${COMP_LINE:0:COMP_POINT}
  local word=${line##* }
  local cut=${word%"${word##*[=:]}"}    # readline replaces only what follows the last = or :
  COMPREPLY=($(tlcli completion query "$line" 2>/dev/null))
  COMPREPLY=("${COMPREPLY[@]#"$cut"}")
}
complete -o nospace -o default -F _tlcli tlcli
""",
    "zsh": r"""_tlcli() {
  local -a found; found=("${(@f)$(tlcli completion query "$LBUFFER" 2>/dev/null)}")
  compadd -Q -S '' -- ${found:#}
}
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit -u }
compdef _tlcli tlcli
""",
    "fish": "complete -c tlcli -f -a '(tlcli completion query (commandline -cp))'\n",
}


def parser() -> Parser:
    """Return the parser of `tlcli completion`."""
    made = Parser(
        "completion",
        "Print a script that completes tlcli's commands, groups, options, keys and values on Tab.\n\n"
        '  bash  eval "$(tlcli completion bash)"            in ~/.bashrc\n'
        '  zsh   eval "$(tlcli completion zsh)"             in ~/.zshrc\n'
        "  fish  tlcli completion fish | source             in ~/.config/fish/config.fish",
    )
    made.add_argument("shell", choices=tuple(SCRIPTS))
    return made


def run(argv: list[str]) -> int:
    """Print a script, or the candidates for the last word of a command line; return the exit code."""
    match argv:
        case ["query", line]:
            print("\n".join(candidates(line)))
        case _:
            print(SCRIPTS[parser().parse_args(argv).shell], end="")
    return 0


def candidates(line: str) -> list[str]:
    """Return what the last word of a command line may become. What is complete ends with a blank."""
    from tlcli.cli import COMMANDS

    words = line.split()
    word = "" if line.endswith(" ") or not words else words.pop()
    match words:
        case [] | [_]:
            found: Iterator[str] = iter([*COMMANDS, "--help", "--version"])
        case [_, "train", *before]:  # its module imports Hydra
            found = _from_parser(train_parser(), word, before)
        case [_, command, *before] if command in COMMANDS:
            module = import_module(COMMANDS[command][0])
            own = command != "completion" and hasattr(module, "candidates")
            found = module.candidates(before) if own else _from_parser(module.parser(), word, before)
        case _:
            found = iter(())
    return [one if one[-1] in "=." else one + " " for one in dict.fromkeys(found) if one.startswith(word)]


def _from_parser(command: argparse.ArgumentParser, word: str, before: list[str]) -> Iterator[str]:
    """Yield positional arguments and flags; behind a flag with a value, its values."""
    flags = {flag: action for action in command._actions for flag in action.option_strings}
    last = flags.get(before[-1]) if before else None
    if last is not None and last.nargs != 0:
        yield from _values_of(last, word, before)
        return
    for action in command._actions:
        if isinstance(action, argparse._SubParsersAction) and (used := [w for w in before if w in action.choices]):
            yield from _from_parser(action.choices[used[0]], word, before[before.index(used[0]) + 1 :])
            return
        if not action.option_strings:
            yield from _values_of(action, word, before)
    yield from (flag for flag, a in flags.items() if flag.startswith("--") and a.help != argparse.SUPPRESS)


def _values_of(action: argparse.Action, word: str, before: list[str]) -> Iterator[str]:
    if action.choices:
        yield from map(str, action.choices)
    elif action.metavar in ("RUN", "SWEEP"):
        from tlcli.runs.run_dir import recent_runs

        yield from recent_runs()
    elif action.metavar == "FOLDER":
        yield from (f"{path}/" for path in sorted(Path().iterdir()) if path.is_dir() and path.name[0] != ".")
    elif "=" in str(action.metavar):
        yield from _config_words(word, before, ConfFiles([conf_dir(), *extra_folders(before)]))


def _config_words(word: str, before: list[str], files: ConfFiles) -> Iterator[str]:
    """Yield groups and keys, and behind an equals sign their options and values."""
    key, equals, value = word.partition("=")
    group, dot, name = key.rpartition(".")
    chosen = [w.partition("=")[2].split(",")[0] for w in before if w.startswith(f"{group}=")]
    option = files.groups.get(group, {}).get(chosen[-1] if chosen else files.defaults.get(group, ""))
    if equals:
        known = files.keys_of(option) if option else files.top_level()
        defaults = [k.default for k in known if k.name == (name if option else key)]
        values = [*files.groups.get(key, ()), *_choices(key), *(d for d in defaults if not {" ", "$"} & set(d))]
        done = value.rpartition(",")[0] + "," if "," in value else ""  # a sweep: the values so far stay
        yield from (f"{key}={done}{one}" for one in values)
        return
    yield from (f"{group}=" for group in files.groups)
    if option:  # keys of a group only after its name and dot, or the list would be long
        yield from (f"{group}.{own.name.split('.')[0]}=" for own in files.keys_of(option) if own.name != "kind")
    elif not dot:
        yield from (f"{group}." for group in files.groups if classes_of(group))
    for top in files.top_level():
        parent, inner, _ = top.name.rpartition(".")
        yield f"{top.name}=" if dot or not inner else f"{parent}."


def _choices(key: str) -> Iterator[str]:
    """Yield the values of an enum or of a yes-or-no key, by its type."""
    for hint, _ in leaf_types(key):
        if hint is type(None):
            yield "null"
        elif hint is bool:
            yield from ("true", "false")
        elif get_origin(hint) is Literal:
            yield from get_args(hint)
        elif isinstance(hint, enum.EnumMeta):
            yield from (str(member.value) for member in list[enum.Enum](hint))
