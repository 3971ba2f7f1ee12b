"""What a data set's builder hands over: images that can be read by position, and which belong to which split."""

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tlcli.data.decode import BadImage, Pixels, read_bytes, read_image
from tlcli.data.listing import Listing, kept_classes
from tlcli.data.threads import map_in_threads, shown_if_slow
from tlcli.errors import BadImagesError
from tlcli.reporter import Reporter

Ints = np.ndarray[Any, np.dtype[np.int64]]

DIGEST_SIZE = 16
"""Bytes of an image's digest: enough that no two images share one by chance."""


class Images(Protocol):
    """Images by position. Reading may happen in several threads and processes at once."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> Pixels:
        """Pixels, uint8 (height, width, 3) RGB. Raises BadImage."""

    def name(self, index: int) -> str:
        """The path of the file, or a name such as digits/17."""

    def key(self, index: int) -> str:
        """A name that stays when the data moves: the path below the data set's root, or a name such as digits/17."""

    def digest(self, index: int) -> bytes:
        """BLAKE2b of the file's bytes, or of shape and pixels. Raises BadImage."""


@dataclass(frozen=True, eq=False)
class Files:
    """Images in files below a folder, read each time."""

    paths: tuple[Path, ...]
    root: Path

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> Pixels:
        return read_image(self.paths[index])

    def name(self, index: int) -> str:
        return str(self.paths[index])

    def key(self, index: int) -> str:
        # lexically, so that nothing is read from disk; as_posix: Windows gives the same
        return Path(os.path.relpath(self.paths[index], self.root)).as_posix()

    def digest(self, index: int) -> bytes:
        return hashlib.blake2b(read_bytes(self.paths[index]), digest_size=DIGEST_SIZE).digest()


@dataclass(frozen=True, eq=False)
class Arrays:
    """Images of one size that are in memory: uint8 (n, height, width, 3). Their digests stay once they were taken."""

    arrays: Pixels
    prefix: str
    digests: dict[int, bytes] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.arrays)

    def read(self, index: int) -> Pixels:
        pixels: Pixels = self.arrays[index]
        return pixels

    def name(self, index: int) -> str:
        return f"{self.prefix}/{index}"

    def key(self, index: int) -> str:
        return self.name(index)

    def digest(self, index: int) -> bytes:
        digest = self.digests.get(index)
        if digest is None:
            digest = self.digests[index] = digest_of_pixels(self.read(index))
        return digest


def digest_of_pixels(pixels: Pixels) -> bytes:
    """BLAKE2b of the shape and the values."""
    digest = hashlib.blake2b(repr(pixels.shape).encode(), digest_size=DIGEST_SIZE)
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.digest()


def fingerprint(images: Images, indices: Sequence[int], reporter: Reporter) -> str:
    """SHA-256 over key and digest of each of these images, in order. Raises BadImages for what cannot be read.

    It stays when the data moves, and changes with each byte, name and size, and with the choice of images.
    """

    def digest_of(index: int) -> bytes:
        try:
            return images.digest(index)
        except BadImage as error:
            raise no_longer_readable(images, index, error) from error

    total = hashlib.sha256()
    digests = shown_if_slow(map_in_threads(digest_of, indices, 64), "reading files", len(indices), reporter)
    for index, digest in zip(indices, digests, strict=True):
        key = os.fsencode(images.key(index))  # a file's name need not be UTF-8
        total.update(len(key).to_bytes(8, "little") + key + digest)
    return total.hexdigest()


def no_longer_readable(images: Images, index: int, error: BadImage) -> BadImagesError:
    """The error of an image that was sound when the data set was loaded."""
    return BadImagesError(f"{images.name(index)}: {error}")


@dataclass(frozen=True, eq=False)
class Split:
    """Some of the images, each with its class: `indices` are positions in `images`, `labels` positions in classes."""

    images: Images
    indices: Ints
    labels: Ints

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, i: int) -> Pixels:
        """Pixels of the split's i-th image, uint8 (height, width, 3) RGB, not to be changed in place."""
        try:
            return self.images.read(int(self.indices[i]))
        except BadImage as error:
            raise no_longer_readable(self.images, int(self.indices[i]), error) from error

    def name(self, i: int) -> str:
        """The path or name of the split's i-th image."""
        return self.images.name(int(self.indices[i]))

    def key(self, i: int) -> str:
        """The name of the split's i-th image that stays when the data moves."""
        return self.images.key(int(self.indices[i]))

    def fingerprint(self, positions: Ints | None = None, reporter: Reporter | None = None) -> str:
        """SHA-256 over names and contents of the images at these positions (None: all), in order; not over labels.

        It stays when the data moves. Raises BadImages for a file that cannot be read.
        """
        indices = self.indices if positions is None else self.indices[positions]
        return fingerprint(self.images, indices.tolist(), reporter or Reporter())

    def class_counts(self, n_classes: int) -> tuple[int, ...]:
        """The number of images of each class."""
        return tuple(np.bincount(self.labels, minlength=n_classes).tolist())

    def take(self, positions: Ints) -> "Split":
        """The split's images at these positions."""
        return Split(self.images, self.indices[positions], self.labels[positions])


@dataclass(frozen=True, eq=False)
class Source:
    """Classes, and the splits that the data itself has: among train, val and test, or all."""

    classes: tuple[str, ...]
    splits: Mapping[str, Split]

    def keep(self, wanted: Iterable[str] | None, where: str) -> "Source":
        """The same with the wanted classes alone. Raises UsageError for an unknown name."""
        classes = kept_classes(self.classes, wanted, where)
        place = np.array([classes.index(c) if c in classes else -1 for c in self.classes], dtype=np.int64)
        relabelled = {k: Split(s.images, s.indices, place[s.labels]) for k, s in self.splits.items()}
        return Source(classes, {k: s.take(np.flatnonzero(s.labels >= 0)) for k, s in relabelled.items()})


def whole(images: Images, labels: Iterable[int]) -> Split:
    """A split of all images."""
    values = np.fromiter(labels, dtype=np.int64)
    return Split(images, np.arange(len(values), dtype=np.int64), values)


def from_listing(listing: Listing) -> Source:
    """Files as images."""
    return Source(
        listing.classes,
        {
            k: whole(Files(tuple(p for p, _ in rows), listing.root), (c for _, c in rows))
            for k, rows in listing.splits.items()
        },
    )
