"""Scales from values to units of a figure, and where their ticks are."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from matplotlib.ticker import MaxNLocator

WIDTH, HEIGHT = 420, 250  # units, about a pixel each
LEFT, RIGHT, TOP, BOTTOM = 46, WIDTH - 16, 26, HEIGHT - 34
APART = 44
"""Units between two labels, at least."""

Words = Callable[[float], str]


@dataclass(frozen=True)
class Tick:
    """A label on an axis, and how far along it is in units."""

    at: float
    label: str


@dataclass(frozen=True)
class Axis:
    """A scale from `low` to `high`, which are at `start` and `end` in units."""

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...] = ()
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, here = ((math.log10(v) if self.log else v) for v in (self.low, self.high, value))
        share = 0.5 if high == low else (here - low) / (high - low)
        return round(self.start + share * (self.end - self.start), 1)

    def marks(self, words: Words) -> tuple[Tick, ...]:
        """The ticks with their labels."""
        return tuple(Tick(self(value), words(value)) for value in self.ticks)


def epochs(values: Sequence[float]) -> Axis:
    """A horizontal axis over whole numbers, with ticks at some of them."""
    low, high = min(values), max(values)
    ticks = [t for t in nice(low, high, 7, whole_numbers=True) if low <= t <= high] or [low]
    pad = 0.02 * (high - low)
    return Axis(low - pad, high + pad, LEFT, RIGHT, tuple(ticks))


def swept(values: Sequence[float]) -> Axis:
    """A horizontal axis over the values of a key: by decades where they span one or more, with ticks at the values
    themselves where there is room for them."""
    own = tuple(sorted(set(values)))
    low, high = own[0], own[-1]
    if low > 0 and high / low >= 10:
        axis = Axis(low / (high / low) ** 0.07, high * (high / low) ** 0.07, LEFT, RIGHT, own, log=True)
        first, last = math.ceil(math.log10(low)), math.floor(math.log10(high))
        step = max(1, math.ceil((last - first) / 5))
        round_ones = tuple(10.0**e for e in range(first, last + 1, step))
    else:
        pad = 0.07 * (high - low)
        axis = Axis(low - pad, high + pad, LEFT, RIGHT, own)
        round_ones = tuple(t for t in nice(low, high, 6) if low <= t <= high)
    has_room = all(axis(b) - axis(a) >= APART for a, b in pairwise(own))
    return axis if has_room else Axis(axis.low, axis.high, LEFT, RIGHT, round_ones, axis.log)


def up(values: Sequence[float], *, most: float | None = None) -> Axis:
    """A vertical axis over values, from tick to tick; `most`: the highest value that there can be."""
    low, high = min(values), max(values)
    floor = 0.0 if low >= 0 else -math.inf
    if high - low < 1e-3 * max(abs(high), 1e-3):  # a flat line is no full scale of noise
        low, high = low - 0.05 * max(abs(low), 0.1), high + 0.05 * max(abs(high), 0.1)
    ticks = [t for t in nice(low, high, 4) if floor <= t and (most is None or t <= most + 1e-9)]
    return Axis(min(ticks[0], *values), max(ticks[-1], *values), BOTTOM, TOP, tuple(ticks))


def nice(low: float, high: float, n: int, *, whole_numbers: bool = False) -> list[float]:
    """Round numbers from one at or below the lowest value to one at or above the highest."""
    locator = MaxNLocator(n, integer=whole_numbers, min_n_ticks=2, steps=[1, 2, 2.5, 5, 10])
    return [float(tick) for tick in locator.tick_values(low, high)]


def decimals(ticks: Sequence[float]) -> Words:
    """As many decimals as tell the ticks apart."""
    step = min((b - a for a, b in pairwise(ticks)), default=1.0)
    digits = next((d for d in range(7) if math.isclose(round(step, d), step, rel_tol=1e-6)), 7)
    return lambda value: f"{value:.{digits}f}"


def percents(ticks: Sequence[float]) -> Words:
    """The same of shares, as percent."""
    inner = decimals([100 * tick for tick in ticks])
    return lambda value: f"{inner(100 * value)}%"
