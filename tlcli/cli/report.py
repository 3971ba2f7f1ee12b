"""`tlcli report`: one HTML file of a run or a sweep."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from tlcli.cli.folders import run_folders
from tlcli.cli.process import fast_imports
from tlcli.errors import TlcliError, UsageError
from tlcli.runs.run_dir import SWEEP_FILES, RunDir
from tlcli.text import did_you_mean

if TYPE_CHECKING:
    from tlcli.runs.report import Pictures

HELP = """\
usage: tlcli report RUN [--output FILE] [--open]
       tlcli report SWEEP [--output FILE] [--open]

Write one HTML file that shows what was trained and how good it is: the result
with its interval, curves, confusion, figures a class, the most confident
mistakes and the most uncertain images, calibration, what trained, times,
environment, and the command to do it again. Of a sweep: the leaderboard, and
each key against validation. It needs no network and no other file. A run that
failed has a report, too, of what there is.

  --output FILE  where to; report.html in the run's or sweep's directory. Only
                 an earlier report is replaced, never another file
  --open         show it in the browser

examples:
  tlcli report outputs/2026-11-24/10-15-00
  tlcli report outputs/2026-11-24/10-20-00 --output sweep.html --open
"""

FLAGS = ("--output", "--open", "--help")


@dataclass(frozen=True)
class Request:
    """What the command line asks for."""

    folder: Path
    output: Path
    show: bool


def run(argv: list[str]) -> int:
    """Write the report of a run or a sweep, and print where it is; the exit code."""
    if not argv or "-h" in argv or "--help" in argv:
        print(HELP, end="")
        return 0
    request = _request(argv)
    _write(request)
    print(request.output)
    if request.show:
        _open(request.output)
    return 0


def candidates(before: Sequence[str]) -> Iterator[str]:
    """What may follow these words on a command line, for completion: a run or a sweep, and the flags."""
    if before and before[-1] == "--output":
        return
    if all(word.startswith("-") or word == _after(before, "--output") for word in before):
        yield from sorted((path.parent.as_posix() for path in Path().glob("outputs/*/*/sweep.json")), reverse=True)
        yield from run_folders()
    yield from (flag for flag in FLAGS if flag not in before)


def _after(words: Sequence[str], flag: str) -> str | None:
    """The word that follows a flag."""
    return next((value for word, value in pairwise(words) if word == flag), None)


def _request(argv: Sequence[str]) -> Request:
    folders: list[str] = []
    output: str | None = None
    show = False
    words = iter([part for word in argv for part in (word.split("=", 1) if word.startswith("--") else [word])])
    for word in words:
        if word in ("--output", "-o"):
            output = next(words, None)
            if not output:
                raise UsageError("--output takes the name of a file")
        elif word == "--open":
            show = True
        elif word.startswith("-"):
            raise UsageError(
                f"unknown flag {word!r}.{did_you_mean(word, FLAGS) or ' `tlcli report --help` lists them.'}"
            )
        else:
            folders.append(word)
    if len(folders) != 1:
        raise UsageError(f"give one directory of a run or a sweep, not {len(folders)}: tlcli report RUN-or-SWEEP")
    folder = Path(folders[0])
    return Request(folder, Path(output) if output else folder / "report.html", show)


def _write(request: Request) -> None:
    """Gather, render and save; whether the file may be written is known before the rest is done."""
    folder = request.folder
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such directory; give that of a run or a sweep (`tlcli list` shows them)")
    is_run = RunDir(folder).info_file.exists()
    if not is_run and not any((folder / name).exists() for name in SWEEP_FILES):
        raise UsageError(
            f"{folder}: neither a run nor a sweep: no run.json and no sweep.json in it (`tlcli list {folder}` shows "
            "what is below)"
        )
    with fast_imports():  # torch and matplotlib
        from tlcli.runs import report

    report.check_is_ours(request.output)
    if is_run:
        run = RunDir(folder)
        html = report.render("run.html.j2", report.run_page(run, _pictures(run)))
    else:
        html = report.render("sweep.html.j2", report.sweep_page(folder, request.output))
    report.save(html, request.output)


def _pictures(run: RunDir) -> "Pictures":
    """The images of the run's data set, where its config still leads to them."""
    from tlcli.cli.saved import saved_spec
    from tlcli.runs.report import Pictures

    if not run.test_predictions.exists():
        return Pictures({})
    try:
        spec = saved_spec(run)
    except TlcliError as exc:
        return Pictures({}, f"The images are not shown, because the config cannot be read: {exc}.")
    return Pictures.of(spec.dataset)


def _open(file: Path) -> None:
    import webbrowser

    if not webbrowser.open(file.resolve().as_uri()):
        raise TlcliError(f"no browser was found; open {file} in one")
