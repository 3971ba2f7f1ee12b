"""The pictures of a run: of their size, with what they are to show where it belongs."""

import runpy
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

from tlcli.data.images import ImageArrays, Split
from tlcli.runs import plots
from tlcli.runs.plots import CELL_HEIGHT, CELL_WIDTH, plot_samples


def pixels(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


@pytest.mark.parametrize(("n", "rows"), [(3, 1), (9, 3), (40, 4)])
def test_samples_are_in_their_places_with_a_caption_below(tmp_path: Path, n: int, rows: int) -> None:
    """Each image is of one colour that says its position; every second one is classified wrongly."""
    colours = np.array([[5 * i, 100, 200] for i in range(n)], dtype=np.uint8)
    images = np.broadcast_to(colours[:, None, None], (n, 20, 30, 3)).copy()
    split = Split(ImageArrays(images, "one colour"), np.arange(n), np.zeros(n, dtype=np.int64))
    predicted = np.arange(n) % 2
    plot_samples(split, predicted, np.full(n, 0.9), ("this", "that"), tmp_path / "s.png")
    sheet = pixels(tmp_path / "s.png")
    assert sheet.shape == (rows * CELL_HEIGHT, min(n, 4) * CELL_WIDTH, 3)
    shown = []
    for place in range(min(n, 16)):
        row, column = divmod(place, 4)
        cell = sheet[row * CELL_HEIGHT : (row + 1) * CELL_HEIGHT, column * CELL_WIDTH : (column + 1) * CELL_WIDTH]
        middle = cell[CELL_WIDTH // 2, CELL_WIDTH // 2]
        assert middle[1:].tolist() == [100, 200]
        shown.append(middle[0] // 5)
        assert cell[CELL_WIDTH - 10 :].min() < 200, "no caption"
    assert len(set(shown)) == min(n, 16)
    wrong = [bool(predicted[i]) for i in shown]
    assert wrong == sorted(wrong, reverse=True)  # the wrong ones first
    assert sum(wrong) >= min(n // 2, 8)


def test_settings_of_a_matplotlibrc_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in (("text.usetex", True), ("axes.facecolor", "black"), ("svg.fonttype", "path")):
        monkeypatch.setitem(matplotlib.rcParams, key, value)
    runpy.run_path(plots.__file__)  # the module as it is imported
    found = [matplotlib.rcParams[key] for key in ("text.usetex", "axes.facecolor", "svg.fonttype")]
    assert found == [False, "white", "none"]
