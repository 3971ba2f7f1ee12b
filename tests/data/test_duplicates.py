"""Exact duplicates: found by content, named in a note where they make a figure wrong, and never read twice."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.data.samples import folder_spec
from tests.data.test_dataset import load
from tlcli.data.images import (
    ConcatSplits,
    ImageArrays,
    cross_split_duplicates,
    exact_duplicates,
    full_split,
    label_conflicts,
)
from tlcli.reporter import Reporter

MakeFolder = Callable[..., Path]


@pytest.fixture
def photos(make_folder: MakeFolder) -> Path:
    """All images differ."""
    return make_folder({f"{split}/{name}": 6 for split in ("train", "val", "test") for name in ("a", "b")})


def copy(root: Path, source: str, target: str) -> None:
    shutil.copyfile(root / source, root / target)


def notes(root: Path) -> tuple[str, ...]:
    return load(folder_spec(root)).notes


def test_test_images_in_train_are_noted(photos: Path) -> None:
    copy(photos, "train/a/001.png", "test/a/copy.png")
    copy(photos, "train/b/002.png", "test/b/other.png")
    assert notes(photos) == (
        "2 images of test also in train (exact duplicates), e.g. test/a/copy.png = train/a/001.png: "
        "test accuracy is too high; `tlcli data check` lists them",
    )


def test_val_images_in_train_are_noted(photos: Path) -> None:
    copy(photos, "train/a/001.png", "val/a/copy.png")
    assert notes(photos) == (
        "1 image of val also in train (exact duplicates), e.g. val/a/copy.png = train/a/001.png: "
        "validation accuracy is too high; `tlcli data check` lists them",
    )


def test_copies_within_one_split_are_noted_only_where_their_labels_differ(photos: Path) -> None:
    copy(photos, "train/a/001.png", "train/a/copy.png")
    copy(photos, "test/a/001.png", "test/b/copy.png")
    assert notes(photos) == ()
    copy(photos, "train/a/001.png", "train/b/wrong.png")
    assert notes(photos) == (
        "1 image of train with several labels (exact duplicates), "
        "e.g. train/a/001.png (a) = train/b/wrong.png (b): at most one is right; `tlcli data check` lists them",
    )


def together(train: list[int], test: list[int], labels: dict[int, int] | None = None) -> ConcatSplits:
    """Images of one value each; equal values are equal images."""
    splits = {}
    for name, values in (("train", train), ("test", test)):
        pixels = np.stack([np.full((4, 4, 3), value, dtype=np.uint8) for value in values])
        splits[name] = full_split(ImageArrays(pixels, name), [(labels or {}).get(value, 0) for value in values])
    return ConcatSplits(splits)


def test_groups() -> None:
    images = together([1, 2, 1, 3], [2, 4, 1])
    groups = exact_duplicates(images, Reporter())
    assert groups == [[0, 2, 6], [1, 4]]
    assert cross_split_duplicates(images, groups, "test", ("train",)) == [[6, 0, 2], [4, 1]]
    assert cross_split_duplicates(images, groups, "train", ("test",)) == [[0, 6], [2, 6], [1, 4]]
    assert label_conflicts(images, groups) == []
