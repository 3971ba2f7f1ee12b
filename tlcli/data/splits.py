"""Stratified random choices: functions of the seed, the class's name and the order of its files, nothing else."""

import zlib
from collections.abc import Iterable, Sequence

import numpy as np

from tlcli.data.source import Ints


def per_class(labels: Ints, classes: Sequence[str], most: int, *, seed: int, purpose: str) -> Ints:
    """Positions of at most so many images a class, ascending; a smaller choice is part of a larger one."""
    return _sorted(shuffled[:most] for shuffled in _shuffled(labels, classes, seed, purpose))


def stratified_split(
    labels: Ints, classes: Sequence[str], fraction: float, *, seed: int, purpose: str
) -> tuple[Ints, Ints]:
    """Positions that stay and positions held out, each ascending.

    Of each class the fraction, rounded, is held out, and at least one image, but always one stays.
    """
    stay, held = [], []
    for shuffled in _shuffled(labels, classes, seed, purpose):
        n = min(max(1, int(len(shuffled) * fraction + 0.5)), max(0, len(shuffled) - 1))
        held.append(shuffled[:n])
        stay.append(shuffled[n:])
    return _sorted(stay), _sorted(held)


def _shuffled(labels: Ints, classes: Sequence[str], seed: int, purpose: str) -> list[Ints]:
    """The positions of each class in random order."""
    return [
        np.random.default_rng([seed, zlib.crc32(f"{purpose}/{name}".encode())]).permutation(np.flatnonzero(labels == c))
        for c, name in enumerate(classes)
    ]


def _sorted(parts: Iterable[Ints]) -> Ints:
    return np.sort(np.concatenate(list(parts)))
