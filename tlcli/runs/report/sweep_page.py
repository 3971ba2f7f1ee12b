"""What is on the page of a sweep."""

import os
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from tlcli.errors import TlcliError, UsageError
from tlcli.runs import leaderboard
from tlcli.runs.leaderboard import Job, Leaderboard
from tlcli.runs.report import words
from tlcli.runs.report.figures import Chart, Trial, scatter
from tlcli.runs.report.reading import RunFiles, read_run, texts
from tlcli.runs.run_dir import RunDir


@dataclass(frozen=True)
class Row:
    """One job of the leaderboard. `link`: its report or else its directory, relative to this report."""

    job: Job
    status_words: str
    values: tuple[str, ...]
    link: str


@dataclass(frozen=True)
class SweepPage:
    """Everything that the page of a sweep shows. `best` is None where no job was finished."""

    name: str
    title: str
    when: str | None
    sentence: str
    figure: str
    figure_words: str
    keys: tuple[str, ...]
    rows: tuple[Row, ...]
    best: Row | None
    has_report: bool
    n_done: int
    charts: tuple[Chart, ...]
    command: str
    seconds: float | None


def sweep_page(folder: Path, output: Path) -> SweepPage:
    """The page of a sweep, for a report that is written to `output`. Raises UsageError where there is no job in it."""
    board = leaderboard.read(folder)
    if not board.jobs:
        raise UsageError(f"{folder}: no run in this sweep")
    rows = tuple(_row(board, job, output) for job in board.jobs)
    best = next((row for row in rows if row.job.rank == 1), None)
    files = _files(board, best or rows[0])
    done = [job for job in board.jobs if job.rank is not None]
    seconds = [job.seconds for job in board.jobs if job.seconds is not None]
    name = folder.resolve().name
    return SweepPage(
        name=name,
        title=f"{_figure(board, best.job.validation)} {name}" if best else f"Sweep {name}",
        when=words.moment(files.record.get("started")) if files else None,
        sentence=_sentence(board, files),
        figure=board.figure,
        figure_words=board.figure.replace("_", " "),
        keys=board.keys,
        rows=rows,
        best=best,
        has_report=best is not None and _report(board, best.job).is_file(),
        n_done=len(done),
        charts=_charts(board, done),
        command=board.command,
        seconds=sum(seconds) if seconds else None,
    )


def _row(board: Leaderboard, job: Job, output: Path) -> Row:
    return Row(
        job=job,
        status_words=words.STATUS.get(job.status, job.status),
        values=tuple(job.values.get(key, "") for key in board.keys),
        link=_link(board, job, output),
    )


def _report(board: Leaderboard, job: Job) -> Path:
    return board.folder / job.name / "report.html"


def _link(board: Leaderboard, job: Job, output: Path) -> str:
    """Percent-encoded, so that a directory's name is a path and nothing else."""
    report = _report(board, job)
    target = report if report.is_file() else report.parent
    try:
        relative = Path(os.path.relpath(target.resolve(), output.resolve().parent)).as_posix()
    except ValueError:  # another drive
        relative = target.name
    return "./" + quote(os.fsencode(relative)) + ("" if target is report else "/")


def _files(board: Leaderboard, row: Row) -> RunFiles | None:
    try:
        return read_run(RunDir(board.folder / row.job.name))
    except TlcliError:
        return None


def _figure(board: Leaderboard, value: float | None) -> str:
    return words.figure(value) if board.figure == "loss" else words.percent(value)


def _sentence(board: Leaderboard, files: RunFiles | None) -> str:
    """What was tried on what."""
    jobs = words.plural(len(board.jobs), "job")
    if files is None:
        return f"{jobs}."
    data = words.dataset_name(files.record, files.config)
    keys = f", with different values of {_listed(board.keys)}" if board.keys else ""
    return f"{jobs}, each trained on images of {data} {words.purpose(texts(files.record.get('classes')))}{keys}."


def _listed(names: tuple[str, ...]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _charts(board: Leaderboard, done: list[Job]) -> tuple[Chart, ...]:
    """A scatter for each key that the jobs have."""
    found = []
    for key in board.keys:
        own = [job for job in done if key in job.values and job.validation is not None]
        trials = [Trial(job.values[key], job.validation or 0.0, f"job {job.name}", job.rank == 1) for job in own]
        found.append(scatter(key, board.figure.replace("_", " "), trials))
    return tuple(chart for chart in found if chart is not None)
