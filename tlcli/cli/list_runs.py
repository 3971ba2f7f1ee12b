"""List the runs and sweeps under a folder, newest first. A sweep is one line:
its best job by validation. val and test are accuracies. status is done,
running, failed, interrupted, stopped (a hopeless trial of a search), died (the
process of a running run has ended) or damaged (run.json cannot be read).

examples:
  tlcli list --sort test
  tlcli list experiments --jobs --format csv > runs.csv
"""

import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.cells import cell_len, set_cell_size

from tlcli.cli.parser import Parser, whole_number
from tlcli.cli.table import table_lines, terminal_columns
from tlcli.errors import UsageError
from tlcli.files import expand_user
from tlcli.runs.index import Entry, read_index
from tlcli.text import csv_line

MAX_NAME_COLUMNS = 24  # at which a name is cut on a terminal, so that the numbers stay visible
# keys that a list can be sorted by, and the columns of CSV
KEYS = ("status", "when", "dataset", "backbone", "freeze", "seed", "val", "test", "minutes", "name", "path")
HIGHEST_FIRST = frozenset({"seed", "val", "test", "minutes", "when"})

TITLES = ("<status", "<when", "<dataset", "<backbone", "<freeze", "<swept", "val", "test", "minutes", "<path")
LESS_IMPORTANT = ("minutes", "when", "freeze", "dataset", "backbone", "swept", "val")

PARSER = Parser("list", __doc__)
add = PARSER.add_argument
add("folders", nargs="*", metavar="FOLDER", default=["outputs"], help="default: outputs")
add("--jobs", action="store_true", help="also list the jobs of a sweep, below it")
order = f"sort by a key, highest number first; -KEY reverses. Keys: {', '.join(KEYS)}"
add("--sort", choices=[*KEYS, *(f"-{key}" for key in KEYS)], metavar="KEY", help=order)
add("--limit", type=whole_number, metavar="N", help="list the first N entries")
PARSER.add_format(("table", "csv", "json"))


def run(argv: list[str]) -> int:
    """List the runs under the folders in argv; return the exit code."""
    words = list(argv)
    if "--sort" in words[:-1]:  # argparse would take -test for a flag
        i = words.index("--sort")
        words[i : i + 2] = [f"--sort={words[i + 1]}"]
    arguments = PARSER.parse_intermixed_args(words)
    entries: dict[Path, Entry] = {}
    for folder in map(expand_user, arguments.folders):
        if not folder.is_dir():
            raise UsageError(f"{folder}: no such folder; name the folder of the runs: tlcli list FOLDER")
        under_folder, unreadable = read_index(folder)
        entries |= {entry["path"]: entry for entry in under_folder}
        for path in unreadable:
            print(f"tlcli list: {path}: cannot be read", file=sys.stderr)
    listed = sort_entries(entries.values(), arguments.sort)[: arguments.limit]
    if arguments.format == "table":
        _print_table(listed, ", ".join(arguments.folders), arguments.jobs)
    elif arguments.format == "csv":
        sys.stdout.write(csv_line(["kind", *KEYS, "jobs", "jobs_done", "swept", "error"]))
        for kind, entry, swept in _with_jobs(listed, arguments.jobs):
            jobs = (entry["jobs"], entry["jobs_by_status"].get("done", 0)) if kind == "sweep" else (None, None)
            values = [_value(entry, key) for key in KEYS]
            sys.stdout.write(csv_line([kind, *values, *jobs, swept, entry.get("error")]))
    else:
        rows = [{k: v for k, v in entry.items() if k != "runs" or arguments.jobs} for entry in listed]
        print(json.dumps(rows, indent=2, default=lambda x: x.isoformat() if isinstance(x, datetime) else str(x)))
    return 0


def sort_entries(entries: Iterable[Entry], sort: str | None) -> list[Entry]:
    """Return the entries newest first, or by a key; those without a value come last in either direction."""
    key = (sort or "when").removeprefix("-")
    order = sorted(entries, key=lambda entry: str(entry["path"]), reverse=True)
    order.sort(key=lambda entry: entry["started"].timestamp() if entry["started"] else 0.0, reverse=True)
    by_value = [(entry["started"] if key == "when" else _value(entry, key), entry) for entry in order]
    known = [(value, entry) for value, entry in by_value if value not in (None, "")]
    known.sort(key=lambda pair: pair[0], reverse=(key in HIGHEST_FIRST) != (sort or "").startswith("-"))
    return [entry for _, entry in [*known, *(pair for pair in by_value if pair[0] in (None, ""))]]


def _value(entry: Entry, key: str) -> Any:
    """Return the value of a key; None or the empty string if the entry has none."""
    if key == "when":
        return entry["started"] and f"{entry['started'].astimezone():%Y-%m-%d %H:%M}"
    if key == "path":
        return str(entry["path"]).removeprefix(f"{os.getcwd()}/")  # noqa: PTH109 - Path.cwd takes 10 us per run
    value = entry.get("data" if key == "dataset" else key)
    return ",".join(value) if isinstance(value, tuple) else value


def _with_jobs(entries: Sequence[Entry], jobs: bool) -> Iterator[tuple[str, Entry, str]]:
    """Yield (kind, entry, swept): runs, sweeps and, if asked for, jobs with the overrides that their sweep varies."""
    for entry in entries:
        yield entry["kind"], entry, ""
        if jobs and entry["kind"] == "sweep":
            counts = Counter(word for job in entry["runs"] for word in set(job["overrides"]))
            for job in entry["runs"]:
                yield "job", job, " ".join(word for word in job["overrides"] if counts[word] < entry["jobs"])


def _print_table(entries: Sequence[Entry], folders: str, jobs: bool) -> None:
    if not entries:
        print(f"no runs in {folders}")
        return
    width = terminal_columns()
    rows = []
    for kind, entry, swept in _with_jobs(entries, jobs):
        status = f"  {entry['status']}" if kind == "job" else entry["status"]
        if kind == "sweep":
            done, n = entry["jobs_by_status"].get("done", 0), entry["jobs"]
            status = f"{n} done" if done == n else f"{done} of {n}, {status}"
        names = [_value(entry, key) or None for key in ("when", "dataset", "backbone", "freeze")]
        for i, name in enumerate(names):
            if width is not None and name and cell_len(name) > MAX_NAME_COLUMNS:
                names[i] = set_cell_size(name, MAX_NAME_COLUMNS - 1).rstrip() + "…"
        shares = [None if entry[key] is None else f"{entry[key]:.4f}" for key in ("val", "test")]
        if shares[1] is None and entry["status"] == "done":
            shares[1] = "not tested"
        minutes = None if entry["minutes"] is None else f"{entry['minutes']:.1f}"
        rows.append([status, *names, swept or None, *shares, minutes, _value(entry, "path")])
    used = [i for i in range(len(TITLES)) if any(row[i] is not None for row in rows)]
    cells = ([row[i] for i in used] for row in rows)
    print(*table_lines([TITLES[i] for i in used], cells, width, LESS_IMPORTANT), sep="\n")
    sweeps = [entry["jobs"] for entry in entries if entry["kind"] == "sweep"]
    numbers = {"run": len(entries) - len(sweeps), "sweep": len(sweeps), "job": sum(sweeps)}
    counts = [f"{n:,} {noun}{'' if n == 1 else 's'}" for noun, n in numbers.items() if n]
    print(f"\n{', '.join(counts)} in {folders}")
