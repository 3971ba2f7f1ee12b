"""Print a script that completes tlcli's commands, groups, options, keys and values on Tab.

bash  eval "$(tlcli completion bash)"            in ~/.bashrc
zsh   eval "$(tlcli completion zsh)"             in ~/.zshrc
fish  tlcli completion fish | source             in ~/.config/fish/config.fish
"""

import argparse
import re
import shutil
import textwrap
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

from tlcli.cli.conf_files import ConfFiles, files_for
from tlcli.cli.parser import Parser

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


PARSER = Parser("completion", __doc__)
PARSER.add_argument("shell", choices=tuple(SCRIPTS))

TRAIN = Parser(  # here, since the module of `tlcli train` imports Hydra
    "train",
    """Fine-tune one pretrained network on one set of images, then test it on images it has not seen.

examples:
  tlcli train
  tlcli train dataset=imagefolder dataset.root=photos
  tlcli train freeze=head backbone=resnet50 optimizer.lr=0.01
  tlcli train backbone=resnet18 backbone.weights=outputs/DATE/TIME
  tlcli train experiment=cifar10_resnet18
  tlcli train -m freeze=head,none optimizer.lr=1e-3,1e-2
  tlcli train --resume outputs/DATE/TIME
""",
)
TRAIN.usage = "tlcli train [-m] [GROUP=OPTION ...] [KEY=VALUE ...]\n       tlcli train --resume DIR [KEY=VALUE ...]"
add = TRAIN.add_argument
add("overrides", nargs="*", metavar="GROUP=OPTION")
add("--multirun", "-m", action="store_true", help="sweep: a run for each combination of the values given")
add("--resume", metavar="RUN|SWEEP", help="resume an interrupted run or sweep")
add("--cfg", "-c", choices=("job", "hydra", "all"), help="print the composed config and stop")
TRAIN.add_config_dir()
add("--config-name", "-cn", default="train", metavar="NAME", help="the main file in that folder; default: train")
sources = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")
add("--info", "-i", nargs="?", const="all", choices=sources, help="print what the config is composed of and stop")
add("--hydra-help", action="store_true", help="the flags and settings of Hydra, which composes the config")
add("--debug", action="store_true", help="show the traceback of an error")
add("--resolve", action="store_true", help=argparse.SUPPRESS)  # for those who know Hydra


def train_help(files: ConfFiles, width: int | None = None) -> str:
    """Return the text of `tlcli train --help`, at most `width` columns wide (the terminal's, at most 100)."""
    width = width or min(shutil.get_terminal_size().columns, 100)
    parts = [
        f"usage: {TRAIN.usage}\n",
        textwrap.fill(str(TRAIN.description), width) + "\n",
        "groups and their options (* is the default):",
    ]
    for group, options in files.groups.items():
        default = files.defaults.get(group)
        rows = [(("* " if o.name == default else "  ") + o.name, o.comment) for o in options.values()]
        parts += [f"\n  {group}", *_rows(rows, width, indent=4)]
        names = dict.fromkeys(key.name.split(".")[0] for option in options.values() for key in option.all_keys)
        if default not in (None, "null"):
            keys = ", ".join(f"{group}.{name}" for name in names if name != "kind" or group == "device")
            parts += textwrap.wrap(f"keys: {keys}", width, initial_indent=" " * 6, subsequent_indent=" " * 12)
    parts.append("\nkeys, with their defaults:")
    parts += _rows([(f"{key.name}={key.default}", key.comment) for key in files.top_level], width)
    parts.append("\nflags:")
    rows = []
    for action in TRAIN._actions:
        if action.option_strings and action.help != argparse.SUPPRESS:
            value = action.metavar or ("|".join(action.choices) if action.choices and action.const is None else "")
            rows.append((f"{', '.join(sorted(action.option_strings, key=len))} {value}".rstrip(), str(action.help)))
    parts += _rows(rows, width)
    return "\n".join([*parts, "", str(TRAIN.epilog)])


def _rows(rows: list[tuple[str, str]], width: int, indent: int = 2) -> Iterator[str]:
    """Yield two aligned columns, the right one wrapped. What is too long for the left one has a line of its own."""
    column = max((len(left) for left, _ in rows if len(left) <= 26), default=0)
    hanging = " " * (indent + column + 2)
    for left, right in rows:
        head = " " * indent + left.ljust(column) + "  "
        if len(left) > column:
            yield head.rstrip()
            head = hanging
        lines = textwrap.wrap(right, width, break_on_hyphens=False, initial_indent=head, subsequent_indent=hanging)
        yield from lines or [head.rstrip()]


def run(argv: list[str]) -> int:
    """Print a script, or the candidates for the last word of a command line; return the exit code."""
    if len(argv) == 2 and argv[0] == "query":
        print("\n".join(candidates(argv[1])))
    else:
        print(SCRIPTS[PARSER.parse_args(argv).shell], end="")
    return 0


def candidates(line: str) -> list[str]:
    """Return what the last word of a command line may become. What is complete ends with a blank."""
    from tlcli.cli import COMMANDS

    words = line.split()
    word = "" if line.endswith(" ") or not words else words.pop()
    before = words[2:]
    if len(words) < 2:
        found = [*COMMANDS, "--help", "--version"]
    elif words[1] not in COMMANDS:
        found = []
    else:
        command = TRAIN if words[1] == "train" else import_module(COMMANDS[words[1]][0]).PARSER
        positional = [action for action in command._actions if not action.option_strings]
        flags = {flag: action for action in command._actions for flag in action.option_strings}
        action: argparse.Action | None = None  # whose value is next
        for previous in before:
            if previous in flags and action is None:
                action = flags[previous] if flags[previous].nargs != 0 else None
            else:
                if action is None and not previous.startswith("-") and positional and positional[0].nargs is None:
                    positional.pop(0)
                action = None
        own = action or next(iter(positional), None)
        found = list(_values_of(own, command, word, before)) if own else []
        if action is None:
            found += [flag for flag, a in flags.items() if flag.startswith("--") and a.help != argparse.SUPPRESS]
    # a shell would run what some names hold, as `;` and `$( )`; shells complete these by themselves, with quotes
    plain = (text for text in dict.fromkeys(found) if re.fullmatch(r"[\w./:=,@%+~\[\]-]+", text))
    fitting = [text for text in plain if text.startswith(word) and text not in words]
    return [text if text[-1] in "=./" else f"{text} " for text in fitting]


def _values_of(action: argparse.Action, command: Parser, word: str, before: list[str]) -> Iterator[str]:
    if action.choices:
        yield from map(str, action.choices)
        return
    for kind in str(action.metavar).split("|"):
        if kind in ("RUN", "SWEEP"):
            files = (file for pattern in ("*/*", "*/*/*") for file in Path("outputs").glob(f"{pattern}/run.json"))
            runs = sorted((file.parent.as_posix() for file in files), reverse=True)[:200]  # the newest
            yield from runs if kind == "RUN" else (run.rpartition("/")[0] for run in runs if run.count("/") > 2)
        elif kind == "FOLDER":
            above = word[: word.rfind("/") + 1]
            folders = (path for path in Path(above).glob("*/") if path.name[0] != ".")
            yield from (f"{above}{path.name}/" for path in sorted(folders) if path.is_dir())
        elif kind == "BACKBONE":
            yield from (option for option in ConfFiles().groups["backbone"] if option != "timm")
        elif kind == "KEY" and "fill" not in before:
            from tlcli.store import Store, cache_dir

            yield from (entry.key for entry in Store(cache_dir()).entries())
        elif "=" in kind and "remove" not in before:
            names = {known.partition("=")[0] for known in command.known_words}
            words = _config_words(word, files_for(before), before)
            yield from command.known_words
            yield from (found for found in words if not names or re.split("[=.]", found)[0] in names)


def _config_words(word: str, files: ConfFiles, before: list[str]) -> Iterator[str]:
    """Yield groups and keys, and behind an equals sign their options and values."""
    key, equals, value = word.partition("=")
    group, dot, name = key.rpartition(".")
    chosen = [w.partition("=")[2].split(",")[0] for w in before if w.startswith(f"{group}=")]
    option = files.groups.get(group, {}).get(chosen[-1] if chosen else files.defaults.get(group, ""))
    if equals:
        from tlcli.specs import choices, leaf_types  # here: the schema takes longer than the rest

        known = option.all_keys if option else files.top_level
        values = [*files.groups.get(key, ()), *(k.default for k in known if k.name == (name if option else key))]
        for hint in leaf_types(key):
            values += {type(None): ["null"], bool: ["true", "false"]}.get(hint, [])
        done = value.rpartition(",")[0] + "," if "," in value else ""  # a sweep: the values so far stay
        yield from (f"{key}={done}{one}" for one in [*values, *choices(key)] if not {" ", "$"} & set(one))
        return
    yield from (f"{group}=" for group in files.groups)
    if option:  # keys of a group only after its name and dot, or the list would be long
        yield from (f"{group}.{own.name.split('.')[0]}=" for own in option.all_keys if own.name != "kind")
    elif not dot:
        yield from (f"{group}." for group in files.groups if files.defaults.get(group, "null") != "null")
    for top in files.top_level:
        parent, inner, _ = top.name.rpartition(".")
        yield f"{top.name}=" if dot or not inner else f"{parent}."
