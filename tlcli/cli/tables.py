"""Old names, for commands that do not use `make_table` yet."""

from rich.table import Table

from tlcli.cli.table import TableColumn, make_table
from tlcli.text import duration_text as duration
from tlcli.text import labelled, shown_path

__all__ = ["duration", "figures_table", "labelled", "shown_path"]


def figures_table(name: str, *figures: str) -> Table:
    """Return a table without rows: names on the left and figures, aligned to the right."""
    return make_table([TableColumn(name, left=True), *map(TableColumn, figures)], [])
