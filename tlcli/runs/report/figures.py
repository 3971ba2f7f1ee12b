"""The geometry of a report's figures: where lines, points and ticks are. The templates draw them as inline SVG."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tlcli.runs.report import axes
from tlcli.runs.report.axes import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Axis, Tick, Words
from tlcli.runs.report.reading import Facts, number, whole
from tlcli.runs.report.words import count, figure, percent

MOST_DOTS = 30
"""Points up to which each has a dot."""

LARGEST, SMALLEST = 1e100, 1e-100
"""Values beyond these are names, not places on an axis."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Dot:
    """A point that is marked: its place, its radius, what it says when pointed at, whether it is the chosen one."""

    x: float
    y: float
    r: float = 3.0
    label: str = ""
    chosen: bool = False


@dataclass(frozen=True)
class Series:
    """A line, and its dots. `kind` names its look in the style sheet; `path` may be empty."""

    name: str
    kind: str
    path: str
    dots: tuple[Dot, ...]


@dataclass(frozen=True)
class Chart:
    """A figure with two axes. `summary` says in words what it shows, for whoever does not see it."""

    title: str
    summary: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    series: tuple[Series, ...]
    x_label: str = ""
    marker: Tick | None = None
    diagonal: bool = False
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = RIGHT
    top: int = TOP
    bottom: int = BOTTOM


# -- curves

NAMES = {"train": "train", "val": "validation"}


def curves(rows: Sequence[Facts], kept: int | None) -> tuple[Chart, ...]:
    """Loss and accuracy by epoch from the rows of metrics.jsonl; the kept epoch is marked."""
    charts = (_curve(rows, key, kept) for key in ("loss", "accuracy"))
    return tuple(chart for chart in charts if chart is not None)


def _curve(rows: Sequence[Facts], key: str, kept: int | None) -> Chart | None:
    found = {split: points for split in NAMES if (points := _points(rows, split, key))}
    every = [point for points in found.values() for point in points]
    if not every:
        return None
    is_share = key == "accuracy"
    words: Words = percent if is_share else figure
    x = axes.epochs([e for e, _ in every])
    y = axes.up([v for _, v in every], most=1.0 if is_share else None)
    said = [f"{NAMES[split]} from {words(points[0][1])} to {words(points[-1][1])}" for split, points in found.items()]
    return Chart(
        title=key.capitalize(),
        summary=f"{key.capitalize()} by epoch: {'; '.join(said)}.",
        x_label="epoch",
        x_ticks=x.marks(count),
        y_ticks=y.marks((axes.percents if is_share else axes.decimals)(y.ticks)),
        series=tuple(_line(split, points, x, y, words) for split, points in found.items()),
        marker=Tick(x(kept), f"kept: epoch {kept}") if kept is not None and x.low <= kept <= x.high else None,
    )


def _points(rows: Sequence[Facts], split: str, key: str) -> list[Point]:
    found = [(whole(row.get("epoch")), number(row.get(key))) for row in rows if row.get("split") == split]
    return sorted((float(e), v) for e, v in found if e is not None and v is not None and abs(v) < LARGEST)


def _line(split: str, points: Sequence[Point], x: Axis, y: Axis, words: Words) -> Series:
    dotted = points if len(points) <= MOST_DOTS else []
    dots = tuple(Dot(x(e), y(v), label=f"{NAMES[split]}, epoch {e:g}: {words(v)}") for e, v in dotted)
    return Series(NAMES[split], split, _path([(x(e), y(v)) for e, v in points]), dots)


def _path(points: Sequence[Point]) -> str:
    """The points joined, as the d of an SVG path."""
    return "M" + "L".join(f"{x:g} {y:g}" for x, y in points) if len(points) > 1 else ""


# -- reliability

SIDE = 340


@dataclass(frozen=True)
class Bin:
    """Images whose highest probability is within a range: their mean probability, their accuracy, their number."""

    confidence: float
    accuracy: float
    n: int


def reliability(series: Mapping[str, Sequence[Bin]]) -> Chart | None:
    """Accuracy against probability; the last series is what counts. The area of a dot is the number of its images."""
    most = max((one.n for bins in series.values() for one in bins), default=0)
    if not most:
        return None
    ticks = (0.0, 0.25, 0.5, 0.75, 1.0)
    right, bottom = SIDE - (WIDTH - RIGHT), SIDE - (HEIGHT - BOTTOM)
    x, y = Axis(0, 1, LEFT, right, ticks), Axis(0, 1, bottom, TOP, ticks)
    last = len(series) - 1
    drawn = [
        Series(name, "after" if i == last else "before", "", tuple(_bin_dot(one, x, y, most, name) for one in bins))
        for i, (name, bins) in enumerate(series.items())
    ]
    return Chart(
        title="Share that was right",
        summary="The share of images that were right against the probability that was given, in 15 ranges of it.",
        x_label="probability of the predicted class",
        x_ticks=x.marks(axes.percents(ticks)),
        y_ticks=y.marks(axes.percents(ticks)),
        series=tuple(drawn),
        diagonal=True,
        width=SIDE,
        height=SIDE,
        right=right,
        bottom=bottom,
    )


def _bin_dot(one: Bin, x: Axis, y: Axis, most: int, name: str) -> Dot:
    label = f"{name}: {percent(one.accuracy)} right where {percent(one.confidence)} was given, {one.n:,} images"
    return Dot(x(one.confidence), y(one.accuracy), round(max(2.5, 10 * math.sqrt(one.n / most)), 1), label)


# -- sweeps


@dataclass(frozen=True)
class Trial:
    """A finished job: its value of one key, as it was written, its validation figure, and whether it is the best."""

    value: str
    figure: float
    name: str
    best: bool


def scatter(key: str, figure_name: str, trials: Sequence[Trial]) -> Chart | None:
    """A key's values against the validation figure; a log axis where they span decades, strips where they are names."""
    if not trials:
        return None
    is_share = figure_name != "loss"
    y = axes.up([trial.figure for trial in trials], most=1.0 if is_share else None)
    places, ticks = _across(trials)
    words: Words = percent if is_share else figure
    dots = [
        Dot(place, y(t.figure), 5.0, f"{t.name}: {key}={t.value}, {words(t.figure)}", t.best)
        for place, t in zip(places, trials, strict=True)
    ]
    best = next((f" The best has {key}={t.value}." for t in trials if t.best), "")
    return Chart(
        title=key,
        summary=f"Validation {figure_name} of {len(trials)} jobs against {key}.{best}",
        x_ticks=ticks,
        y_ticks=y.marks((axes.percents if is_share else axes.decimals)(y.ticks)),
        series=(Series("jobs", "trial", "", tuple(sorted(dots, key=lambda dot: dot.chosen))),),
        height=HEIGHT - 14,
    )


def _across(trials: Sequence[Trial]) -> tuple[list[float], tuple[Tick, ...]]:
    """Where each trial is, from left to right, and the ticks below."""
    values = [value for trial in trials if (value := _place(trial.value)) is not None]
    if len(values) < len(trials):
        return _strips(trials)
    x = axes.swept(values)
    return [x(value) for value in values], x.marks(lambda value: f"{value:g}")


def _place(text: str) -> float | None:
    """The number that a value is, where an axis has a place for it."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if value == 0 or SMALLEST < abs(value) < LARGEST else None


def _strips(trials: Sequence[Trial]) -> tuple[list[float], tuple[Tick, ...]]:
    """A strip for each name; the jobs of a strip beside each other."""
    names = sorted({trial.value for trial in trials})
    width = (RIGHT - LEFT) / len(names)
    middles = {name: LEFT + width * (i + 0.5) for i, name in enumerate(names)}
    totals = {name: sum(trial.value == name for trial in trials) for name in names}
    seen = dict.fromkeys(names, 0)
    places = []
    for trial in trials:
        seen[trial.value] += 1
        share = seen[trial.value] / (totals[trial.value] + 1) - 0.5
        places.append(round(middles[trial.value] + 0.6 * width * share, 1))
    room = max(3, int(width / 6.5))
    labels = [name if len(name) <= room else name[: room - 1] + "…" for name in names]
    return places, tuple(Tick(round(middles[n], 1), label) for n, label in zip(names, labels, strict=True))
