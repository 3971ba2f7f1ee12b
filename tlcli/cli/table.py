"""The table of every command: aligned columns without lines, of which the less important ones go if space is short."""

import io
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence

from rich.cells import cell_len

from tlcli.text import strip_control_chars

UNLIMITED_WIDTH = 10_000  # if stdout is not a terminal: a program that reads a pipe needs one line per row
GAP = 2  # blanks between two columns


def table_lines(
    titles: Sequence[str],
    rows: Iterable[Sequence[object]],
    width: int | None,
    drop: Sequence[str] = (),
    wrap: bool = False,
) -> Iterator[str]:
    """Yield the lines of a table. A title that starts with < is that of a column of text, aligned to the left.

    A cell is shown as `str` of it, None as a dash. If a table is wider than `width` characters, the columns `drop` go,
    in this order, until it fits; if it does not, `wrap` folds the cells.
    """
    is_left, titles = [title[:1] == "<" for title in titles], [title.removeprefix("<") for title in titles]
    cells = [["-" if cell is None else strip_control_chars(str(cell)) for cell in row] for row in rows]
    widths = [max([len(title), *(cell_len(row[i]) for row in cells)]) for i, title in enumerate(titles)]
    shown, droppable = list(range(len(titles))), [titles.index(title) for title in drop if title in titles]
    while (is_wide := width is not None and sum(widths[i] + GAP for i in shown) - GAP > width) and droppable:
        shown.remove(droppable.pop(0))
    if is_wide and wrap:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0))
        for i in shown:
            table.add_column(Text(titles[i]), justify="left" if is_left[i] else "right", overflow="fold")
        for row in cells:
            table.add_row(*(Text(row[i]) for i in shown))
        console = Console(file=io.StringIO(), width=width, color_system=None)
        with console.capture() as capture:
            console.print(table)
        yield from (line.rstrip() for line in capture.get().splitlines())
        return
    for row in [titles, *cells]:  # rich takes two seconds for 2,000 rows
        padded = []
        for i in shown:
            blanks = " " * (widths[i] - cell_len(row[i]))
            padded.append(row[i] + blanks if is_left[i] else blanks + row[i])
        yield (" " * GAP).join(padded).rstrip()


def number_text(value: float | None, form: str = ".4f") -> str:
    """Return a number as a cell of a table; a dash for None."""
    return "-" if value is None else format(value, form)


def terminal_columns() -> int | None:
    """Return the width of the terminal on stdout; None if stdout is not a terminal."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None
