"""`tlcli train --help`: the groups, their options and every key, read from the YAML files."""

import shutil
import textwrap
from collections.abc import Iterator

from tlcli.cli.conf_files import ConfFiles

WIDEST = 26  # columns for what stands on the left

SUMMARY = "Fine-tune one pretrained network on one set of images, then test it on images it has not seen."

EXAMPLES = """\
examples:
  tlcli train
  tlcli train dataset=imagefolder dataset.root=photos
  tlcli train freeze=head backbone=resnet50 optimizer.lr=0.01
  tlcli train backbone=resnet18 backbone.weights=outputs/DATE/TIME
  tlcli train experiment=cifar10_resnet18
  tlcli train -m freeze=head,none optimizer.lr=1e-3,1e-2
  tlcli train --resume outputs/DATE/TIME
"""

FLAGS = {
    "-m, --multirun": "sweep: a run for each combination of the values given",
    "--resume DIR": "go on with a run or a sweep that ended before its time",
    "--cfg job": "print the composed config and stop",
    "--config-dir DIR": "a folder with groups and options of your own",
    "--info defaults-tree": "print what the config is composed of and stop",
    "--hydra-help": "the flags and settings of Hydra, which composes the config",
    "--debug": "show the traceback of an error",
}


def train_help(files: ConfFiles, width: int | None = None) -> str:
    """The text of `tlcli train --help`, at most `width` columns wide (the terminal's, up to 100)."""
    width = width or min(shutil.get_terminal_size().columns, 100)
    parts = [
        "usage: tlcli train [-m] [GROUP=OPTION ...] [KEY=VALUE ...]\n       tlcli train --resume DIR [KEY=VALUE ...]\n",
        textwrap.fill(SUMMARY, width) + "\n",
        "groups and their options (* is the default):",
    ]
    for group in files.groups:
        parts += _group(files, group, width)
    parts.append("keys, with their defaults:")
    parts += _rows([(f"{key.name}={key.default}", key.comment) for key in files.top_level()], width)
    parts.append("\nflags:")
    parts += _rows(list(FLAGS.items()), width)
    parts.append("\n" + EXAMPLES)
    return "\n".join(parts)


def _group(files: ConfFiles, group: str, width: int) -> Iterator[str]:
    """A group's name, its options with their comments, and the names of their keys."""
    default = files.defaults.get(group)
    yield f"\n  {group}"
    options = files.groups[group].values()
    yield from _rows([(("* " if o.name == default else "  ") + o.name, o.comment) for o in options], width, indent=4)
    names = dict.fromkeys(key.name.split(".")[0] for option in options for key in files.keys_of(option))
    if group in files.defaults and files.defaults[group] != "null":
        keys = ", ".join(f"{group}.{name}" for name in names)
        yield from textwrap.wrap(f"keys: {keys}", width, initial_indent=" " * 6, subsequent_indent=" " * 12)
    yield from [""] if group == list(files.groups)[-1] else []


def _rows(rows: list[tuple[str, str]], width: int, indent: int = 2) -> Iterator[str]:
    """Two aligned columns, the second one wrapped. What is too long for the first stands on a line of its own."""
    column = max((len(left) for left, _ in rows if len(left) <= WIDEST), default=0)
    hanging = " " * (indent + column + 2)
    for left, right in rows:
        head = " " * indent + left.ljust(column) + "  "
        if len(left) > column:
            yield head.rstrip()
            head = hanging
        yield from textwrap.wrap(
            right, width, break_on_hyphens=False, initial_indent=head, subsequent_indent=hanging
        ) or [head.rstrip()]
