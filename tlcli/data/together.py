"""The images of several splits in one row, for what looks at all of them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from tlcli.data.decode import BadImage, Pixels
from tlcli.data.source import Images, Ints, Split, no_longer_readable
from tlcli.data.threads import map_in_threads, shown_if_slow
from tlcli.reporter import Reporter


@dataclass(frozen=True, eq=False)
class ConcatSplits:
    """Splits by name, one after the other: position 0 is the first image of the first one.

    Raises BadImages where a file can no longer be read.
    """

    splits: Mapping[str, Split]

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def labels(self) -> Ints:
        """The class of each image."""
        return np.concatenate([split.labels for split in self.splits.values()])

    @cached_property
    def where(self) -> tuple[str, ...]:
        """The name of each image's split."""
        return tuple(name for name, split in self.splits.items() for _ in range(len(split)))

    @cached_property
    def _places(self) -> list[tuple[Images, int]]:
        return [(split.images, i) for split in self.splits.values() for i in split.indices.tolist()]

    def place(self, position: int) -> tuple[Images, int]:
        """The images that one is of, and its index there."""
        return self._places[position]

    def name(self, position: int) -> str:
        """The path of the file, or a name such as digits/17."""
        images, index = self._places[position]
        return images.name(index)

    def key(self, position: int) -> str:
        """The path below the data set's root, or a name such as digits/17."""
        images, index = self._places[position]
        return images.key(index)

    def read(self, position: int) -> Pixels:
        """Pixels, uint8 (height, width, 3) RGB."""
        images, index = self._places[position]
        try:
            return images.read(index)
        except BadImage as error:
            raise no_longer_readable(images, index, error) from error

    def digests(self, reporter: Reporter) -> Iterator[bytes]:
        """The digest of each image's content, in order."""
        digests = map_in_threads(self._digest, range(len(self)), 64)
        return shown_if_slow(digests, "reading files", len(self), reporter)

    def _digest(self, position: int) -> bytes:
        images, index = self._places[position]
        try:
            return images.digest(index)
        except BadImage as error:
            raise no_longer_readable(images, index, error) from error
