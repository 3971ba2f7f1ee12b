"""Images that a dataset contains twice: exact copies by their digests, near duplicates by features and thumbnails."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image

from tlcli.data.decode import BadImage, Pixels
from tlcli.data.images import ImageSource, Ints, Split, digests_of, map_in_threads, unreadable
from tlcli.reporter import Reporter


@dataclass(frozen=True, eq=False)
class ConcatSplits:
    """Several splits as one sequence: position 0 is the first image of the first split."""

    splits: Mapping[str, Split]

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def labels(self) -> Ints:
        """The class of each image."""
        return np.concatenate([split.labels for split in self.splits.values()])

    @cached_property
    def split_names(self) -> tuple[str, ...]:
        """The name of each image's split."""
        return tuple(name for name, split in self.splits.items() for _ in range(len(split)))

    @cached_property
    def places(self) -> list[tuple[ImageSource, int]]:
        """The source of each image, and its index there."""
        return [(split.images, i) for split in self.splits.values() for i in split.indices.tolist()]

    def name(self, position: int) -> str:
        """Return the path of the file, or a name such as digits/17."""
        images, index = self.places[position]
        return images.name(index)

    def key(self, position: int) -> str:
        """Return the path below the dataset's root, or a name such as digits/17."""
        images, index = self.places[position]
        return images.key(index)

    def read(self, position: int) -> Pixels:
        """Return the pixels, uint8 (height, width, 3) RGB. Raise BadImagesError for an unreadable file."""
        images, index = self.places[position]
        try:
            return images.read(index)
        except BadImage as error:
            raise unreadable(images, index, error) from error


def exact_duplicates(images: ConcatSplits, reporter: Reporter) -> list[list[int]]:
    """Return the positions of images with equal digests, two or more per group. Raise BadImagesError."""
    groups: dict[bytes, list[int]] = {}
    for position, digest in enumerate(digests_of(images.places, reporter)):
        groups.setdefault(digest, []).append(position)
    return [group for group in groups.values() if len(group) > 1]


def cross_split_duplicates(
    images: ConcatSplits, groups: Iterable[Sequence[int]], split: str, others: Sequence[str]
) -> list[list[int]]:
    """Return for each image of a split that is in another one too: its position, then those of its copies there."""
    rows = []
    for group in groups:
        copies = [i for i in group if images.split_names[i] in others]
        if copies:
            rows += [[i, *copies] for i in group if images.split_names[i] == split]
    return rows


def label_conflicts(images: ConcatSplits, groups: Iterable[Sequence[int]]) -> list[list[int]]:
    """Return the groups whose images have several labels."""
    return [list(group) for group in groups if len({int(images.labels[i]) for i in group}) > 1]


def duplicate_notes(splits: Mapping[str, Split], classes: Sequence[str], reporter: Reporter) -> Iterator[str]:
    """Yield a line for each way in which exact duplicates make a metric of a run wrong."""
    images = ConcatSplits(splits)
    groups = exact_duplicates(images, reporter)
    for split, others, metric in (
        ("test", ("train", "val"), "test accuracy"),
        ("val", ("train",), "validation accuracy"),
    ):
        if rows := cross_split_duplicates(images, groups, split, others):
            sources = " and ".join(
                o for o in others if any(images.split_names[i] == o for row in rows for i in row[1:])
            )
            example = f"{images.key(rows[0][0])} = {images.key(rows[0][1])}"
            yield (
                f"{_count_images(len(rows))} of {split} also in {sources} (exact duplicates), e.g. {example}: "
                f"{metric} is too high; `tlcli data check` lists them"
            )
    in_train = [[i for i in group if images.split_names[i] == "train"] for group in groups]
    if conflicts := label_conflicts(images, in_train):
        first = conflicts[0][0]
        other = next(i for i in conflicts[0] if images.labels[i] != images.labels[first])
        example = " = ".join(f"{images.key(i)} ({classes[images.labels[i]]})" for i in (first, other))
        yield (
            f"{_count_images(len(conflicts))} of train with several labels (exact duplicates), e.g. {example}: "
            f"at most one is right; `tlcli data check` lists them"
        )


def _count_images(n: int) -> str:
    return "1 image" if n == 1 else f"{n:,} images"


# -- near duplicates --------------------------------------------------------------------------------------------------

THUMBNAIL_SIDE = 32
NEIGHBORS = 10
"""Nearest neighbors per image whose thumbnails are compared. Larger groups are found through their chains."""
MAX_RESIDUAL, MIN_CORRELATION = 2.5, 0.95
"""Two thumbnails are one image if, after the best linear change of brightness and contrast, their gray values differ by
at most this root mean square. Copies (half and a third of the size, 1.5 times, JPEG of quality 25) of brain scans,
aerial images and textures had 0.4 to 1.1 in the median and below 2.5 in 99 %; neighboring slices of a scan 3.3 or more.
The correlation keeps plain images apart, which differ by little whatever they show."""


def near_duplicates(
    images: ConcatSplits, positions: Sequence[int], features: np.ndarray[Any, np.dtype[np.float32]], reporter: Reporter
) -> Iterator[tuple[int, int, float]]:
    """Yield (i, j, correlation of the thumbnails) of near duplicates among images at `positions`, i < j.

    They are one image in another size, format, compression or brightness. Raise BadImagesError for an unreadable file.

    Args:
        features: of the backbone for these images, (N, D).
    """
    from sklearn.neighbors import NearestNeighbors

    if len(positions) < 2:
        return
    centered = features - features.mean(axis=0)
    unit = centered / np.maximum(np.linalg.norm(centered, axis=1, keepdims=True), 1e-12)
    search = NearestNeighbors(n_neighbors=min(NEIGHBORS + 1, len(positions)), algorithm="brute").fit(unit)
    neighbors = search.kneighbors(return_distance=False, n_neighbors=min(NEIGHBORS, len(positions) - 1))
    thumbnails = []
    with reporter.track("comparing", len(positions)) as advance:
        for thumbnail in map_in_threads(lambda i: _thumbnail(images.read(i)), positions, 16):
            thumbnails.append(thumbnail)
            advance(1)
    gray = np.stack(thumbnails) - np.mean(thumbnails, axis=1, keepdims=True)
    contrast = np.sqrt((gray**2).mean(axis=1))
    pairs = {(min(i, j), max(i, j)) for i, row in enumerate(neighbors.tolist()) for j in row}
    for i, j in sorted(pairs):
        high = max(float(contrast[i]), float(contrast[j]))
        correlation = float((gray[i] * gray[j]).mean() / max(float(contrast[i] * contrast[j]), 1e-6))
        if correlation >= MIN_CORRELATION and (1 - min(1.0, correlation) ** 2) * high**2 <= MAX_RESIDUAL**2:
            yield (*sorted((positions[i], positions[j])), min(1.0, correlation))


def _thumbnail(image: Pixels) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return the gray values of a small square, (1024)."""
    gray = Image.fromarray(image).convert("L")
    small = gray.resize((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.BILINEAR, reducing_gap=3)
    return np.asarray(small, dtype=np.float32).ravel()


def connected_components(pairs: Iterable[tuple[int, int]]) -> list[list[int]]:
    """Return groups of positions that are connected by pairs, each ascending, in the order of their first members."""
    group_of: dict[int, list[int]] = {}
    for i, j in pairs:
        merged = {*group_of.get(i, [i]), *group_of.get(j, [j])}
        group = sorted(merged)
        group_of.update(dict.fromkeys(group, group))
    return sorted({id(group): group for group in group_of.values()}.values())
