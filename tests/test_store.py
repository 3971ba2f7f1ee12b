"""The store of activations: what comes back is what was written, whole, whoever else is at work."""

import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import time
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.faults.programs import scale, together
from tlcli import store as module
from tlcli.errors import UsageError
from tlcli.locks import Observer, owner_text
from tlcli.store import GB, META, CacheEntry, Column, Store, cache_dir

fork = multiprocessing.get_context("fork")
KEY = "0123456789abcdef"
OTHER = "fedcba9876543210"
COLUMNS = (Column("float32", (3, 4)), Column("bfloat16", (5,)), Column("float16", ()))
FACTS = {"dataset": "shapes", "split": "train", "view": 0}
ROWS = 12


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    yield Store(tmp_path / "cache")
    release()


def release() -> None:
    """Hold no entry any longer, as if this process had ended."""
    module.release_entries()


def nobody() -> None:
    raise AssertionError("nobody holds this key")


def arrays() -> list[np.ndarray]:
    """Return one tensor per column; bfloat16 as 16-bit integers."""
    random = np.random.default_rng(0)
    return [
        random.normal(size=(ROWS, 3, 4)).astype(np.float32),
        random.integers(0, 65536, (ROWS, 5), dtype=np.uint16),
        random.normal(size=ROWS).astype(np.float16),
    ]


BATCHES = [[memoryview(array[part]) for array in arrays()] for part in (slice(0, 4), slice(4, ROWS))]


def fill(store: Store, key: str = KEY) -> CacheEntry:
    """Write an entry in two batches."""
    with store.lock_for_write(key, nobody):
        return store.find(key) or store.write(key, ROWS, COLUMNS, FACTS, BATCHES)


def everything(root: Path) -> list[str]:
    """All files and folders but the locks."""
    names = (path.relative_to(root).as_posix() for path in sorted(root.rglob("*")))
    return [name for name in names if not name.startswith("locks")]


def age(entry: CacheEntry) -> None:
    """Let the files be old enough for their times to tell a later change."""
    for column in range(len(entry.columns)):
        os.utime(entry.file(column), (1, 1))


def test_round_trip(store: Store) -> None:
    written, found = fill(store), store.find(KEY)
    assert found == written
    assert (found.key, found.rows, found.columns, found.metadata) == (KEY, ROWS, COLUMNS, FACTS)
    assert found.nbytes == ROWS * (48 + 10 + 2)
    for column, array in enumerate(arrays()):
        mapped = np.memmap(found.file(column), array.dtype, "r", shape=array.shape)
        assert np.array_equal(mapped, array)


def test_an_exception_leaves_nothing(store: Store) -> None:
    def interrupted() -> Iterator[list[memoryview]]:
        yield BATCHES[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.write(KEY, ROWS, COLUMNS, FACTS, interrupted())
    assert everything(store.root) == ["activations"]


def flip(file: Path, index: int, change: int = 1) -> None:
    """Change one byte as a failing disk would: the time of the file stays as it was."""
    before, data = file.stat(), bytearray(file.read_bytes())
    data[index] ^= change
    file.write_bytes(data)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_flipped_byte_anywhere_is_noticed(store: Store) -> None:
    """Flip bytes of meta.json and of each column: the first, the last and some that are drawn."""
    entry, draw = fill(store), random.Random(0)
    assert store.find(KEY)  # which is not remembered: a change within the same tick of the clock leaves the time
    for file in (entry.path / META, *map(entry.file, range(3))):
        size = file.stat().st_size
        drawn = (0, size - 1, *draw.choices(range(size), k=scale(50, 2000)))
        for index in range(0, size, scale(10, 1)) if file.name == META else drawn:
            change = draw.randrange(1, 256)
            flip(file, index, change)
            assert store.find(KEY) is None, (file.name, index, change)
            flip(file, index, change)
    assert store.find(KEY)


DAMAGES: dict[str, Callable[[CacheEntry], object]] = {
    "another byte": lambda entry: entry.file(2).write_bytes(entry.file(2).read_bytes()[:-1] + b"\1"),
    "a short file": lambda entry: os.truncate(entry.file(0), entry.file(0).stat().st_size - 1),
    "a missing file": lambda entry: entry.file(1).unlink(),
    "no meta.json": lambda entry: (entry.path / META).unlink(),
    "meta.json is no text": lambda entry: (entry.path / META).write_bytes(b"\xff\x00"),
    "meta.json is a list": lambda entry: (entry.path / META).write_text("[]"),
    "meta.json without end": lambda entry: (entry.path / META).write_text("[" * 100_000),
}


@pytest.mark.parametrize("verified", [False, True], ids=["new", "verified before"])
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_entry_is_removed_and_can_be_refilled(store: Store, damage, verified) -> None:
    entry = fill(store)
    age(entry)
    if verified:
        assert store.find(KEY)
    damage(entry)
    assert store.find(KEY) is None
    fill(store)
    assert store.find(KEY)
    assert everything(store.activations) == [KEY, *(f"{KEY}/{name}" for name in ("0.bin", "1.bin", "2.bin", META))]


@pytest.mark.parametrize("key", ["", "../..", "/etc", "ab\n", "AB", f"{KEY}.lock", "a" * 300, "\u0661"])
def test_keys_are_hex_and_nothing_else(store: Store, key: str) -> None:
    for call in (store.find, store.remove, lambda key: store.write(key, 1, COLUMNS, {}, [])):
        with pytest.raises(ValueError):
            call(key)
    with pytest.raises(ValueError), store.lock_for_write(key, nobody):
        pass
    assert not store.root.exists()


def fill_in_steps(pipe: Connection, store: Store, key: str) -> None:
    """Fill an entry, and report what happens; wait before each step until the other end of the pipe says so."""

    def rows() -> Iterator[list[bytes]]:
        yield [bytes(4096)]
        pipe.send("filling")
        pipe.recv()
        yield [bytes([7]) * 4096]

    pipe.recv()
    try:
        with store.lock_for_write(key, lambda: pipe.send("waiting")):
            entry = store.find(key) or store.write(key, 2, [Column("float32", (1024,))], {}, rows())
        pipe.send(zlib.crc32(entry.file(0).read_bytes()))
        pipe.recv()
    except OSError as error:
        pipe.send(error.strerror)


class Child:
    """A process that fills an entry in steps."""

    def __init__(self, store: Store, key: str) -> None:
        self.pipe, end = fork.Pipe()
        self.process = fork.Process(target=fill_in_steps, args=(end, store, key), daemon=True)
        self.process.start()

    def says(self) -> Any:
        assert self.pipe.poll(60)
        return self.pipe.recv()

    def go_on(self) -> None:
        self.pipe.send(None)

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


@pytest.fixture
def child(store: Store) -> Iterator[Callable[..., Child]]:
    """Start a process that is ready to fill an entry."""
    children: list[Child] = []

    def start(key: str = KEY, max_gb: float = 1.0) -> Child:
        children.append(Child(Store(store.root, max_gb), key))
        return children[-1]

    yield start
    for one in children:
        one.kill()


def test_of_sixteen_processes_on_a_cold_cache_one_fills_and_none_reads_a_wrong_row(store: Store) -> None:
    def member(key: str, number: int, wait: Callable[[], object]) -> tuple[bool, bool]:
        wait()
        entry, fills = store.find(key), False
        if entry is None:
            with store.lock_for_write(key, lambda: None):
                fills = (entry := store.find(key)) is None
                entry = entry or store.write(key, ROWS, COLUMNS, FACTS, BATCHES)
        return fills, [entry.file(i).read_bytes() for i in range(3)] == [array.tobytes() for array in arrays()]

    for i in range(scale(1, 100)):
        found = together(partial(member, f"{i:04x}"), 16)
        assert sum(fills for fills, _ in found) == 1 and all(is_right for _, is_right in found)


def test_entries_are_not_read_while_there_is_room(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shards of a cluster are written one after the other: each would read all that were there."""
    monkeypatch.setattr(Store, "entries", lambda self: pytest.fail("entries are read"))
    entry = fill(store)
    assert store.find(entry.key) == entry


def test_a_writer_that_is_killed_leaves_nothing_that_disturbs_the_next_one(store: Store) -> None:
    def rows(n: int) -> Iterator[list[memoryview]]:
        yield from ([memoryview(array[i : i + 1]) for array in arrays()] for i in range(n))
        os.kill(os.getpid(), signal.SIGKILL)

    def dies(n: int) -> None:
        with store.lock_for_write(KEY, nobody):
            store.write(KEY, ROWS, COLUMNS, FACTS, rows(n))

    for n in range(ROWS):
        writer = fork.Process(target=dies, args=(n,))
        writer.start()
        writer.join()
        assert (writer.exitcode, store.find(KEY)) == (-signal.SIGKILL, None)
        entry = fill(store)
        assert [entry.file(i).read_bytes() for i in range(3)] == [array.tobytes() for array in arrays()]
        assert everything(store.activations) == [KEY, *(f"{KEY}/{name}" for name in ("0.bin", "1.bin", "2.bin", META))]
        store.remove(KEY)


def test_a_mark_that_cannot_be_written_leaves_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: bytes) -> int:
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    fill(store)
    release()
    monkeypatch.setattr(Path, "write_bytes", full)
    assert store.find(KEY)
    assert list(store.root.rglob("*.use.*")) == []


# --- Room and eviction

ENDED = owner_text().replace(b'"pid"', b'"pid": 1073741824, "was"')  # what a process that has ended has written
SIZE = 10_000
"""Bytes: one entry of a child, or of `add`, fits; two do not."""


def write(store: Store, key: str, rows: int = 2) -> CacheEntry:
    """Write an entry of 4 kB per row."""
    with store.lock_for_write(key, nobody):
        return store.write(key, rows, [Column("float32", (1024,))], {}, [[bytes(4096 * rows)]])


def add(store: Store, key: str, used: float = 0.0) -> None:
    """Write an entry of 8 kB, last used at this time, that no process holds."""
    os.utime(write(store, key).path / META, (used, used))
    release()


def keys(store: Store) -> list[str]:
    return sorted(entry.key for entry in store.entries())


def nbytes_of(store: Store) -> int:
    """Bytes of all files, each at its final size."""
    return sum(file.stat().st_size for file in store.activations.rglob("*") if file.is_file())


def test_the_least_recently_used_entries_are_evicted(tmp_path: Path) -> None:
    store = Store(tmp_path, 3 * SIZE / GB)
    for used, key in enumerate(["aa", "bb", "cc"], 1):
        add(store, key, used)
    assert store.find("aa")  # used now
    release()
    assert store.no_room_reason(8192) is None
    assert len(keys(store)) == 3  # asking evicts nothing
    (store.activations / "cc" / META).unlink()  # a damaged entry goes first
    add(store, "dd", 4)
    assert keys(store) == ["aa", "bb", "dd"]
    add(store, "ee", 5)
    assert keys(store) == ["aa", "dd", "ee"]
    assert nbytes_of(store) <= 3 * SIZE


def test_shards_are_not_evicted_before_their_entry_is_complete(tmp_path: Path) -> None:
    store, now = Store(tmp_path, 3 * SIZE / GB), int(time.time())
    for used, key in enumerate(["aa", "bb"], now - 9):
        store.write(key, 2, [Column("float32", (1024,))], {"part_of": "ee"}, [[bytes(8192)]])
        os.utime(store.activations / key / META, (used, used))
        release()
    for used, key in enumerate(["cc", "dd"], now - 7):
        add(store, key, used)
    assert keys(store) == ["aa", "bb", "dd"]
    add(store, "ee", now - 5)  # complete
    assert keys(store) == ["aa", "bb", "ee"]
    add(store, "ff", now - 4)
    assert keys(store) == ["bb", "ee", "ff"]


def test_a_shard_that_nobody_used_for_a_week_is_evicted(tmp_path: Path) -> None:
    store = Store(tmp_path, SIZE / GB)
    store.write("aa", 2, [Column("float32", (1024,))], {"part_of": "ee"}, [[bytes(8192)]])
    os.utime(store.activations / "aa" / META, (time.time() - 8 * 86_400,) * 2)
    release()
    add(store, "bb", 1)
    assert keys(store) == ["bb"]


def test_marks_of_killed_processes_are_removed_also_those_of_entries_that_stay(tmp_path: Path) -> None:
    store = Store(tmp_path, 2 * SIZE / GB)
    marks = [store.locks / f"{key}.use.0" for key in ("aa", "bb")]
    for used, mark in enumerate(marks, 1):
        add(store, mark.name[:2], used)
        mark.write_bytes(ENDED)
    add(store, "cc", 3)
    assert (keys(store), [mark.exists() for mark in marks]) == (["bb", "cc"], [False, False])


def test_what_does_not_fit_evicts_nothing_and_says_so(tmp_path: Path) -> None:
    store = Store(tmp_path, SIZE / GB)
    add(store, "aa")
    reason = "20.5 kB is over cache.max_gb=1e-05"
    assert store.no_room_reason(20_480) == reason
    with pytest.raises(OSError, match="is over"):
        write(store, "bb", 5)
    assert keys(store) == ["aa"]


def test_an_entry_that_another_process_uses_is_not_evicted(store: Store, child: Callable[..., Child]) -> None:
    other = child()
    for _ in range(2):
        other.go_on()
    assert [type(other.says()) for _ in range(2)] == [str, int]  # filling, then the sum: it holds the entry now
    store.max_gb = SIZE / GB
    os.utime(store.activations / KEY / META, (1, 1))
    assert store.no_room_reason(8192) == "8.2 kB in addition to 8.5 kB of entries in use is over cache.max_gb=1e-05"
    with pytest.raises(OSError, match="entries in use"):
        write(store, OTHER)
    assert keys(store) == [KEY]
    other.kill()
    add(store, OTHER)
    assert keys(store) == [OTHER]


def test_this_process_does_not_evict_what_it_uses(tmp_path: Path) -> None:
    store = Store(tmp_path, SIZE / GB)
    add(store, KEY)
    assert store.find(KEY, verify=False)
    assert "entries in use" in str(store.no_room_reason(8192))
    release()
    assert store.no_room_reason(8192) is None


def test_two_processes_do_not_take_the_same_room(store: Store, child: Callable[..., Child]) -> None:
    """An entry counts with its final size from the moment when its writer starts."""
    first, second = child(KEY, SIZE / GB), child(OTHER, SIZE / GB)
    first.go_on()
    assert first.says() == "filling"
    second.go_on()
    assert second.says().endswith("of entries in use is over cache.max_gb=1e-05")
    store.max_gb = SIZE / GB
    assert "entries in use" in str(store.no_room_reason(8192))
    assert nbytes_of(store) <= SIZE
    first.kill()
    assert store.no_room_reason(8192) is None  # the draft of the killed writer is removed
    assert everything(store.root) == ["activations"]


@pytest.mark.parametrize(
    ("total", "free", "fits"),
    [(100, 7.1, True), (100, 6.9, False), (10, 3.1, True), (10, 2.9, False), (4000, 12.1, True), (4000, 11.9, False)],
)
def test_room_by_free_disk(store: Store, monkeypatch: pytest.MonkeyPatch, total: int, free: float, fits: bool) -> None:
    """2 GB on a disk: 5 % of it stay free, but no less than 1 GB and no more than 10 GB."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: (total * GB, 0, int(free * GB)))
    reason = store.no_room_reason(2 * GB)
    assert (reason is None) == fits
    assert fits or f"free {free:.1f} GB" in str(reason)


def test_what_a_draft_will_still_take_is_not_free(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: (100 * GB, 0, int(7.5 * GB)))  # 5 GB stay free
    assert store.no_room_reason(2 * GB) is None
    with store.lock_for_write(KEY, nobody):
        draft = store.activations / f".{KEY}.1.0123abcd"
        draft.mkdir()
        with (draft / "0.bin").open("wb") as file:
            file.truncate(GB)  # of which nothing is written
        assert "free 6.5 GB" in str(store.no_room_reason(2 * GB))


FOREIGN = (
    "notes.txt",
    "settings.json",
    "activations/readme",
    "activations/photos/a.jpg",
    "activations/2024/a.jpg",
    "activations/.git/meta.json",
)


def test_clear_removes_what_is_ours_and_nothing_else(store: Store, tmp_path: Path) -> None:
    nbytes = sum(f.stat().st_size for key in (KEY, OTHER) for f in fill(store, key).path.iterdir()) + 1000
    draft = store.activations / f".{OTHER}.4194304.0123abcd"  # of a writer that was killed
    draft.mkdir()
    (draft / "0.bin").write_bytes(bytes(1000))
    for name in (".DS_Store", "._0.bin"):
        (store.activations / KEY / name).touch()
    (store.activations / OTHER / META).unlink()
    store.add_note("choices", "a", 1)
    for name in (".choices.json.4194304", f"digests-{0:032}.bin", f".digests-{0:032}.bin.4194304"):
        (store.root / name).touch()
    before = everything(store.root)
    for name in FOREIGN:
        (store.root / name).parent.mkdir(parents=True, exist_ok=True)
        (store.root / name).write_text("{}")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "0.bin").touch()
    (store.activations / "abcd").symlink_to(tmp_path / "elsewhere")
    count, freed = store.clear()
    assert count == 2
    assert 0 < freed < nbytes
    left = everything(store.root)
    assert set(FOREIGN) <= set(left)
    assert (store.activations / "abcd" / "0.bin").exists()
    assert not (set(before) - {"activations"}) & set(left)


@pytest.mark.parametrize("lives", [True, False])
def test_a_draft_of_another_machine_is_removed_if_its_writer_does_not_live(store, monkeypatch, lives: bool) -> None:
    draft, lock, now = store.activations / f".{OTHER}.7.0123abcd", store.locks / f"{OTHER}.lock", 0.0
    for folder in (draft, store.locks):
        folder.mkdir(parents=True)
    (draft / "0.bin").write_bytes(bytes(1000))
    lock.write_text('{"host": "another", "pid": 7, "process_start": 7}')

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds
        if lives:
            os.utime(lock, (now, now))

    monkeypatch.setattr("tlcli.locks.observer.clock", lambda: now)
    monkeypatch.setattr("tlcli.locks.observer.sleep", sleep)
    store.max_gb = 1500 / GB
    reason = store.no_room_reason(1000)  # without the draft there is room
    assert (reason is None, draft.exists()) == ((False, True) if lives else (True, False))
    assert now < 10 if lives else 60 <= now < 65
    assert store.clear() == (0, 0)
    assert draft.exists() == lives


@pytest.mark.parametrize("text", ["{", "[]", '{"format": "tlcli notes 1"}', '{"a": 1}', "\u00ff"])
def test_damaged_notes_are_none_and_can_be_written_again(store: Store, text: str) -> None:
    store.add_note("choices", "a", {"b": [1, 2]})
    assert store.read_notes("choices") == {"a": {"b": [1, 2]}}
    (store.root / "choices.json").write_text(text, encoding="latin-1")
    assert store.read_notes("choices") == {}
    store.add_note("choices", "c", None)
    assert store.read_notes("choices") == {"c": None}


def test_notes_of_many_processes_are_all_kept(store: Store) -> None:
    def add_notes(n: int) -> None:
        for i in range(20):
            store.add_note("choices", f"{n} {i}", i)

    writers = [fork.Process(target=add_notes, args=(n,)) for n in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert store.read_notes("choices") == {f"{n} {i}": i for n in range(3) for i in range(20)}
    assert store.read_notes("others") == {}
    assert everything(store.root) == ["choices.json"]


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TLCLI_CACHE", "~/mine")
    assert cache_dir() == tmp_path / "mine"
    monkeypatch.setenv("TLCLI_CACHE", "")
    assert cache_dir().is_absolute()
    monkeypatch.setenv("TLCLI_CACHE", "~nobody-of-this-name/x")
    with pytest.raises(UsageError):
        cache_dir()


# --- Processes of other machines

ELSEWHERE = b'{"host": "another", "pid": 1}'


def test_a_writer_that_lost_its_lock_does_not_replace_the_entry_of_another(store: Store) -> None:
    lock, entry = store.locks / f"{KEY}.lock", store.activations / KEY

    def suspended() -> Iterator[list[memoryview]]:
        yield BATCHES[0]
        lock.unlink()
        (store.activations / OTHER).rename(entry)  # another process has taken the lock, and is done
        meta = json.loads((entry / META).read_text())
        del meta["meta_checksum"]
        (entry / META).write_text(module._with_checksum({**meta, "key": KEY}))
        yield BATCHES[1]

    fill(store, OTHER)
    inode = (store.activations / OTHER).stat().st_ino
    with store.lock_for_write(KEY, nobody):
        written = store.write(KEY, ROWS, COLUMNS, FACTS, suspended())
    assert written.path.stat().st_ino == inode
    assert everything(store.activations) == [KEY, *(f"{KEY}/{name}" for name in ("0.bin", "1.bin", "2.bin", META))]
    assert not lock.exists()


def test_a_writer_that_lost_its_lock_to_one_that_failed_writes_after_it(store: Store) -> None:
    lock = store.locks / f"{KEY}.lock"

    def suspended() -> Iterator[list[memoryview]]:
        lock.write_bytes(ENDED)
        yield from BATCHES

    with store.lock_for_write(KEY, nobody):
        assert store.write(KEY, ROWS, COLUMNS, FACTS, suspended()).rows == ROWS
    assert not lock.exists()


@pytest.mark.parametrize("is_touched", [True, False])
def test_an_entry_in_use_on_another_machine_stays_until_that_process_has_ended(store, is_touched, monkeypatch) -> None:
    store.max_gb, now = SIZE / GB, [0.0]
    add(store, KEY)
    mark = store.locks / f"{KEY}.use.0"
    mark.write_bytes(ELSEWHERE)

    def sleep(seconds: float) -> None:
        now[0] += seconds
        if is_touched:
            os.utime(mark, (now[0], now[0]))

    monkeypatch.setattr(module, "observer", Observer(lambda: now[0], sleep))
    if is_touched:
        with pytest.raises(OSError, match="entries in use"):
            write(store, OTHER)
    else:
        write(store, OTHER)
    assert keys(store) == [KEY if is_touched else OTHER]
    assert mark.exists() == is_touched
