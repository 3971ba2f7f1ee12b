"""Images by position, in files or in memory; splits of them; and their digests."""

import hashlib
import os
import time
from abc import ABC, abstractmethod
from collections import deque
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
from tlcli.reporter import Reporter
from tlcli.store import Store
from tlcli.text import join_limited, one_line

S = TypeVar("S")
T = TypeVar("T")
Ints = np.ndarray[Any, np.dtype[np.int64]]

DIGEST_BYTES = 16  # enough that no two images share a digest by chance
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
        self._digests: dict[int, bytes] = {}

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
            pixels = self._or_name(self.decode, index)
            self.store(index, pixels)
        return pixels

    def store(self, index: int, pixels: Pixels) -> None:
        """Store an image if there is memory for it."""
        if self.memory is not None and index not in self.pixels and self.memory.take(pixels.nbytes):
            self.pixels[index] = pixels

    def digest(self, index: int) -> bytes:
        """Return BLAKE2b of the file's bytes, or of shape and pixels. Raise BadImagesError."""
        if index not in self._digests:
            self._digests[index] = self._or_name(self.compute_digest, index)
        return self._digests[index]

    def order_by_buffer(self, order: Ints, indices: Ints, seed: int, epoch: int) -> Ints:
        """Return a random order of an epoch, in which the images have `indices`, changed if many are read at once."""
        return order

    def _or_name(self, read: Callable[[int], T], index: int) -> T:
        try:
            return read(index)
        except BadImage as error:
            raise BadImagesError(f"{self.name(index)}: {error}") from error

    def compute_digest(self, index: int) -> bytes:
        pixels = self.decode(index)
        digest = hashlib.blake2b(repr(pixels.shape).encode(), digest_size=DIGEST_BYTES)
        digest.update(np.ascontiguousarray(pixels).data)
        return digest.digest()

    def fingerprint(self, indices: Sequence[int], reporter: Reporter) -> str:
        """Return SHA-256 over key and digest of each of these images, in order. Raise BadImagesError.

        It stays when the data moves, and changes with each byte, name and size, and with the choice of images.
        """
        total = hashlib.sha256()
        digests = digests_of([(self, index) for index in indices], reporter)
        for index, digest in zip(indices, digests, strict=True):
            key = os.fsencode(self.key(index))  # a file's name need not be UTF-8
            total.update(len(key).to_bytes(8, "little") + key + digest)
        return total.hexdigest()


class DigestRecord:
    """Digests of the files below one folder, in the notes of a store.

    A digest is reused if size, inode and modification time match, and the file was at least 2 s old when it was read;
    with `verify_all` every file is read.
    """

    def __init__(self, store: Store, root: Path, *, verify_all: bool) -> None:
        self._store = store
        self._name = "digests-" + hashlib.blake2b(os.fsencode(root.absolute()), digest_size=DIGEST_BYTES).hexdigest()
        self._entries = store.read_notes(self._name)
        self._root, self._verify_all, self._changed = root, verify_all, False

    def digest(self, path: Path, key: str) -> bytes:
        """Return the digest of a file. Raise BadImage."""
        try:
            state = path.stat()
        except (OSError, ValueError):
            return digest_of_file(path)  # which says what is wrong
        identity = [state.st_size, state.st_ino, state.st_mtime_ns]
        with suppress(LookupError, TypeError, ValueError):  # no entry, or a damaged one
            if not self._verify_all and self._entries[key][:3] == identity:
                return bytes.fromhex(self._entries[key][3])
        digest = digest_of_file(path)
        if time.time_ns() - state.st_mtime_ns >= SETTLED_NS:
            self._entries[key] = [*identity, digest.hex()]
            self._changed = True
        return digest

    def save(self) -> None:
        """Write the record if it changed and the cache is writable, without files that are gone."""
        if self._changed:
            self._changed = False
            self._entries = {k: v for k, v in self._entries.items() if (self._root / k).exists()}
            with suppress(OSError):
                self._store.write_notes(self._name, self._entries)


def digest_of_file(path: Path) -> bytes:
    """Return BLAKE2b of the bytes of a file. Raise BadImage."""
    return hashlib.blake2b(read_bytes(path), digest_size=DIGEST_BYTES).digest()


class ImageFiles(ImageSource):
    """Images in files below a folder; `keys` are paths relative to it, with slashes."""

    def __init__(self, root: Path, keys: Sequence[str], value_range: ValueRange | None = None) -> None:
        super().__init__()
        self.root, self.keys, self.value_range = root, keys, value_range

    def read_raw(self, index: int) -> RawImage:
        """Return an image before its values are mapped to 8 bits. Raise BadImage."""
        return read_raw(self.root / self.keys[index])

    def decode(self, index: int) -> Pixels:
        return self.read_raw(index).to_pixels(self.value_range)

    def name(self, index: int) -> str:
        return str(self.root / self.keys[index])

    def key(self, index: int) -> str:
        return self.keys[index]

    def join(self, splits: Iterable["Split"]) -> "ImageFiles":
        """Return the images of several splits, whose files are below the same folder, in one source."""
        return ImageFiles(self.root, [split.key(i) for split in splits for i in range(len(split))])

    def new_record(self, store: Store, *, verify_all: bool) -> DigestRecord:
        return DigestRecord(store, self.root, verify_all=verify_all)

    def compute_digest(self, index: int) -> bytes:
        path = self.root / self.keys[index]
        return digest_of_file(path) if self.record is None else self.record.digest(path, self.keys[index])


class TorchvisionImages(ImageSource):
    """Images as a torchvision dataset returns them, with names such as cifar10/train/17."""

    def __init__(self, items: Any, prefix: str) -> None:
        super().__init__(prefix)
        self.items = items

    def decode(self, index: int) -> Pixels:
        try:
            image = self.items[index][0]
        except (OSError, SyntaxError, ValueError) as error:
            raise BadImage(one_line(error)[:80]) from error
        if not isinstance(image, Image.Image):
            raise BadImage(f"a {type(image).__name__}, not an image")
        return raw_image(image).to_pixels(None)


class ImageArrays(ImageSource):
    """Images of one size that are in memory: uint8 (n, height, width, 3)."""

    def __init__(self, arrays: Pixels, prefix: str) -> None:
        super().__init__(prefix)
        self.arrays = arrays

    def decode(self, index: int) -> Pixels:
        return self.arrays[index]  # type: ignore[no-any-return]


def digests_of(places: Sequence[tuple[ImageSource, int]], reporter: Reporter) -> Iterator[bytes]:
    """Yield the digest of the image at each source and index. Raise BadImagesError for an unreadable file."""
    try:
        yield from tracked_map(lambda place: place[0].digest(place[1]), places, 64, reporter, "reading files")
    finally:
        for record in {images.record for images, _ in places}:
            if record is not None:
                record.save()


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
        return self.images.fingerprint(indices.tolist(), Reporter())

    def order_by_buffer(self, order: Ints, seed: int, epoch: int) -> Ints:
        """Return `ImageSource.order_by_buffer` of positions that are in the order of an epoch."""
        return self.images.order_by_buffer(order, self.indices[order % len(self)], seed, epoch)

    def class_counts(self, n_classes: int) -> tuple[int, ...]:
        return tuple(np.bincount(self.labels, minlength=n_classes).tolist())

    def take(self, positions: Ints) -> "Split":
        return Split(self.images, self.indices[positions], self.labels[positions])


def full_split(images: ImageSource, labels: Iterable[int]) -> Split:
    values = np.fromiter(labels, dtype=np.int64)
    return Split(images, np.arange(len(values), dtype=np.int64), values)


@dataclass(frozen=True, eq=False)
class Source:
    """Classes, and the splits that the data itself has: some of train, val and test, or "all"; notes for the plan."""

    classes: tuple[str, ...]
    splits: Mapping[str, Split]
    notes: tuple[str, ...] = ()

    def select_classes(self, selected: Iterable[str] | None, where: str) -> "Source":
        """Return the source with the selected classes only. Raise UsageError for an unknown name."""
        classes = resolve_classes(self.classes, selected, where)
        position = {name: i for i, name in enumerate(classes)}
        new_label = np.array([position.get(name, -1) for name in self.classes], dtype=np.int64)
        relabeled = {k: Split(s.images, s.indices, new_label[s.labels]) for k, s in self.splits.items()}
        return Source(classes, {k: s.take(np.flatnonzero(s.labels >= 0)) for k, s in relabeled.items()}, self.notes)


def source_of_files(listing: Listing) -> Source:
    splits = {
        split: full_split(ImageFiles(listing.root, [key for key, _ in rows]), (label for _, label in rows))
        for split, rows in listing.splits.items()
    }
    endings = join_limited([f"{ending} ({n:,})" for ending, n in listing.ignored.most_common()])
    notes = [f"files that are not images by their names are left out: {endings}"] if endings else []
    return Source(listing.classes, splits, tuple(notes))


class ConcatSplits(ImageSource):
    """Several splits as one sequence, with the methods of a split; position 0 is the first image of the first one."""

    def __init__(self, splits: Mapping[str, Split]) -> None:
        super().__init__()
        self.splits = splits
        self.labels: Ints = np.concatenate([split.labels for split in splits.values()])
        self.split_names = [name for name, split in splits.items() for _ in range(len(split))]
        self.places = [(split.images, i) for split in splits.values() for i in split.indices.tolist()]

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, position: int) -> str:
        return self.places[position][0].name(self.places[position][1])

    def key(self, position: int) -> str:
        return self.places[position][0].key(self.places[position][1])

    def decode(self, position: int) -> Pixels:
        images, index = self.places[position]
        return images.pixels[index] if index in images.pixels else images.decode(index)

    def exact_duplicates(self, reporter: Reporter) -> list[list[int]]:
        """Return the positions of images with equal digests, two or more per group. Raise BadImagesError."""
        groups: dict[bytes, list[int]] = {}
        for position, digest in enumerate(digests_of(self.places, reporter)):
            groups.setdefault(digest, []).append(position)
        return [group for group in groups.values() if len(group) > 1]

    def duplicates_across(self, groups: Iterable[Sequence[int]], split: str, others: Sequence[str]) -> list[list[int]]:
        """Return for each image of a split that is in another one too: its position, then those of its copies there."""
        copies = [(group, [i for i in group if self.split_names[i] in others]) for group in groups]
        return [[i, *there] for group, there in copies if there for i in group if self.split_names[i] == split]

    def label_conflicts(self, groups: Iterable[Sequence[int]]) -> list[list[int]]:
        """Return the groups whose images have several labels."""
        return [list(group) for group in groups if len({int(self.labels[i]) for i in group}) > 1]


def join_splits(splits: ConcatSplits) -> Split:
    """Return the images of several splits as one; their files are below one folder."""
    first = splits.places[0][0]
    if isinstance(first, ImageFiles):
        return full_split(first.join(splits.splits.values()), splits.labels)
    return full_split(splits, splits.labels)


def map_in_threads(work: Callable[[S], T], items: Iterable[S], chunk: int, ahead: int | None = None) -> Iterator[T]:
    """Yield the result of `work` for each item, in order, computed in threads by tasks of `chunk` items.

    At most `ahead` tasks, or two per thread, have results that are not taken yet. Errors are raised here.
    """
    threads = min(16, os.cpu_count() or 1)
    max_tasks = 2 * threads if ahead is None else ahead
    tasks: deque[Future[list[T]]] = deque()
    source = iter(items)
    pool = ThreadPoolExecutor(threads)
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
