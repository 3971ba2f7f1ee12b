"""What a data set's builder hands over: images that can be read by position, and which belong to which split."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tlcli.data.decode import BadImage, Pixels, read_image
from tlcli.data.listing import Listing, kept_classes
from tlcli.errors import BadImages

Ints = np.ndarray[Any, np.dtype[np.int64]]


class Images(Protocol):
    """Images by position. Reading may happen in several threads and processes at once."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> Pixels:
        """Pixels, uint8 (height, width, 3) RGB. Raises BadImage."""

    def name(self, index: int) -> str:
        """The path of the file, or a name such as digits/17."""


@dataclass(frozen=True, eq=False)
class Files:
    """Images in files, read each time."""

    paths: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> Pixels:
        return read_image(self.paths[index])

    def name(self, index: int) -> str:
        return str(self.paths[index])


@dataclass(frozen=True, eq=False)
class Arrays:
    """Images of one size that are in memory: uint8 (n, height, width, 3)."""

    arrays: Pixels
    prefix: str

    def __len__(self) -> int:
        return len(self.arrays)

    def read(self, index: int) -> Pixels:
        pixels: Pixels = self.arrays[index]
        return pixels

    def name(self, index: int) -> str:
        return f"{self.prefix}/{index}"


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
        except BadImage as error:  # it was sound when the data set was loaded
            raise BadImages(f"{self.name(i)}: {error}") from error

    def name(self, i: int) -> str:
        """The path or name of the split's i-th image."""
        return self.images.name(int(self.indices[i]))

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
        {k: whole(Files(tuple(p for p, _ in rows)), (c for _, c in rows)) for k, rows in listing.splits.items()},
    )
