"""Activations on disk: raw tensors in entries, each under a key, shared by all runs and processes of a machine.

    ROOT/activations/KEY/              one entry: meta.json, for people too, and 0.bin, 1.bin ...: a file a column
    ROOT/activations/.KEY.PID.RANDOM/  an entry that is being written, or what a killed writer left
    ROOT/locks/KEY.lock                held by whoever fills that entry; the system frees it when that process ends
    ROOT/NAME.json                     notes, such as measured choices

What a key stands for and what the tensors mean is the caller's business. torch is not needed here, so that
`tlcli cache list` answers at once.
"""

import errno
import json
import math
import os
import re
import secrets
import shutil
import stat
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import platformdirs
from filelock import FileLock, Timeout

from tlcli.errors import UsageError
from tlcli.files import sync_folder
from tlcli.text import did_you_mean, size_text

FORMAT = 1
"""The version of meta.json and of the files beside it."""

META = "meta.json"
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
GB = 1_000_000_000
BLOCK = 1 << 20
"""Bytes read at a time to verify an entry. On one core zlib.crc32 alone ran at 5.4 GB/s, with reading from the page
cache at 3.6, from the disk at 1.7; blocks from 256 kB to 4 MB made no difference."""

SETTLED = 2.0
"""Seconds since its last change from which a file's time tells a later change for certain (FAT's clock has 2 s)."""

LEAST_PREFIX = 4
"""The fewest characters of a key that name an entry on the command line."""

_KEY = re.compile(r"[0-9a-f]{1,128}")
_DRAFT = re.compile(r"\.([0-9a-f]{1,128})\.\d+\.[0-9a-f]+")
_NAME = re.compile(r"[a-z][a-z0-9_-]*")
_NOTES_DRAFT = re.compile(r"\.[a-z][a-z0-9_-]*\.json\.\d+\.[0-9a-f]+")
_OWN_FILE = re.compile(r"meta\.json|\d+\.bin")
_NOTES_MARK = "tlcli notes 1"
_META_KEYS = {"format", "key", "created", "facts", "rows", "columns", "checksums"}
_META_CHECKSUM = "meta_checksum"  # the key of the checksum over all else in meta.json; tlcli 0.3 wrote none
_DAMAGE = (OSError, ValueError, TypeError, KeyError, RecursionError)  # what reading a damaged entry may raise

_verified: dict[Path, tuple[object, ...]] = {}  # entry -> its state when this process verified it; see _state

Bytes = bytes | bytearray | memoryview


def cache_dir() -> Path:
    """Where the cache is: $TLCLI_CACHE, else the user's cache directory of this system."""
    own = os.environ.get("TLCLI_CACHE", "")
    if not own:
        return platformdirs.user_cache_path("tlcli", appauthor=False)
    try:
        return Path(own).expanduser().absolute()
    except RuntimeError as exc:
        raise UsageError(f"TLCLI_CACHE={own}: there is no such home directory. Give a path") from exc


@dataclass(frozen=True)
class Column:
    """One tensor of each row: its dtype (float32, bfloat16 or float16) and its shape in one row."""

    dtype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.dtype not in ITEM_BYTES:
            raise ValueError(f"a column cannot hold {self.dtype}")
        if not all(type(side) is int and side > 0 for side in self.shape):
            raise ValueError(f"a column cannot have the shape {self.shape}")

    @property
    def nbytes(self) -> int:
        """Bytes of one row."""
        return ITEM_BYTES[self.dtype] * math.prod(self.shape)


@dataclass(frozen=True)
class Entry:
    """A complete entry. `created` is UTC in ISO 8601, `used` the time of the last use in seconds since the epoch."""

    path: Path
    key: str
    rows: int
    columns: tuple[Column, ...]
    facts: Mapping[str, Any]
    created: str
    used: float
    checksums: tuple[str, ...]

    def file(self, column: int) -> Path:
        """The rows of one column one after the other, C-contiguous and little-endian: made for memory mapping."""
        return self.path / f"{column}.bin"

    @property
    def nbytes(self) -> int:
        """Bytes of all columns."""
        return self.rows * sum(column.nbytes for column in self.columns)


class Store:
    """The cache below one directory, which need not exist yet. A key is a lower-case hex string, else ValueError."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.activations = root / "activations"

    def find(self, key: str) -> Entry | None:
        """The entry of a key, verified; None where there is none, or where it was damaged and is now removed.

        Reads the whole entry, but once a process only, as long as nothing touches its files.
        """
        folder = self._folder(key)
        identity = _identity(folder)
        if identity is None:
            return None
        try:
            _verify_meta(folder / META)
            entry = _read(folder)
            _verify(entry)
        except _DAMAGE:
            with suppress(OSError):
                if _identity(folder) == identity:  # else somebody has filled it anew meanwhile
                    _delete(folder)
            return None
        with suppress(OSError):  # somebody else's cache, which we may only read
            os.utime(folder / META)
        return entry

    def exists(self, key: str) -> bool:
        """Whether a key's entry looks whole, by its meta.json and its files' sizes; `find` makes sure."""
        folder = self._folder(key)
        try:
            return bool(_read(folder))
        except _DAMAGE:
            return False

    @contextmanager
    def filling(self, key: str, waiting: Callable[[], None]) -> Iterator[None]:
        """Hold a key for oneself, among all threads and processes, to fill its entry.

        Look for the entry again inside: whoever held the key before may have filled it. `waiting` is called once if
        somebody holds it now. A holder that dies holds nothing. OSError where the directory cannot be written.
        """
        with self._lock(f"{_checked(key)}.lock", waiting=waiting):
            for draft in self._drafts():
                if _key_of(draft) == key:  # nobody fills it but us, so its writer was killed
                    with suppress(OSError):
                        _delete(draft)
            yield

    def create(self, key: str, rows: int, columns: Sequence[Column], facts: Mapping[str, Any]) -> "Writer":
        """A writer of an entry, to be used within `filling(key)`. The facts are JSON, for people to read."""
        if rows < 1 or not columns:
            raise ValueError("an entry has rows and columns")
        return Writer(self, _checked(key), rows, tuple(columns), json.loads(json.dumps(dict(facts), allow_nan=False)))

    def room(self, nbytes: int, max_gb: float) -> str | None:
        """Why an entry of this size does not fit; None where it does. What killed writers left is removed first."""
        self._sweep()
        used = sum(_bytes_in(folder) for folder in self._folders())
        if nbytes + used > max_gb * GB:
            beside = f" beside {size_text(used)} of other entries" if used else ""
            return f"{size_text(nbytes)}{beside} is over cache.max_gb={max_gb:g}"
        return self._no_space(nbytes) or self._not_writable()

    def entries(self) -> list[Entry]:
        """All complete entries, the one used last first; their checksums are not looked at."""
        found = []
        for folder in self._folders():
            if _KEY.fullmatch(folder.name):
                with suppress(*_DAMAGE):
                    found.append(_read(folder))
        return sorted(found, key=lambda entry: entry.used, reverse=True)

    def match(self, key_or_prefix: str) -> Entry:
        """The entry whose key starts with these characters; UsageError where it is none or more than one."""
        word = key_or_prefix
        if not _KEY.fullmatch(word):
            raise UsageError(f"{word!r} is not a key: `tlcli cache list` shows the keys")
        entries = self.entries()
        found = [entry for entry in entries if entry.key.startswith(word)]
        if exact := [entry for entry in found if entry.key == word]:
            return exact[0]
        if len(word) < LEAST_PREFIX:
            raise UsageError(f"{word!r} is too short: give at least {LEAST_PREFIX} characters of a key")
        if not found:
            near = did_you_mean(word, (entry.key[: max(8, len(word))] for entry in entries))
            raise UsageError(f"no entry {word!r}.{near or ' `tlcli cache list` shows the keys'}")
        if len(found) > 1:
            raise UsageError(f"{word!r} is the start of {len(found)} keys: give more characters")
        return found[0]

    def remove(self, key_or_prefix: str) -> Entry:
        """Remove the entry that `match` finds, and return what it was."""
        entry = self.match(key_or_prefix)
        _delete(entry.path)
        return entry

    def clear(self) -> tuple[int, int]:
        """Remove all entries, what killed writers left, and all notes; how many entries, and how many bytes in all.

        An entry that is being written stays, as does every file that is not ours. The locks stay too: a lock file
        that vanishes under one who waits for it lets two hold it.
        """
        nbytes = self._sweep()
        count = 0
        for folder in self._folders():
            if _KEY.fullmatch(folder.name):
                with suppress(FileNotFoundError):  # somebody else removed it first
                    nbytes += _delete(folder)
                    count += 1
        for file in _children(self.root):
            if _NOTES_DRAFT.fullmatch(file.name) or (file.suffix == ".json" and _notes_in(file) is not None):
                file.unlink(missing_ok=True)
        return count, nbytes

    def remembered(self, name: str) -> dict[str, Any]:
        """The notes of a name; empty where there are none, or where they are damaged."""
        return _notes_in(self._notes(name)) or {}

    def remember(self, name: str, key: str, value: Any) -> None:
        """Add a note, in one atomic step among all processes; nothing where the directory cannot be written."""
        file = self._notes(name)
        with suppress(OSError), self._lock(f"{file.name}.lock", timeout=10):
            _write_json(file, {"format": _NOTES_MARK, "notes": {**self.remembered(name), key: value}})

    def _folder(self, key: str) -> Path:
        return self.activations / _checked(key)

    def _notes(self, name: str) -> Path:
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no name for notes")
        return self.root / f"{name}.json"

    def _folders(self) -> list[Path]:
        """The folders of ours: entries, complete or damaged, and drafts."""
        return [path for path in _children(self.activations) if _ours(path)]

    def _drafts(self) -> list[Path]:
        return [folder for folder in self._folders() if _DRAFT.fullmatch(folder.name)]

    def _sweep(self) -> int:
        """Remove the drafts of keys that nobody is filling; the bytes that this frees."""
        nbytes = 0
        for draft in self._drafts():
            with suppress(OSError), self._lock(f"{_key_of(draft)}.lock", timeout=0):  # Timeout is an OSError
                nbytes += _delete(draft)
        return nbytes

    @contextmanager
    def _lock(self, name: str, *, timeout: float = -1, waiting: Callable[[], None] | None = None) -> Iterator[None]:
        """Hold a lock among processes and threads; Timeout, an OSError, where it cannot be had in time."""
        file = self.root / "locks" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()  # by the umask, so that a group can share a cache; filelock 3 would make it 0644
        lock = FileLock(file, mode=stat.S_IMODE(file.stat().st_mode))
        try:
            lock.acquire(timeout=0 if waiting else timeout)
        except NotImplementedError as exc:  # filelock 3, on a file system without locks
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK), str(file)) from exc
        except Timeout:
            if waiting is None:
                raise
            waiting()
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def _no_space(self, nbytes: int) -> str | None:
        """Why the disk has too little space. 5 % of it stay free for others, which is 1 GB at least and 10 at most."""
        there = next(path for path in (self.root.absolute(), *self.root.absolute().parents) if path.exists())
        total, _, free = shutil.disk_usage(there)
        reserve = max(GB, min(total // 20, 10 * GB))
        if free - nbytes >= reserve:
            return None
        return f"{size_text(nbytes)} of the disk's free {size_text(free)} would leave less than {size_text(reserve)}"

    def _not_writable(self) -> str | None:
        """Why nothing can be written; found out by writing, which permissions alone do not tell."""
        try:
            self.activations.mkdir(parents=True, exist_ok=True)
            (self.activations / f".probe.{os.getpid()}.{secrets.token_hex(4)}").mkdir()
            for probe in self.activations.glob(".probe.*"):  # that of a process which was killed just here, too
                with suppress(OSError):
                    probe.rmdir()
        except OSError as exc:
            read_only = exc.errno in (errno.EROFS, errno.EACCES, errno.EPERM)
            return f"{self.root} {'is read-only' if read_only else 'cannot be written'} ({exc.strerror})"
        return None


class Writer:
    """Writes one entry, batch by batch; a context manager, at whose end the entry is there as a whole or not at all.

    An OSError, of a full disk say, comes through; nothing is left then. So it is after any other exception.
    """

    def __init__(
        self, store: Store, key: str, rows: int, columns: tuple[Column, ...], facts: Mapping[str, Any]
    ) -> None:
        self._store, self._key, self._rows, self._columns, self._facts = store, key, rows, columns, facts
        self._draft = store.activations / _draft_name(key)
        self._files: list[BinaryIO] = []
        self._open = ExitStack()
        self._checksums = [0] * len(columns)
        self._written = 0
        self._entry: Entry | None = None

    @property
    def entry(self) -> Entry:
        """The finished entry: this writer's, or that of another one who was first."""
        if self._entry is None:
            raise ValueError("the entry is not finished")
        return self._entry

    def __enter__(self) -> Self:
        try:
            self._store.activations.mkdir(parents=True, exist_ok=True)
            self._draft.mkdir()
            for column in range(len(self._columns)):
                self._files.append(self._open.enter_context((self._draft / f"{column}.bin").open("wb")))
        except BaseException:
            self._abandon()
            raise
        return self

    def append(self, batch: Sequence[Bytes]) -> None:
        """Write the next rows: for each column the C-contiguous bytes of the same number of whole rows."""
        views = [memoryview(part) for part in batch]
        rows = views[0].nbytes // self._columns[0].nbytes if views else 0
        if [view.nbytes for view in views] != [rows * column.nbytes for column in self._columns]:
            raise ValueError(f"not the same whole rows of each column: {[view.nbytes for view in views]} bytes")
        if self._written + rows > self._rows:
            raise ValueError(f"more than the {self._rows} rows of the entry")
        if rows == 0:
            return
        flat = [view.cast("B") for view in views]  # TypeError where one is not contiguous, before anything is written
        for column, (file, view) in enumerate(zip(self._files, flat, strict=True)):
            file.write(view)
            self._checksums[column] = zlib.crc32(view, self._checksums[column])
        self._written += rows

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._abandon()
            return
        try:
            self._finish()
        except BaseException:
            self._abandon()
            raise

    def _finish(self) -> None:
        """Bring everything to the disk, then show it under its final name."""
        if self._written != self._rows:
            raise ValueError(f"{self._written} rows came for an entry of {self._rows}")
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())
        self._open.close()
        with (self._draft / META).open("w", encoding="utf-8", newline="\n") as meta:
            meta.write(_meta_text(self._meta()))
            meta.flush()
            os.fsync(meta.fileno())
        sync_folder(self._draft)
        self._publish()
        sync_folder(self._store.activations)
        self._entry = _read(self._store.activations / self._key)

    def _publish(self) -> None:
        """Rename the draft. A whole entry that is there already is kept, a damaged one replaced."""
        final = self._store.activations / self._key
        try:
            self._draft.rename(final)
        except OSError:
            if self._store.exists(self._key):
                _delete(self._draft)
                return
            _delete(final)
            self._draft.rename(final)

    def _meta(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "key": self._key,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "facts": self._facts,
            "rows": self._rows,
            "columns": [{"dtype": column.dtype, "shape": list(column.shape)} for column in self._columns],
            "checksums": [_hex(checksum) for checksum in self._checksums],
        }

    def _abandon(self) -> None:
        """Close and remove what was written; errors in that must not hide the one that is on its way."""
        with suppress(OSError):
            self._open.close()
        with suppress(OSError):
            _delete(self._draft)


def _checked(key: str) -> str:
    """A key that can be a file's name and nothing else."""
    if not _KEY.fullmatch(key):
        raise ValueError(f"{key!r} is not a key: a key is a lower-case hex string")
    return key


def _draft_name(name: str) -> str:
    return f".{name}.{os.getpid()}.{secrets.token_hex(4)}"


def _key_of(draft: Path) -> str:
    return draft.name.split(".")[1]


def _hex(checksum: int) -> str:
    return f"{checksum:08x}"


def _read(folder: Path) -> Entry:
    """The entry in a folder, if meta.json and the files' sizes are right; one of _DAMAGE is raised if they are not."""
    meta = json.loads((folder / META).read_text(encoding="utf-8"))
    columns = tuple(Column(column["dtype"], tuple(column["shape"])) for column in meta["columns"])
    entry = Entry(
        path=folder,
        key=folder.name,
        rows=meta["rows"],
        columns=columns,
        facts=meta["facts"],
        created=meta["created"],
        used=(folder / META).stat().st_mtime,
        checksums=tuple(meta["checksums"]),
    )
    consistent = (
        meta["format"] == FORMAT
        and meta["key"] == folder.name
        and type(entry.rows) is int
        and entry.rows > 0
        and isinstance(entry.facts, dict)
        and isinstance(entry.created, str)
        and len(entry.checksums) == len(columns) > 0
    )
    if not consistent:
        raise ValueError(f"{folder / META} is not consistent")
    for column, one in enumerate(columns):
        if entry.file(column).stat().st_size != entry.rows * one.nbytes:
            raise ValueError(f"{entry.file(column)} has a wrong size")
    return entry


def _meta_text(meta: Mapping[str, Any]) -> str:
    """What is written as meta.json: the checksum of the rest is its last line."""
    return _json({**meta, _META_CHECKSUM: _hex(zlib.crc32(_json(meta).encode()))})


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2) + "\n"


def _verify_meta(file: Path) -> None:
    """One of _DAMAGE is raised unless a meta.json is what some writer wrote, to the last byte."""
    text = file.read_bytes().decode()
    rest = dict(json.loads(text))
    whole = _json(rest) if rest.pop(_META_CHECKSUM, None) is None else _meta_text(rest)
    if text != whole or rest.keys() != _META_KEYS:
        raise ValueError(f"{file} is not as it was written")


def _verify(entry: Entry) -> None:
    """Compare the checksums with the files, unless this process has done so; ValueError where one differs."""
    state = _state(entry)
    if _verified.get(entry.path) == state:
        return
    started = time.time()
    block = memoryview(bytearray(BLOCK))
    for column, wanted in enumerate(entry.checksums):
        checksum = 0
        with entry.file(column).open("rb", buffering=0) as file:
            while size := file.readinto(block):
                checksum = zlib.crc32(block[:size], checksum)
        if _hex(checksum) != wanted:
            raise ValueError(f"{entry.file(column)} has a wrong checksum")
    if all(entry.file(c).stat().st_mtime < started - SETTLED for c in range(len(entry.columns))):
        _verified[entry.path] = state


def _state(entry: Entry) -> tuple[object, ...]:
    """What changes when somebody changes the files of an entry, or what they should be."""
    files = [entry.file(column).stat() for column in range(len(entry.columns))]
    return (entry.checksums, *((file.st_ino, file.st_size, file.st_mtime_ns) for file in files))


def _identity(folder: Path) -> tuple[int, int, int] | None:
    """What tells a folder from one that took its place; None where there is none. An inode alone is soon used again."""
    try:
        found = folder.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns


def _children(folder: Path) -> list[Path]:
    """What is in a folder; nothing where it is missing or cannot be read."""
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _ours(folder: Path) -> bool:
    """Whether a folder is an entry or a draft: by its name and by what is in it, so that no photograph is removed."""
    if not (_KEY.fullmatch(folder.name) or _DRAFT.fullmatch(folder.name)) or folder.is_symlink() or not folder.is_dir():
        return False
    files = _children(folder)
    own = [file for file in files if _OWN_FILE.fullmatch(file.name)]
    hidden = [file for file in files if file.name.startswith(".")]  # .DS_Store and the like come by themselves
    return bool(own or not files) and len(own) + len(hidden) == len(files) and not any(f.is_dir() for f in files)


def _bytes_in(folder: Path) -> int:
    """Bytes of the files in a folder, which may vanish while we look."""
    nbytes = 0
    for file in _children(folder):
        with suppress(OSError):
            nbytes += file.stat().st_size
    return nbytes


def _delete(folder: Path) -> int:
    """Remove an entry or a draft; the bytes that were in it. Nobody sees half an entry: it loses its name first."""
    if not folder.exists():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))
    if not _ours(folder):
        raise FileExistsError(errno.EEXIST, "not a cache entry", str(folder))
    nbytes = _bytes_in(folder)
    if not _DRAFT.fullmatch(folder.name):
        folder = folder.rename(folder.with_name(_draft_name(folder.name)))
    for file in _children(folder):
        file.unlink(missing_ok=True)
    with suppress(FileNotFoundError):
        folder.rmdir()
    return nbytes


def _notes_in(file: Path) -> dict[str, Any] | None:
    """The notes in a file; None where it does not hold notes of ours."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        notes = record["notes"] if record["format"] == _NOTES_MARK else None
    except _DAMAGE:
        return None
    return notes if isinstance(notes, dict) else None


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    """Write an object so that a reader finds the old file or the new one, never a part."""
    draft = file.with_name(_draft_name(file.name))
    try:
        draft.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        draft.replace(file)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
