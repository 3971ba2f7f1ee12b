"""Images that an earlier run decoded are not decoded again, and images that are read stay in memory."""

import errno
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

from tests.data.samples import folder_spec
from tests.data.test_dataset import all_names, damage, load
from tlcli.data.dataset import Dataset, preload_images
from tlcli.data.images import ImageFiles, digest_of
from tlcli.errors import BadImagesError
from tlcli.reporter import Reporter
from tlcli.specs import OnBad
from tlcli.store import Store

IMAGE = 12 * 10 * 3
"""Bytes of an image of make_folder."""


@pytest.fixture(name="store")
def store_fixture(tmp_path: Path) -> Store:
    return Store(tmp_path / "cache")


@pytest.fixture
def root(make_folder: Callable[..., Path]) -> Path:
    return make_folder({"a": 10, "b": 10})


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Record the files that are decoded."""
    opened: list[Path] = []
    content = ImageFiles.content
    monkeypatch.setattr(ImageFiles, "compute_digest", lambda self, i: digest_of(content(self, i)))
    monkeypatch.setattr(ImageFiles, "content", lambda self, i: opened.append(Path(self.name(i))) or content(self, i))
    return opened


def bad_files(store: Store) -> list[list[str]]:
    return [list(note["bad"]) for note in store.read_notes("images").values()]


def read_all(data: Dataset) -> np.ndarray:
    return np.stack([split.read(i) for split in (data.train, data.val, data.test) for i in range(len(split))])


def test_known_images_are_not_decoded(root: Path, decoded: list[Path], store: Store) -> None:
    first, again = load(folder_spec(root), store), load(folder_spec(root), store)
    assert len(decoded) == 20
    assert bad_files(store) == [[]]
    assert all_names(again) == all_names(first)
    assert (again.notes, again.classes, again.bad_files) == (first.notes, first.classes, ())
    assert np.array_equal(read_all(first), read_all(again))
    load(folder_spec(root), None)
    assert len(decoded) == 60


def test_a_change_is_seen(root: Path, decoded: list[Path], monkeypatch: pytest.MonkeyPatch, store: Store) -> None:
    load(folder_spec(root), store)
    damage(root, "a/003.png")
    with pytest.raises(BadImagesError, match="1 file does not decode"):
        load(folder_spec(root), store)
    monkeypatch.setattr("tlcli.data.dataset.decoder", lambda: "another Pillow")
    load(folder_spec(root, on_bad=OnBad.skip), store)
    assert len(decoded) == 60
    assert bad_files(store) == [[], ["a/003.png"], ["a/003.png"]]


def test_known_bad_images_are_treated_as_new_ones(root: Path, decoded: list[Path], store: Store) -> None:
    damage(root, "a/003.png", "b/000.png")
    first, again = (load(folder_spec(root, on_bad=OnBad.skip), store) for _ in range(2))
    assert (again.bad_files, again.notes, all_names(again)) == (first.bad_files, first.notes, all_names(first))
    assert len(first.bad_files) == 2
    errors = []
    for memory in (store, None):
        with pytest.raises(BadImagesError) as caught:
            load(folder_spec(root), memory)
        errors.append((str(caught.value), caught.value.files))
    assert errors[0] == errors[1]
    assert len(decoded) == 40


def test_what_cannot_be_read_is_not_remembered(root: Path, store: Store) -> None:
    (root / "a" / "new.png").symlink_to(root / "nowhere.png")
    for _ in range(2):
        data = load(folder_spec(root, on_bad=OnBad.skip), store)
        assert data.bad_files == ((str(root / "a/new.png"), "no such file or directory"),)
    assert bad_files(store) == []


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), MemoryError()], ids=repr)
def test_an_error_of_the_system_that_has_passed_is_forgotten(root: Path, store: Store, monkeypatch, error) -> None:
    with monkeypatch.context() as patch, pytest.raises(BadImagesError, match="20 files do not decode"):
        patch.setattr("PIL.Image.open", Mock(side_effect=error))
        load(folder_spec(root), store)
    assert load(folder_spec(root), store).bad_files == ()
    assert bad_files(store) == [[]]


@pytest.mark.parametrize("preloads", [False, True])
@pytest.mark.parametrize(("room", "kept"), [(0, 0), (5.5, 5), (14, 14), (100, 20)])
def test_what_fits_in_memory_is_decoded_once(root: Path, decoded: list[Path], room, kept, store, preloads) -> None:
    spec = folder_spec(root, ram_gb=room * IMAGE / 1e9)
    first = read_all(load(spec, store))
    data = load(spec, store)
    splits = [data.train, data.val, data.test]
    if preloads:
        preload_images(splits, Reporter())
    else:
        read_all(data)
    decoded.clear()
    assert np.array_equal(read_all(data), first)
    assert len(decoded) == 20 - kept
    assert not kept or data.train.name(0) not in [str(path) for path in decoded], "the first split comes first"
    decoded.clear()
    preload_images(splits, Reporter())
    assert kept < 20 or not decoded
