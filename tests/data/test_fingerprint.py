"""A fingerprint is of names and contents: a moved folder keeps it, nothing else does."""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.data.samples import folder_spec, save_image
from tlcli.data import images
from tlcli.data.decode import read_bytes
from tlcli.data.images import (
    DigestRecord,
    ImageArrays,
    ImageFiles,
    Split,
    TorchvisionImages,
    full_split,
    source_of_files,
)
from tlcli.store import Store

MakeFolder = Callable[..., Path]


def everything(root: Path) -> Split:
    """All images of a folder that is not split."""
    return source_of_files(folder_spec(root).list_files()).splits["all"]


def keys(split: Split) -> list[str]:
    return [split.images.key(i) for i in range(len(split))]


def test_a_moved_folder_keeps_it(make_folder: MakeFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_folder({"a": 3, "b/deep": 2})
    before = everything(root)
    shutil.copytree(root, tmp_path / "else" / "where")
    moved = everything(tmp_path / "else" / "where")
    assert keys(before) == keys(moved) == ["a/000.png", "a/001.png", "a/002.png", "b/deep/000.png", "b/deep/001.png"]
    assert before.fingerprint() == moved.fingerprint()
    monkeypatch.chdir(tmp_path)
    assert everything(Path("photos")).fingerprint() == before.fingerprint()
    assert everything(Path("else/../photos")).fingerprint() == before.fingerprint()


@pytest.mark.parametrize(
    "change",
    [
        lambda root: (root / "a/000.png").write_bytes((root / "a/000.png").read_bytes() + b"\0"),
        lambda root: (root / "a/000.png").write_bytes(b"\0" + (root / "a/000.png").read_bytes()[1:]),
        lambda root: (root / "a/000.png").rename(root / "a/00.png"),
        lambda root: (root / "a/000.png").rename(root / "b/000.png"),
        lambda root: (root / "a/000.png").unlink(),
        lambda root: save_image(root / "b" / "new.png"),
    ],
    ids=["longer", "a byte", "renamed", "another class", "removed", "added"],
)
def test_whatever_changes_changes_it(make_folder: MakeFolder, change: Callable[[Path], object]) -> None:
    root = make_folder({"a": 2, "b": 0})
    save_image(root / "b" / "only.png", seed=9)
    before = everything(root).fingerprint()
    assert everything(root).fingerprint() == before
    change(root)
    assert everything(root).fingerprint() != before


def test_positions_choose_and_order() -> None:
    split = full_split(
        ImageArrays(np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), dtype=np.uint8), "x"), range(5)
    )
    prints = [split.fingerprint(np.array(p, dtype=np.int64)) for p in ([], [0], [1], [0, 1], [1, 0], range(5))]
    assert len(set(prints)) == 6
    assert prints[-1] == split.fingerprint()
    assert split.take(np.array([1, 0])).fingerprint() == prints[4]


def test_names_that_run_together_differ(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        for name in ("ab", "c", "a", "bc"):
            save_image(tmp_path / folder / name / "x.png")
    both = [
        full_split(ImageFiles(tmp_path / "one", [f"{n}/x.png" for n in names]), range(2))
        for names in (("ab", "c"), ("a", "bc"))
    ]
    assert both[0].fingerprint() != both[1].fingerprint()


def test_a_digest_is_of_pixels_and_shape() -> None:
    pixels = np.arange(24, dtype=np.uint8)
    sources = [ImageArrays(pixels.reshape(1, *shape), "x") for shape in ((2, 4, 3), (4, 2, 3), (2, 4, 3))]
    digests = [source.digest(0) for source in sources]
    assert digests[0] == digests[2] != digests[1]
    assert {len(digest) for digest in digests} == {16}
    from PIL import Image

    items = TorchvisionImages([(Image.fromarray(pixels.reshape(2, 4, 3)), 0)], "x")
    assert (items.digest(0), items.key(0)) == (digests[0], "x/0")


# -- remembered digests


def remembered(root: Path, cache: Path, *, verify_all: bool = False) -> str:
    """Return the fingerprint of a folder as a run computes it."""
    split = everything(root)
    assert isinstance(split.images, ImageFiles)
    record = DigestRecord(Store(cache), root, verify_all=verify_all)
    files = ImageFiles(root, split.images.keys, record=record)
    fingerprint = Split(files, split.indices, split.labels).fingerprint()
    record.save()
    return fingerprint


@pytest.fixture
def old_files(make_folder: MakeFolder) -> Path:
    """Files that were last changed an hour ago."""
    root = make_folder({"a": 3, "b": 2})
    for path in root.rglob("*.png"):
        os.utime(path, (time.time() - 3600,) * 2)
    return root


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the names of the files that are read."""
    names: list[str] = []
    monkeypatch.setattr(images, "read_bytes", lambda path: names.append(path.name) or read_bytes(path))
    return names


def test_unchanged_files_are_read_once(old_files: Path, tmp_path: Path, reads: list[str]) -> None:
    first = remembered(old_files, tmp_path / "cache")
    assert len(reads) == 5
    assert remembered(old_files, tmp_path / "cache") == first == everything(old_files).fingerprint()
    assert len(reads) == 5 + 5  # the last one has no record


def test_all_files_are_read_with_verify_full(old_files: Path, tmp_path: Path, reads: list[str]) -> None:
    path = old_files / "a" / "000.png"
    first, state = remembered(old_files, tmp_path / "cache"), path.stat()
    with path.open("r+b") as stream:
        stream.write(b"\0")
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert remembered(old_files, tmp_path / "cache") == first, "such a change is what verify=full is for"
    reads.clear()
    assert remembered(old_files, tmp_path / "cache", verify_all=True) != first
    assert len(reads) == 5


@pytest.mark.parametrize("change", ["size", "time", "inode"])
def test_changed_files_are_read_again(old_files: Path, tmp_path: Path, reads: list[str], change: str) -> None:
    path = old_files / "a" / "000.png"
    remembered(old_files, tmp_path / "cache")
    state, content = path.stat(), path.read_bytes()
    if change == "inode":
        path.rename(tmp_path / "old.png")
    path.write_bytes(content + (b"\0" if change == "size" else b""))
    later = 1_000_000_000 if change == "time" else 0
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + later))
    reads.clear()
    assert remembered(old_files, tmp_path / "cache") == everything(old_files).fingerprint()
    assert reads[0] == "000.png"
    assert len(reads) == 1 + 5


def test_files_that_have_just_changed_are_not_remembered(
    make_folder: MakeFolder, tmp_path: Path, reads: list[str]
) -> None:
    """A change within the same tick of the clock would have the same time."""
    root = make_folder({"a": 2, "b": 2})
    remembered(root, tmp_path / "cache")
    remembered(root, tmp_path / "cache")
    assert len(reads) == 8


@pytest.mark.parametrize("content", [b"", b"[]", b'{"format": "tlcli notes 1", "notes": {"a/000.png": 3}}'])
def test_a_damaged_record_is_ignored(old_files: Path, tmp_path: Path, content: bytes) -> None:
    first = remembered(old_files, tmp_path / "cache")
    (file,) = (tmp_path / "cache").glob("digests-*.json")
    file.write_bytes(content)
    assert remembered(old_files, tmp_path / "cache") == first


def test_a_cache_that_cannot_be_written_is_no_error(old_files: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").touch()
    assert remembered(old_files, tmp_path / "cache") == everything(old_files).fingerprint()
