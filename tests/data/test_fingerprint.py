"""A fingerprint is of names and contents: a moved folder keeps it, nothing else does."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.samples import folder_spec, save_image
from tlcli.data import images
from tlcli.data.dataset import load_dataset
from tlcli.data.decode import read_bytes
from tlcli.data.images import ImageArrays, ImageFiles, Split, TorchvisionImages, full_split, source_of_files
from tlcli.reporter import Reporter
from tlcli.specs import OnBad, Verify
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


def remembered(root: Path, cache: Path, **changes: Any) -> str:
    """Return the fingerprint of a folder as a run computes it."""
    data = load_dataset(folder_spec(root, **changes), seed=0, reporter=Reporter(), store=Store(cache))
    return data.train.fingerprint() + data.test.fingerprint()


@pytest.fixture
def old_files(make_folder: MakeFolder) -> Path:
    """Files that were last changed an hour ago."""
    root = make_folder({"a": 6, "b": 6})
    for path in root.rglob("*.png"):
        os.utime(path, (time.time() - 3600,) * 2)
    return root


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the names of the files whose digests are computed."""
    names: list[str] = []
    monkeypatch.setattr(images, "read_bytes", lambda path: names.append(path.name) or read_bytes(path))
    return names


@pytest.mark.parametrize("change", ["nothing", "size", "time", "inode"])
def test_files_are_read_again_only_if_they_changed(
    old_files: Path, tmp_path: Path, reads: list[str], change: str
) -> None:
    path = old_files / "a" / "000.png"
    first = remembered(old_files, tmp_path / "cache")
    assert len(reads) == 12
    state, content = path.stat(), path.read_bytes()
    if change == "inode":
        path.rename(tmp_path / "old.png")
    if change != "nothing":
        path.write_bytes(content + (b"\0" if change == "size" else b""))
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + 1_000_000_000 * (change == "time")))
    reads.clear()
    assert (remembered(old_files, tmp_path / "cache") == first) == (change != "size")
    assert reads == ["000.png"] * (change != "nothing")


def test_all_files_are_read_with_verify_full(old_files: Path, tmp_path: Path, reads: list[str]) -> None:
    path = old_files / "a" / "000.png"
    first, state = remembered(old_files, tmp_path / "cache"), path.stat()
    with path.open("ab") as stream:
        stream.truncate(state.st_size - 1)
        stream.write(b"\0")
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert remembered(old_files, tmp_path / "cache") == first, "such a change is what verify=full is for"
    reads.clear()
    assert remembered(old_files, tmp_path / "cache", verify=Verify.full) != first
    assert len(reads) == 12


def test_files_that_have_just_changed_are_not_remembered(
    make_folder: MakeFolder, tmp_path: Path, reads: list[str]
) -> None:
    """A change within the same tick of the clock would have the same time."""
    root = make_folder({"a": 4, "b": 4})
    for _ in range(2):
        remembered(root, tmp_path / "cache")
    assert len(reads) == 16


def test_an_unreadable_file_does_not_keep_others_from_being_remembered(
    old_files: Path, tmp_path: Path, reads: list[str]
) -> None:
    (old_files / "a" / "000.png").unlink()
    (old_files / "a" / "000.png").symlink_to("nowhere.png")
    first = remembered(old_files, tmp_path / "cache", on_bad=OnBad.skip)
    reads.clear()
    assert remembered(old_files, tmp_path / "cache", on_bad=OnBad.skip) == first
    assert set(reads) == {"000.png"}


def test_files_that_are_gone_are_forgotten(old_files: Path, tmp_path: Path) -> None:
    remembered(old_files, tmp_path / "cache")
    (old_files / "a" / "000.png").rename(old_files / "a" / "new.png")
    remembered(old_files, tmp_path / "cache", classes=("a", "b"), train_per_class=4)
    (file,) = (tmp_path / "cache").glob("digests-*.json")
    names = {path.relative_to(old_files).as_posix() for path in old_files.rglob("*.png")}
    assert set(json.loads(file.read_text())["notes"]) == names


@pytest.mark.parametrize("content", [b"", b"[]", b'{"format": "tlcli notes 1", "notes": {"a/000.png": 3}}'])
def test_a_damaged_record_is_ignored(old_files: Path, tmp_path: Path, content: bytes) -> None:
    first = remembered(old_files, tmp_path / "cache")
    (file,) = (tmp_path / "cache").glob("digests-*.json")
    file.write_bytes(content)
    assert remembered(old_files, tmp_path / "cache") == first


def test_a_cache_that_cannot_be_written_is_no_error(old_files: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").touch()
    assert remembered(old_files, tmp_path / "cache")
