"""Images deeper than 8 bits: one scale for the whole dataset, and the plan names what is lost."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.conftest import Compose, Notes
from tests.data.samples import folder_spec
from tests.data.test_decode import png
from tlcli.data.batches import Preprocessing
from tlcli.data.dataset import Dataset, images_by_key, load_dataset, load_evaluation_split
from tlcli.data.decode import read_raw
from tlcli.errors import UsageError
from tlcli.reporter import Reporter
from tlcli.runs.load import pixels_of
from tlcli.specs import Fit
from tlcli.store import Store

HIGHEST = 4095


def make_scans(root: Path, dtype: type = np.uint16, ending: str = "png", offset: int = 0, scale: float = 1) -> Path:
    """Make two classes of 12-bit images, each of another brightness."""
    random = np.random.default_rng(0)
    for i in range(16):
        (root / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        values = random.integers(0, HIGHEST * (i + 1) // 16, (12, 10)) * scale + offset
        Image.fromarray(values.astype(dtype)).save(root / "ab"[i % 2] / f"{i}.{ending}")
    return root


def load(root: Path, **changes: Any) -> Dataset:
    return load_dataset(folder_spec(root, **changes), seed=0, reporter=Reporter())


def note(data: Dataset) -> str:
    (line,) = (line for line in data.notes if "deeper than 8 bits" in line)
    return line


def test_the_plan_says_that_12_bits_in_16_leave_few_levels(tmp_path: Path) -> None:
    line = note(load(make_scans(tmp_path / "photos")))
    assert line.startswith("16 images are deeper than 8 bits: values 0 to 40")
    assert "mapped from the full range of the type (floats: 0 to 1): only 17 gray levels are left; set" in line


@pytest.mark.parametrize(
    ("dtype", "ending", "offset", "scale", "low", "high"),
    [
        (np.uint16, "png", 0, 1, 0, HIGHEST),
        (np.uint16, "tif", 0, 1, 0, HIGHEST),
        (np.int32, "tif", -1000, 1, -1000, HIGHEST - 1000),
        (np.float32, "tif", -3, 1 / 512, -3, 5),
    ],
    ids=["PNG", "TIFF", "negative", "float"],
)
def test_an_explicit_range_keeps_all_levels(tmp_path: Path, dtype: type, ending: str, offset, scale, low, high) -> None:
    root = make_scans(tmp_path / "photos", dtype, ending, offset, scale)
    data = load(root, range=(low, high))
    assert f"mapped from {low:g} to {high:g}" in note(data)
    assert "gray levels are left" not in note(data)
    assert data.value_range == (low, high)
    for i in range(len(data.train)):
        raw = np.asarray(Image.open(data.train.name(i))).astype(np.float64)
        want = np.clip((raw - low) / (high - low) * 255, 0, 255)
        assert np.abs(data.train.read(i)[:, :, 0] - want).max() <= 0.51


def test_auto_is_of_the_training_images_alone(tmp_path: Path) -> None:
    root = make_scans(tmp_path / "photos")
    data = load(root, range="auto")
    train = np.concatenate([np.asarray(Image.open(data.train.name(i))).ravel() for i in range(len(data.train))])
    assert data.value_range == pytest.approx(np.percentile(train, [0.1, 99.9]), rel=1e-6)
    Image.fromarray(np.full((12, 10), 60_000, dtype=np.uint16)).save(data.test.name(0))
    again = load(root, range="auto")
    assert again.value_range == data.value_range
    assert again.test.read(0).min() == 255


def test_a_second_run_says_the_same_without_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, store = folder_spec(make_scans(tmp_path / "photos"), range="auto"), Store(tmp_path / "cache")
    first = load_dataset(spec, seed=0, reporter=Reporter(), store=store)
    monkeypatch.setattr("tlcli.data.images.read_raw", lambda path: pytest.fail("decoded again"))
    again = load_dataset(spec, seed=0, reporter=Reporter(), store=store)
    assert (again.notes, again.value_range) == (first.notes, first.value_range)


def test_color_of_16_bits_is_noted(tmp_path: Path) -> None:
    root = make_scans(tmp_path / "photos")
    (root / "a" / "color.ppm").write_bytes(b"P6 2 1 65535\n" + bytes(range(12)))
    (root / "a" / "color.png").write_bytes(png(4, 4, 16, b"".join(b"\0" + bytes(range(4 * 6)) for _ in range(4))))
    assert all(read_raw(root / "a" / name).is_reduced for name in ("color.ppm", "color.png"))
    assert any(line.startswith("2 color images are deeper than 8 bits") for line in load(root).notes)


def test_8_bit_images_are_not_noted_and_not_changed(tmp_path: Path) -> None:
    root = make_scans(tmp_path / "photos", np.uint8, scale=1 / 32)
    (root / "a" / "color.ppm").write_bytes(b"P6 2 1 255\n" + bytes(range(6)))
    plain, ranged = load(root), load(root, range=(0.0, 99.0))
    assert not any("deeper" in line for line in (*plain.notes, *ranged.notes))
    assert np.array_equal(plain.train.read(0), ranged.train.read(0))


def test_checkpoints_keep_the_range() -> None:
    own = Preprocessing(8, Fit.squash, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), (-5.0, 4095.0))
    assert Preprocessing.from_json(own.to_json()) == own
    old = {key: value for key, value in own.to_json().items() if key != "range"}
    assert Preprocessing.from_json(old).range is None


def test_bounds_fit_float32(spec: Compose) -> None:
    with pytest.raises(UsageError, match=r"dataset\.range"):
        spec("dataset.range=[0,1e300]")


def test_all_readers_use_the_range(tmp_path: Path) -> None:
    root, value_range = make_scans(tmp_path / "photos"), (0.0, 4095.0)
    data = load(root, range=value_range)
    path, want = Path(data.test.name(0)), data.test.read(0)
    reporter = Notes()
    split = load_evaluation_split(folder_spec(root, range=value_range), None, seed=0, reporter=reporter).split
    assert "mapped from 0 to 4095" in reporter.notes[0]
    assert np.array_equal(next(split.read(i) for i in range(len(split)) if split.name(i) == str(path)), want)
    assert np.array_equal(images_by_key(folder_spec(root), value_range)[data.test.key(0)](), want)
    assert np.array_equal(pixels_of(path, value_range), want)
    assert np.array_equal(pixels_of(Image.open(path), value_range), want)
