"""Entries of the cache that the disk, or somebody, has changed: noticed before a row is read, and filled anew."""

import os
import random
import shutil
from pathlib import Path

import pytest

from tests.faults.filling import KEY, entry_of, fill, wrong_rows
from tests.faults.programs import scale
from tlcli import store as module
from tlcli.store import META, Store


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a cache with one entry that is some days old."""
    root = tmp_path_factory.mktemp("whole")
    entry = fill(Store(root), KEY)
    for file in entry.path.iterdir():
        os.utime(file, (1e9, 1e9))
    return root


@pytest.fixture
def store(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """Copy that cache, so that this process has not verified it."""
    monkeypatch.setattr(module, "_verified", {})
    shutil.copytree(whole, tmp_path / "cache")
    return Store(tmp_path / "cache")


def flip(file: Path, place: int, change: int) -> None:
    """Change one byte as a failing disk would: the time of the file stays as it was."""
    before = file.stat()
    with file.open("r+b") as stream:
        stream.seek(place)
        old = stream.read(1)[0]
        stream.seek(place)
        stream.write(bytes([old ^ change]))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_flipped_byte_anywhere_is_noticed(store: Store) -> None:
    """Every byte of meta.json, and of each column its first, its last, and others that are drawn."""
    entry = store.find(KEY)
    assert entry
    module._verified.clear()
    draw = random.Random(0)
    for file in (entry.path / META, entry.file(0), entry.file(1)):
        size = file.stat().st_size
        places = range(size) if file.name == META else [0, size - 1, *draw.choices(range(size), k=scale(50, 2000))]
        for place in places:
            change = draw.randrange(1, 256)
            flip(file, place, change)
            assert store.find(KEY) is None, (file.name, place, change)
            flip(file, place, change)
    assert store.find(KEY)


def test_a_flipped_byte_is_made_good_by_the_next_who_wants_the_entry(store: Store) -> None:
    draw = random.Random(1)
    for name in (META, "0.bin", "1.bin"):
        file = store.activations / KEY / name
        flip(file, draw.randrange(file.stat().st_size), draw.randrange(1, 256))
        entry, filled = entry_of(store, KEY)
        assert filled
        assert wrong_rows(entry) == 0
        assert [path.name for path in store.activations.iterdir()] == [KEY]
