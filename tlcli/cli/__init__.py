"""The command line: argv in, an exit code out.

A command is a module with `run(argv) -> int` and a line in COMMANDS. Only this package knows argv, Hydra, OmegaConf
and the terminal. A command's module is imported when it is needed: `tlcli --help` imports none of them.

Exit codes: 0 done, 1 a run failed, 2 a usage error, 130 interrupted (SIGINT), 143 terminated (SIGTERM).
"""

import errno
import gc
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module

from tlcli import __version__
from tlcli.errors import TlcliError, UsageError, is_out_of_memory
from tlcli.interrupts import Terminated

COMMANDS = {
    "train": ("tlcli.cli.train", "fine-tune a pretrained network on your images, and test it"),
    "rank": ("tlcli.cli.rank", "compare backbones and image sizes on your images, before training"),
    "tune": ("tlcli.cli.tune", "search for a better recipe within a time budget"),
    "eval": ("tlcli.cli.evaluate", "evaluate a finished run on its test set, or on another dataset"),
    "predict": ("tlcli.cli.predict", "classify images with a finished run"),
    "embed": ("tlcli.cli.embed", "write the feature vectors of images, and draw them as a map"),
    "similar": ("tlcli.cli.similar", "find the images that are most similar to one"),
    "compare": ("tlcli.cli.compare", "show differences between runs, and whether they are significant"),
    "report": ("tlcli.cli.report", "write an HTML report of a run or a sweep"),
    "demo": ("tlcli.cli.demo", "show a local page to try a finished run"),
    "list": ("tlcli.cli.list_runs", "list the runs and sweeps under a folder, with their results"),
    "export": ("tlcli.cli.export", "export the model of a run as ONNX, pt2 or for timm"),
    "inspect": ("tlcli.cli.inspect", "show a network's stages, and what each freeze strategy costs"),
    "data": ("tlcli.cli.data_check", "find problems of a dataset: duplicates, labels, files, balance"),
    "doctor": ("tlcli.cli.doctor", "show versions, devices and free space, and what does not work"),
    "cache": ("tlcli.cli.cache", "list or remove cached activations, or fill them in shards"),
    "completion": ("tlcli.cli.completion", "print a completion script for bash, zsh or fish"),
}

HELP = """\
usage: tlcli COMMAND [ARGUMENT ...]

Transfer learning for image classification from the shell.

commands:
{commands}
flags:
  --help     this, or `tlcli COMMAND --help`
  --version  the version of tlcli
  --debug    with any command: show the traceback of an error

examples:
  tlcli train
  tlcli train dataset=imagefolder dataset.root=photos
  tlcli train -m freeze=head,none optimizer.lr=1e-3,1e-2
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code. An error is one line on stderr; --debug adds the traceback."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed: the next file that is opened must not take its place
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115, PTH123
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # the terminal's encoding may lack a character of a class name
    code = 0
    try:
        match words:
            case [] | ["-h" | "--help" | "help", *_]:
                width = max(map(len, COMMANDS))
                commands = "".join(f"  {name:<{width}}  {summary}\n" for name, (_, summary) in COMMANDS.items())
                print(HELP.format(commands=commands), end="")
            case ["-V" | "--version", *_] | ["train", "--version", *_]:
                print(f"tlcli {__version__}")
            case ["train", *rest] if {"-h", "--help"} & {*rest}:  # without Hydra, which takes half a second
                from tlcli.cli.completion import train_help
                from tlcli.cli.conf_files import files_for

                print(train_help(files_for(rest)), end="")
            case [name, *rest] if name in COMMANDS:
                from tlcli import text

                try:
                    os.getcwd()  # noqa: PTH109
                except FileNotFoundError:
                    raise UsageError("the working directory no longer exists: cd to one that does") from None
                if name != "train" and "RANK" in os.environ:
                    from tlcli.cli.launch import rank_and_size

                    if rank_and_size()[1] > 1:
                        raise UsageError("torchrun has started several processes, but this command runs in one")
                text.typed_in = None
                code = import_module(COMMANDS[name][0]).run(rest)
            case [word, *_] if "=" in word:
                raise UsageError(f"unknown command {word!r}. Did you mean 'tlcli train {word}'?")
            case [word, *_]:
                from tlcli.text import did_you_mean

                hint = did_you_mean(word, [*COMMANDS, "--help", "--version"])
                kind = "flag" if word.startswith("-") else "command"
                raise UsageError(f"unknown {kind} {word!r}.{hint or ' `tlcli --help` lists the commands.'}")
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # the reader of stdout has gone: without this Python reports it again on its way out
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except SystemExit as exc:
        return exc.code if isinstance(exc.code, int) else int(exc.code is not None)
    except (Exception, KeyboardInterrupt) as exc:
        if debug and not isinstance(exc, KeyboardInterrupt):
            import traceback

            traceback.print_exception(exc)
        code, line = exit_status(exc)
        command = f"tlcli {words[0]}" if words and words[0] in COMMANDS else "tlcli"
        print(f"{command}: {line}", file=sys.stderr)
        return code


def exit_status(exc: BaseException) -> tuple[int, str]:
    """Return the exit code and the line on stderr for an exception that ended a command."""
    from tlcli.text import one_line  # here: `tlcli --help` needs neither difflib nor csv

    match exc:
        case Terminated():
            return 143, ": ".join(["terminated", *map(str, exc.args)])
        case KeyboardInterrupt():
            return 130, ": ".join(["interrupted", *map(str, exc.args)])
        case UsageError():
            return 2, one_line(exc)
        case TlcliError():
            return 1, one_line(exc)
        case OSError(errno=errno.ENAMETOOLONG | errno.ELOOP):
            return 2, one_line(f"{exc.filename}: {(exc.strerror or '').lower()}; choose another path")
        case OSError(errno=errno.EACCES | errno.EPERM | errno.EROFS) if exc.filename:
            return 1, one_line(f"{exc.filename}: {(exc.strerror or '').lower()}: tlcli cannot read or write there")
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            where = f" for {exc.filename}" if exc.filename else ""
            return 1, f"the disk is full, or your quota of it: no space left{where}"
    if is_out_of_memory(exc):
        batches = "smaller batches (--batch-size of predict and embed), cache.mode=off"
        return 1, f"out of memory: close other programs, or use smaller images (image.size), {batches} or the CPU"
    if isinstance(exc, RuntimeError) and re.search(r"^unable to .*shared memory|DataLoader worker \(pid", str(exc)):
        remedy = "set device.workers=0, or give the container more shared memory (docker run --shm-size=8g)"
        return 1, f"a process that decodes images was killed: {remedy}"
    text = f"{type(exc).__name__}: {one_line(exc)}".rstrip(": ")
    return 1, f"internal error: {text} (rerun with --debug for the traceback)"


def quiet_libraries() -> None:
    """Set environment variables that PyTorch and tqdm read at import, unless the user has set them."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads must not spin on a shared machine
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")


@contextmanager
def fast_imports() -> Iterator[None]:
    """Import PyTorch and libraries on top of it without GC, which saves a sixth of a second, then call gc.freeze().

    If nothing new was imported, nothing is frozen, because there may be garbage by then.
    """
    quiet_libraries()
    n_modules, was_enabled = len(sys.modules), gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > n_modules:
            gc.freeze()
        if was_enabled:
            gc.enable()
