"""The parser of `tlcli train` and its help: the groups, their options and every key, read from the YAML files."""

import argparse
import shutil
import textwrap
from collections.abc import Iterator

from tlcli.cli.conf_files import ConfFiles
from tlcli.cli.parser import Parser

LEFT_COLUMNS = 26
"""Widest text on the left that has its comment beside it."""


def train_parser() -> Parser:
    """Return the parser of `tlcli train`. Flags without help are for those who know Hydra."""
    parser = Parser(
        "train",
        "Fine-tune one pretrained network on one set of images, then test it on images it has not seen.",
        [
            "tlcli train",
            "tlcli train dataset=imagefolder dataset.root=photos",
            "tlcli train freeze=head backbone=resnet50 optimizer.lr=0.01",
            "tlcli train backbone=resnet18 backbone.weights=outputs/DATE/TIME",
            "tlcli train experiment=cifar10_resnet18",
            "tlcli train -m freeze=head,none optimizer.lr=1e-3,1e-2",
            "tlcli train --resume outputs/DATE/TIME",
        ],
    )
    parser.usage = (
        "tlcli train [-m] [GROUP=OPTION ...] [KEY=VALUE ...]\n       tlcli train --resume DIR [KEY=VALUE ...]"
    )
    add = parser.add_argument
    add("overrides", nargs="*", metavar="GROUP=OPTION")
    add("--multirun", "-m", action="store_true", help="sweep: a run for each combination of the values given")
    add("--resume", metavar="RUN", help="resume an interrupted run or sweep")
    add("--cfg", "-c", choices=("job", "hydra", "all"), help="print the composed config and stop")
    add("--config-dir", "-cd", metavar="DIR", help="a folder with groups and options of your own")
    add("--config-name", "-cn", metavar="NAME", help="the main file in that folder; default: train")
    sources = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")
    add("--info", "-i", nargs="?", const="all", choices=sources, help="print what the config is composed of and stop")
    add("--hydra-help", action="store_true", help="the flags and settings of Hydra, which composes the config")
    add("--debug", action="store_true", help="show the traceback of an error")
    for flags in (("--resolve",), ("--run", "-r"), ("--shell-completion", "-sc")):
        add(*flags, action="store_true", help=argparse.SUPPRESS)
    add("--package", "-p", help=argparse.SUPPRESS)
    return parser


def train_help(files: ConfFiles, width: int | None = None) -> str:
    """Return the text of `tlcli train --help`, at most `width` columns wide (the terminal's, at most 100)."""
    width = width or min(shutil.get_terminal_size().columns, 100)
    parser = train_parser()
    parts = [
        f"usage: {parser.usage}\n",
        textwrap.fill(str(parser.description), width) + "\n",
        "groups and their options (* is the default):",
    ]
    for group, options in files.groups.items():
        default = files.defaults.get(group)
        rows = [(("* " if o.name == default else "  ") + o.name, o.comment) for o in options.values()]
        parts += [f"\n  {group}", *_rows(rows, width, indent=4)]
        names = dict.fromkeys(key.name.split(".")[0] for option in options.values() for key in files.keys_of(option))
        if default not in (None, "null"):
            keys = ", ".join(f"{group}.{name}" for name in names if name != "kind" or group == "device")
            parts += textwrap.wrap(f"keys: {keys}", width, initial_indent=" " * 6, subsequent_indent=" " * 12)
    parts.append("\nkeys, with their defaults:")
    parts += _rows([(f"{key.name}={key.default}", key.comment) for key in files.top_level()], width)
    parts.append("\nflags:")
    shown = [action for action in parser._actions if action.option_strings and action.help != argparse.SUPPRESS]
    parts += _rows([(_flag(action), str(action.help)) for action in shown], width)
    return "\n".join([*parts, "", str(parser.epilog)])


def _flag(action: argparse.Action) -> str:
    value = action.metavar or ("|".join(action.choices) if action.choices and action.const is None else "")
    return ", ".join(sorted(action.option_strings, key=len)) + (f" {value}" if value else "")


def _rows(rows: list[tuple[str, str]], width: int, indent: int = 2) -> Iterator[str]:
    """Yield two aligned columns, the right one wrapped. What is too long for the left one has a line of its own."""
    column = max((len(left) for left, _ in rows if len(left) <= LEFT_COLUMNS), default=0)
    hanging = " " * (indent + column + 2)
    for left, right in rows:
        head = " " * indent + left.ljust(column) + "  "
        if len(left) > column:
            yield head.rstrip()
            head = hanging
        lines = textwrap.wrap(right, width, break_on_hyphens=False, initial_indent=head, subsequent_indent=hanging)
        yield from lines or [head.rstrip()]
