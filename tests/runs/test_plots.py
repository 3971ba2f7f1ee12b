"""The pictures of a run: of their size, with what they are to show where it belongs."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tlcli.data.images import ImageArrays, Split
from tlcli.runs.plots import GAP, THUMBNAIL, TITLE, plot_samples


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
