"""Charts of a run or a sweep: PNG files, such as those in plots/, and SVG for the report."""

import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, PercentFormatter
from PIL import Image, ImageDraw, ImageFont, ImageOps

from tlcli.data.decode import Pixels
from tlcli.data.images import Split
from tlcli.text import evenly_spaced, strip_control_chars

matplotlib.rcdefaults()  # a matplotlibrc may want LaTeX
matplotlib.rcParams["text.parse_math"] = False  # names are text, never formulas
matplotlib.rcParams["svg.fonttype"] = "none"  # text stays text
matplotlib.rcParams["svg.hashsalt"] = "tlcli"  # the same run gives the same bytes

# colors of charts, the same as in the style sheet of the report, and their replacements in dark mode
PAPER, INK, SOFT, GRID, BLUE, ORANGE = "#ffffff", "#1b1d20", "#5d6269", "#e3e4e6", "#1f5fa5", "#b4500b"
DARK = {PAPER: "#14161a", INK: "#e9e9e7", SOFT: "#9ca1a8", GRID: "#2d3137", BLUE: "#7db4f2", ORANGE: "#f2a65e"}

LABELS = {"train": "train", "val": "validation"}
DPI = 120
PNG: dict[str, Any] = {"compress_level": 1}  # more compression takes as long as drawing
SAMPLES, COLUMNS = 16, 4
CELL_WIDTH, CELL_HEIGHT = 200, 260  # of a sheet of images, in pixels
MAX_NAMED_CLASSES = 40  # above, a matrix has no names: they would be too small to read


def draw_curve(axes: Any, points: Mapping[str, Any], key: str, best_epoch: int | None) -> None:
    """Draw a metric of train and val by epoch, from (epoch, value) by split, and mark the epoch that was kept."""
    for split, values in points.items():
        color, face, line = (ORANGE, PAPER, "--") if split == "train" else (BLUE, BLUE, "-")
        style = {"color": color, "linestyle": line, "markersize": 5, "markerfacecolor": face, "clip_on": False}
        marker = "o" if len(values) <= 30 else None
        axes.plot(*zip(*values, strict=True), marker=marker, label=LABELS[split], **style)
    _style_axes(axes, [value for values in points.values() for _, value in values], is_share=key == "accuracy")
    axes.xaxis.set_major_locator(MaxNLocator(7, integer=True, min_n_ticks=1))
    axes.set_xlabel("epoch", color=SOFT)
    if best_epoch is not None:
        low, high = axes.get_xlim()
        axes.axvline(best_epoch, color=SOFT, linestyle=":", linewidth=1)
        side = "right" if best_epoch > (low + high) / 2 else "left"
        place = {"xycoords": ("data", "axes fraction"), "xytext": (0, 6), "textcoords": "offset points", "ha": side}
        axes.annotate(f"kept: epoch {best_epoch}", (best_epoch, 1), **place, color=SOFT, fontsize="small")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1.13), ncols=2, borderaxespad=0, frameon=False, labelcolor=SOFT)


def draw_reliability(axes: Any, series: Mapping[str, Sequence[tuple[float, float, int]]]) -> None:
    """Draw accuracy against confidence, from bins (confidence, accuracy, images): larger dots are more images."""
    largest = max(n for bins in series.values() for *_, n in bins)
    axes.plot([0, 1], [0, 1], color=SOFT, linestyle=":", linewidth=1)
    for name, bins in series.items():
        color, face = (BLUE, BLUE) if name == list(series)[-1] else (ORANGE, "none")
        x, y, n = zip(*bins, strict=True)
        area = [max(20.0, 300 * count / largest) for count in n]
        axes.scatter(x, y, s=area, facecolors=face, edgecolors=color, alpha=0.75, label=name, clip_on=False, zorder=3)
    _style_axes(axes, [0.0, 1.0], is_share=True)
    axes.set(xlim=(0, 1), ylim=(0, 1), xticks=np.linspace(0, 1, 5), yticks=np.linspace(0, 1, 5))
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel("probability of the predicted class", color=SOFT)
    if len(series) > 1:
        legend = axes.legend(loc="lower right", bbox_to_anchor=(1, 1.03), ncols=2, frameon=False, labelcolor=SOFT)
        for handle in legend.legend_handles:
            handle.set_sizes([30])


def draw_risk_coverage(axes: Any, curve: Sequence[tuple[float, float, float]]) -> None:
    """Draw the share of errors among the most confident predictions against their share, from `risk_coverage`."""
    coverage, risk, _ = zip(*curve, strict=True)
    axes.plot(coverage, risk, color=BLUE)
    _style_axes(axes, [0.0, *risk], is_share=True)
    axes.set(xlim=(0, 1), xticks=np.linspace(0, 1, 5))
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel("share of the images that are answered", color=SOFT)


def draw_jobs(axes: Any, jobs: Sequence[tuple[str, float, bool]], *, is_share: bool) -> None:
    """Draw the metric of jobs against their value of one key, from (value, metric, is best); the best is filled."""
    try:
        x = [float(value) for value, *_ in jobs]
    except ValueError:
        x = [np.nan]
    if all(number == 0 or 1e-100 < abs(number) < 1e100 for number in x):
        distinct = sorted(set(x))
        if distinct[0] > 0 and distinct[-1] / distinct[0] >= 10:
            axes.set_xscale("log")
            axes.xaxis.set_minor_locator(NullLocator())
        if len(distinct) <= 5:
            axes.set_xticks(distinct)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.margins(x=0.07)
    else:
        names = sorted({value for value, *_ in jobs})
        x = [names.index(value) for value, *_ in jobs]
        axes.set(xlim=(-0.5, len(names) - 0.5))
        axes.set_xticks(range(len(names)), [shorten(name, max(3, 60 // len(names))) for name in names])
    for place, (_, metric, is_best) in zip(x, jobs, strict=True):
        colors = {"facecolors": BLUE if is_best else "none", "edgecolors": BLUE if is_best else SOFT}
        axes.scatter([place], [metric], s=60, **colors, clip_on=False, zorder=3)
    _style_axes(axes, [metric for _, metric, _ in jobs], is_share=is_share)


def draw_history(axes: Any, trials: Sequence[tuple[int, float]], *, is_share: bool) -> None:
    """Draw the metric of the trials of a search, from (number, metric), and the best one so far."""
    numbers, values = zip(*trials, strict=True)
    best = np.maximum.accumulate(values) if is_share else np.minimum.accumulate(values)
    axes.step(numbers, best, where="post", color=BLUE)
    axes.scatter(numbers, values, s=40, facecolors="none", edgecolors=SOFT, clip_on=False, zorder=3)
    _style_axes(axes, values, is_share=is_share)
    axes.xaxis.set_major_locator(MaxNLocator(7, integer=True, min_n_ticks=1))
    axes.set_xlabel("trial", color=SOFT)


def draw_importances(axes: Any, shares: Mapping[str, float]) -> None:
    """Draw the share of each key in the differences between trials, the highest at the top."""
    names = list(shares)[::-1]
    axes.barh(range(len(names)), [shares[name] for name in names], color=BLUE, height=0.6)
    axes.set_yticks(range(len(names)), [shorten(name, 24) for name in names])
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.grid(axis="x", color=GRID)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, pad=6, labelcolor=SOFT)
    for spine in axes.spines.values():
        spine.set_visible(False)


def draw_interval(axes: Any, value: float, interval: tuple[float, float], baseline: float | None) -> None:
    """Draw a share and its confidence interval on a line from 0 to 1, with a mark at the baseline."""
    axes.set(xlim=(0, 1), ylim=(-1, 1))
    axes.axis("off")
    axes.axhline(0, color=SOFT, linewidth=1)
    axes.axvspan(*interval, 0.3, 0.7, color=BLUE, alpha=0.3, linewidth=0)
    axes.axvline(value, color=BLUE, linewidth=4)
    if baseline is not None:
        axes.axvline(baseline, color=SOFT, linewidth=1, linestyle=":")


def _style_axes(axes: Any, values: Sequence[float], *, is_share: bool) -> None:
    """Set the range of the vertical axis, percent for shares, and the look of grid and labels."""
    low, high = min(values), max(values)
    is_flat = high - low < 1e-3 * max(abs(high), 1e-3)  # a flat line must not show noise at full scale
    margin = 0.05 * max(abs(high), 0.1) if is_flat else 0.08 * (high - low)
    top = min(high + margin, 1.0) if is_share else high + margin
    axes.set_ylim(max(low - margin, 0.0) if low >= 0 else low - margin, top)
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    if is_share:
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g}%")
    axes.grid(axis="y", color=GRID)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, pad=6, labelcolor=SOFT)
    for name, spine in axes.spines.items():
        spine.set_visible(name == "bottom")
        spine.set_color(SOFT)


def svg(draw: Callable[[Any], None], size: tuple[int, int], margins: tuple[int, int, int, int]) -> tuple[str, str]:
    """Return a chart as SVG, in light and in dark colors; margins are left, right, top and bottom, for labels."""
    (width, height), (left, right, top, bottom) = size, margins
    figure = Figure(figsize=(width / 72, height / 72))  # matplotlib writes 72 units per inch
    box = (left / width, bottom / height, 1 - (left + right) / width, 1 - (top + bottom) / height)
    draw(figure.add_axes(box))
    for text in figure.findobj(Text):
        text.set_fontsize(12)
    file = io.StringIO()
    _save(figure, file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    light = file.getvalue().replace("'DejaVu Sans'", "system-ui, 'DejaVu Sans'")
    light = light.replace("<svg ", '<svg preserveAspectRatio="none" ', 1)
    return light, re.sub("|".join(DARK), lambda color: DARK[color[0]], light)


def plot_ranking(rows: Sequence[Mapping[str, Any]], file: io.BytesIO, kind: str) -> None:
    """Draw accuracy with its standard error against images per second, as `kind`: png or svg.

    The rows are those of `tlcli rank --format json`.
    """
    figure = Figure(figsize=(8, 5), dpi=DPI)
    figure.subplots_adjust(left=0.1, right=0.97, bottom=0.12, top=0.95)
    axes, known = figure.add_subplot(), [row for row in rows if row["images_per_second"]]
    speeds = [row["images_per_second"] for row in known]
    middle = (min(speeds) * max(speeds)) ** 0.5
    for row in known:
        color, point = (BLUE if row["tied"] else SOFT), (row["images_per_second"], row["accuracy"])
        axes.errorbar(*point, row["standard_error"], fmt="o", color=color, capsize=3)
        label = f"{shorten(Path(row['backbone']).name, 24)}, {row['size']} px"
        x, side = (6, "left") if point[0] < middle else (-6, "right")
        axes.annotate(label, point, (x, 6), textcoords="offset points", ha=side, color=color, fontsize="small")
    axes.set_xscale("log")
    _style_axes(
        axes, [row["accuracy"] + side * row["standard_error"] for row in known for side in (-1, 1)], is_share=True
    )
    axes.margins(x=0.1)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("images per second", color=SOFT)
    axes.set_ylabel("accuracy of a linear probe in cross-validation", color=SOFT)
    _save(figure, file, format=kind)


def plot_curves(rows: Sequence[Mapping[str, Any]], best_epoch: int, file: Path) -> None:
    """Draw loss and accuracy of train and val by epoch, from the rows of metrics.jsonl."""
    figure = Figure(figsize=(9, 3.6), dpi=DPI)
    figure.subplots_adjust(left=0.09, right=0.985, bottom=0.14, top=0.82, wspace=0.22)
    for axes, key in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        points = {split: [(row["epoch"], row[key]) for row in rows if row["split"] == split] for split in LABELS}
        draw_curve(axes, {split: values for split, values in points.items() if values}, key, best_epoch)
        axes.set_title(key, loc="left", pad=22)  # above the label of the epoch
    _save(figure, file, pil_kwargs=PNG)


def plot_confusion(report: Mapping[str, Any], file: Path) -> None:
    """Draw a full confusion matrix: rows are true classes, columns predicted; color is the row's share."""
    counts = np.array(report["confusion"])
    names, n = [shorten(name, 18) for name in report["classes"]], len(report["classes"])
    has_names = n <= MAX_NAMED_CLASSES
    margin = 0.45 + (0.09 * max(map(len, names)) if has_names else 0.3)  # inches for names and axis label
    side = min(12.0, max(2.6, 0.5 * n))
    width, height = margin + side + 0.2, margin + side + 0.4
    figure = Figure(figsize=(width, height), dpi=DPI)  # margins by hand: a layout engine would draw twice
    axes = figure.add_axes((margin / width, margin / height, side / width, side / height))
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="predicted", ylabel="true", title=f"test, {report['n']} images")
    if has_names:
        fits = 0.09 * max(map(len, names)) < side / n
        axes.set_xticks(range(n), names, rotation=0 if fits else 90)
        axes.set_yticks(range(n), names)
    if n <= 20:
        for t, p in np.argwhere(counts > 0):
            axes.text(p, t, counts[t, p], ha="center", va="center", color="white" if shares[t, p] > 0.5 else "black")
    _save(figure, file, pil_kwargs=PNG)


def plot_samples(
    split: Split, predicted: np.ndarray, probability: np.ndarray, classes: Sequence[str], file: Path
) -> None:
    """Draw sixteen test images with predicted and true names; half of them are wrong if there are enough."""
    is_right = predicted == split.labels
    wrong, right = np.flatnonzero(~is_right).tolist(), np.flatnonzero(is_right).tolist()
    chosen = evenly_spaced(wrong, max(SAMPLES // 2, SAMPLES - len(right)))
    chosen += evenly_spaced(right, SAMPLES - len(chosen))
    cells = []
    for i in chosen:
        text, color = f"{shorten(classes[predicted[i]], 20)} {probability[i]:.0%}", "black"
        if not is_right[i]:
            text, color = f"{text}\nis {shorten(classes[split.labels[i]], 22)}", ORANGE
        cells.append((i, text, color))
    draw_sheet(split.read, [cells[n : n + COLUMNS] for n in range(0, len(cells), COLUMNS)], file)


def draw_sheet(read: Callable[[int], Pixels], rows: Sequence[Sequence[tuple[int, str, str]]], file: Path) -> None:
    """Draw rows of images, from (position, caption, color of the caption); `read` returns the pixels at a position."""
    # this font has more alphabets than Pillow's own
    font = ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", 12)
    side = CELL_WIDTH - 10  # of an image; its caption is below
    sheet = Image.new("RGB", (max(map(len, rows)) * CELL_WIDTH, len(rows) * CELL_HEIGHT), "white")
    for y, row in enumerate(rows):
        for x, (i, caption, color) in enumerate(row):
            cell = Image.new("RGB", (side, CELL_HEIGHT), "white")  # it clips long names
            image = Image.fromarray(read(i))
            kernel = Image.Resampling.NEAREST if max(image.size) < side else Image.Resampling.BILINEAR
            cell.paste(ImageOps.pad(image, (side, side), kernel, color="white"))
            text = "\n".join(map(strip_control_chars, caption.split("\n")))
            ImageDraw.Draw(cell).text((0, side + 3), text, color, font)
            sheet.paste(cell, (x * CELL_WIDTH, y * CELL_HEIGHT))
    sheet.save(file, **PNG)


def shorten(name: str, length: int) -> str:
    """Return a name of at most `length` characters, with an ellipsis if it was cut."""
    return name if len(name) <= length else name[: length - 1] + "…"


def _save(figure: Figure, file: Any, **options: Any) -> None:
    with warnings.catch_warnings(action="ignore"):  # of a name in a script that the font lacks
        figure.savefig(file, **options)
