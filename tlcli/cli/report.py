"""`tlcli report`: write one HTML file about a run or a sweep."""

from pathlib import Path

from tlcli.cli.parser import Parser
from tlcli.cli.process import fast_imports
from tlcli.errors import TlcliError, UsageError
from tlcli.runs.run_dir import RunDir, is_sweep

SUMMARY = """\
Write one HTML file that shows what was trained and how good it is: the result
with its interval, curves, confusion, metrics per class, the most confident
mistakes and the most uncertain images, calibration, what trained, times,
environment, and the command to train again. For a sweep: the leaderboard, and
each key against validation. The file needs no network and no other file. Runs
that failed have a report, too."""


def parser() -> Parser:
    """Return the parser of the command."""
    examples = [
        "tlcli report outputs/2026-11-24/10-15-00",
        "tlcli report outputs/2026-11-24/10-20-00 --output s.html --open",
    ]
    made = Parser("report", SUMMARY, examples)
    made.add_argument("run", metavar="RUN", help="directory of a run or a sweep")
    made.add_argument(
        "-o", "--output", metavar="FILE", help="default: report.html in RUN; only an earlier report is replaced"
    )
    made.add_argument("--open", action="store_true", help="show the report in the browser")
    return made


def run(argv: list[str]) -> int:
    """Write the report of a run or a sweep and print its path; return the exit code."""
    arguments = parser().parse_args(argv or ["--help"])
    folder = Path(arguments.run)
    output = Path(arguments.output) if arguments.output else folder / "report.html"
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such directory; give a run or a sweep (`tlcli list` shows them)")
    if not RunDir(folder).info_file.exists() and not is_sweep(folder):
        raise UsageError(
            f"{folder}: not a run or a sweep (no run.json, no sweep.json); `tlcli list {folder}` finds runs"
        )
    with fast_imports():  # torch and matplotlib
        from tlcli.runs.report import check_output, render, save, sweep_view

    check_output(output)  # before the work
    page = render("sweep.html.j2", sweep_view(folder, output)) if is_sweep(folder) else _run_page(RunDir(folder))
    save(page, output)
    print(output)
    if arguments.open:
        import webbrowser

        if not webbrowser.open(output.resolve().as_uri()):
            raise TlcliError(f"no browser was found; open {output} in one")
    return 0


<<<<<<< HEAD
def _run_page(run: RunDir) -> str:
    from tlcli.cli.saved_config import load_spec
    from tlcli.data.dataset import images_by_key
    from tlcli.runs.report import render, run_view

    images, reason = {}, None
    if run.test_predictions.exists():
        try:
            images = images_by_key(load_spec(run).dataset)
        except (TlcliError, OSError) as exc:
            reason = f"The images are not shown, because the data set cannot be read: {exc}."
    return render("run.html.j2", run_view(run, images, reason))
=======
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
    from tlcli.cli.saved_config import load_spec
    from tlcli.runs.report import Pictures

    if not run.test_predictions.exists():
        return Pictures({})
    try:
        spec = load_spec(run)
    except TlcliError as exc:
        return Pictures({}, f"The images are not shown, because the config cannot be read: {exc}.")
    return Pictures.of(spec.dataset)


def _open(file: Path) -> None:
    import webbrowser

    if not webbrowser.open(file.resolve().as_uri()):
        raise TlcliError(f"no browser was found; open {file} in one")
>>>>>>> 100680c (Of Hydra's node, files that are not tlcli's may set the choice and the numbers of a launcher and the sweep; Optuna's sweeper is accepted; text keys take text as typed; aliases are refused; help and completion come from the parsers)
