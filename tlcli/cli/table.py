"""The table of every command: aligned columns without lines, of which the less important ones go if space is short."""

import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from rich.cells import cell_len, chop_cells

from tlcli.text import strip_control_chars

UNLIMITED_WIDTH = 10_000  # if stdout is not a terminal: a program that reads a pipe needs one line per row
GAP = 2  # blanks between two columns
MIN_WRAPPED_WIDTH = 8


@dataclass(frozen=True)
class TableColumn:
    """A column of a table."""

    title: str
    drop: int = 0  # columns with a higher number go first if the width is short; 0 always stays
    left: bool = False  # aligned to the left


def table_lines(
    columns: Sequence[TableColumn], rows: Iterable[Sequence[object]], width: int | None = None, *, wrap: bool = False
) -> Iterator[str]:
    """Yield the lines of a table of the columns that fit `width` characters; of all if the width is None.

    A cell is shown as `str` of it, None as a dash. `wrap` breaks the cells of the widest column that is aligned to the
    left. rich's own tables are not used: they take a second for 2,000 rows.
    """
    cells = [["-" if cell is None else strip_control_chars(str(cell)) for cell in row] for row in rows]
    widths = [max([len(column.title), *(cell_len(row[i]) for row in cells)]) for i, column in enumerate(columns)]
    shown = list(range(len(columns)))
    while width is not None and (excess := sum(widths[i] + GAP for i in shown) - GAP - width) > 0:
        least = max(reversed(shown), key=lambda i: columns[i].drop)
        if columns[least].drop == 0:
            if wrap:
                widest = max((i for i in shown if columns[i].left), key=lambda i: widths[i])
                widths[widest] = max(MIN_WRAPPED_WIDTH, widths[widest] - excess)
            break
        shown.remove(least)
    for row in [[column.title for column in columns], *cells]:
        for line in zip_longest(*(_wrap(row[i], widths[i]) for i in shown), fillvalue=""):
            padded = []
            for i, part in zip(shown, line, strict=True):
                blanks = " " * (widths[i] - cell_len(part))
                padded.append(part + blanks if columns[i].left else blanks + part)
            yield (" " * GAP).join(padded).rstrip()


def _wrap(cell: str, width: int) -> list[str]:
    if cell_len(cell) <= width:
        return [cell]
    lines = textwrap.wrap(cell, width, break_on_hyphens=False)  # counts a wide character as one
    return [part for line in lines for part in chop_cells(line, width)]


def terminal_columns() -> int | None:
    """Return the width of the terminal on stdout; None if stdout is not a terminal."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None
