"""`tlcli cache`: what is in the cache of activations, and its removal."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from tlcli.cli.arguments import FORMATS, only_format
from tlcli.cli.terminal import WHOLE_LINES
from tlcli.errors import TlcliError, UsageError
from tlcli.store import LEAST_PREFIX, Entry, Store, cache_dir
from tlcli.text import did_you_mean, size_text

HELP = f"""\
usage: tlcli cache list [--format table|json]
       tlcli cache remove KEY ...
       tlcli cache clear

The activations of frozen layers, kept on disk for later runs to start from.
They can be removed at any time: a run that needs them computes them again.

  list    the entries, the one used last first, and the size of all
  remove  remove some; {LEAST_PREFIX} characters are enough where only one key starts so
  clear   remove all, and with them what killed runs left and measured choices

The directory is $TLCLI_CACHE, or tlcli in the user's cache directory.
"""

ACTIONS = ("list", "remove", "clear")
SHOWN_KEY = 8  # characters
WIDEST_CELL = 24  # columns: what is longer is cut on a terminal, so that the figures stay in sight
WIDEST_WORD = 16  # columns: a longer word of what wraps is broken


def run(argv: list[str]) -> int:
    """Do one action of `tlcli cache`; the exit code."""
    if not argv or "-h" in argv or "--help" in argv:
        print(HELP, end="")
        return 0
    store = Store(cache_dir())
    match argv:
        case ["list", *rest]:
            shown = {"table": _print_table, "json": _print_json}[only_format("list", rest)]
            shown(store)
        case ["remove", *keys]:
            _remove(store, keys)
        case ["clear"]:
            _clear(store)
        case ["clear", word, *_]:
            raise UsageError(f"clear takes no argument {word!r}. Did you mean 'tlcli cache remove {word}'?")
        case [word, *_]:
            hint = did_you_mean(word, [*ACTIONS, "--help"]) or " `tlcli cache --help` lists them."
            raise UsageError(f"there is no 'tlcli cache {word}'.{hint}")
    return 0


def candidates(before: Sequence[str]) -> Iterator[str]:
    """What may follow these words on a command line, for completion."""
    match before:
        case []:
            yield from (*ACTIONS, "--help")
        case ["list"]:
            yield "--format"
        case ["list", "--format"]:
            yield from FORMATS
        case ["remove", *keys]:
            yield from (entry.key for entry in Store(cache_dir()).entries() if entry.key not in keys)


def _remove(store: Store, keys: Sequence[str]) -> None:
    """Remove the entries that the keys name; all of them are found before the first is removed."""
    if not keys:
        raise UsageError("name the entries: tlcli cache remove KEY ... (`tlcli cache list` shows the keys)")
    chosen = {entry.key: entry for entry in map(store.match, keys)}
    with _writing(store):
        for key in chosen:
            store.remove(key)
    print(f"removed {_count(len(chosen))}, {size_text(sum(entry.nbytes for entry in chosen.values()))}")


def _clear(store: Store) -> None:
    with _writing(store):
        count, nbytes = store.clear()
    print(f"removed {_count(count)}, {size_text(nbytes)}, from {store.root}")


@contextmanager
def _writing(store: Store) -> Iterator[None]:
    """A file that does not let itself be removed is no bug of ours."""
    try:
        yield
    except OSError as exc:
        raise TlcliError(f"{exc.filename or store.root}: {exc.strerror or exc}") from exc


def _count(entries: int) -> str:
    return f"{entries:,} {'entry' if entries == 1 else 'entries'}"


def _print_json(store: Store) -> None:
    """The entries with whole keys, for programs."""
    print(json.dumps([_record(entry) for entry in store.entries()], indent=2))


def _record(entry: Entry) -> dict[str, Any]:
    return {
        "key": entry.key,
        "path": str(entry.path),
        "bytes": entry.nbytes,
        "rows": entry.rows,
        "columns": [{"dtype": column.dtype, "shape": list(column.shape)} for column in entry.columns],
        "created": entry.created,
        "used": datetime.fromtimestamp(entry.used, UTC).isoformat(timespec="seconds"),
        "facts": dict(entry.facts),
    }


@dataclass(frozen=True)
class Field:
    """A column of the list. Where the width is short, fields with a higher `drop` go first."""

    title: str
    cell: Callable[[Entry], str]
    drop: int
    figure: bool = False
    wraps: bool = False

    def least_width(self, entries: Sequence[Entry]) -> int:
        """The columns that it needs: its longest cell, or its longest word where it wraps."""
        cells = [self.title, *map(self.cell, entries)]
        if self.wraps:
            return min(max(len(word) for cell in cells for word in cell.split()), WIDEST_WORD)
        return min(max(map(len, cells)), WIDEST_CELL)


FIELDS = (
    Field("key", lambda entry: entry.key[:SHOWN_KEY], 0),
    Field("dataset", lambda entry: _facts(entry, "dataset", "split"), 1, wraps=True),
    Field("backbone", lambda entry: _facts(entry, "backbone"), 2),
    Field("at", lambda entry: _facts(entry, "at"), 4),
    Field("images", lambda entry: f"{entry.rows:,}", 5, figure=True),
    Field("size", lambda entry: size_text(entry.nbytes), 0, figure=True),
    Field("used", lambda entry: ago(time.time() - entry.used), 3, figure=True),
)


def fields_for(entries: Sequence[Entry], width: int) -> list[Field]:
    """The fields that fit a width, in columns; the key and the size always do."""
    fields = list(FIELDS)
    while sum(field.least_width(entries) + 2 for field in fields) - 2 > width:
        first = max(fields, key=lambda field: field.drop)
        if first.drop == 0:
            break
        fields.remove(first)
    return fields


def _print_table(store: Store) -> None:
    """The entries as a table, and the size of all."""
    from rich.table import Table

    from tlcli.cli.view import Screen

    entries = store.entries()
    if not entries:
        print(f"the cache is empty: {store.root}")
        return
    screen = Screen()
    if not screen.is_terminal:
        screen = Screen(WHOLE_LINES)
    fields = fields_for(entries, screen.width)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for field in fields:
        table.add_column(
            field.title,
            justify="right" if field.figure else "left",
            no_wrap=not field.wraps,
            overflow="fold" if field.wraps else "ellipsis",
            max_width=WIDEST_CELL if screen.is_terminal and not field.wraps else None,
        )
    for entry in entries:
        table.add_row(*(field.cell(entry) for field in fields))
    screen.print(table)
    total = f"{_count(len(entries))}, {size_text(sum(entry.nbytes for entry in entries))}, in {store.root}"
    screen.print(total, soft_wrap=True)


def _facts(entry: Entry, *names: str) -> str:
    """Some facts of an entry, as its writer gave them; a dash where it gave none."""
    return " ".join(str(entry.facts[name]) for name in names if name in entry.facts) or "-"


def ago(seconds: float) -> str:
    """How long ago something was: now, 5m ago, 3h ago, 12d ago."""
    for unit, length, least in (("d", 86_400, 2), ("h", 3600, 1), ("m", 60, 1)):
        if seconds >= least * length:
            return f"{seconds // length:.0f}{unit} ago"
    return "now"
