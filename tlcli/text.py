"""Text for people: hints, shortened lists, sizes, durations, and text that is safe to print or to put in a CSV file."""

import csv
import difflib
import io
import json
import os
import re
import textwrap
import unicodedata
from array import array
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

typed_in: Path | None = None
"""The folder where the command was typed, if this process has left it."""

FORMULA_PREFIXES = ("=", "+", "-", "@", "\t", "\r")  # a spreadsheet evaluates a cell that starts like this
BIDI_CONTROLS = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")  # they reorder what follows


def did_you_mean(word: str, known: Iterable[object]) -> str:
    """Return " Did you mean 'near'?" for the nearest known word, or the empty string if none is near."""
    by_lower = {str(k).lower(): str(k) for k in known}
    near = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.6)
    return f" Did you mean {by_lower[near[0]]!r}?" if near else ""


def one_line(text: object) -> str:
    """Return text on one line, without control characters."""
    return strip_control_chars(" ".join(str(text).split()))


def join_limited(items: Sequence[str], limit: int = 5) -> str:
    """Return `a, b, c and 7 more`."""
    more = f" and {len(items) - limit:,} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more


def natural_order(name: str) -> list[tuple[int, str]]:
    """Return a sort key that has 2 before 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def evenly_spaced(items: Sequence[T], n: int) -> list[T]:
    """Return at most n items, evenly spaced from the first to the last."""
    n = min(n, len(items))
    return [items[round(i * (len(items) - 1) / max(1, n - 1))] for i in range(n)]


def size_text(nbytes: float) -> str:
    """Return a size for people, in powers of 1,000: 999 B, 4.2 GB."""
    unit = "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if nbytes >= 1000:
            nbytes, unit = nbytes / 1000, larger
    digits = 0 if unit == "B" or nbytes >= 100 else 1
    return f"{nbytes:.{digits}f} {unit}"


def duration_text(seconds: float) -> str:
    """Return `0.42 s`, `12.3 s`, `4:05` or `2:00:00`."""
    if seconds < 60:
        return f"{seconds:.2f} s" if seconds < 1 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def shown_path(path: Path) -> str:
    """Return a path relative to the user's folder if it is inside, so that it is short and can be typed."""
    full, folder = path.resolve(), typed_in or Path.cwd()
    if full.is_relative_to(folder):
        return str(full.relative_to(folder))
    return str(full if ".." in path.parts else path)


def labelled(label: str, value: str, width: int | None) -> list[str]:
    """Return the lines of a value behind its label, wrapped under itself; not wrapped if the width is None."""
    wrapper = textwrap.TextWrapper(max(width or 10**9, 19), break_on_hyphens=False, break_long_words=False)
    wrapper.initial_indent, wrapper.subsequent_indent = label.ljust(11), " " * 11
    return wrapper.wrap(value) or [label]


def to_plain(value: Any) -> Any:
    """Return dataclasses and Structs as dicts, enums as their values, tuples as lists: what JSON and YAML can hold."""
    from msgspec import to_builtins  # here: help and completion have no time for it

    return json.loads(json.dumps(to_builtins(value)))  # lists for tuples


def flat_keys(value: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Return {"a.b": 1} for {"a": {"b": 1}}."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= flat_keys(item, f"{prefix}{key}.") if isinstance(item, Mapping) and item else {f"{prefix}{key}": item}
    return flat


def strip_control_chars(text: str) -> str:
    """Return text without characters that move a terminal's cursor or set its colors."""

    def is_control(c: str) -> bool:  # marks that join letters, and characters of a newer Unicode, are none
        return unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") or unicodedata.bidirectional(c) in BIDI_CONTROLS

    return "".join("\N{REPLACEMENT CHARACTER}" if is_control(c) else c for c in text)


def csv_line(cells: Iterable[object]) -> str:
    """Return a line of CSV, with its newline; text that starts like a formula gets an apostrophe."""
    text = io.StringIO()
    escaped = [f"'{c}" if isinstance(c, str) and c.startswith(FORMULA_PREFIXES) else c for c in cells]
    csv.writer(text, lineterminator="\r\n").writerow(escaped)
    return text.getvalue().removesuffix("\r\n") + "\n"


class Names(Sequence[str]):
    """Names in one buffer of bytes, with the end of each: a million of them are not a million Python objects."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        self.data, self.ends = bytearray(), array("q")
        self.extend(names)

    def extend(self, names: Iterable[str]) -> None:
        for name in names:
            self.data += os.fsencode(name)  # a file's name need not be UTF-8
            self.ends.append(len(self.data))

    @classmethod
    def from_bytes(cls, data: bytes, ends: bytes) -> "Names":
        """Return the names of these bytes, given the ends as 64-bit integers. Raise ValueError if they do not fit."""
        names = cls()
        names.data, names.ends = bytearray(data), array("q", ends)
        is_ascending = all(a <= b for a, b in pairwise(chain([0], names.ends, [len(data)])))
        if not is_ascending or (names.ends[-1] if names.ends else 0) < len(data):
            raise ValueError("the ends of names are not those of their bytes")
        return names

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = range(len(self))[index]  # IndexError ends an iteration
        return os.fsdecode(bytes(self.data[self.ends[i - 1] if i else 0 : self.ends[i]]))
