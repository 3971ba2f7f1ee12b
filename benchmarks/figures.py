"""Medians, ratios within a round, and bars."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Rounds = dict[str, list[float]]
"""The figures of each round, by what was measured."""

HEADER = ["measure", "bar", "seen", "holds"]


@dataclass(frozen=True)
class Measure:
    """One row of the suite: a bar and the figure of each round. It holds if the median reaches the bar."""

    what: str
    bar: float
    seen: tuple[float, ...]
    unit: str
    at_least: bool

    @property
    def holds(self) -> bool:
        """Return True if the unrounded median reaches the bar."""
        middle = statistics.median(self.seen)
        return middle >= self.bar if self.at_least else middle <= self.bar

    @property
    def row(self) -> list[str]:
        """Return the cells under HEADER."""
        bar = f"at {'least' if self.at_least else 'most'} {self.bar:g}{self.unit}"
        return [self.what, bar, spread(self.seen, self.unit), "yes" if self.holds else "**no**"]

    def to_json(self) -> dict[str, Any]:
        """Return a plain dict."""
        return {**vars(self), "holds": self.holds}


def at_least(what: str, bar: float, seen: Sequence[float], unit: str = "x") -> Measure:
    """Return a bar that the figures must reach."""
    return Measure(what, bar, tuple(seen), unit, at_least=True)


def at_most(what: str, bar: float, seen: Sequence[float], unit: str = "x") -> Measure:
    """Return a bar that the figures must not exceed."""
    return Measure(what, bar, tuple(seen), unit, at_least=False)


def interleaved(timers: Mapping[str, Callable[[], float]], rounds: int) -> Rounds:
    """Run every timer once per round, so that a temporary slowdown of the machine affects all of them."""
    seen: Rounds = {name: [] for name in timers}
    for turn in range(rounds):
        order = list(timers) if turn % 2 == 0 else list(reversed(timers))  # the order alternates
        for name in order:
            seen[name].append(timers[name]())
    return seen


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Return the ratio within each round."""
    return [a / b for a, b in zip(above, below, strict=True)]


def quickest(rounds: Rounds, names: Sequence[str]) -> str:
    """Return the name whose median rate is highest."""
    return max(names, key=lambda name: statistics.median(rounds[name]))


def spread(values: Sequence[float], unit: str = "") -> str:
    """Return `2.41x (2.38 to 2.45)`, median and range, or the single value."""
    middle = number(statistics.median(values)) + unit
    return middle if len(values) == 1 else f"{middle} ({number(min(values))} to {number(max(values))})"


def number(value: float) -> str:
    """Return about three digits: 0.913, 2.41, 35.7, 113, 12,345."""
    size = abs(value)
    return f"{value:,.0f}" if size >= 100 else f"{value:.1f}" if size >= 10 else f"{value:.3g}"


def table(rounds: Rounds, unit: str = "") -> list[list[str]]:
    """Return rows of name, median and range."""
    return [
        [name, f"{number(statistics.median(seen))}{unit}", f"{number(min(seen))} to {number(max(seen))}"]
        for name, seen in rounds.items()
    ]
