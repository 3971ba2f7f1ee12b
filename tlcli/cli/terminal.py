"""How wide the output is."""

import shutil
import sys

WHOLE_LINES = 10_000
"""The width where there is no terminal: what reads a pipe wants a line for each row."""


def terminal_columns() -> int | None:
    """The width of the terminal on stdout; None where that is none."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None
