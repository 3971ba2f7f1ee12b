"""The confusion matrix as a report shows it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tlcli.runs.report.reading import Facts, at, facts, number, texts, whole

MOST_CELLS = 40
"""Classes up to which the matrix is a table: a cell of a larger one is too small to read, and is drawn instead."""

LEVELS = 10
PAIRS, FEW_PAIRS = 20, 8
FEW = 6
"""Classes up to which the matrix says everything at a glance, and the pairs need no list."""


@dataclass(frozen=True)
class Cell:
    """Images of one true class that got one name; `level`: their share of the row, of mistakes twice it."""

    n: int
    level: int
    diagonal: bool


@dataclass(frozen=True)
class Pair:
    """`n` of `of` images of one class were taken for another."""

    truth: str
    taken_for: str
    n: int
    of: int


@dataclass(frozen=True)
class Matrix:
    """Rows are true classes, columns predicted ones. `rows` is empty where the matrix is drawn: `marks` are its cells
    that are not 0, as (row, column, level, on the diagonal)."""

    classes: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    marks: tuple[tuple[int, int, int, bool], ...]
    pairs: tuple[Pair, ...]
    wide_names: bool


@dataclass(frozen=True)
class ClassRow:
    """Figures of one class on test; a figure is None where the file has none."""

    name: str
    precision: float | None
    recall: float | None
    f1: float | None
    support: int | None


def matrix(test: Facts) -> Matrix | None:
    """The matrix of a test.json; None where it has none."""
    classes, counts = texts(test.get("classes")), _counts(test.get("confusion"))
    if counts is None or not classes or len(classes) != len(counts):
        return None
    totals = counts.sum(axis=1)
    shares = counts / np.maximum(totals, 1)[:, None]
    n, as_table = len(classes), len(classes) <= MOST_CELLS
    strength = np.where(np.eye(n, dtype=bool), shares, 2 * shares)  # mistakes are few, and what one looks for
    levels = np.where(counts > 0, np.clip(np.rint(strength * LEVELS), 1, LEVELS), 0).astype(int)
    rows = (
        [[Cell(int(counts[t, p]), int(levels[t, p]), t == p) for p in range(n)] for t in range(n)] if as_table else []
    )
    marks = [] if as_table else [(int(t), int(p), int(levels[t, p]), bool(t == p)) for t, p in np.argwhere(counts > 0)]
    return Matrix(
        classes=classes,
        rows=tuple(tuple(row) for row in rows),
        marks=tuple(marks),
        pairs=_pairs(counts, classes, FEW_PAIRS if as_table else PAIRS) if n > FEW else (),
        wide_names=n <= FEW,
    )


def _counts(value: object) -> np.ndarray | None:
    """A square matrix of counts, else None."""
    if not isinstance(value, list) or not all(isinstance(row, list) and len(row) == len(value) for row in value):
        return None
    if not all(n is not None and 0 <= n < 2**40 for row in value for n in map(whole, row)):
        return None
    return np.array(value, dtype=np.int64).reshape(len(value), len(value))


def _pairs(counts: np.ndarray, classes: Sequence[str], most: int) -> tuple[Pair, ...]:
    """The pairs with the most mistakes, most first."""
    off = counts.copy()
    np.fill_diagonal(off, 0)
    order = np.argsort(-off, axis=None, kind="stable")[:most]
    found = [divmod(int(flat), len(classes)) for flat in order]
    return tuple(Pair(classes[t], classes[p], int(off[t, p]), int(counts[t].sum())) for t, p in found if off[t, p] > 0)


def class_rows(test: Facts) -> tuple[ClassRow, ...]:
    """The figures of each class, the lowest F1 first; a class without test images comes last."""
    rows = [
        ClassRow(
            name=str(name),
            precision=number(at(own, "precision")),
            recall=number(at(own, "recall")),
            f1=number(at(own, "f1")),
            support=whole(at(own, "support")),
        )
        for name, own in facts(test.get("per_class")).items()
    ]
    return tuple(sorted(rows, key=lambda row: (not row.support, 2.0 if row.f1 is None else row.f1)))
