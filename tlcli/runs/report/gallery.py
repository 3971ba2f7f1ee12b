"""The images worth looking at: mistakes that the network was sure of, and images that it could not decide on."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from tlcli.data.decode import Pixels
from tlcli.runs.report.pictures import Pictures

SHOWN = 24
SIDE = 160  # pixels of the longer side
QUALITY = 80
UNDECIDED = 0.5
"""Two classes are close whose probabilities differ by less."""

SMALL = 96  # pixels: an image below this is shown pixel by pixel, not blurred


@dataclass(frozen=True)
class Guess:
    """A class and its probability."""

    name: str
    probability: float


@dataclass(frozen=True)
class Card:
    """One image of a gallery. `picture` is a data: URI, None where the image is not there; `small`: a few pixels."""

    picture: str | None
    small: bool
    name: str
    truth: str
    right: bool
    guesses: tuple[Guess, ...]


@dataclass(frozen=True)
class Gallery:
    """Some of `n` images, in order."""

    n: int
    cards: tuple[Card, ...]


def mistakes(p: np.ndarray, labels: np.ndarray, classes: Sequence[str], keys: Sequence[str], of: Pictures) -> Gallery:
    """The images taken for another class, the one with the highest probability first; p is (N, classes)."""
    top = p.argmax(axis=1)
    wrong = np.flatnonzero(top != labels)
    order = wrong[np.argsort(-p[wrong, top[wrong]], kind="stable")]
    return Gallery(len(wrong), tuple(_card(int(i), 1, p, labels, classes, keys, of) for i in order[:SHOWN]))


def uncertain(p: np.ndarray, labels: np.ndarray, classes: Sequence[str], keys: Sequence[str], of: Pictures) -> Gallery:
    """The images whose two likeliest classes are close, the closest first; none where there is one class."""
    if p.shape[1] < 2:
        return Gallery(0, ())
    two = np.partition(p, -2, axis=1)[:, -2:]
    margin = two[:, 1] - two[:, 0]
    close = np.flatnonzero(margin < UNDECIDED)
    order = close[np.argsort(margin[close], kind="stable")]
    return Gallery(len(close), tuple(_card(int(i), 2, p, labels, classes, keys, of) for i in order[:SHOWN]))


def _card(
    i: int, most: int, p: np.ndarray, labels: np.ndarray, classes: Sequence[str], keys: Sequence[str], of: Pictures
) -> Card:
    best = np.argsort(-p[i], kind="stable")[:most]
    pixels = of.read(keys[i])
    return Card(
        picture=None if pixels is None else thumbnail(pixels),
        small=pixels is not None and max(pixels.shape[:2]) < SMALL,
        name=keys[i],
        truth=classes[labels[i]],
        right=bool(best[0] == labels[i]),
        guesses=tuple(Guess(classes[k], float(p[i, k])) for k in best),
    )


def thumbnail(pixels: Pixels) -> str:
    """A JPEG of at most SIDE pixels as a data: URI. Only pixels go in: no metadata of the file."""
    image = Image.fromarray(pixels)
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    small = max(image.size) < SMALL  # each pixel will be seen
    image.save(file, "JPEG", quality=95 if small else QUALITY, subsampling=0 if small else 2, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")
