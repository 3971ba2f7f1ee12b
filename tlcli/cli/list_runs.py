"""`tlcli list`: the runs and sweeps under a folder, as a table, CSV or JSON."""

import json
import sys
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tlcli.cli.list_query import FIGURES, FORMATS, KEYS, OPTIONS, WORDS, Wanted, kept, ordered, parsed
from tlcli.cli.terminal import WHOLE_LINES, terminal_columns
from tlcli.errors import UsageError
from tlcli.runs.index import Entry, Index, RunEntry, SweepEntry, read_index
from tlcli.text import csv_line, strip_control_chars

HELP = """\
usage: tlcli list [FOLDER ...] [--jobs] [--sort KEY] [--filter KEY=VALUE ...]
                  [--limit N] [--format table|csv|json]

The runs and sweeps under a folder (outputs), newest first. A sweep is one line:
its best job by validation, and how many of its jobs are done.

  --jobs     the jobs of a sweep too, each below it
  --sort     by this key, the highest figure first; --sort -KEY the other way
  --filter   only such runs, and such jobs of a sweep; several must all hold.
             KEY=VALUE (* stands for anything), KEY!=VALUE; 'KEY>0.9' and
             < >= <= for figures and for when: put quotes around these
  --limit    the first N of what is left
  --format   table, csv or json

keys: status, when, dataset, backbone, freeze, seed, val, test, minutes, name,
path. val and test are accuracies: of the best epoch, and of the test set.
status is done, running, failed, interrupted, died (running, as it says, but its
process is gone) or damaged (run.json cannot be read).

examples:
  tlcli list --filter backbone=resnet18 --sort test
  tlcli list experiments --jobs --filter 'test>0.9' --format csv > runs.csv
"""

WIDEST_CELL = 24  # columns: a longer name is cut on a terminal, so that the figures stay in sight


@dataclass(frozen=True)
class Row:
    """A line: a run, a sweep, or below it a job, with its values of what the sweep varies."""

    entry: Entry
    is_job: bool = False
    swept: str = ""


def run(argv: list[str]) -> int:
    """List what the arguments ask for; the exit code."""
    if "-h" in argv or "--help" in argv:
        print(HELP, end="")
        return 0
    wanted = parsed(argv)
    found = [_index(folder) for folder in wanted.folders]
    entries = list({entry.path: entry for index in found for entry in index.entries}.values())
    entries = ordered(list(kept(entries, wanted.filters)), wanted.sort)[: wanted.limit]
    for path in (path for index in found for path in index.unreadable):
        print(f"tlcli list: {path}: cannot be looked into", file=sys.stderr)
    show = {"table": _print_table, "csv": _print_csv, "json": _print_json}[wanted.format]
    show(entries, wanted)
    return 0


def candidates(before: Sequence[str]) -> Iterator[str]:
    """What may follow these words on a command line, for completion."""
    match before:
        case [*_, "--format"]:
            yield from FORMATS
        case [*_, "--sort"]:
            yield from KEYS
        case [*_, "--filter"]:
            yield from (f"{key}=" for key in KEYS)
        case [*_, "--limit"]:
            pass
        case _:
            yield from (*OPTIONS, "--help")
            yield from (f"{path}/" for path in sorted(Path().iterdir()) if path.is_dir() and path.name[0] != ".")


# -- what is there


def _index(folder: Path) -> Index:
    """What is under a folder. Raises UsageError where there is none."""
    if not folder.is_dir():
        what = "is no folder" if folder.exists() else "there is no such folder"
        raise UsageError(f"{folder}: {what}; name the one that runs were written to: tlcli list FOLDER")
    return read_index(folder)


def state(row: Row) -> str:
    """The status; of a sweep how many of its jobs are done."""
    entry = row.entry
    if isinstance(entry, RunEntry):
        return f"  {entry.status}" if row.is_job else entry.status
    done, n = entry.counts["done"], len(entry.jobs)
    return f"{n} done" if done == n else f"{done} of {n}, {entry.status}"


# -- the table


@dataclass(frozen=True)
class Field:
    """A column. Where the width is short, those with a higher `drop` are left out; a `whole` one is never cut."""

    title: str
    cell: Callable[[Row], str]
    drop: int
    figure: bool = False
    whole: bool = False


def _word(name: str) -> Callable[[Row], str]:
    return lambda row: strip_control_chars(WORDS[name](row.entry)) or "-"


def _figure(name: str, digits: int) -> Callable[[Row], str]:
    return lambda row: "-" if (found := FIGURES[name](row.entry)) is None else f"{found:.{digits}f}"


FIELDS = (
    Field("status", lambda row: strip_control_chars(state(row)), 0),
    Field("when", _word("when"), 6),
    Field("dataset", _word("dataset"), 4),
    Field("backbone", _word("backbone"), 3),
    Field("freeze", _word("freeze"), 5),
    Field("swept", lambda row: strip_control_chars(row.swept), 2, whole=True),
    Field("val", _figure("val", 4), 1, figure=True),
    Field("test", _figure("test", 4), 0, figure=True),
    Field("minutes", _figure("minutes", 1), 7, figure=True),
    Field("path", _word("path"), 0, whole=True),
)


def _print_table(entries: Sequence[Entry], wanted: Wanted) -> None:
    """A line a run or sweep, and how many they are."""
    where = ", ".join(str(folder) for folder in wanted.folders)
    if not entries:
        print(f"no such runs in {where}" if wanted.filters else f"no runs in {where}")
        return
    width = terminal_columns() or WHOLE_LINES
    print("\n".join(table(list(rows(entries, wanted.jobs)), width)))
    print(f"\n{_total(entries)} in {where}")


def rows(entries: Sequence[Entry], jobs: bool) -> Iterator[Row]:
    """The lines for these, with the jobs of sweeps or without."""
    for entry in entries:
        yield Row(entry)
        if jobs and isinstance(entry, SweepEntry):
            varied = entry.varied()
            for job in entry.jobs:
                yield Row(job, is_job=True, swept=" ".join(word for word in job.overrides if word in varied))


def table(lines: Sequence[Row], width: int) -> list[str]:
    """The lines of the table, with the fields that fit a width. (rich would take seconds for 2,000 of them.)"""
    most = WIDEST_CELL if width < WHOLE_LINES else WHOLE_LINES
    columns = {f: [f.title, *(f.cell(row) if f.whole else _cut(f.cell(row), most) for row in lines)] for f in FIELDS}
    widths = {f: max(map(cells, column)) for f, column in columns.items()}
    fields = fitting([f for f in FIELDS if any(columns[f][1:])], widths, width)
    return [
        "  ".join(_padded(columns[f][i], widths[f], f.figure) for f in fields).rstrip() for i in range(len(lines) + 1)
    ]


def fitting(fields: Sequence[Field], widths: Mapping[Field, int], width: int) -> list[Field]:
    """Those that fit, in their order: what is never dropped, then each next that there is room for."""
    left, kept = width + 2, set()
    for one in sorted(fields, key=lambda f: f.drop):
        if one.drop == 0 or widths[one] + 2 <= left:
            left -= widths[one] + 2
            kept.add(one)
    return [one for one in fields if one in kept]


def _cut(text: str, most: int) -> str:
    """At most so many columns of a text."""
    if cells(text) <= most:
        return text
    while cells(text) >= most:
        text = text[:-1]
    return text + "…"


def _padded(text: str, width: int, right: bool) -> str:
    blanks = " " * (width - cells(text))
    return blanks + text if right else text + blanks


def cells(text: str) -> int:
    """The columns that a text takes on a terminal."""
    if text.isascii():
        return len(text)
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else not unicodedata.combining(c) for c in text)


def _total(entries: Sequence[Entry]) -> str:
    """3 runs and 1 sweep of 4 jobs."""
    jobs = [len(entry.jobs) for entry in entries if isinstance(entry, SweepEntry)]
    runs = len(entries) - len(jobs)
    words = [f"{runs:,} {'run' if runs == 1 else 'runs'}"] if runs or not jobs else []
    if jobs:
        n = sum(jobs)
        sweeps = f"{len(jobs):,} {'sweep' if len(jobs) == 1 else 'sweeps'}"
        words.append(f"{sweeps} of {n:,} {'job' if n == 1 else 'jobs'}")
    return " and ".join(words)


# -- for programs


def _print_csv(entries: Sequence[Entry], wanted: Wanted) -> None:
    """A line a run or sweep; with --jobs a line for each job after its sweep."""
    sys.stdout.write(csv_line(["kind", *KEYS, "jobs", "jobs_done", "swept", "error"]))
    for row in rows(entries, wanted.jobs):
        entry = row.entry
        values = [FIGURES[key](entry) if key in FIGURES else WORDS[key](entry) for key in KEYS]
        jobs = (len(entry.jobs), entry.counts["done"]) if isinstance(entry, SweepEntry) else (None, None)
        kind = "sweep" if isinstance(entry, SweepEntry) else "job" if row.is_job else "run"
        error = entry.error if isinstance(entry, RunEntry) else None
        sys.stdout.write(csv_line([kind, *values, *jobs, row.swept, error]))


def _print_json(entries: Sequence[Entry], wanted: Wanted) -> None:
    print(json.dumps([_record(entry, wanted.jobs) for entry in entries], indent=2))


def _record(entry: Entry, jobs: bool) -> dict[str, Any]:
    """An entry as JSON. The jobs of a sweep are in it only where they are asked for."""
    figures = {key: FIGURES[key](entry) for key in ("val", "test", "minutes")}
    started = entry.started.isoformat(timespec="seconds") if entry.started else None
    facts: dict[str, Any] = {"path": str(entry.path), "status": entry.status, "started": started}
    if isinstance(entry, SweepEntry):
        facts |= {name: list(entry.values(name)) for name in ("dataset", "data", "backbone", "freeze")}
        best = str(entry.top.path) if entry.top else None
        own = {"best_job": best, "jobs": len(entry.jobs), "jobs_by_status": dict(entry.counts)}
        below = {"runs": [_record(job, jobs) for job in entry.jobs]} if jobs else {}
        return {"kind": "sweep", **facts, **figures, **own, **below}
    names = ("name", "dataset", "data", "backbone", "freeze", "seed", "keep_best", "best", "test_ci95", "error")
    own = {name: getattr(entry, name) for name in names}
    return {"kind": "run", **facts, **figures, **own, "overrides": list(entry.overrides)}
