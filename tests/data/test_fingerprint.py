"""A fingerprint is of names and contents: a moved folder keeps it, nothing else does."""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.data.samples import folder_spec, save_image
from tlcli.data import images
from tlcli.data.dataset import load_dataset
from tlcli.data.images import ImageArrays, ImageFiles, Split, TorchvisionImages, full_split, source_of_files
from tlcli.reporter import Reporter
from tlcli.specs import Verify
from tlcli.store import Store

MakeFolder = Callable[..., Path]


def everything(root: Path) -> Split:
    return source_of_files(folder_spec(root).list_files()).splits["all"]


def test_a_moved_folder_keeps_it(make_folder: MakeFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_folder({"a": 1, "b/deep": 1})
    before = everything(root)
    shutil.copytree(root, tmp_path / "else" / "where")
    moved = everything(tmp_path / "else" / "where")
    assert [moved.key(i) for i in range(2)] == ["a/000.png", "b/deep/000.png"]
    assert before.fingerprint() == moved.fingerprint()
    monkeypatch.chdir(tmp_path)
    assert everything(Path("photos")).fingerprint() == before.fingerprint()
    assert everything(Path("else/../photos")).fingerprint() == before.fingerprint()


@pytest.mark.parametrize(
    "change",
    [
        lambda root: (root / "a/000.png").write_bytes(b"\0" + (root / "a/000.png").read_bytes()[1:]),
        lambda root: (root / "a/000.png").rename(root / "a/00.png"),
        lambda root: (root / "a/000.png").rename(root / "b/000.png"),
        lambda root: (root / "a/000.png").unlink(),
        lambda root: save_image(root / "b" / "new.png"),
    ],
    ids=["a byte", "renamed", "another class", "removed", "added"],
)
def test_whatever_changes_changes_it(make_folder: MakeFolder, change: Callable[[Path], object]) -> None:
    root = make_folder({"a": 2, "b": 0})
    save_image(root / "b" / "only.png", seed=9)
    before = everything(root).fingerprint()
    assert everything(root).fingerprint() == before
    change(root)
    assert everything(root).fingerprint() != before


def test_positions_names_pixels_and_shapes_count() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), dtype=np.uint8)
    split = full_split(ImageArrays(pixels, "x"), range(5))
    prints = [split.fingerprint(np.array(p, dtype=np.int64)) for p in ([], [0], [1], [0, 1], [1, 0], range(5))]
    prints += [full_split(ImageArrays(pixels.reshape(5, 6, 4, 3), "x"), range(5)).fingerprint()]
    assert len(set(prints)) == 7
    assert prints[5] == split.fingerprint()
    assert split.take(np.array([1, 0])).fingerprint() == prints[4]
    items = TorchvisionImages([(Image.fromarray(image), 0) for image in pixels], "x")
    assert full_split(items, range(5)).fingerprint() == prints[5], "the same names and pixels"


def remembered(root: Path, cache: Path, **changes: Any) -> str:
    """Return the fingerprint of a folder as a run computes it."""
    data = load_dataset(folder_spec(root, **changes), seed=0, reporter=Reporter(), store=Store(cache))
    return data.train.fingerprint() + data.test.fingerprint()


@pytest.fixture
def old_files(make_folder: MakeFolder) -> Path:
    root = make_folder({"a": 6, "b": 6})
    for path in root.rglob("*.png"):
        os.utime(path, (time.time() - 3600,) * 2)
    return root


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the names of the files whose digests are computed."""
    names: list[str] = []
    compute = ImageFiles.compute_digest

    def record(files: ImageFiles, index: int) -> bytes:
        names.append(Path(files.name(index)).name)
        return compute(files, index)

    monkeypatch.setattr(ImageFiles, "compute_digest", record)
    return names


@pytest.mark.parametrize("change", ["nothing", "size", "time", "inode"])
def test_files_are_read_again_only_if_they_changed(old_files: Path, tmp_path, reads: list[str], change: str) -> None:
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


def test_files_that_just_changed_are_not_remembered(make_folder: MakeFolder, tmp_path: Path, reads: list[str]) -> None:
    """A change within the same tick of the clock would have the same time."""
    root = make_folder({"a": 4, "b": 4})
    for _ in range(2):
        remembered(root, tmp_path / "cache")
    assert len(reads) == 16


def test_digests_that_are_not_used_are_forgotten_first(old_files: Path, tmp_path: Path, reads, monkeypatch) -> None:
    remembered(old_files, tmp_path / "cache")
    monkeypatch.setattr(images, "MAX_RECORDED", 6)
    few = {"train_per_class": 2, "test_per_class": 1}
    remembered(old_files, tmp_path / "cache", **few, verify=Verify.full)
    reads.clear()
    remembered(old_files, tmp_path / "cache", **few)
    assert not reads
    remembered(old_files, tmp_path / "cache")
    assert len(reads) == 12 - 6


@pytest.mark.parametrize("content", [b"", b"[]", b"\0" * 64, None])
def test_a_record_that_cannot_be_read_or_written_is_ignored(old_files: Path, tmp_path, content: bytes | None) -> None:
    first = remembered(old_files, tmp_path / "cache")
    (file,) = (tmp_path / "cache").glob("digests-*.bin")
    if content is None:
        (tmp_path / "file").touch()
        assert remembered(old_files, tmp_path / "file") == first
    else:
        file.write_bytes(content)
        assert remembered(old_files, tmp_path / "cache") == first
