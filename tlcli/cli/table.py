"""The table of every command: aligned columns without lines, of which the less important ones go if space is short."""

import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.cells import cell_len

from tlcli.text import strip_control_chars

if TYPE_CHECKING:
    import rich.table

UNLIMITED_WIDTH = 10_000  # if stdout is not a terminal: a program that reads a pipe needs one line per row
GAP = 2  # blanks between two columns


@dataclass(frozen=True)
class TableColumn:
    """A column of a table."""

    title: str
    drop: int = 0  # columns with a higher number go first if the width is short; 0 always stays
    left: bool = False  # aligned to the left, and wrapped by make_table if the width is short


def make_table(
    columns: Sequence[TableColumn], rows: Iterable[Sequence[object]], width: int | None = None
) -> "rich.table.Table":
    """Return a rich table of the columns that fit `width` characters; all of them if the width is None.

    A cell is shown as `str` of it, None as a dash. Markup in cells is not interpreted.
    """
    from rich.table import Table
    from rich.text import Text

    cells, _, shown = _layout(columns, rows, width)
    table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0), show_header=True, header_style="dim")
    for i in shown:
        table.add_column(Text(columns[i].title), justify="left" if columns[i].left else "right", overflow="fold")
    for row in cells:
        table.add_row(*(Text(row[i]) for i in shown))
    return table


def table_lines(
    columns: Sequence[TableColumn], rows: Iterable[Sequence[object]], width: int | None = None
) -> Iterator[str]:
    """Yield the lines of the same table without wrapped cells: rich takes a second for 2,000 rows."""
    cells, widths, shown = _layout(columns, rows, width)
    for row in [[column.title for column in columns], *cells]:
        padded = []
        for i in shown:
            blanks = " " * (widths[i] - cell_len(row[i]))
            padded.append(row[i] + blanks if columns[i].left else blanks + row[i])
        yield (" " * GAP).join(padded).rstrip()


def _layout(
    columns: Sequence[TableColumn], rows: Iterable[Sequence[object]], width: int | None
) -> tuple[list[list[str]], list[int], list[int]]:
    """Return the cells as text, the width of each column, and the indices of the columns that fit."""
    cells = [["-" if cell is None else strip_control_chars(str(cell)) for cell in row] for row in rows]
    widths = [max([len(column.title), *(cell_len(row[i]) for row in cells)]) for i, column in enumerate(columns)]
    shown = list(range(len(columns)))
    while width is not None and sum(widths[i] + GAP for i in shown) - GAP > width:
        least = max(reversed(shown), key=lambda i: columns[i].drop)
        if columns[least].drop == 0:
            break
        shown.remove(least)
    return cells, widths, shown


def terminal_columns() -> int | None:
    """Return the width of the terminal on stdout; None if stdout is not a terminal."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None
