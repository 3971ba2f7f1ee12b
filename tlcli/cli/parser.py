"""The argument parser of every command: argparse, with errors as one line and exit code 2."""

import argparse
import re
from collections.abc import Sequence
from typing import NoReturn

from tlcli.errors import UsageError
from tlcli.files import expand_user
from tlcli.text import did_you_mean


class Parser(argparse.ArgumentParser):
    """A parser of one command; `text` is the docstring of its module, with `examples:` at the end.

    An error is a UsageError that names the nearest flag. Shell completion offers an argument's choices, or what its
    metavar names, separated by |: RUN, SWEEP, FOLDER, BACKBONE, KEY (of the cache), or KEY=VALUE: words of
    `tlcli train`, only `known_words` if the command has these.
    """

    known_words: Sequence[str] = ()

    def __init__(self, command: str, text: str | None) -> None:
        summary, title, examples = (text or "").partition("examples:\n")
        super().__init__(
            prog=f"tlcli {command}",
            description=summary.rstrip(),
            epilog=title + examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def add_config_dir(self) -> None:
        """Add --config-dir, as a list of words of `tlcli train`."""

        def word(path: str) -> list[str]:
            if not (folder := expand_user(path).absolute()).is_dir():
                raise UsageError(f"--config-dir={path}: no such folder")
            return [f"--config-dir={folder}"]

        names, text = ("-cd", "--config-dir"), "folder with your own options"
        self.add_argument(*names, type=word, default=[], metavar="DIR", help=text)

    def add_format(self, formats: Sequence[str] = ("table", "json")) -> None:
        """Add --format; the first format is the default."""
        self.add_argument("--format", choices=formats, default=formats[0], help="format of the output")

    def error(self, message: str) -> NoReturn:
        """Raise UsageError with argparse's message and the nearest flag."""
        words = message.removeprefix("argument ")
        if message.startswith("unrecognized arguments: "):
            word = message.removeprefix("unrecognized arguments: ").partition(" ")[0].partition("=")[0]
            known = [flag for action in self._actions for flag in action.option_strings]
            kind = "flag" if word.startswith("-") else "argument"
            words = f"unknown {kind} {word!r}.{did_you_mean(word, known) or f' `{self.prog} --help` lists the flags.'}"
        elif choice := re.fullmatch(r"(.*): invalid choice: '(.*)' \(choose from (.*)\)", words):
            known = choice[3].replace("'", "").split(", ")
            words = f"{choice[1]} {choice[2]}: choose from {', '.join(known)}.{did_you_mean(choice[2], known)}"
        raise UsageError(words)


def whole_number(value: str) -> int:
    """Return the value of an argument that must be a whole number from 1."""
    if not re.fullmatch(r"0*[1-9][0-9]{,8}", value):
        raise argparse.ArgumentTypeError(f"must be a whole number from 1, not {value!r}")
    return int(value)


def values_of(words: Sequence[str], keys: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Return the values that KEY=VALUE words give to some keys, and the other words."""
    values = {key: [word.partition("=")[2] for word in words if word.startswith(f"{key}=")] for key in keys}
    return values, [word for word in words if not word.startswith(tuple(f"{key}=" for key in keys))]
