"""What `tlcli list` is asked for: the keys of a run, filters on them, their order, and the arguments that say so."""

import operator
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from tlcli.errors import UsageError
from tlcli.runs.index import Entry, RunEntry, SweepEntry
from tlcli.text import did_you_mean

FORMATS = ("table", "csv", "json")
OPTIONS = ("--sort", "--filter", "--limit", "--format", "--jobs")
HOME = "outputs"

FIGURES: dict[str, Callable[[Entry], float | None]] = {
    "val": lambda entry: entry.validation,
    "test": lambda entry: entry.test,
    "minutes": lambda entry: entry.minutes,
    "seed": lambda entry: entry.seed if isinstance(entry, RunEntry) else None,
}
WORDS: dict[str, Callable[[Entry], str]] = {
    "status": lambda entry: entry.status,
    "when": lambda entry: when(entry.started),
    "dataset": lambda entry: chosen(entry, "data"),
    "backbone": lambda entry: chosen(entry, "backbone"),
    "freeze": lambda entry: chosen(entry, "freeze"),
    "name": lambda entry: (entry.name or "") if isinstance(entry, RunEntry) else "",
    "path": lambda entry: shown_path(entry.path),
}
KEYS = ("status", "when", "dataset", "backbone", "freeze", "seed", "val", "test", "minutes", "name", "path")


@dataclass(frozen=True)
class Filter:
    """One condition on an entry."""

    key: str
    sign: str
    value: str

    def holds(self, entry: Entry) -> bool:
        """Whether the entry is such a one. Where it does not have the figure, nothing but != holds."""
        if self.key in FIGURES:
            figure = FIGURES[self.key](entry)
            return self.sign == "!=" if figure is None else bool(SIGNS[self.sign](figure, float(self.value)))
        word, value = WORDS[self.key](entry), self.value
        if self.key == "when" and self.sign in ("=", "!="):
            value += "*"  # a day is enough
        words = [word, entry.dataset or ""] if self.key == "dataset" and isinstance(entry, RunEntry) else [word]
        same = any(one == value or fnmatchcase(one, value) for one in words)
        if self.sign in ("=", "!="):
            return same == (self.sign == "=")
        return bool(word) and bool(SIGNS[self.sign](word, value))


SIGNS: dict[str, Callable[[Any, Any], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "!=": operator.ne,
    "=": operator.eq,
    ">": operator.gt,
    "<": operator.lt,
}


@dataclass(frozen=True)
class Wanted:
    """What a command line asks for. `sort`: a key, with a minus before it for the other way."""

    folders: tuple[Path, ...] = (Path(HOME),)
    filters: tuple[Filter, ...] = ()
    sort: str | None = None
    limit: int | None = None
    format: str = FORMATS[0]
    jobs: bool = False


def parsed(argv: Sequence[str]) -> Wanted:
    """The arguments, read. Raises UsageError."""
    found: dict[str, Any] = {}
    filters: list[Filter] = []
    folders: list[Path] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        option, equals, value = word.partition("=")
        if not word.startswith("-"):
            folders.append(Path(word).expanduser())
        elif word == "--jobs":
            found["jobs"] = True
        elif option in OPTIONS and option != "--jobs":
            if not equals and not words:
                raise UsageError(f"{option} needs a value: tlcli list --help")
            value = value if equals else words.pop(0)
            if option == "--filter":
                filters.append(parsed_filter(value))
            else:
                found[option[2:]] = _CHECKED[option](value)
        else:
            raise UsageError(f"list does not take {word!r}.{did_you_mean(option, [*OPTIONS, '--help'])}")
    return Wanted(tuple(folders) or (Path(HOME),), tuple(filters), **found)


def parsed_filter(text: str) -> Filter:
    """KEY=VALUE, KEY>VALUE and the like. Raises UsageError."""
    found = re.fullmatch(r"([^=<>!]*)(>=|<=|!=|=|>|<)(.*)", text, re.DOTALL)
    if not found:
        raise UsageError(f"--filter {text}: give KEY=VALUE, or 'KEY>VALUE' in quotes, or the shell takes > for itself")
    key, sign, value = found[1].strip(), found[2], found[3].strip()
    _known(key, f"--filter {text}")
    if key in FIGURES:
        try:
            float(value)
        except ValueError:
            raise UsageError(f"--filter {text}: {key} is a number, and {value!r} is none") from None
    elif sign not in ("=", "!=") and key != "when":
        raise UsageError(f"--filter {text}: {key} is a word: use = or != with it")
    return Filter(key, sign, value)


def _sort(value: str) -> str:
    _known(value.removeprefix("-"), f"--sort {value}")
    return value


def _known(key: str, where: str) -> None:
    if key not in KEYS:
        near = did_you_mean(key, KEYS) or (" Did you mean 'val'?" if key.startswith("val") else "")
        raise UsageError(f"{where}: there is no key {key!r}.{near} Keys: {', '.join(KEYS)}")


def _limit(value: str) -> int:
    if not value.isdecimal() or int(value) == 0:
        raise UsageError(f"--limit {value}: give a whole number from 1")
    return int(value)


def _format(value: str) -> str:
    if value not in FORMATS:
        raise UsageError(f"--format takes one of {', '.join(FORMATS)}.{did_you_mean(value, FORMATS)}")
    return value


_CHECKED: dict[str, Callable[[str], Any]] = {"--sort": _sort, "--limit": _limit, "--format": _format}


def kept(entries: Sequence[Entry], filters: Sequence[Filter]) -> Iterator[Entry]:
    """The runs for which every filter holds, and the sweeps with such jobs, with these alone."""
    for entry in entries:
        if isinstance(entry, SweepEntry):
            jobs = tuple(job for job in entry.jobs if all(one.holds(job) for one in filters))
            if jobs:
                yield replace(entry, jobs=jobs)
        elif all(one.holds(entry) for one in filters):
            yield entry


def ordered(entries: list[Entry], sort: str | None) -> list[Entry]:
    """Newest first, or by a key: figures and times the highest first, words in the order of the alphabet. What has none
    comes last either way."""
    entries = sorted(entries, key=lambda entry: (_seconds(entry.started), str(entry.path)), reverse=True)
    if sort is None:
        return entries
    key, turned = sort.removeprefix("-"), sort.startswith("-")
    value: Callable[[Entry], Any] = FIGURES.get(key) or (WORDS[key] if key != "when" else lambda e: _seconds(e.started))
    there = [entry for entry in entries if value(entry) not in (None, "")]
    there.sort(key=value, reverse=(key in FIGURES or key == "when") != turned)
    return there + [entry for entry in entries if value(entry) in (None, "")]


def _seconds(started: datetime | None) -> float:
    return started.timestamp() if started else 0.0


def chosen(entry: Entry, name: str) -> str:
    """The data set, the backbone or the freeze strategy; of a sweep all that it has, with commas."""
    return ",".join(entry.values(name)) if isinstance(entry, SweepEntry) else getattr(entry, name) or ""


def when(started: datetime | None) -> str:
    """2026-11-24 16:14, in this machine's time."""
    return f"{started.astimezone():%Y-%m-%d %H:%M}" if started else ""


def shown_path(path: Path) -> str:
    """The path from the working directory where it lies in that."""
    text, here = str(path), f"{Path.cwd()}/"
    return text.removeprefix(here)
