"""Folders that are no data sets: links in a circle, names that nothing can have, classes that look the same.

The mistakes of layout that people make are in tests/data/test_listing.py.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.data.samples import folder_spec, list_spec, save_image
from tests.faults.refusals import refused, untouched
from tlcli.data.dataset import load_dataset
from tlcli.data.listing import find_bad_classes
from tlcli.reporter import Reporter

COMPOSED, IN_TWO = "caf\u00e9", "cafe\u0301"
"""The same word in Unicode's two ways: macOS and Linux write them differently."""


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes of eight images that all differ."""
    for i in range(16):
        save_image(tmp_path / "photos" / "ab"[i % 2] / f"{i // 2}.png", seed=i)
    return tmp_path / "photos"


def circle(tmp_path: Path) -> Path:
    (tmp_path / "circle").symlink_to("circle")
    return tmp_path / "circle"


def pipe(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / "pipe")
    return tmp_path / "pipe"


def dangling(tmp_path: Path) -> Path:
    (tmp_path / "dangling").symlink_to("gone")
    return tmp_path / "dangling"


ROOTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a link to itself": (circle, "circle: cannot read this folder (too many levels of symbolic links)"),
    "a link to nothing": (dangling, "dangling: no such folder"),
    "a pipe": (pipe, "pipe: not a folder. Expected one subfolder per class."),
    "a long name": (lambda tmp_path: tmp_path / ("x" * 300), "cannot read this folder (file name too long)"),
    "a long path": (lambda tmp_path: tmp_path / "/".join(["x" * 200] * 30), "(file name too long)"),
    "a NUL": (lambda tmp_path: tmp_path / "a\0b", "cannot read this folder (embedded null byte)"),
    "somebody's home": (lambda tmp_path: Path("~nobody-at-all/x"), "~nobody-at-all/x: no such home directory"),
    "below a file": (lambda tmp_path: save_image(tmp_path / "f.png") / "x", "f.png/x: no such folder"),
}


@pytest.mark.parametrize("case", ROOTS)
def test_a_root_that_is_no_folder(case: str, tmp_path: Path) -> None:
    make, words = ROOTS[case]
    root = make(tmp_path)
    refused(lambda: folder_spec(root).check(), 2, words, keeps=tmp_path)


def test_links_in_a_circle_beside_classes_are_no_classes(photos: Path) -> None:
    (photos / "circle").symlink_to("circle")
    (photos / "gone").symlink_to("nowhere")
    (photos / "a" / "up").symlink_to("..")
    (photos / "a" / "again").symlink_to("again")
    with untouched(photos):
        listing = list_spec(folder_spec(photos))
        assert find_bad_classes(str(photos), None)[0] == []
    assert listing.classes == ("a", "b")
    assert len(listing.splits["all"]) == 16


@pytest.mark.parametrize(
    "name", ["new\nline", "--all", " ", "=1+1", "\x1b[31m", "\u732b" * 85, "x" * 255, ".."[:1] + "a"]
)
def test_a_class_of_any_name(photos: Path, name: str) -> None:
    (photos / "b").rename(photos / name)
    if name.startswith("."):
        refused(lambda: folder_spec(photos).check(), 2, "photos: only one class, 'a'", keeps=photos)
        return
    with untouched(photos):
        data = load_dataset(folder_spec(photos), seed=0, reporter=Reporter())
    assert set(data.classes) == {"a", name}
    (photos / "a" / "0.png").write_bytes(b"")
    (photos / name / "0.png").write_bytes(b"")
    refused(
        lambda: load_dataset(folder_spec(photos), seed=0, reporter=Reporter()), 1, "2 files do not decode", keeps=photos
    )


@pytest.mark.skipif(os.uname().sysname == "Darwin", reason="this system takes both for one name")
@pytest.mark.parametrize(
    ("one", "other", "words"),
    [
        ("Cat", "cat", "differ only in case: rename one"),
        ("\u01c5", "\u01c6", "differ only in case: rename one"),
        ("stra\u00dfe", "STRASSE", "differ only in case: rename one"),
        (COMPOSED, IN_TWO, "differ only in how their accents are encoded, and look the same: rename one"),
        (COMPOSED.upper(), IN_TWO, "differ only in case: rename one"),
    ],
)
def test_classes_that_people_take_for_one(photos: Path, one: str, other: str, words: str) -> None:
    (photos / "a").rename(photos / one)
    (photos / "b").rename(photos / other)
    refused(lambda: folder_spec(photos).check(), 2, repr(one), repr(other), words, keeps=photos)
    assert len(find_bad_classes(str(photos), None)[0]) == 1
