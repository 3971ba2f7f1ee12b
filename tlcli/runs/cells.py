"""Text from other people's files, on its way into a spreadsheet or onto a terminal."""

import csv
import io
import unicodedata
from collections.abc import Iterable

FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""What a spreadsheet takes for the start of a formula."""


def neutral(cell: object) -> object:
    """A CSV cell that no spreadsheet takes for a formula: text that begins like one gets an apostrophe in front."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(FORMULA) else cell


def csv_line(cells: Iterable[object]) -> str:
    """A line of CSV with its end, of which no cell is a formula, nor any part of a cell behind a line break in it."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\r\n").writerow(
        [neutral(cell) for cell in cells]
    )  # it quotes what has a part of this
    return text.getvalue().removesuffix("\r\n") + "\n"


def plain(text: str) -> str:
    """Without what would move a terminal's cursor or colour it."""
    if text.isprintable():
        return text
    return "".join(c if unicodedata.category(c)[0] != "C" else "\N{REPLACEMENT CHARACTER}" for c in text)
