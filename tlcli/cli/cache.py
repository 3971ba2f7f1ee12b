"""`tlcli cache`: list and remove cached activations."""

import json
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from tlcli.cli.parser import Parser
from tlcli.cli.table import TableColumn, table_lines, terminal_columns
from tlcli.errors import TlcliError, UsageError
from tlcli.store import CacheEntry, Store, cache_dir
from tlcli.text import did_you_mean, size_text

MIN_KEY_CHARS = 4  # name an entry if only one key starts with them


def parser() -> Parser:
    """Return the parser of `tlcli cache`."""
    parser = Parser(
        "cache",
        "List or remove the cached activations of frozen layers, which later runs read. They can be removed at any "
        "time:\na run that needs them computes them again. The folder is $TLCLI_CACHE, or tlcli in the user's cache.",
        ("tlcli cache list", "tlcli cache remove 3f2a 9c01", "tlcli cache clear"),
    )
    parser.add_argument(
        "action",
        choices=("list", "remove", "clear"),
        help="clear removes all entries, what killed runs left, and measured speeds",
    )
    parser.add_argument(
        "keys", nargs="*", metavar="KEY", help=f"entries to remove; {MIN_KEY_CHARS} unambiguous characters are enough"
    )
    parser.add_format()
    return parser


def run(argv: list[str]) -> int:
    """Do one action of `tlcli cache`; return the exit status."""
    arguments = parser().parse_args(argv or ["--help"])
    store, keys = Store(cache_dir()), arguments.keys
    if keys and arguments.action != "remove":
        raise UsageError(f"{arguments.action} takes no KEY. Did you mean 'tlcli cache remove {keys[0]}'?")
    entries = store.entries()
    try:
        if arguments.action == "list" and arguments.format == "json":
            print(json.dumps([_record(entry) for entry in entries], indent=2))
        elif arguments.action == "list":
            _print_table(store, entries)
        elif arguments.action == "remove":
            if not keys:
                raise UsageError("name the entries: tlcli cache remove KEY ... (`tlcli cache list` shows the keys)")
            chosen: dict[str, CacheEntry] = {}
            for start in keys:
                matches = [entry for entry in entries if entry.key.startswith(start)]
                if len(matches) != 1 or len(start) < MIN_KEY_CHARS:
                    near = "" if matches else did_you_mean(start, (e.key[: max(8, len(start))] for e in entries))
                    remedy = f"Give {MIN_KEY_CHARS} or more characters of one key; `tlcli cache list` shows the keys."
                    raise UsageError(f"{start!r} is the start of {len(matches)} keys.{near or f' {remedy}'}")
                chosen[matches[0].key] = matches[0]
            for key in chosen:
                store.remove(key)
            print(f"removed {_total(len(chosen), sum(entry.nbytes for entry in chosen.values()))}")
        else:
            print(f"removed {_total(*store.clear())}, from {store.root}")
    except OSError as error:
        raise TlcliError(f"{error.filename or store.root}: {error.strerror or error}") from error
    return 0


def _total(count: int, nbytes: int) -> str:
    return f"{count:,} {'entry' if count == 1 else 'entries'}, {size_text(nbytes)}"


def _record(entry: CacheEntry) -> dict[str, Any]:
    return {
        "key": entry.key,
        "path": str(entry.path),
        "bytes": entry.nbytes,
        "rows": entry.rows,
        "columns": [{"dtype": column.dtype, "shape": list(column.shape)} for column in entry.columns],
        "created": entry.created,
        "used": datetime.fromtimestamp(entry.used, UTC).isoformat(timespec="seconds"),
        "facts": dict(entry.metadata),
    }


def _print_table(store: Store, entries: Sequence[CacheEntry]) -> None:
    if not entries:
        print(f"the cache is empty: {store.root}")
        return
    rows = []
    for entry in entries:
        metadata, images, size = entry.metadata, f"{entry.rows:,}", size_text(entry.nbytes)
        dataset = " ".join(str(metadata[name]) for name in ("dataset", "split") if name in metadata) or None
        minutes = max(0, round(time.time() - entry.used)) // 60
        used = f"{minutes}m" if minutes < 60 else f"{minutes // 60}h" if minutes < 2880 else f"{minutes // 1440}d"
        network = metadata.get("backbone"), metadata.get("at")
        rows.append((entry.key[:8], dataset, *network, images, size, f"{used} ago"))
    left, drop = ("dataset", "backbone", "at"), {"dataset": 1, "backbone": 2, "used": 3, "at": 4, "images": 5}
    titles = ("key", "dataset", "backbone", "at", "images", "size", "used")
    columns = [TableColumn(title, drop.get(title, 0), left=title in left) for title in titles]
    print(*table_lines(columns, rows, terminal_columns()), sep="\n")
    print(f"{_total(len(entries), sum(entry.nbytes for entry in entries))}, in {store.root}")
