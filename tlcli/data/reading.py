"""Images in memory, as far as it goes, and the search for those that do not decode."""

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from tlcli.data.decode import BadImage, Pixels, decoder
from tlcli.data.source import Arrays, Images, Split, fingerprint, no_longer_readable
from tlcli.data.threads import map_in_threads
from tlcli.errors import BadImagesError
from tlcli.reporter import Reporter

CHUNK = 4
"""Images a task of a thread: enough to make its cost small, few enough that large photographs do not fill memory."""

Group = tuple[Images, list[int]]
"""Images, and the positions of those in use."""


class SoundImages(Protocol):
    """What earlier runs found out about which images decode."""

    def known(self, fingerprint: str) -> dict[str, str] | None:
        """The key and the fault of each bad image, usually none; None where these images were never decoded."""

    def record(self, fingerprint: str, bad: dict[str, str]) -> None:
        """Remember that of these images all but the bad ones decode."""


class Memory:
    """So many bytes for decoded images, shared by several sets of images, in the process that made it alone."""

    def __init__(self, size: int) -> None:
        self.left = size
        self.process = os.getpid()

    def take(self, size: int) -> bool:
        """Whether so many bytes are left; they are taken. Two threads at once may take a little more than there is."""
        if size > self.left or os.getpid() != self.process:  # each DataLoader worker would fill as much again
            return False
        self.left -= size
        return True


@dataclass(frozen=True, eq=False)
class CachedImages:
    """Images that stay in memory once they were read, as long as it lasts; their digests and keys always do."""

    images: Images
    memory: Memory
    pixels: dict[int, Pixels] = field(default_factory=dict)
    digests: dict[int, bytes] = field(default_factory=dict)
    keys: dict[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> Pixels:
        pixels = self.pixels.get(index)
        if pixels is None:
            pixels = self.images.read(index)
            self.keep(index, pixels)
        return pixels

    def holds(self, indices: Sequence[int]) -> bool:
        """Whether all of these are in memory."""
        return all(index in self.pixels for index in indices)

    def keep(self, index: int, pixels: Pixels) -> bool:
        """Keep this image if there is room for it; whether it is in memory."""
        if index not in self.pixels and self.memory.take(pixels.nbytes):
            self.pixels[index] = pixels
        return index in self.pixels

    def name(self, index: int) -> str:
        return self.images.name(index)

    def key(self, index: int) -> str:
        key = self.keys.get(index)
        if key is None:
            key = self.keys[index] = self.images.key(index)
        return key

    def digest(self, index: int) -> bytes:
        digest = self.digests.get(index)
        if digest is None:
            digest = self.digests[index] = self.images.digest(index)
        return digest


def kept(images: Images, memory: Memory) -> Images:
    """The same images, in memory once they were read; arrays are there already."""
    return images if isinstance(images, Arrays) else CachedImages(images, memory)


def bad_images(groups: Sequence[Group], reporter: Reporter, sound: SoundImages | None) -> dict[str, str]:
    """The key and the fault of each image that does not decode.

    Decodes all of them, and keeps what fits, unless `sound` knows these very bytes, names and decoder.
    """
    groups = [(images, indices) for images, indices in groups if not isinstance(images, Arrays)]  # those are sound
    if not groups:
        return {}
    seen = None if sound is None else _fingerprint(groups, reporter)
    if sound is not None and seen is not None and (known := sound.known(seen)) is not None:
        return known
    bad: dict[str, str] = {}
    with reporter.track("decoding", sum(len(indices) for _, indices in groups)) as done:
        for images, indices in groups:
            bad |= {images.key(index): reason for index, reason in read_once(images, indices, done).items()}
    if sound is not None and seen is not None:
        sound.record(seen, bad)
    return bad


def read_once(images: Images, indices: Sequence[int], done: Callable[[int], None]) -> dict[int, str]:
    """Read each image, and keep it if there is room; what is wrong with each that does not decode.

    `done` is called with the numbers of images read.
    """
    bad = {}
    for index, pixels in _pixels(images, indices):
        if isinstance(pixels, BadImage):
            bad[index] = str(pixels)
        done(1)
    return bad


def preload_images(splits: Iterable[Split], reporter: Reporter) -> None:
    """Decode ahead, in threads, as many images of these splits as fit in memory, the first split first.

    For live training: what a DataLoader worker decodes is lost to all others, what was there before it is shared.
    Does nothing for images that are in memory. Raises BadImages for a file that can no longer be read.
    """
    for split in splits:
        images = split.images
        if isinstance(images, CachedImages):
            missing = [index for index in split.indices.tolist() if index not in images.pixels]
            if missing and images.memory.left > 0:
                _fill(images, missing, reporter)


def _fill(images: CachedImages, indices: Sequence[int], reporter: Reporter) -> None:
    """Read images until one finds no room."""
    with reporter.track("decoding", len(indices)) as done:
        for index, pixels in _pixels(images, indices):
            if isinstance(pixels, BadImage):
                raise no_longer_readable(images, index, pixels)
            if index not in images.pixels:
                return
            done(1)


def _pixels(images: Images, indices: Sequence[int]) -> Iterable[tuple[int, Pixels | BadImage]]:
    """Each image or what is wrong with it, in order. Those read are kept in that order too, while there is room."""
    source = images.images if isinstance(images, CachedImages) else images

    def read(index: int) -> Pixels | BadImage:
        try:
            return source.read(index)
        except BadImage as error:
            return error

    for index, pixels in zip(indices, map_in_threads(read, indices, CHUNK), strict=True):
        if isinstance(images, CachedImages) and not isinstance(pixels, BadImage):
            images.keep(index, pixels)
        yield index, pixels


def _fingerprint(groups: Sequence[Group], reporter: Reporter) -> str | None:
    """Of all images and the decoder; None where a file cannot be read, of which nothing can be remembered."""
    digest = hashlib.sha256(decoder().encode())
    try:
        for images, indices in groups:
            digest.update(fingerprint(images, indices, reporter).encode())
    except BadImagesError:
        return None
    return digest.hexdigest()
