"""Cache of activations: raw tensors in entries, each under a key, shared by processes of one or several machines.

    ROOT/activations/KEY/              an entry: meta.json, and one file per column: 0.bin, 1.bin ...
    ROOT/activations/.KEY.PID.RANDOM/  an entry that is being written; its files have their final sizes from the start
    ROOT/locks/KEY.lock                held while the entry is written
    ROOT/locks/KEY.use.RANDOM          says that a process uses the entry, until that process ends
    ROOT/locks/KEY.gate                held while such a file is made, or the entry is evicted because there is none
    ROOT/locks/space.lock              held while room is made
    ROOT/plans/ID.json, KEY.json       plans of entries that are filled in shards, and the images of a shard
    ROOT/NAME.json                     notes, such as measured speeds
    ROOT/digests-FOLDER.bin            digests of the images below a folder

A shard is an entry whose metadata name the entry that it is a part of; it is not evicted before that is complete,
unless it has not been used for a week.
"""

import atexit
import errno
import json
import math
import os
import re
import secrets
import shutil
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

import platformdirs

from tlcli.files import atomic_write, expand_user, sync_folder
from tlcli.locks import STALE_SECONDS, Lock, heartbeat, observer, owner_text
from tlcli.text import size_text

FORMAT = 1  # of meta.json and of the files next to it
META = "meta.json"
GB = 1_000_000_000
SHARD_SECONDS = 7 * 86_400  # after which a shard is taken for one of a fill that was given up
Batches = Iterable[Sequence[bytes | memoryview]]  # the rows of an entry, per column

_KEY = re.compile(r"[0-9a-f]{1,128}")
_DRAFT = re.compile(r"\.([0-9a-f]{1,128})\.\d+\.[0-9a-f]+")
_OWN_FILE = re.compile(r"meta\.json|\d+\.bin|\.meta\.json\.\d+|\.DS_Store|\._.+|\.nfs\w+")  # the last are the system's
_NOTES_MARK = "tlcli notes 1"
_DAMAGE = (OSError, ValueError, TypeError, KeyError, RecursionError)  # what reading a damaged file may raise

_verified: dict[Path, tuple[object, ...]] = {}  # file times of entries when this process verified them
_held: dict[Path, Path] = {}  # by the folder of an entry: the file that says that this process uses it
_filling: dict[Path, Lock] = {}  # by the folder of an entry
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_held.clear)


@atexit.register
def release_entries() -> None:
    """Release all entries that this process holds."""
    for folder in list(_held):
        if mark := _held.pop(folder, None):
            heartbeat.drop(mark)
            with suppress(OSError):
                mark.unlink()


def cache_dir() -> Path:
    """Return the cache folder: $TLCLI_CACHE, else the user's cache folder of this system."""
    path = os.environ.get("TLCLI_CACHE", "")
    return expand_user(path).absolute() if path else platformdirs.user_cache_path("tlcli", appauthor=False)


@dataclass(frozen=True)
class Column:
    """One tensor per row: its dtype (float32, bfloat16 or float16) and its shape in one row."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return {"float32": 4, "bfloat16": 2, "float16": 2}[self.dtype] * math.prod(self.shape)


@dataclass(frozen=True)
class CacheEntry:
    """A complete entry. `created` is UTC in ISO 8601, `used` the time of the last use in seconds since the epoch."""

    path: Path
    key: str
    rows: int
    columns: tuple[Column, ...]
    metadata: Mapping[str, Any]
    created: str
    used: float
    checksums: tuple[str, ...]

    def file(self, column: int) -> Path:
        """Return the file of a column: its rows, C-contiguous and little-endian, ready for memory mapping."""
        return self.path / f"{column}.bin"

    @property
    def nbytes(self) -> int:
        return self.rows * sum(column.nbytes for column in self.columns)


@dataclass
class Store:
    """The cache in one folder, which need not exist yet. A key is a lower-case hex string, else ValueError."""

    root: Path
    max_gb: float = math.inf  # of all entries; those that no process holds are evicted, the least recently used first

    def __post_init__(self) -> None:
        self.activations, self.plans = self.root / "activations", self.root / "plans"
        self.locks = self.root / "locks"

    def find(self, key: str, *, verify: bool = True) -> CacheEntry | None:
        """Return an entry and hold it until this process ends; None if there is none or it is damaged.

        `verify` reads the whole entry, once per process while its files do not change; else only their sizes count.
        """
        folder = self._folder(key)
        with suppress(*_DAMAGE):
            if not folder.is_dir():
                return None
            self._hold(key)
            entry, start = _read_entry(folder), time.time()
            if not verify:
                return entry
            files = [entry.file(i) for i in range(len(entry.columns))]
            stats = [file.stat() for file in files]
            state = (entry.checksums, *((s.st_ino, s.st_size, s.st_mtime_ns) for s in stats))
            if _verified.get(folder) != state:
                if tuple(map(_crc_of, files)) != entry.checksums:
                    return None
                if all(s.st_mtime < start - 2 for s in stats):  # FAT counts in 2 s: a later change shows
                    _verified[folder] = state
            with suppress(OSError):  # a cache of another user, which is read-only for this one
                os.utime(folder / META)
            return entry
        return None

    @contextmanager
    def lock_for_write(self, key: str, on_wait: Callable[[], None]) -> Iterator[None]:
        """Hold the right to fill a key; call `on_wait` if another process has it, which may have filled it by then."""
        folder = self._folder(key)
        lock = self._lock(folder)
        with ExitStack() as held:
            try:
                held.enter_context(lock.held(timeout=0))
            except TimeoutError:
                on_wait()
                held.enter_context(lock.held())
            for draft in self._folders(_DRAFT):
                if self._lock(draft).path == lock.path:  # this process has the lock, so the draft's writer was killed
                    with suppress(OSError):
                        _delete(draft)
            held.callback(_filling.pop, folder, None)
            _filling[folder] = lock
            yield

    def write(
        self, key: str, rows: int, columns: Sequence[Column], metadata: Mapping[str, Any], batches: Batches
    ) -> CacheEntry:
        """Write an entry, completely or not at all, inside `lock_for_write(key)`. A damaged entry is replaced.

        Each batch has per column the C-contiguous bytes of the same number of whole rows. Raises OSError if there is no
        room, or a write fails. A process that was suspended, and lost its lock, returns the entry of another.
        """
        final = self._folder(key)
        draft = final.with_name(f".{key}.{os.getpid()}.{secrets.token_hex(4)}")
        meta = {
            "format": FORMAT,
            "key": key,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "facts": dict(metadata),
            "rows": rows,
            "columns": [{"dtype": column.dtype, "shape": list(column.shape)} for column in columns],
            "checksums": ["00000000"] * len(columns),
        }
        sizes = [column.nbytes for column in columns]
        try:
            with ExitStack() as stack:
                with Lock(self.locks / "space.lock").held():
                    if final.exists() and not self.find(key):
                        _delete(final)
                    if reason := self._make_room(rows * sum(sizes) + len(_with_checksum(meta)), evict=True):
                        raise OSError(errno.ENOSPC, reason)
                    draft.mkdir()
                    files = [stack.enter_context((draft / f"{i}.bin").open("wb")) for i in range(len(sizes))]
                    for file, size in zip(files, sizes, strict=True):
                        file.truncate(rows * size)  # sparse: other processes see how much room it will take
                meta["checksums"] = _write_rows(files, sizes, rows, batches)
            atomic_write(draft / META, _with_checksum(meta).encode(), durable=True)
            self._hold(key)
            if (lock := _filling.get(final)) and not lock.owned():
                lock.acquire()
                if entry := self.find(key):
                    _delete(draft)
                    return entry
            draft.rename(final)
            sync_folder(self.activations)
            return _read_entry(final)
        except BaseException:
            with suppress(OSError):
                _delete(draft)
            raise

    def no_room_reason(self, nbytes: int) -> str | None:
        """Return why entries of this size do not fit, even if all unused ones are evicted; None if they fit."""
        try:
            with Lock(self.locks / "space.lock").held():
                return self._make_room(nbytes, evict=False)
        except OSError as error:
            return f"{self.root} cannot be written ({error.strerror})"

    def entries(self) -> list[CacheEntry]:
        """Return all complete entries, the most recently used first, without reading their columns."""
        entries = []
        for folder in self._folders(_KEY):
            with suppress(*_DAMAGE):
                entries.append(_read_entry(folder))
        return sorted(entries, key=lambda entry: entry.used, reverse=True)

    def remove(self, key: str) -> None:
        """Remove an entry, also if it is in use: a process that has mapped it keeps its rows."""
        _delete(self._folder(key))

    def clear(self) -> tuple[int, int]:
        """Remove all entries, stale drafts, notes, digests and plans; return the number of entries and of all bytes."""
        nbytes, count = self._remove_stale_drafts(wait=True), 0
        for folder in self._folders(_KEY):
            with suppress(FileNotFoundError):  # another process removed it
                nbytes += _delete(folder)
                count += 1
        # not the lock files: two processes could hold one that vanishes
        own = r"\..+\.json\.\d+|\.?digests-[0-9a-f]{32}\.bin(\.\d+)?|plans/\.?[0-9a-f]{32,64}\.jsonl?(\.\d+)?"
        for file in [*_children(self.root), *_children(self.plans)]:
            is_own = re.fullmatch(own, file.relative_to(self.root).as_posix())
            if is_own or (file.suffix == ".json" and _notes_in(file) is not None):
                file.unlink(missing_ok=True)
        return count, nbytes

    def read_notes(self, name: str) -> dict[str, Any]:
        """Return the notes of a name, without damaged ones."""
        return _notes_in(self.root / f"{name}.json") or {}

    def add_note(self, name: str, key: str, value: Any) -> None:
        """Add a note in one atomic step among all processes. Does nothing if the cache cannot be written."""
        with suppress(OSError), Lock(self.locks / f"{name}.json.lock").held(timeout=STALE_SECONDS + 10):
            self.write_notes(name, {**self.read_notes(name), key: value})

    def write_notes(self, name: str, notes: Mapping[str, Any]) -> None:
        """Replace all notes of a name. Raise OSError if the cache cannot be written."""
        atomic_write(self.root / f"{name}.json", json.dumps({"format": _NOTES_MARK, "notes": notes}).encode())

    def _folder(self, key: str) -> Path:
        if not _KEY.fullmatch(key):
            raise ValueError(f"{key!r} is not a key: a key is a lower-case hex string")
        return self.activations / key

    def _lock(self, folder: Path, suffix: str = "lock") -> Lock:
        """Return a lock of the key of an entry or a draft, given its folder."""
        return Lock(self.locks / f"{folder.name.removeprefix('.').split('.')[0]}.{suffix}")

    def _folders(self, *patterns: re.Pattern[str]) -> list[Path]:
        """Return the folders of entries, complete or damaged (_KEY), or drafts (_DRAFT), without third-party files."""
        named = [path for path in _children(self.activations) if any(p.fullmatch(path.name) for p in patterns)]
        folders = [path for path in named if path.is_dir() and not path.is_symlink()]
        return [path for path in folders if all(_OWN_FILE.fullmatch(file.name) for file in _children(path))]

    def _hold(self, key: str) -> None:
        """Keep an entry from being evicted until this process ends or releases it."""
        folder = self._folder(key)
        if folder not in _held:
            with suppress(OSError), self._lock(folder, "gate").held():  # a read-only cache: nothing is evicted either
                mark = self.locks / f"{key}.use.{secrets.token_hex(8)}"
                try:
                    mark.write_bytes(owner_text())
                except OSError:  # a full disk leaves an empty file, whose owner nobody knows
                    mark.unlink(missing_ok=True)
                    raise
                heartbeat.add(mark)
                _held[folder] = mark

    def _make_room(self, nbytes: int, *, evict: bool) -> str | None:
        """Evict what `nbytes` need; return a reason if that is not enough, and then evict nothing."""
        self.activations.mkdir(parents=True, exist_ok=True)
        self._remove_stale_drafts()
        used = sum(map(_bytes_in, self._folders(_KEY, _DRAFT)))  # drafts have their final sizes
        total, _, disk_free = shutil.disk_usage(self.activations)
        disk_free -= sum(map(_unwritten, self._folders(_DRAFT)))
        reserve = max(GB, min(total // 20, 10 * GB))  # 5 % of a disk stay free
        freed, excess = 0, max(used + nbytes - self.max_gb * GB, nbytes + reserve - disk_free)
        if excess <= 0:
            return None
        entries = {entry.path: entry for entry in self.entries()}
        last_use = {path: entry.used for path, entry in entries.items()}  # damaged entries go first
        wholes = {path: self.activations / entry.metadata.get("part_of", "") for path, entry in entries.items()}
        oldest = time.time() - SHARD_SECONDS
        evictable = [f for f in self._folders(_KEY) if wholes.get(f, f).is_dir() or last_use.get(f, 0.0) < oldest]
        evicted = []
        gone = self._remove_stale_drafts(wait=True)
        used, excess = used - gone, excess - gone
        if excess > 0:  # all at once: it takes up to 60 s to know if processes of other machines live
            marks = set(self.locks.glob("*.use.*"))
            for mark in marks - observer.living(marks):
                mark.unlink(missing_ok=True)  # of a process that was killed
        with ExitStack() as locks:
            for folder in sorted(evictable, key=lambda folder: last_use.get(folder, 0.0)):
                if freed >= excess:
                    break
                with suppress(OSError):
                    locks.enter_context(self._lock(folder, "gate").held(timeout=0))
                    if not observer.living(set(self.locks.glob(f"{folder.name}.use.*"))):
                        freed += _bytes_in(folder)
                        evicted.append(folder)
            if used - freed + nbytes > self.max_gb * GB:
                beside = f" in addition to {size_text(used - freed)} of entries in use" if used > freed else ""
                return f"{size_text(nbytes)}{beside} is over cache.max_gb={self.max_gb:g}"
            if freed < excess:
                free = size_text(max(0, disk_free + freed))
                return f"{size_text(nbytes)} of the disk's free {free} would leave less than {size_text(reserve)}"
            for folder in evicted if evict else ():
                with suppress(OSError):  # it is gone, or on Windows in use
                    _delete(folder)
        return None

    def _remove_stale_drafts(self, *, wait: bool = False) -> int:
        """Remove drafts without a writer; `wait` up to 60 s to know which writers on other machines live."""
        nbytes, drafts = 0, self._folders(_DRAFT)
        if wait:
            observer.living({self._lock(draft).path for draft in drafts})
        for draft in drafts:
            with suppress(OSError), self._lock(draft).held(timeout=0):  # else it is being written
                nbytes += _delete(draft)
        return nbytes


def _write_rows(files: Sequence[BinaryIO], sizes: Sequence[int], rows: int, batches: Batches) -> list[str]:
    """Write the rows durably, one file per column, and return the checksums."""
    crcs, written = [0] * len(files), 0
    for batch in batches:
        views = [memoryview(part).cast("B") for part in batch]  # TypeError if one is not contiguous
        count = views[0].nbytes // sizes[0] if views else 0
        written += count
        if [view.nbytes for view in views] != [count * size for size in sizes]:
            raise ValueError(f"not the same whole rows of each column: {[view.nbytes for view in views]} bytes")
        for i, view in enumerate(views):
            files[i].write(view)
            crcs[i] = zlib.crc32(view, crcs[i])
    if written != rows:
        raise ValueError(f"{written} rows were written of {rows}")
    for file in files:
        file.flush()
        os.fsync(file.fileno())
    return [f"{crc:08x}" for crc in crcs]


def _with_checksum(meta: Mapping[str, Any]) -> str:
    """Return the text of meta.json, with a checksum of the rest."""
    crc = zlib.crc32((json.dumps(meta, indent=2, allow_nan=False) + "\n").encode())
    return json.dumps({**meta, "meta_checksum": f"{crc:08x}"}, indent=2, allow_nan=False) + "\n"


def _read_entry(folder: Path) -> CacheEntry:
    """Return the entry in a folder. Raise one of _DAMAGE unless meta.json is as written and the file sizes fit."""
    text = (folder / META).read_bytes().decode()
    meta = json.loads(text)
    del meta["meta_checksum"]
    if text != _with_checksum(meta) or (meta["format"], meta["key"]) != (FORMAT, folder.name):
        raise ValueError(f"{folder / META} is damaged")
    columns = tuple(Column(column["dtype"], tuple(column["shape"])) for column in meta["columns"])
    used, checksums = (folder / META).stat().st_mtime, tuple(meta["checksums"])
    entry = CacheEntry(folder, folder.name, meta["rows"], columns, meta["facts"], meta["created"], used, checksums)
    if any(entry.file(i).stat().st_size != entry.rows * column.nbytes for i, column in enumerate(entry.columns)):
        raise ValueError(f"{folder}: a file has a wrong size")
    return entry


def _crc_of(path: Path) -> str:
    crc = 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(1 << 20):  # 256 kB to 4 MB are equally fast
            crc = zlib.crc32(block, crc)
    return f"{crc:08x}"


def _children(folder: Path) -> list[Path]:
    """Return the contents of a folder; nothing if it is missing or cannot be read."""
    with suppress(OSError):
        return sorted(folder.iterdir())
    return []


def _bytes_in(folder: Path) -> int:
    with suppress(OSError):  # it is being removed
        return sum(file.stat().st_size for file in _children(folder))
    return 0


def _unwritten(draft: Path) -> int:
    """Return the bytes that its files will still take on the disk."""
    with suppress(OSError, AttributeError):  # it is complete; Windows does not tell
        stats = [file.stat() for file in _children(draft)]
        return sum(max(0, s.st_size - 512 * s.st_blocks) for s in stats)
    return 0


def _delete(folder: Path) -> int:
    """Remove an entry or a draft and return its bytes. The entry loses its name first: no process sees half of it."""
    if not all(_OWN_FILE.fullmatch(file.name) for file in _children(folder)):
        raise FileExistsError(errno.EEXIST, "not a cache entry", str(folder))
    nbytes = _bytes_in(folder)
    if not _DRAFT.fullmatch(folder.name):
        folder = folder.rename(folder.with_name(f".{folder.name}.{os.getpid()}.{secrets.token_hex(4)}"))
    for file in _children(folder):
        file.unlink(missing_ok=True)
    with suppress(OSError):  # on NFS an open file stays under another name; _remove_stale_drafts removes it later
        folder.rmdir()
    return nbytes


def _notes_in(file: Path) -> dict[str, Any] | None:
    """Return the notes in a file; None if it does not hold notes of tlcli."""
    with suppress(*_DAMAGE):
        record = json.loads(file.read_text(encoding="utf-8"))
        if record["format"] == _NOTES_MARK and isinstance(record["notes"], dict):
            return dict(record["notes"])
    return None
