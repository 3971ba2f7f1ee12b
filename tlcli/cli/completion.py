"""Shell completion: `tlcli completion bash|zsh|fish` prints a script, which asks `tlcli completion query LINE`.

The candidates are read from the YAML files and the dataclasses, without Hydra, so that Tab answers at once.
"""

import enum
from collections.abc import Iterator
from importlib import import_module
from typing import Literal, get_args, get_origin

from tlcli.cli.conf_files import ConfFiles, conf_dir, extra_folders
from tlcli.cli.folders import run_folders
from tlcli.errors import UsageError
from tlcli.specs import classes_of, leaf_types
from tlcli.text import did_you_mean

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

HELP = """\
usage: tlcli completion bash|zsh|fish

Print a script that completes tlcli's commands, groups, options, keys and values on Tab.

  bash  eval "$(tlcli completion bash)"            in ~/.bashrc
  zsh   eval "$(tlcli completion zsh)"             in ~/.zshrc
  fish  tlcli completion fish | source             in ~/.config/fish/config.fish
"""

FLAGS = (
    "--cfg",
    "--config-dir",
    "--config-name",
    "--debug",
    "--help",
    "--hydra-help",
    "--info",
    "--multirun",
    "--resume",
)
FLAG_VALUES = {"--cfg": ("job", "hydra", "all"), "--info": ("all", "config", "defaults", "defaults-tree", "searchpath")}


def run(argv: list[str]) -> int:
    """Print a script, or the candidates for the last word of a command line; the exit code."""
    match argv:
        case ["query", line]:
            print("\n".join(candidates(line)))
        case [shell] if shell in SCRIPTS:
            print(SCRIPTS[shell], end="")
        case ["-h" | "--help", *_]:
            print(HELP, end="")
        case []:
            raise UsageError("name a shell: tlcli completion bash|zsh|fish")
        case _:
            hint = did_you_mean(argv[0], SCRIPTS)
            raise UsageError(f"cannot complete for {' '.join(argv)!r}.{hint} Choose from {', '.join(SCRIPTS)}")
    return 0


def candidates(line: str) -> list[str]:
    """What the last word of a command line may become. What is finished ends with a blank."""
    from tlcli.cli import COMMANDS

    words = line.split()
    word = "" if line.endswith(" ") or not words else words.pop()
    match words:
        case [] | [_]:
            found: Iterator[str] = iter([*COMMANDS, "--help", "--version"])
        case [_, "train", *before]:
            files = ConfFiles([conf_dir(), *extra_folders(before)])
            found = _for_train(word, before, files)
        case [_, "completion"]:
            found = iter(SCRIPTS)
        case [_, command, *before] if command in COMMANDS:
            module = import_module(COMMANDS[command][0])
            found = module.candidates(before) if hasattr(module, "candidates") else iter(())
        case _:
            found = iter(())
    return [one if one[-1] in "=." else one + " " for one in dict.fromkeys(found) if one.startswith(word)]


def _for_train(word: str, before: list[str], files: ConfFiles) -> Iterator[str]:
    """Flags, groups, keys, and behind an equals sign their options and values."""
    if before and before[-1] == "--resume":
        yield from run_folders()
    elif before and before[-1] in FLAG_VALUES:
        yield from FLAG_VALUES[before[-1]]
    elif word.startswith("-"):
        yield from FLAGS
    elif "=" in word:
        key, _, value = word.partition("=")
        done = value.rpartition(",")[0] + "," if "," in value else ""  # a sweep: the values so far stay
        yield from (f"{key}={done}{one}" for one in _values(key, before, files))
    else:
        yield from (f"{group}=" for group in files.groups)
        yield from _keys(word, before, files)


def _keys(word: str, before: list[str], files: ConfFiles) -> Iterator[str]:
    """Keys: those of a group only once its name and dot are there, or the list would be long."""
    group, dot, _ = word.partition(".")
    if not dot:
        yield from (f"{group}." for group in files.groups if classes_of(group))
    elif option := _chosen(group, before, files):
        names = dict.fromkeys(key.name.split(".")[0] for key in files.keys_of(files.groups[group][option]))
        yield from (f"{group}.{name}=" for name in names)
    for key in files.top_level():
        parent, inner, _ = key.name.rpartition(".")
        yield f"{key.name}=" if dot or not inner else f"{parent}."


def _chosen(group: str, before: list[str], files: ConfFiles) -> str | None:
    """The option of a group that the words so far choose, else its default; None where there is no such option."""
    own = [word.partition("=")[2].split(",")[0] for word in before if word.startswith(f"{group}=")]
    option = own[-1] if own else files.defaults.get(group, "")
    return option if option in files.groups.get(group, {}) else None


def _values(key: str, before: list[str], files: ConfFiles) -> Iterator[str]:
    """The options of a group; the choices of a key, and its default."""
    if key in files.groups:
        yield from files.groups[key]
        return
    yield from _choices(key)
    group, _, name = key.partition(".")
    option = _chosen(group, before, files)
    known = files.keys_of(files.groups[group][option]) if option else files.top_level()
    wanted = name if option else key
    yield from (k.default for k in known if k.name == wanted and "${" not in k.default and " " not in k.default)


def _choices(key: str) -> Iterator[str]:
    """The values of an enum or of a yes-or-no key, by its type."""
    for hint, _ in leaf_types(key):
        if hint is type(None):
            yield "null"
        elif hint is bool:
            yield from ("true", "false")
        elif get_origin(hint) is Literal:
            yield from get_args(hint)
        elif isinstance(hint, enum.EnumMeta):
            yield from (str(member.value) for member in list[enum.Enum](hint))
