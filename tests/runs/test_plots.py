"""The pictures of a run: of their size, with what they are to show where it belongs."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tlcli.data.images import ImageArrays, Split
from tlcli.runs.plots import DPI, GAP, THUMBNAIL, TITLE, plot_confusion, plot_curves, plot_samples


def pixels(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


@pytest.mark.parametrize(("n", "rows"), [(3, 1), (9, 3), (40, 4)])
def test_samples_are_in_their_places_with_a_title_above(tmp_path: Path, n: int, rows: int) -> None:
    """Each image is of one colour that says its position; every second one is classified wrongly."""
    colours = np.array([[5 * i, 100, 200] for i in range(n)], dtype=np.uint8)
    images = np.broadcast_to(colours[:, None, None], (n, 20, 30, 3)).copy()
    split = Split(ImageArrays(images, "one colour"), np.arange(n), np.zeros(n, dtype=np.int64))
    predicted = np.arange(n) % 2
    plot_samples(split, predicted, np.full(n, 0.9), ("this", "that"), tmp_path / "s.png")
    sheet = pixels(tmp_path / "s.png")
    assert sheet.shape == (rows * (THUMBNAIL + TITLE), 4 * (THUMBNAIL + GAP), 3)
    shown = []
    for place in range(min(n, 16)):
        row, column = divmod(place, 4)
        top, left = (row + 1) * (THUMBNAIL + TITLE) - THUMBNAIL, column * (THUMBNAIL + GAP)
        middle = sheet[top + 90, left + (THUMBNAIL + GAP) // 2]
        assert middle[1:].tolist() == [100, 200]
        shown.append(middle[0] // 5)
        assert sheet[top - TITLE : top, left : left + THUMBNAIL + GAP].min() < 200, "no title"
    assert len(set(shown)) == min(n, 16)
    wrong = [bool(predicted[i]) for i in shown]
    assert wrong == sorted(wrong, reverse=True)  # the wrong ones first
    assert sum(wrong) >= min(n // 2, 8)


def test_curves_and_confusion(tmp_path: Path) -> None:
    rows = [
        {"split": split, "epoch": epoch, "loss": 1 / (1 + epoch), "accuracy": 1 - 1 / (2 + epoch)}
        for split in ("train", "val")
        for epoch in range(4)
    ]
    plot_curves(rows, 3, tmp_path / "curves.png")
    curves = pixels(tmp_path / "curves.png")
    assert curves.shape == (round(3.6 * DPI), 9 * DPI, 3)
    assert ((curves - [0x1F, 0x5F, 0xA5]) == 0).all(axis=2).any(), "no blue line"
    report = {"confusion": [[9, 1], [0, 10]], "classes": ["a", "b"], "n": 20}
    plot_confusion(report, tmp_path / "confusion.png")
    matrix = pixels(tmp_path / "confusion.png")
    dark, light = matrix.reshape(-1, 3).min(axis=0), matrix.reshape(-1, 3).max(axis=0)
    assert (dark < 60).all()
    assert (light == 255).all()
