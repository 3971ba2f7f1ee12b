"""Near duplicates: the same picture in another size, format, compression or brightness. No network is needed.

A picture becomes 32 x 32 gray values, and these the lowest 16 x 16 frequencies of their discrete cosine transform. The
signs of the lowest 64 are its perceptual hash (Zauner 2010). Two pictures are near duplicates where their hashes differ
in few bits and the coefficients, each weighted by its frequency as natural images have less of the high ones, point the
same way. The hash alone confuses plain pictures, the coefficients alone those with the same frame around them, and both
those of things with one outline on a white wall: so what is inside the outline has to be alike, too.

Chosen on CIFAR-10, all 60,000 images of 32 pixels: of 100 pairs drawn from those just below the bar (0.62 to 0.8) all
above 0.75 were one picture, or one model of car, when looked at, and below 0.7 different horses and aeroplanes began.
"""

from collections.abc import Iterable, Iterator

import numpy as np
from PIL import Image

from tlcli.data.decode import Pixels
from tlcli.data.source import Ints

SIDE, KEPT, BITS = 32, 16, 64
RADIUS = 11
"""Bits in which two hashes may differ. Four words of 16 bits: in one of them they differ in two bits at the most."""
WORD, WORDS = 16, 4
ALIKE = 0.75
"""The least cosine of the coefficients."""
PLAIN = 500.0
"""The least length of the coefficients: below it a picture has a contrast of about 2 in 255, and may be but noise."""
FLAT, FAINT, WALL = 8, 4.0, 0.3
"""Gray values that are one to the eye; the least contrast that can be compared; the least share of a background."""
SMALLEST = 16
"""Pixels a side below which there is too little in an image: handwritten digits of 8 x 8 are alike by the hundred."""
FLIPS = tuple(sorted({1 << a | 1 << b for a in range(WORD) for b in range(a)} | {1 << a for a in range(WORD)} | {0}))
"""Words with two bits set at the most."""
CHUNK = 1 << 20
"""Pairs that are compared at a time."""

Floats = np.ndarray[tuple[int, ...], np.dtype[np.float32]]


def thumbnail(image: Pixels) -> Pixels | None:
    """uint8 (height, width, 3) -> uint8 (32, 32), gray; None where the image is too small to be told from others."""
    if min(image.shape[:2]) < SMALLEST:
        return None
    gray = Image.fromarray(image).convert("L").resize((SIDE, SIDE), Image.Resampling.BILINEAR, reducing_gap=3)
    return np.asarray(gray)


def coefficients(thumbnails: Pixels) -> Floats:
    """uint8 (n, 32, 32) -> float32 (n, 255) of length 1, lowest frequencies first; zeros for a plain picture."""
    place, frequency = np.arange(SIDE), np.arange(KEPT)
    cosines = np.cos(np.pi * (2 * place + 1) * frequency[:, None] / (2 * SIDE)).astype(np.float32)
    cosines *= np.sqrt(np.where(frequency == 0, 1, 2) / SIDE)[:, None].astype(np.float32)
    down, across = np.mgrid[:KEPT, :KEPT]
    order = np.lexsort((down.ravel(), (down + across).ravel()))[1:]  # without the mean brightness
    weights = np.hypot(down, across).ravel()[order].astype(np.float32)
    out = np.empty((len(thumbnails), len(order)), dtype=np.float32)
    for start in range(0, len(thumbnails), 4096):
        part = slice(start, start + 4096)
        found = cosines @ thumbnails[part].astype(np.float32) @ cosines.T
        out[part] = found.reshape(len(found), -1)[:, order] * weights
    lengths = np.linalg.norm(out, axis=1, keepdims=True)
    return np.where(lengths < PLAIN, 0, out / np.maximum(lengths, PLAIN)).astype(np.float32)


def hashes(found: Floats) -> np.ndarray[tuple[int, ...], np.dtype[np.uint16]]:
    """Coefficients (n, 255) -> perceptual hashes, uint16 (n, 4)."""
    return np.ascontiguousarray(np.packbits(found[:, :BITS] > 0, axis=1)).view(np.uint16)


def near_pairs(thumbnails: Pixels, found: Floats) -> Iterator[tuple[int, int, float]]:
    """(i, j, cosine) of each near pair, i < j, of thumbnails (n, 32, 32) and their coefficients (n, 255)."""
    words = hashes(found)
    usable = np.flatnonzero(found.any(axis=1))
    seen: set[tuple[int, int]] = set()
    for left, right in _candidates(words[usable]):
        cosines = np.einsum("ij,ij->i", found[usable[left]], found[usable[right]])
        for k in np.flatnonzero(cosines >= ALIKE).tolist():
            pair = int(usable[left[k]]), int(usable[right[k]])
            if pair not in seen:
                seen.add(pair)
                if alike_inside(thumbnails[pair[0]], thumbnails[pair[1]]):
                    yield *pair, float(cosines[k])


def alike_inside(one: Pixels, other: Pixels) -> bool:
    """Whether two thumbnails correlate where they are not both background, as far as there is anything."""
    inside = ~(_background(one) & _background(other))
    a, b = one[inside].astype(np.float32), other[inside].astype(np.float32)
    if len(a) < SIDE or min(a.std(), b.std()) < FAINT:
        return True
    return bool(np.corrcoef(a, b)[0, 1] >= ALIKE)


def _background(thumbnail: Pixels) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    """The pixels that have about the most frequent gray, where many have."""
    steps = np.bincount(thumbnail.ravel() // FLAT, minlength=256 // FLAT)
    middle = int((steps[:-1] + steps[1:]).argmax() + 1) * FLAT  # the border of the fullest two steps
    same: np.ndarray[tuple[int, ...], np.dtype[np.bool_]] = np.abs(thumbnail.astype(np.int16) - middle) <= 1.5 * FLAT
    return same if same.mean() >= WALL else np.zeros_like(same)


def _candidates(words: np.ndarray[tuple[int, ...], np.dtype[np.uint16]]) -> Iterator[tuple[Ints, Ints]]:
    """Positions i < j whose hashes differ in at most RADIUS bits, some of them several times.

    All of them are found: among four words one has to be the same but for two bits (multi-index hashing, Norouzi,
    Punjani and Fleet 2012).
    """
    bits = np.array([value.bit_count() for value in range(1 << WORD)], dtype=np.uint8)
    for word in range(WORDS):
        own = words[:, word]
        order = np.argsort(own, kind="stable")
        ends = np.cumsum(np.bincount(own, minlength=1 << WORD))
        for flip in FLIPS:
            wanted = own ^ np.uint16(flip)
            stop = ends[wanted]
            start = np.where(wanted == 0, 0, ends[wanted.astype(np.int64) - 1])
            for left, right in _ranges(start, stop, order):
                distance = bits[words[left] ^ words[right]].sum(axis=1)
                near = distance <= RADIUS
                yield left[near], right[near]


def _ranges(start: Ints, stop: Ints, order: Ints) -> Iterator[tuple[Ints, Ints]]:
    """Each i with each j of order[start[i]:stop[i]] where i < j, some at a time."""
    counts = np.cumsum(stop - start)
    first = 0
    while first < len(start):
        before = counts[first - 1] if first else 0
        last = max(first + 1, int(np.searchsorted(counts, before + CHUNK, side="right")))
        n = (stop - start)[first:last]
        left = np.repeat(np.arange(first, last), n)
        offsets = np.arange(len(left)) - np.repeat(np.cumsum(n) - n, n)
        right = order[np.repeat(start[first:last], n) + offsets]
        yield left[left < right], right[left < right]
        first = last


def joined(pairs: Iterable[tuple[int, int]]) -> list[list[int]]:
    """Groups of all that hang together through pairs, each ascending, in the order of their first members."""
    parent: dict[int, int] = {}

    def root(i: int) -> int:
        while parent.setdefault(i, i) != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for i, j in pairs:
        a, b = sorted((root(i), root(j)))
        parent[b] = a
    groups: dict[int, list[int]] = {}
    for i in sorted(parent):
        groups.setdefault(root(i), []).append(i)
    return list(groups.values())
