"""The table of every command: aligned columns without lines, of which the less important ones go if space is short."""

import io
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from rich.cells import cell_len

from tlcli.text import strip_control_chars

UNLIMITED_WIDTH = 10_000  # if stdout is not a terminal: a program that reads a pipe needs one line per row
GAP = 2  # blanks between two columns


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

    A cell is shown as `str` of it, None as a dash. If the columns that stay do not fit, `wrap` folds their cells.
    """
    cells = [["-" if cell is None else strip_control_chars(str(cell)) for cell in row] for row in rows]
    widths = [max([len(column.title), *(cell_len(row[i]) for row in cells)]) for i, column in enumerate(columns)]
    shown = list(range(len(columns)))
    while is_wide := width is not None and sum(widths[i] + GAP for i in shown) - GAP > width:
        least = max(reversed(shown), key=lambda i: columns[i].drop)
        if columns[least].drop == 0:
            break
        shown.remove(least)
    if is_wide and wrap:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0))
        for column in (columns[i] for i in shown):
            table.add_column(Text(column.title), justify="left" if column.left else "right", overflow="fold")
        for row in cells:
            table.add_row(*(Text(row[i]) for i in shown))
        console = Console(file=io.StringIO(), width=width, color_system=None)
        with console.capture() as capture:
            console.print(table)
        yield from (line.rstrip() for line in capture.get().splitlines())
        return
    for row in [[column.title for column in columns], *cells]:  # rich takes two seconds for 2,000 rows
        padded = []
        for i in shown:
            blanks = " " * (widths[i] - cell_len(row[i]))
            padded.append(row[i] + blanks if columns[i].left else blanks + row[i])
        yield (" " * GAP).join(padded).rstrip()


def terminal_columns() -> int | None:
    """Return the width of the terminal on stdout; None if stdout is not a terminal."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None
