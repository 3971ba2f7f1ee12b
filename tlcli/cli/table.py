"""The table of every command: aligned columns without lines, of which the less important ones go if space is short."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

GAP = 2
"""Blanks between two columns."""


@dataclass(frozen=True)
class TableColumn:
    """A column of a table.

    Args:
        title: the header.
        drop: columns with a higher number go first if the width is short; 0 always stays.
        left: align to the left; cells of such a column wrap. Others are aligned to the right and do not.
    """

    title: str
    drop: int = 0
    left: bool = False


def make_table(columns: Sequence[TableColumn], rows: Iterable[Sequence[object]], width: int | None = None) -> Table:
    """Return a rich table of the columns that fit `width` characters; all of them if the width is None.

    A cell is shown as `str` of it, None as a dash. Markup in cells is not interpreted.
    """
    cells = [["-" if cell is None else str(cell) for cell in row] for row in rows]
    widths = [max([len(column.title), *(Text(row[i]).cell_len for row in cells)]) for i, column in enumerate(columns)]
    kept = list(range(len(columns)))
    while width is not None and sum(widths[i] + GAP for i in kept) - GAP > width:
        least = max(reversed(kept), key=lambda i: columns[i].drop)
        if columns[least].drop == 0:
            break
        kept.remove(least)
    table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0), show_header=True, header_style="dim")
    for i in kept:
        table.add_column(Text(columns[i].title), justify="left" if columns[i].left else "right", overflow="fold")
    for row in cells:
        table.add_row(*(Text(row[i]) for i in kept))
    return table
