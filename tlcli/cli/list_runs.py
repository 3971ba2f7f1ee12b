"""`tlcli list`: the runs and sweeps under a folder, as a table, CSV or JSON."""

import json
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.cells import cell_len, set_cell_size

from tlcli.cli.parser import Parser
from tlcli.cli.table import TableColumn, table_lines, terminal_columns
from tlcli.errors import UsageError
from tlcli.files import expand_user
from tlcli.runs.index import Entry, RunEntry, SweepEntry, read_index
from tlcli.text import csv_line, did_you_mean

MAX_NAME_COLUMNS = 24
"""Width at which a name is cut on a terminal, so that the numbers stay visible."""

VALUES: dict[str, Callable[[Entry], Any]] = {
    "status": lambda entry: entry.status,
    "when": lambda entry: _local_time(entry.started),
    "dataset": lambda entry: _names(entry, "data"),
    "backbone": lambda entry: _names(entry, "backbone"),
    "freeze": lambda entry: _names(entry, "freeze"),
    "seed": lambda entry: None if isinstance(entry, SweepEntry) else entry.seed,
    "val": lambda entry: entry.validation,
    "test": lambda entry: entry.test,
    "minutes": lambda entry: entry.minutes,
    "name": lambda entry: "" if isinstance(entry, SweepEntry) else entry.name or "",
    "path": lambda entry: str(entry.path).removeprefix(f"{Path.cwd()}/"),
}
"""The value of each key; None or the empty string if the entry has none."""

HIGHEST_FIRST = frozenset({"seed", "val", "test", "minutes", "when"})

COLUMNS = (
    TableColumn("status", left=True),
    TableColumn("when", drop=6, left=True),
    TableColumn("dataset", drop=4, left=True),
    TableColumn("backbone", drop=3, left=True),
    TableColumn("freeze", drop=5, left=True),
    TableColumn("swept", drop=2, left=True),
    TableColumn("val", drop=1),
    TableColumn("test"),
    TableColumn("minutes", drop=7),
    TableColumn("path", left=True),
)


def parser() -> Parser:
    """Return the parser of `tlcli list`."""
    list_parser = Parser(
        "list",
        "List the runs and sweeps under a folder, newest first. A sweep is one line:\n"
        "its best job by validation. val and test are accuracies. status is done,\n"
        "running, failed, interrupted, died (the process of a running run has ended)\n"
        "or damaged (run.json cannot be read).",
        ["tlcli list --sort test", "tlcli list experiments --jobs --format csv > runs.csv"],
    )
    list_parser.add_argument("folders", nargs="*", metavar="FOLDER", default=["outputs"], help="default: outputs")
    list_parser.add_argument("--jobs", action="store_true", help="also list the jobs of a sweep, below it")
    list_parser.add_argument(
        "--sort",
        type=_sort_key,
        metavar="KEY",
        help=f"sort by a key, highest number first; -KEY reverses. Keys: {', '.join(VALUES)}",
    )
    list_parser.add_argument("--limit", type=_limit, metavar="N", help="list the first N entries")
    list_parser.add_removed("--filter", "use jq: tlcli list --format json | jq '.[] | select(.test > 0.9)'")
    list_parser.add_format(("table", "csv", "json"))
    return list_parser


def run(argv: list[str]) -> int:
    """List the runs under the folders in argv; return the exit code."""
    words = list(argv)
    if "--sort" in words[:-1]:  # argparse would take -test for a flag
        i = words.index("--sort")
        words[i : i + 2] = [f"--sort={words[i + 1]}"]
    arguments = parser().parse_args(words)
    entries: dict[Path, Entry] = {}
    for folder in map(expand_user, arguments.folders):
        if not folder.is_dir():
            problem = "not a folder" if folder.exists() else "no such folder"
            raise UsageError(f"{folder}: {problem}; name the folder of the runs: tlcli list FOLDER")
        index = read_index(folder)
        entries |= {entry.path: entry for entry in index.entries}
        for path in index.unreadable:
            print(f"tlcli list: {path}: cannot be read", file=sys.stderr)
    listed = sort_entries(list(entries.values()), arguments.sort)[: arguments.limit]
    {"table": _print_table, "csv": _print_csv, "json": _print_json}[arguments.format](listed, arguments)
    return 0


def candidates(before: Sequence[str]) -> Iterator[str]:
    """Yield the words that may follow, for completion."""
    match before:
        case [*_, "--format"]:
            yield from ("table", "csv", "json")
        case [*_, "--sort"]:
            yield from VALUES
        case [*_, "--limit"]:
            pass
        case _:
            yield from ("--jobs", "--sort", "--limit", "--format", "--help")
            yield from (f"{path}/" for path in sorted(Path().iterdir()) if path.is_dir() and path.name[0] != ".")


def _sort_key(value: str) -> str:
    if value.removeprefix("-") not in VALUES:
        near = did_you_mean(value, VALUES) or (" Did you mean 'val'?" if value.startswith("val") else "")
        raise UsageError(f"--sort {value}: unknown key.{near} Keys: {', '.join(VALUES)}")
    return value


def _limit(value: str) -> int:
    if not value.isdecimal() or int(value) == 0:
        raise UsageError(f"--limit {value}: must be a whole number from 1")
    return int(value)


def sort_entries(entries: list[Entry], sort: str | None) -> list[Entry]:
    """Return the entries newest first, or by a key; those without a value come last in either direction."""
    key = (sort or "when").removeprefix("-")
    value = VALUES[key]
    entries = sorted(entries, key=lambda entry: (_timestamp(entry.started), str(entry.path)), reverse=True)
    if sort is None:
        return entries
    known = [entry for entry in entries if value(entry) not in (None, "")]
    reverse = (key in HIGHEST_FIRST) != sort.startswith("-")
    known.sort(key=value if key != "when" else lambda entry: _timestamp(entry.started), reverse=reverse)
    return known + [entry for entry in entries if value(entry) in (None, "")]


def _timestamp(started: datetime | None) -> float:
    return started.timestamp() if started else 0.0


def _local_time(started: datetime | None) -> str:
    return f"{started.astimezone():%Y-%m-%d %H:%M}" if started else ""


def _names(entry: Entry, field: str) -> str:
    return ",".join(entry.values(field)) if isinstance(entry, SweepEntry) else getattr(entry, field) or ""


def _with_jobs(entries: Sequence[Entry], jobs: bool) -> Iterator[tuple[str, Entry, str]]:
    """Yield (kind, entry, swept): runs, sweeps and, if asked for, jobs with the overrides that their sweep varies."""
    for entry in entries:
        yield ("sweep" if isinstance(entry, SweepEntry) else "run"), entry, ""
        if jobs and isinstance(entry, SweepEntry):
            varied = entry.varied()
            for job in entry.jobs:
                yield "job", job, " ".join(word for word in job.overrides if word in varied)


def _print_table(entries: Sequence[Entry], arguments: Namespace) -> None:
    """Print a line per run or sweep, and how many there are."""
    folders = ", ".join(arguments.folders)
    if not entries:
        print(f"no runs in {folders}")
        return
    width = terminal_columns()
    rows = []
    for kind, entry, swept in _with_jobs(entries, arguments.jobs):
        status = f"  {entry.status}" if kind == "job" else entry.status
        if isinstance(entry, SweepEntry):
            done, n = entry.counts["done"], len(entry.jobs)
            status = f"{n} done" if done == n else f"{done} of {n}, {entry.status}"
        names = [VALUES[key](entry) or None for key in ("when", "dataset", "backbone", "freeze")]
        if width is not None:
            names = [name and _cut(name) for name in names]
        numbers = [
            None if value is None else f"{value:.{digits}f}"
            for value, digits in ((entry.validation, 4), (entry.test, 4), (entry.minutes, 1))
        ]
        rows.append([status, *names, swept or None, *numbers, VALUES["path"](entry)])
    used = [i for i in range(len(COLUMNS)) if any(row[i] is not None for row in rows)]
    print("\n".join(table_lines([COLUMNS[i] for i in used], [[row[i] for i in used] for row in rows], width)))
    jobs = [len(entry.jobs) for entry in entries if isinstance(entry, SweepEntry)]
    runs = len(entries) - len(jobs)
    counts = [_count(runs, "run")] if runs else []
    if jobs:
        counts.append(f"{_count(len(jobs), 'sweep')} of {_count(sum(jobs), 'job')}")
    print(f"\n{' and '.join(counts)} in {folders}")


def _cut(name: str) -> str:
    too_long = cell_len(name) > MAX_NAME_COLUMNS
    return set_cell_size(name, MAX_NAME_COLUMNS - 1).rstrip() + "…" if too_long else name


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun if n == 1 else noun + 's'}"


def _print_csv(entries: Sequence[Entry], arguments: Namespace) -> None:
    """Print a line per run or sweep; with --jobs also per job."""
    sys.stdout.write(csv_line(["kind", *VALUES, "jobs", "jobs_done", "swept", "error"]))
    for kind, entry, swept in _with_jobs(entries, arguments.jobs):
        jobs = (len(entry.jobs), entry.counts["done"]) if isinstance(entry, SweepEntry) else (None, None)
        error = entry.error if isinstance(entry, RunEntry) else None
        sys.stdout.write(csv_line([kind, *(value(entry) for value in VALUES.values()), *jobs, swept, error]))


def _print_json(entries: Sequence[Entry], arguments: Namespace) -> None:
    print(json.dumps([_as_json(entry, arguments.jobs) for entry in entries], indent=2))


def _as_json(entry: Entry, jobs: bool) -> dict[str, Any]:
    common = {
        "path": str(entry.path),
        "status": entry.status,
        "started": entry.started.isoformat(timespec="seconds") if entry.started else None,
        "val": entry.validation,
        "test": entry.test,
        "minutes": entry.minutes,
    }
    if isinstance(entry, RunEntry):
        names = ("name", "dataset", "data", "backbone", "freeze", "seed", "keep_best", "best", "test_ci95", "error")
        values = {name: getattr(entry, name) for name in names}
        return {"kind": "run", **common, **values, "overrides": list(entry.overrides)}
    return {
        "kind": "sweep",
        **common,
        **{name: list(entry.values(name)) for name in ("dataset", "data", "backbone", "freeze")},
        "best_job": str(entry.best_job.path) if entry.best_job else None,
        "jobs": len(entry.jobs),
        "jobs_by_status": dict(entry.counts),
        **({"runs": [_as_json(job, jobs) for job in entry.jobs]} if jobs else {}),
    }
