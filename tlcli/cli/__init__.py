"""The command line: argv in, an exit code out.

A command is a module with `run(argv) -> int` and a line in COMMANDS. This package alone knows argv, Hydra, OmegaConf
and the terminal, and each module is imported only once it is needed: `tlcli --help` imports none of these.

Exit codes: 0 done, 1 a run failed, 2 a usage error, 130 interrupted (SIGINT), 143 terminated (SIGTERM).
"""

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from tlcli import __version__
from tlcli.errors import UsageError
from tlcli.text import did_you_mean

COMMANDS = {
    "train": ("tlcli.cli.train", "fine-tune a pretrained network on your images, and test it"),
    "eval": ("tlcli.cli.evaluate", "a finished run on its test set, or on another data set"),
    "predict": ("tlcli.cli.predict", "what a finished run says of images that you name"),
    "compare": ("tlcli.cli.compare", "what differs between runs, and whether it is more than chance"),
    "report": ("tlcli.cli.report", "one HTML file of a run or a sweep, with figures and pictures"),
    "list": ("tlcli.cli.list_runs", "the runs and sweeps under a folder, with what they reached"),
    "export": ("tlcli.cli.export", "a run's model as ONNX, pt2 or for timm"),
    "inspect": ("tlcli.cli.inspect", "a network's stages, and what each way to freeze it costs here"),
    "data": ("tlcli.cli.data_check", "what is wrong with a data set: duplicates, labels, files, balance"),
    "doctor": ("tlcli.cli.doctor", "versions, devices and free space here, and what does not work"),
    "cache": ("tlcli.cli.cache", "list or remove the activations that are kept on disk"),
    "completion": ("tlcli.cli.completion", "print a completion script for bash, zsh or fish"),
}
"""The module of each command, and what it does."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code. An error is one line on stderr; --debug adds the traceback."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    _let_every_character_print()
    try:
        code = _dispatch(words)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        _abandon_stdout()
        return 1
    except SystemExit as exc:
        return exc.code if isinstance(exc.code, int) else int(exc.code is not None)
    except (Exception, KeyboardInterrupt) as exc:
        return _show(exc, words, debug)


def _dispatch(words: list[str]) -> int:
    """Run the command that the first word names."""
    match words:
        case [] | ["-h" | "--help" | "help", *_]:
            print(_help(), end="")
            return 0
        case ["-V" | "--version", *_]:
            print(f"tlcli {__version__}")
            return 0
        case [name, *rest] if name in COMMANDS:
            code: int = import_module(COMMANDS[name][0]).run(rest)
            return code
    kind = "flag" if words[0].startswith("-") else "command"
    raise UsageError(f"unknown {kind} {words[0]!r}.{_near_command(words[0])}")


def _near_command(word: str) -> str:
    """What may have been meant, else where to look."""
    if "=" in word:
        return " Did you mean 'tlcli train " + word + "'?"
    return did_you_mean(word, [*COMMANDS, "--help", "--version"]) or " `tlcli --help` lists the commands."


def _help() -> str:
    """The text of `tlcli --help`."""
    width = max(map(len, COMMANDS))
    commands = "".join(f"  {name:<{width}}  {what}\n" for name, (_, what) in COMMANDS.items())
    return (
        "usage: tlcli COMMAND [ARGUMENT ...]\n\n"
        "Transfer learning for image classification from the shell.\n\n"
        f"commands:\n{commands}\n"
        "flags:\n"
        "  --help     this, or `tlcli COMMAND --help`\n"
        "  --version  the version of tlcli\n"
        "  --debug    with any command: show the traceback of an error\n\n"
        "examples:\n"
        "  tlcli train\n"
        "  tlcli train dataset=imagefolder dataset.root=photos\n"
        "  tlcli train -m freeze=head,none optimizer.lr=1e-3,1e-2\n"
    )


def _show(exc: BaseException, words: list[str], debug: bool) -> int:
    """Print the one line that an exception comes down to; the exit code."""
    from tlcli.cli.endings import ending

    if debug and not isinstance(exc, KeyboardInterrupt):
        import traceback

        traceback.print_exception(exc)
    code, line = ending(exc)
    command = f"tlcli {words[0]}" if words and words[0] in COMMANDS else "tlcli"
    print(f"{command}: {line}", file=sys.stderr)
    return code


def _let_every_character_print() -> None:
    """A class name or a path must not crash a run because the terminal's encoding lacks a character."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def _abandon_stdout() -> None:
    """Point stdout at nothing: its reader has gone, and Python would report that again on its way out."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
