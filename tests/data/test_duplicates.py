"""Exact duplicates: found by content, and named in a note if they make a metric wrong."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.data.samples import folder_spec
from tests.data.test_dataset import load


@pytest.fixture
def photos(make_folder: Callable[..., Path]) -> Path:
    return make_folder({f"{split}/{name}": 6 for split in ("train", "val", "test") for name in ("a", "b")})


def copy(root: Path, source: str, target: str) -> None:
    shutil.copyfile(root / source, root / target)


@pytest.mark.parametrize(("split", "metric"), [("test", "test"), ("val", "validation")])
def test_images_of_another_split_in_train_are_noted(photos: Path, split: str, metric: str) -> None:
    copy(photos, "train/a/001.png", f"{split}/a/copy.png")
    copy(photos, "train/b/002.png", f"{split}/b/other.png")
    assert load(folder_spec(photos)).notes == (
        f"2 images of {split} also in train (exact duplicates), e.g. {split}/a/copy.png = train/a/001.png: "
        f"{metric} accuracy is too high; `tlcli data check` lists them",
    )


def test_copies_within_one_split_are_noted_only_if_their_labels_differ(photos: Path) -> None:
    copy(photos, "train/a/001.png", "train/a/copy.png")
    copy(photos, "test/a/001.png", "test/b/copy.png")
    assert load(folder_spec(photos)).notes == ()
    copy(photos, "train/a/001.png", "train/b/wrong.png")
    assert load(folder_spec(photos)).notes == (
        "1 image of train with several labels (exact duplicates), "
        "e.g. train/a/001.png (a) = train/b/wrong.png (b): at most one is right; `tlcli data check` lists them",
    )
