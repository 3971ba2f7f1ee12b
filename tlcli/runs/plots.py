"""The pictures in a run directory: curves, confusion matrix, sample predictions."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from tlcli.data.dataset import Split

matplotlib.rcParams["text.parse_math"] = False  # names are text, never formulas
BLUE, ORANGE, GRAY = "#1f6fb4", "#d1661d", "#666666"
DPI = 120
SAMPLES, COLUMNS = 16, 4
THUMBNAIL, TITLE, GAP = 270, 52, 14  # pixels
MOST_NAMES = 40
"""With more classes than this the matrix has no names beside it: they would be too small to read."""


def plot_curves(rows: Sequence[Mapping[str, Any]], best_epoch: int, file: Path) -> None:
    """Loss and accuracy of train and val by epoch, from the rows of metrics.jsonl; the kept epoch is marked."""
    figure = Figure(figsize=(9, 3.6), dpi=DPI)
    figure.subplots_adjust(left=0.09, right=0.985, bottom=0.14, top=0.91, wspace=0.22)
    for axes, key in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for split, colour in (("train", BLUE), ("val", ORANGE)):
            points = [(r["epoch"], r[key]) for r in rows if r["split"] == split]
            if points:
                axes.plot(*zip(*points, strict=True), "o-", color=colour, label=split, markersize=4)
        axes.axvline(best_epoch, color=GRAY, linestyle=":", label=f"kept: epoch {best_epoch}")
        axes.set(title=key, xlabel="epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    _save(_drawn(figure), file)


def plot_confusion(report: Mapping[str, Any], file: Path) -> None:
    """Rows are true classes, columns predicted ones; colour is the share of the row, numbers are images."""
    counts = np.array(report["confusion"])
    names, n = [_shorten(name, 18) for name in report["classes"]], len(report["classes"])
    named = n <= MOST_NAMES
    labels = 0.45 + (0.09 * max(map(len, names)) if named else 0.3)  # inches for the names and what stands before them
    cells = min(12.0, max(2.6, 0.5 * n))
    width, height = labels + cells + 0.2, labels + cells + 0.4
    figure = Figure(figsize=(width, height), dpi=DPI)  # margins by hand: a layout engine would draw it all twice
    axes = figure.add_axes((labels / width, labels / height, cells / width, cells / height))
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="predicted", ylabel="true", title=f"test, {report['n']} images")
    if named:
        fits = 0.09 * max(map(len, names)) < cells / n
        axes.set_xticks(range(n), names, rotation=0 if fits else 90)
        axes.set_yticks(range(n), names)
    if n <= 20:
        for t, p in np.argwhere(counts > 0):
            axes.text(p, t, counts[t, p], ha="center", va="center", color="white" if shares[t, p] > 0.5 else "black")
    _save(_drawn(figure), file)


def plot_samples(
    split: Split, predicted: np.ndarray, probability: np.ndarray, classes: Sequence[str], file: Path
) -> None:
    """Sixteen test images with true and predicted names: half of them wrong where there are so many, spread evenly."""
    wrong = np.flatnonzero(predicted != split.labels)
    right = np.flatnonzero(predicted == split.labels)
    chosen_wrong = _spread(wrong, max(SAMPLES // 2, SAMPLES - len(right)))
    chosen = [*chosen_wrong, *_spread(right, SAMPLES - len(chosen_wrong))]
    rows = -(-len(chosen) // COLUMNS)
    height, width = rows * (THUMBNAIL + TITLE), COLUMNS * (THUMBNAIL + GAP)
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    for place, i in enumerate(chosen):
        is_right = predicted[i] == split.labels[i]
        guess = f"{_shorten(classes[predicted[i]], 22)} {probability[i]:.0%}"
        text = guess if is_right else f"{guess}\nis {_shorten(classes[split.labels[i]], 24)}"
        centre, top = _place(place)
        x, y = centre / width, 1 - (top - 6) / height
        figure.text(x, y, text, fontsize=9, color="black" if is_right else ORANGE, ha="center", va="bottom")
    sheet = _drawn(figure)
    for place, i in enumerate(chosen):  # matplotlib would take five times as long to put them there
        centre, top = _place(place)
        small = _thumbnail(split.read(i))
        sheet.paste(small, (centre - small.width // 2, top))
    _save(sheet, file)


def _place(number: int) -> tuple[int, int]:
    """Pixels, from the left and the top, of the middle of a thumbnail's upper edge; its title is above."""
    row, column = divmod(number, COLUMNS)
    return column * (THUMBNAIL + GAP) + (THUMBNAIL + GAP) // 2, (row + 1) * (THUMBNAIL + TITLE) - THUMBNAIL


def _drawn(figure: Figure) -> Image.Image:
    """A figure's pixels, RGB."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def _save(picture: Image.Image, file: Path) -> None:
    """As PNG, of the least compression: more would take as long as drawing, and save little."""
    picture.save(file, compress_level=1, dpi=(DPI, DPI))


def _thumbnail(image: np.ndarray) -> Image.Image:
    small = Image.fromarray(image)
    scale = THUMBNAIL / max(small.size)
    return small.resize([max(1, round(side * scale)) for side in small.size], Image.Resampling[_kernel(scale)])


def _kernel(scale: float) -> str:
    """Small images are shown pixel by pixel."""
    return "BILINEAR" if scale < 1 else "NEAREST"


def _spread(indices: np.ndarray, n: int) -> list[int]:
    """At most n of the indices, evenly spaced."""
    if len(indices) <= n:
        return [int(i) for i in indices]
    return [int(indices[k]) for k in np.linspace(0, len(indices) - 1, n).astype(int)]


def _shorten(name: str, length: int) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"
