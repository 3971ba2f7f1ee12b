"""What an earlier run found store is not decoded again, and what is read stays in memory."""

import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tests.data.samples import folder_spec
from tests.data.test_dataset import Recorder, all_names, damage
from tlcli.data.batches import ImageBatches, Preprocessing
from tlcli.data.dataset import Dataset, load_dataset, preload_images
from tlcli.data.decode import read_raw
from tlcli.errors import BadImagesError
from tlcli.reporter import Reporter
from tlcli.specs import DatasetSpec, Fit, OnBad
from tlcli.store import Store

MakeFolder = Callable[..., Path]
IMAGE = 12 * 10 * 3
"""Bytes of an image of make_folder."""


@pytest.fixture(name="store")
def store_fixture(tmp_path: Path) -> Store:
    return Store(tmp_path / "cache")


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Record the files that are decoded."""
    opened: list[Path] = []
    monkeypatch.setattr("tlcli.data.images.read_raw", lambda path: opened.append(path) or read_raw(path))
    return opened


def load(spec: DatasetSpec, store: Store | None, seed: int = 0) -> Dataset:
    return load_dataset(spec, seed=seed, reporter=Reporter(), store=store)


def bad_files(store: Store) -> list[list[str]]:
    """Return the bad files of each set of images in the store."""
    return [list(note["bad"]) for note in store.read_notes("images").values()]


def read_all(data: Dataset) -> list[np.ndarray]:
    return [split.read(i) for split in (data.train, data.val, data.test) for i in range(len(split))]


def test_known_images_are_not_decoded(make_folder: MakeFolder, decoded: list[Path], store: Store) -> None:
    root = make_folder({"a": 10, "b": 10})
    first = load(folder_spec(root), store)
    assert len(decoded) == 20
    assert bad_files(store) == [[]]
    again = load(folder_spec(root), store)
    assert len(decoded) == 20
    assert all_names(again) == all_names(first)
    assert (again.notes, again.classes, again.bad_files) == (first.notes, first.classes, ())
    assert all(np.array_equal(a, b) for a, b in zip(read_all(first), read_all(again), strict=True))
    load(folder_spec(root), None)
    assert len(decoded) == 60


def test_a_change_is_seen(
    make_folder: MakeFolder, decoded: list[Path], monkeypatch: pytest.MonkeyPatch, store: Store
) -> None:
    root = make_folder({"a": 10, "b": 10})
    load(folder_spec(root), store)
    damage(root, "a/003.png")
    with pytest.raises(BadImagesError, match="1 file does not decode"):
        load(folder_spec(root), store)
    monkeypatch.setattr("tlcli.data.dataset.decoder", lambda: "another Pillow")
    load(folder_spec(root, on_bad=OnBad.skip), store)
    assert len(decoded) == 60
    assert bad_files(store) == [[], ["a/003.png"], ["a/003.png"]]


def test_known_bad_images_are_treated_as_new_ones(make_folder: MakeFolder, decoded: list[Path], store: Store) -> None:
    root = make_folder({"a": 10, "b": 10})
    damage(root, "a/003.png", "b/000.png")
    first = load(folder_spec(root, on_bad=OnBad.skip), store)
    again = load(folder_spec(root, on_bad=OnBad.skip), store)
    assert (again.bad_files, again.notes) == (first.bad_files, first.notes)
    assert len(first.bad_files) == 2
    assert all_names(again) == all_names(first)
    messages = []
    for memory in (store, None):
        with pytest.raises(BadImagesError) as caught:
            load(folder_spec(root), memory)
        messages.append((str(caught.value), caught.value.files))
    assert messages[0] == messages[1]
    assert len(decoded) == 40


def test_what_cannot_be_read_is_not_remembered(make_folder: MakeFolder, store: Store) -> None:
    root = make_folder({"a": 10, "b": 10})
    (root / "a" / "new.png").symlink_to(root / "nowhere.png")
    for _ in range(2):
        data = load(folder_spec(root, on_bad=OnBad.skip), store)
        assert data.bad_files == ((str(root / "a/new.png"), "no such file or directory"),)
    assert bad_files(store) == []


# -- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("room", "kept"), [(0, 0), (5.5, 5), (100, 20)])
def test_what_is_read_later_stays_too(
    make_folder: MakeFolder, decoded: list[Path], room: float, kept: int, store: Store
) -> None:
    spec = folder_spec(make_folder({"a": 10, "b": 10}), ram_gb=room * IMAGE / 1e9)
    load(spec, store)
    data = load(spec, store)
    decoded.clear()
    first, second = read_all(data), read_all(data)
    assert len(decoded) == 20 + 20 - kept
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(("room", "kept"), [(0, 0), (5.5, 5), (14, 14), (100, 20)])
def test_decoding_ahead(make_folder: MakeFolder, decoded: list[Path], room: float, kept: int, store: Store) -> None:
    spec = folder_spec(make_folder({"a": 10, "b": 10}), ram_gb=room * IMAGE / 1e9)
    load(spec, store)
    data = load(spec, store)
    reporter = Recorder()
    preload_images([data.train, data.val, data.test], reporter)
    assert sum(n for n, _ in reporter.tracked.values()) <= kept
    decoded.clear()
    read_all(data)
    assert len(decoded) == 20 - kept
    if kept:
        assert data.train.name(0) not in [str(path) for path in decoded], "the first split comes first"
    decoded.clear()
    preload_images([data.train, data.val, data.test], reporter)
    assert kept < 20 or not decoded


def test_several_threads_may_read(make_folder: MakeFolder, store: Store) -> None:
    spec = folder_spec(make_folder({"a": 10, "b": 10}), ram_gb=7 * IMAGE / 1e9)
    want = read_all(load(spec, store))
    data = load(spec, store)
    with ThreadPoolExecutor(8) as pool:
        for got in pool.map(lambda _: read_all(data), range(16)):
            assert all(np.array_equal(a, b) for a, b in zip(got, want, strict=True))


def test_workers_do_not_fill_memory_anew(make_folder: MakeFolder, tmp_path: Path, store: Store) -> None:
    """What a worker keeps is lost with it: it would only take memory, as much as the budget for each worker."""
    spec = folder_spec(make_folder({"a": 10, "b": 10}))
    load(spec, store)
    split = load(spec, store).train
    preprocessing = Preprocessing(8, Fit.squash, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    log = tmp_path / "log"
    take = type(split.images.memory).take  # type: ignore[attr-defined]

    def logged(self: object, size: int) -> bool:
        with log.open("a") as stream:
            stream.write(f"{taken}\n" if (taken := take(self, size)) else "False\n")
        return bool(taken)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tlcli.data.images.MemoryBudget.take", logged)
        list(ImageBatches(split, preprocessing, batch_size=4, workers=2).in_order())
    assert log.read_text().split() == ["False"] * len(split)


def test_a_split_travels_to_a_process_that_is_spawned(make_folder: MakeFolder) -> None:
    split = load(folder_spec(make_folder({"a": 4, "b": 4})), None).train
    copy = pickle.loads(pickle.dumps(split))
    assert all(np.array_equal(copy.read(i), split.read(i)) for i in range(len(split)))
