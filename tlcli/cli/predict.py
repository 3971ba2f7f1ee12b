"""`tlcli predict`: what a finished run says of images, as a table, CSV or a JSON object a line."""

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from tlcli.cli.answer_rows import ROWS
from tlcli.cli.libraries import importing
from tlcli.errors import UsageError
from tlcli.reporter import Reporter
from tlcli.text import did_you_mean

if TYPE_CHECKING:
    from rich.console import Console

    from tlcli.data.named import Named

HELP = """\
usage: tlcli predict RUN PATH ... [--top K] [--format table|csv|jsonl]
                     [--output FILE] [--checkpoint best|last]
                     [--precision auto|fp32|bf16] [--batch-size N]
                     [--device auto|cpu|cuda|mps]

What a finished run says of images, in order. RUN is its directory. A PATH is an
image, a folder (all images below it), a pattern in quotes, or - for a list on
stdin, a path a line. Images are read and made ready as in training;
probabilities are calibrated on the run's validation images.

  --top         so many classes of each image (5)
  --format      table (on a terminal), csv, or jsonl (elsewhere): an object a
                line, {"path", "prediction", "probability", "top": [[class,
                probability], ...]}, or {"path", "error"}
  --output      write to this file, which is not there yet
  --checkpoint  the weights of the best epoch (best) or of the last one
  --precision   auto (as the run was evaluated), fp32: exact, or bf16: fast on
                hardware that has it
  --batch-size  images a forward pass
  --device      where to compute

A file that does not decode is a row with its error. The exit code is then 1.

examples:
  tlcli predict outputs/2026-11-24/10-15-00 photo.jpg
  tlcli predict outputs/2026-11-24/10-15-00 photos --format csv --output all.csv
  find photos -newer last | tlcli predict outputs/2026-11-24/10-15-00 - --top 1
"""

FORMATS = ("table", "csv", "jsonl")
CHOICES: dict[str, tuple[str, ...]] = {
    "--format": FORMATS,
    "--checkpoint": ("best", "last"),
    "--precision": ("auto", "fp32", "bf16"),
    "--device": ("auto", "cpu", "cuda", "mps"),
}
NUMBERS = ("--top", "--batch-size")
OPTIONS = (*NUMBERS, *CHOICES, "--output")
STDIN = "-"
PATIENCE = 5.0
"""Seconds that counting images may take: what is not counted by then is taken for a stream without an end."""


@dataclass
class Wanted:
    """What the arguments ask for."""

    run: str
    paths: list[str]
    values: dict[str, str] = field(default_factory=dict)

    @property
    def top(self) -> int:
        """Classes of each image."""
        return int(self.values.get("--top", "5"))

    @property
    def batch_size(self) -> int | None:
        """Images a forward pass."""
        return int(self.values["--batch-size"]) if "--batch-size" in self.values else None

    @property
    def format(self) -> str:
        """The format asked for, else the one that suits where the rows go."""
        suited = "table" if sys.stdout.isatty() and "--output" not in self.values else "jsonl"
        return self.values.get("--format", suited)


def run(argv: list[str]) -> int:
    """Predict what the arguments name; the exit code."""
    if not argv or "-h" in argv or "--help" in argv:
        print(HELP, end="")
        return 0
    wanted = _wanted(argv)
    with _output(wanted.values.get("--output")) as file:
        return _predict(wanted, file)


def candidates(before: Sequence[str]) -> Iterator[str]:
    """What may follow these words on a command line, for completion; paths are the shell's to complete."""
    from tlcli.cli.run_folders import run_folders

    if before and before[-1] in CHOICES:
        yield from CHOICES[before[-1]]
    elif not before:
        yield from run_folders()
        yield "--help"
    elif before[-1] not in OPTIONS:
        yield from (option for option in OPTIONS if option not in before)


# -- arguments


def _wanted(argv: Sequence[str]) -> Wanted:
    """The arguments, checked. Raises UsageError."""
    words, paths, values = list(argv), [], {}
    while words:
        word = words.pop(0)
        if word == "--":
            paths += words
            break
        if not word.startswith("-") or word == STDIN:
            paths.append(word)
            continue
        option, equals, value = word.partition("=")
        if option not in OPTIONS:
            raise UsageError(f"there is no {option}.{did_you_mean(option, OPTIONS) or ' See tlcli predict --help.'}")
        if not equals and not words:
            raise UsageError(f"{option} needs a value: {_takes(option)}")
        values[option] = _checked(option, value if equals else words.pop(0))
    if not paths:
        raise UsageError("name a run directory and images: tlcli predict RUN PATH ...")
    if len(paths) == 1:
        raise UsageError(f"name what to predict: tlcli predict {paths[0]} PATH ... (images, folders, or - for a list)")
    if paths.count(STDIN) > 1:
        raise UsageError("stdin (-) is named twice")
    return Wanted(paths[0], paths[1:], values)


def _checked(option: str, value: str) -> str:
    """A value that the option takes."""
    if option in CHOICES and value not in CHOICES[option]:
        raise UsageError(f"{option}={value}: give {_takes(option)}.{did_you_mean(value, CHOICES[option])}")
    if option in NUMBERS and not (value.isascii() and value.isdigit() and 0 < int(value) <= 65_536):
        raise UsageError(f"{option}={value}: give {_takes(option)}")
    return value


def _takes(option: str) -> str:
    if option in CHOICES:
        return "one of " + ", ".join(CHOICES[option])
    return "a whole number from 1" if option in NUMBERS else "the name of a file"


@contextmanager
def _output(path: str | None) -> Iterator[TextIO]:
    """stdout, or a new file. Raises UsageError where that is there already or cannot be made."""
    if path is None:
        yield sys.stdout
        return
    try:
        file = Path(path).open("x", encoding="utf-8", newline="", errors="surrogateescape")  # noqa: SIM115
    except FileExistsError:
        raise UsageError(f"--output={path}: is there already; name a new file") from None
    except OSError as error:
        raise UsageError(f"--output={path}: cannot be written ({error.strerror})") from error
    try:
        with file:
            yield file
    finally:
        if file.closed and Path(path).stat().st_size == 0:
            Path(path).unlink()  # nothing came of it: the next try finds the name free


# -- work


def _predict(wanted: Wanted, file: TextIO) -> int:
    """Write a row an image; 1 if there were errors among them."""
    with importing():
        from tlcli.device import find_accelerator, keep_freed_memory
        from tlcli.predict import Predictor
        from tlcli.runs.load import load_run
    from tlcli.specs import Accelerator, Precision
    from tlcli.store import Store, cache_dir

    loaded = load_run(wanted.run, wanted.values.get("--checkpoint", "best"))
    accelerator = find_accelerator(Accelerator(wanted.values.get("--device", "auto")))
    if accelerator.type == "cpu":
        keep_freed_memory()
    precision = Precision(wanted.values.get("--precision", "auto"))
    predictor = Predictor(loaded, accelerator, Store(cache_dir()), precision=precision, batch_size=wanted.batch_size)
    total = _count(wanted.paths)
    top = min(wanted.top, len(loaded.classes))
    rows = ROWS[wanted.format](file, top, loaded.classes)
    count = errors = 0
    start = time.perf_counter()
    with _progress(total, shown=sys.stderr.isatty() and not file.isatty()) as (reporter, advance):
        for answer in predictor.answers(_images(wanted.paths), top=top, total=total, reporter=reporter):
            rows.add(answer)
            count, errors = count + 1, errors + (answer.error is not None)
            advance(1)
    if errors:
        print(f"tlcli predict: {errors:,} of {count:,} have no prediction: see their errors", file=sys.stderr)
    elif sys.stderr.isatty():
        speed = count / (time.perf_counter() - start)
        print(f"{count:,} images, {speed:,.0f} a second ({predictor.how})", file=sys.stderr)
    return 1 if errors else 0


def _images(paths: Sequence[str]) -> Iterator["Named"]:
    """What the arguments name; for - the lines of stdin."""
    from tlcli.data.named import expand_image_paths

    for path in paths:
        yield from expand_image_paths(_lines(), patterns=False) if path == STDIN else expand_image_paths([path])


def _lines() -> Iterator[str]:
    """The lines of stdin that are not empty, as they come; names need not be UTF-8."""
    for line in sys.stdin.buffer:
        if path := os.fsdecode(line.rstrip(b"\r\n")):
            yield path


def _count(paths: Sequence[str]) -> int | None:
    """How many images the arguments name; None for stdin, and where it takes long to tell."""
    if STDIN in paths:
        return None
    start, count = time.monotonic(), 0
    for _ in _images(paths):
        count += 1
        if time.monotonic() - start > PATIENCE:
            return None
    return count


@contextmanager
def _progress(total: int | None, shown: bool) -> Iterator[tuple[Reporter, Callable[[int], None]]]:
    """A watch for notes, and what counts the images done: with a bar on stderr, where one is to be shown."""
    if not shown:
        yield Reporter(), lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from tlcli.cli.view import Speed

    console = Console(stderr=True, markup=False, emoji=False, highlight=False)
    columns = [TextColumn("predicting"), BarColumn(bar_width=16), MofNCompleteColumn(), Speed()]
    # the rows go to another stream, which is none of the bar's
    with Progress(
        *columns,
        TimeRemainingColumn(compact=True),
        console=console,
        transient=True,
        refresh_per_second=4,
        redirect_stdout=False,
    ) as bars:
        task = bars.add_task("", total=total, unit="images")
        yield _Notes(console), lambda done: bars.advance(task, done)


class _Notes(Reporter):
    """Shows notes on stderr."""

    def __init__(self, console: "Console") -> None:
        self._console = console

    def note(self, text: str) -> None:
        self._console.print(f"note       {text}", soft_wrap=True)
