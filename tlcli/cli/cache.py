"""`tlcli cache`: list and remove cached activations."""

import json
import time
from collections.abc import Sequence
from datetime import UTC, datetime

from tlcli.cli.parser import Parser
from tlcli.cli.table import UNLIMITED_WIDTH, TableColumn, make_table, terminal_columns
from tlcli.errors import TlcliError, UsageError
from tlcli.store import CacheEntry, Store, cache_dir
from tlcli.text import did_you_mean, size_text

ACTIONS = ("list", "remove", "clear")
SHOWN_KEY_CHARS = 8
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
        "action", choices=ACTIONS, help="clear removes all entries, what killed runs left, and measured speeds"
    )
    parser.add_argument(
        "keys", nargs="*", metavar="KEY", help=f"entries to remove; {MIN_KEY_CHARS} unambiguous characters are enough"
    )
    parser.add_format()
    return parser


def run(argv: list[str]) -> int:
    """Do one action of `tlcli cache`; return the exit status."""
    arguments = parser().parse_args(argv or ["--help"])
    store = Store(cache_dir())
    keys = arguments.keys
    if keys and arguments.action != "remove":
        raise UsageError(f"{arguments.action} takes no KEY. Did you mean 'tlcli cache remove {keys[0]}'?")
    try:
        if arguments.action == "list" and arguments.format == "json":
            records = [
                {
                    "key": entry.key,
                    "path": str(entry.path),
                    "bytes": entry.nbytes,
                    "rows": entry.rows,
                    "columns": [{"dtype": column.dtype, "shape": list(column.shape)} for column in entry.columns],
                    "created": entry.created,
                    "used": datetime.fromtimestamp(entry.used, UTC).isoformat(timespec="seconds"),
                    "facts": dict(entry.metadata),
                }
                for entry in store.entries()
            ]
            print(json.dumps(records, indent=2))
        elif arguments.action == "list":
            _print_table(store)
        elif arguments.action == "remove":
            if not keys:
                raise UsageError("name the entries: tlcli cache remove KEY ... (`tlcli cache list` shows the keys)")
            entries = store.entries()
            chosen = {entry.key: entry for entry in (_match(entries, key) for key in keys)}
            for key in chosen:
                store.remove(key)
            print(f"removed {_total(len(chosen), sum(entry.nbytes for entry in chosen.values()))}")
        else:
            count, nbytes = store.clear()
            print(f"removed {_total(count, nbytes)}, from {store.root}")
    except OSError as error:
        raise TlcliError(f"{error.filename or store.root}: {error.strerror or error}") from error
    return 0


def _match(entries: Sequence[CacheEntry], prefix: str) -> CacheEntry:
    """Return the entry whose key is or starts with `prefix`. Raise UsageError unless there is exactly one."""
    matches = [entry for entry in entries if entry.key.startswith(prefix)]
    matches = [entry for entry in matches if entry.key == prefix] or matches
    if len(prefix) < MIN_KEY_CHARS:
        raise UsageError(f"{prefix!r} is too short: give at least {MIN_KEY_CHARS} characters of a key")
    if not matches:
        near = did_you_mean(prefix, (entry.key[: max(8, len(prefix))] for entry in entries))
        raise UsageError(f"no entry {prefix!r}.{near or ' `tlcli cache list` shows the keys'}")
    if len(matches) > 1:
        raise UsageError(f"{prefix!r} is the start of {len(matches)} keys: give more characters")
    return matches[0]


def _total(count: int, nbytes: int) -> str:
    return f"{count:,} {'entry' if count == 1 else 'entries'}, {size_text(nbytes)}"


def _print_table(store: Store) -> None:
    from tlcli.cli.view import Screen

    entries = store.entries()
    if not entries:
        print(f"the cache is empty: {store.root}")
        return
    left = ("dataset", "backbone", "at")
    ranks = {"key": 0, "dataset": 1, "backbone": 2, "at": 4, "images": 5, "size": 0, "used": 3}  # 5 is left out first
    rows = []
    for entry in entries:
        facts, images, size = entry.metadata, f"{entry.rows:,}", size_text(entry.nbytes)
        dataset = " ".join(str(facts[name]) for name in ("dataset", "split") if name in facts) or None
        used = _ago(time.time() - entry.used)
        rows.append((entry.key[:SHOWN_KEY_CHARS], dataset, facts.get("backbone"), facts.get("at"), images, size, used))
    screen = Screen(terminal_columns() or UNLIMITED_WIDTH)
    columns = [TableColumn(name, rank, left=name in left) for name, rank in ranks.items()]
    screen.print(make_table(columns, rows, screen.width))
    total = _total(len(entries), sum(entry.nbytes for entry in entries))
    screen.print(f"{total}, in {store.root}", soft_wrap=True)


def _ago(seconds: float) -> str:
    """Return how long ago something was: now, 5m ago, 3h ago, 12d ago."""
    for unit, length, least in (("d", 86_400, 2), ("h", 3600, 1), ("m", 60, 1)):
        if seconds >= least * length:
            return f"{seconds // length:.0f}{unit} ago"
    return "now"
