"""Text from other people's files, on its way into a spreadsheet or onto a terminal."""

import unicodedata

FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""What a spreadsheet takes for the start of a formula."""


def neutral(cell: object) -> object:
    """A CSV cell that no spreadsheet takes for a formula: text that begins like one gets an apostrophe in front."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(FORMULA) else cell


def plain(text: str) -> str:
    """Without what would move a terminal's cursor or colour it."""
    if text.isprintable():
        return text
    return "".join(c if unicodedata.category(c)[0] != "C" else "\N{REPLACEMENT CHARACTER}" for c in text)
