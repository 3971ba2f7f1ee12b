"""Images by position, in files or in memory; splits of them; and their digests."""

import hashlib
import io
import os
import time
import zlib
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from tlcli.data.decode import BadImage, Pixels, RawImage, ValueRange, raw_image, read_bytes, read_raw
from tlcli.data.listing import Listing, resolve_classes
from tlcli.errors import BadImagesError
from tlcli.files import atomic_write
from tlcli.reporter import Reporter
from tlcli.store import Store
from tlcli.text import Names, join_limited, one_line

S = TypeVar("S")
T = TypeVar("T")
Ints = np.ndarray[Any, np.dtype[np.int64]]
Digests = np.ndarray[Any, np.dtype[np.uint64]]  # (N, 2): 16 bytes per image

DIGEST_BYTES = 16  # enough that no two images share a digest by chance
CHUNK = 1024  # images per task of small work
MAX_RECORDED = 20_000_000  # digests of a folder that are remembered, in 640 MB; those not used now are the last
SETTLED_NS = 2_000_000_000  # age of a file from which its time reveals a change: the clock of FAT has steps of 2 s


class MemoryBudget:
    """Bytes left for decoded images of several sources, which threads may exceed by an image each."""

    def __init__(self, nbytes: int) -> None:
        self.left = nbytes
        self._process = os.getpid()

    def take(self, nbytes: int) -> bool:
        """Take that many bytes. Return False if they are not left, or in a worker, which would fill as much again."""
        if os.getpid() != self._process or nbytes > self.left:
            return False
        self.left -= nbytes
        return True


class ImageSource(ABC):
    """Images by position, which stay in memory once they are read, up to the budget `memory`. Digests always stay.

    Reading may happen in several threads and processes at once. Images that are not files are named prefix/index.
    """

    memory: MemoryBudget | None = None
    record: "DigestRecord | None" = None

    def __init__(self, prefix: str = "") -> None:
        self.prefix = prefix
        self.pixels: dict[int, Pixels] = {}
        self._digests: Digests = np.empty((0, 2), dtype=np.uint64)  # zeros: not known

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of images."""

    @abstractmethod
    def decode(self, index: int) -> Pixels:
        """Return the pixels, uint8 (height, width, 3) RGB, without a look at memory. Raise BadImage."""

    def name(self, index: int) -> str:
        """Return the path of the file, or prefix/index."""
        return f"{self.prefix}/{index}"

    def key(self, index: int) -> str:
        """Return a name that stays when the data moves: the path below the dataset's root, or prefix/index."""
        return self.name(index)

    def read(self, index: int) -> Pixels:
        """Return the pixels from memory, else decoded. Raise BadImagesError."""
        pixels = self.pixels.get(index)
        if pixels is None:
            pixels = self._with_named_error(self.decode, index)
            self.store(index, pixels)
        return pixels

    def store(self, index: int, pixels: Pixels) -> None:
        """Store an image if there is memory for it."""
        if self.memory is not None and index not in self.pixels and self.memory.take(pixels.nbytes):
            self.pixels[index] = pixels

    def digests(self, indices: Ints, reporter: Reporter) -> Digests:
        """Return BLAKE2b of each file's bytes, or of shape and pixels. Raise BadImagesError."""
        if not len(self._digests):
            self._digests = np.zeros((len(self), 2), dtype=np.uint64)
        missing = np.unique(indices[~self._digests[indices].any(axis=1)])
        if len(missing):
            self._digests[missing] = self.compute_digests(missing, reporter)
        return self._digests[indices]

    def compute_digests(self, indices: Ints, reporter: Reporter) -> Digests:
        """Return `digests`, computed."""
        digests = tracked_map(self.digest, indices.data, 64, reporter, "reading files")
        return _from_bytes(digests, len(indices))

    def digest(self, index: int) -> bytes:
        """Return the digest of an image, computed. Raise BadImagesError."""
        return self._with_named_error(self.compute_digest, index)

    def order_by_buffer(self, order: Ints, indices: Ints, seed: int, epoch: int) -> Ints:
        """Return a random order of an epoch, in which the images have `indices`, changed if many are read at once."""
        return order

    def _with_named_error(self, read: Callable[[int], T], index: int) -> T:
        """Return `read(index)`; raise its BadImage as a BadImagesError with the name of the image."""
        try:
            return read(index)
        except BadImage as error:
            raise BadImagesError(f"{self.name(index)}: {error}") from error

    def compute_digest(self, index: int) -> bytes:
        """Return the digest of an image, computed. Raise BadImage."""
        pixels = self.decode(index)
        return digest_of(repr(pixels.shape).encode() + pixels.tobytes())

    def fingerprint(self, indices: Ints, reporter: Reporter) -> str:
        """Return SHA-256 over key and digest of each of these images, in order. Raise BadImagesError.

        It stays when the data moves, and changes with each byte, name and size, and with the choice of images.
        """
        total = hashlib.sha256()
        for index, digest in zip(indices.data, self.digests(indices, reporter), strict=True):
            key = os.fsencode(self.key(index))  # a file's name need not be UTF-8
            total.update(len(key).to_bytes(8, "little") + key + digest.tobytes())
        return total.hexdigest()


class DigestRecord:
    """Digests of images below one folder, in a file of the folder of a store.

    A digest is reused if the image's key and the size, inode and modification time of its file match, and the file was
    at least 2 s old when it was read; with `verify_all` every file is read. The record has four numbers per image,
    sorted: two are a hash of what must match, two the digest. Before them are three zeros and the CRC-32 of all.
    """

    def __init__(self, store: Store, root: Path, *, verify_all: bool) -> None:
        self._file = store.root / f"digests-{digest_of(os.fsencode(root.absolute())).hex()}.bin"
        self._verify_all = verify_all

    def digests(self, images: "ImageFiles", indices: Ints, reporter: Reporter) -> Digests:
        """Return the digests of images, and record new ones. Raise BadImagesError."""

        def state(index: int) -> bytes:
            with suppress(OSError, ValueError):  # reading it says what is wrong
                found = os.stat(images.file(index))  # noqa: PTH116 - a Path would take longer than the call
                if time.time_ns() - found.st_mtime_ns >= SETTLED_NS:
                    match = f"{images.column} {found.st_size} {found.st_ino} {found.st_mtime_ns}"
                    return digest_of(os.fsencode(images.key(index) + match))
            return bytes(DIGEST_BYTES)  # not to be found or remembered

        states = _from_bytes(tracked_map(state, indices.data, CHUNK, reporter, "checking files"), len(indices))
        known, is_settled = self._read(), (states != 0).any(axis=1)
        rows = known[np.minimum(np.searchsorted(known[:, 0], states[:, 0]), len(known) - 1)]
        is_known: np.ndarray[Any, np.dtype[np.bool_]] = (rows[:, :2] == states).all(axis=1) & is_settled
        is_known &= not self._verify_all
        digests, missing, n_read = rows[:, 2:].copy(), np.flatnonzero(~is_known), 0
        try:
            for digest in tracked_map(images.digest, indices[missing].data, 64, reporter, "reading files"):
                digests[missing[n_read]] = np.frombuffer(digest, dtype=np.uint64)
                n_read += 1
        finally:
            new = missing[:n_read][is_settled[missing[:n_read]]]
            if len(new):
                all_rows = np.concatenate([np.hstack([states[new], digests[new]]), rows[is_known], known[1:]])
                kept = all_rows[np.unique(all_rows[:MAX_RECORDED, 0], return_index=True)[1]]  # without repetition
                head = np.array([0, 0, 0, zlib.crc32(kept.data)], dtype="<u8")
                with suppress(OSError):  # the cache is read-only
                    atomic_write(self._file, head.tobytes() + kept.tobytes())
        return digests

    def _read(self) -> Digests:
        with suppress(OSError, ValueError):
            known: Digests = np.frombuffer(self._file.read_bytes(), dtype="<u8").reshape(-1, 4)
            if len(known) and known[0].tolist() == [0, 0, 0, zlib.crc32(known[1:].data)]:
                return known
        return np.zeros((1, 4), dtype=np.uint64)


def digest_of(content: bytes) -> bytes:
    """Return BLAKE2b of bytes, DIGEST_BYTES long."""
    return hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest()


def _from_bytes(digests: Iterable[bytes], n: int) -> Digests:
    # as text of 16 bytes, which is equal if all bytes are
    return np.fromiter(digests, dtype=f"S{DIGEST_BYTES}", count=n).view(np.uint64).reshape(n, 2)


class ImageFiles(ImageSource):
    """Images in files below a folder; `keys` are paths relative to it, with slashes."""

    column = ""  # of the files, if they have several with images

    def __init__(self, root: Path, keys: Iterable[str], value_range: ValueRange | None = None) -> None:
        super().__init__()
        self.root, self.value_range = root, value_range
        self.keys = keys if isinstance(keys, Names) else Names(keys)

    def __len__(self) -> int:
        return len(self.keys)

    def file(self, index: int) -> str:
        """Return the path of the file that has the image."""
        return f"{self.root}/{self.key(index)}"

    def content(self, index: int) -> bytes:
        """Return the bytes of an image as they are in a file. Raise BadImage."""
        return read_bytes(self.root / self.keys[index])

    def read_raw(self, index: int) -> RawImage:
        """Return an image before its values are mapped to 8 bits. Raise BadImage."""
        return read_raw(io.BytesIO(self.content(index)))

    def decode(self, index: int) -> Pixels:
        return self.read_raw(index).to_pixels(self.value_range)

    def name(self, index: int) -> str:
        return str(self.root / self.key(index))

    def key(self, index: int) -> str:
        return self.keys[index]  # type: ignore[no-any-return]

    def compute_digest(self, index: int) -> bytes:
        return digest_of(self.content(index))

    def compute_digests(self, indices: Ints, reporter: Reporter) -> Digests:
        record = self.record
        return super().compute_digests(indices, reporter) if record is None else record.digests(self, indices, reporter)


class TorchvisionImages(ImageSource):
    """Images as a torchvision dataset returns them, with names such as cifar10/train/17."""

    def __init__(self, items: Any, prefix: str) -> None:
        super().__init__(prefix)
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def decode(self, index: int) -> Pixels:
        try:
            image = self.items[index][0]
        except Exception as error:  # Pillow's decoders raise many kinds
            raise BadImage(one_line(error)[:80] or type(error).__name__) from error
        if not isinstance(image, Image.Image):
            raise BadImage(f"a {type(image).__name__}, not an image")
        return raw_image(image).to_pixels(None)


class ImageArrays(ImageSource):
    """Images of one size that are in memory: uint8 (n, height, width, 3)."""

    def __init__(self, arrays: Pixels, prefix: str) -> None:
        super().__init__(prefix)
        self.arrays = arrays

    def __len__(self) -> int:
        return len(self.arrays)

    def decode(self, index: int) -> Pixels:
        return self.arrays[index]  # type: ignore[no-any-return]


@dataclass(frozen=True, eq=False)
class Split:
    """Images with their classes: `indices` are positions in `images`, `labels` positions in the classes."""

    images: ImageSource
    indices: Ints
    labels: Ints

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, i: int) -> Pixels:
        """Return the pixels of the i-th image, uint8 (height, width, 3) RGB. Do not change them in place."""
        return self.images.read(int(self.indices[i]))

    def name(self, i: int) -> str:
        return self.images.name(int(self.indices[i]))

    def key(self, i: int) -> str:
        return self.images.key(int(self.indices[i]))

    def fingerprint(self, positions: Ints | None = None) -> str:
        """Return `ImageSource.fingerprint` of the images at these positions (None: all). Labels do not count."""
        indices = self.indices if positions is None else self.indices[positions]
        return self.images.fingerprint(indices, Reporter())

    def class_counts(self, n_classes: int) -> tuple[int, ...]:
        return tuple(np.bincount(self.labels, minlength=n_classes).tolist())

    def take(self, positions: Ints) -> "Split":
        return Split(self.images, self.indices[positions], self.labels[positions])


def positions_by_class(labels: Ints, n_classes: int) -> list[Ints]:
    """Return the positions of each class, ascending."""
    return np.split(np.argsort(labels, kind="stable"), np.cumsum(np.bincount(labels, minlength=n_classes))[:-1])


def full_split(images: ImageSource, labels: Iterable[int]) -> Split:
    values = np.fromiter(labels, dtype=np.int64)
    return Split(images, np.arange(len(values), dtype=np.int64), values)


@dataclass(frozen=True, eq=False)
class Source:
    """Classes, and the splits that the data itself has: some of train, val and test, or "all"; notes for the plan."""

    classes: tuple[str, ...]
    splits: Mapping[str, Split]
    notes: tuple[str, ...] = ()

    def select_classes(self, selected: Iterable[str] | None, where: str, *, for_training: bool) -> "Source":
        """Return the source with the selected classes only. Raise UsageError as `resolve_classes` does."""
        return self.keep_classes(resolve_classes(self.classes, selected, where, for_training=for_training))

    def keep_classes(self, classes: tuple[str, ...]) -> "Source":
        """Return the source with these of its classes only."""
        position = {name: i for i, name in enumerate(classes)}
        new_label = np.array([position.get(name, -1) for name in self.classes], dtype=np.int64)
        relabeled = {k: Split(s.images, s.indices, new_label[s.labels]) for k, s in self.splits.items()}
        return Source(classes, {k: s.take(np.flatnonzero(s.labels >= 0)) for k, s in relabeled.items()}, self.notes)


def source_of_files(listing: Listing) -> Source:
    splits = {k: full_split(ImageFiles(listing.root, keys), labels) for k, (keys, labels) in listing.splits.items()}
    return Source(listing.classes, splits, ignored_notes(listing.ignored))


def ignored_notes(ignored: Counter[str]) -> tuple[str, ...]:
    """Return the line for the plan about files that are left out, given their number by ending; none without any."""
    endings = join_limited([f"{ending} ({n:,})" for ending, n in ignored.most_common()])
    return (f"left out, since they are no images of a class: {endings}",) if endings else ()


class ConcatSplits(ImageSource):
    """Several splits as one source, the first one first; `labels` and `split_names` are by position."""

    def __init__(self, splits: Mapping[str, Split]) -> None:
        super().__init__()
        self.splits = splits
        self.labels: Ints = np.concatenate([split.labels for split in splits.values()])
        self.split_names = np.repeat(list(splits), [len(split) for split in splits.values()])
        self._indices: Ints = np.concatenate([split.indices for split in splits.values()])

    def __len__(self) -> int:
        return len(self.labels)

    def _find(self, position: int) -> tuple[ImageSource, int]:
        return self.splits[self.split_names[position]].images, int(self._indices[position])

    def name(self, position: int) -> str:
        images, index = self._find(position)
        return images.name(index)

    def key(self, position: int) -> str:
        images, index = self._find(position)
        return images.key(index)

    def decode(self, position: int) -> Pixels:
        images, index = self._find(position)
        return images.pixels[index] if index in images.pixels else images.decode(index)

    def compute_digests(self, indices: Ints, reporter: Reporter) -> Digests:
        names = self.split_names[indices]  # in the order of the splits, as indices are ascending
        parts = ((split.images, indices[names == name]) for name, split in self.splits.items())
        return np.concatenate([images.digests(self._indices[own], reporter) for images, own in parts])

    def first_copies(self, reporter: Reporter) -> Ints:
        """Return for each image the position of the first one with the same digest. Raise BadImagesError."""
        digests = self.digests(np.arange(len(self)), reporter).view(f"S{DIGEST_BYTES}")[:, 0]
        _, first, group = np.unique(digests, return_index=True, return_inverse=True)
        return first[group]

    def duplicates_across(self, first: Ints, split: str, others: Sequence[str]) -> Ints:
        """Return the images of a split that have a copy in others. Copies have the same number in `first`."""
        in_others = np.isin(first, first[np.isin(self.split_names, others)])
        return np.flatnonzero((self.split_names == split) & in_others)

    def label_conflicts(self, first: Ints) -> Ints:
        """Return the images whose label is not that of the first of its copies."""
        return np.flatnonzero(self.labels != self.labels[first])


def join_splits(splits: ConcatSplits) -> Split:
    """Return the images of several splits as one; their files are below one folder."""
    parts = list(splits.splits.values())
    first = parts[0].images
    if all(part.images is first for part in parts):
        return Split(first, np.concatenate([part.indices for part in parts]), splits.labels)
    if isinstance(first, ImageFiles):
        files = ImageFiles(first.root, (part.key(i) for part in parts for i in range(len(part))))
        return full_split(files, splits.labels)
    return full_split(splits, splits.labels)


def map_in_threads(work: Callable[[S], T], items: Iterable[S], chunk: int, ahead: int | None = None) -> Iterator[T]:
    """Yield the result of `work` for each item, in order, computed in threads by tasks of `chunk` items.

    At most `ahead` tasks, or two per thread, have results that are not taken yet. Errors are raised here.
    """
    threads = min(16, os.cpu_count() or 1)
    max_tasks = 2 * threads if ahead is None else ahead
    tasks, source, pool = deque[Future[list[T]]](), iter(items), ThreadPoolExecutor(threads)
    try:
        while part := list(islice(source, chunk)):
            tasks.append(pool.submit(lambda part: [work(item) for item in part], part))
            if len(tasks) > max_tasks:
                yield from tasks.popleft().result()
        while tasks:
            yield from tasks.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)  # the caller may have stopped early


def tracked_map(work: Callable[[S], T], items: Sequence[S], chunk: int, reporter: Reporter, label: str) -> Iterator[T]:
    """Yield the results of `map_in_threads`, and report each as done."""
    with reporter.track(label, len(items)) as advance:
        for result in map_in_threads(work, items, chunk):
            yield result
            advance(1)
