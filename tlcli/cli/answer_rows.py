"""The rows of `tlcli predict`: a table, CSV, or a JSON object a line."""

import json
import shutil
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TextIO

from rich.cells import cell_len, set_cell_size

from tlcli.text import csv_line, strip_control_chars

if TYPE_CHECKING:
    from tlcli.predict import Answer

LEAST_PATH, WIDEST_PATH, WIDEST_CLASS = 16, 40, 24  # columns
DIGITS = 8  # of a probability, after the point


class Rows:
    """Writes an answer a row, at once."""

    def __init__(self, file: TextIO, top: int, classes: Sequence[str]) -> None:
        self.file, self.top, self.classes = file, top, classes
        self.begin()

    def begin(self) -> None:
        """What comes before the first row."""

    def line(self, answer: "Answer") -> str:
        """One row with its line break."""
        raise NotImplementedError

    def add(self, answer: "Answer") -> None:
        """Write a row; whoever reads the pipe has it now."""
        self.file.write(self.line(answer))
        self.file.flush()


class JsonLines(Rows):
    """A JSON object a line, in ASCII: what is no UTF-8 in a path stays what it is."""

    def line(self, answer: "Answer") -> str:
        row: dict[str, Any] = {"path": answer.path}
        if answer.error is not None:
            row["error"] = answer.error
        else:
            top = [[name, round(value, DIGITS)] for name, value in answer.top]
            row |= {"prediction": top[0][0], "probability": top[0][1], "top": top}
        return json.dumps(row) + "\n"


class Csv(Rows):
    """CSV with a header; no cell is one that a spreadsheet would take for a formula."""

    def begin(self) -> None:
        if hasattr(self.file, "reconfigure"):
            self.file.reconfigure(encoding="utf-8", errors="surrogateescape", newline="")
        more = [word for n in range(2, self.top + 1) for word in (f"class_{n}", f"probability_{n}")]
        self.file.write(csv_line(["path", "prediction", "probability", *more, "error"]))

    def line(self, answer: "Answer") -> str:
        cells = [cell for name, value in answer.top for cell in (name, round(value, DIGITS))]
        cells += [""] * (2 * self.top - len(cells))
        return csv_line([answer.path, *cells, answer.error or ""])


class Table(Rows):
    """Columns for people: on a terminal within its width, elsewhere with nothing left out."""

    def begin(self) -> None:
        widest = max(cell_len(strip_control_chars(name)) for name in self.classes)
        self._class = min(widest, WIDEST_CLASS) if self.file.isatty() else widest
        self._class = max(self._class, len("prediction"))
        self._width = shutil.get_terminal_size().columns if self.file.isatty() else None
        room = WIDEST_PATH if self._width is None else self._width - self._class - len("  0.000  ")
        self._path = max(LEAST_PATH, min(WIDEST_PATH, room))
        self.file.write(self._row("image", "prediction", "prob.", "then" if self.top > 1 else ""))

    def line(self, answer: "Answer") -> str:
        path = strip_control_chars(answer.path)
        if answer.error is not None:
            return f"{self._fitted(path, self._path, keep_end=True)}  error: {strip_control_chars(answer.error)}\n"
        (name, value), *others = answer.top
        then = ", ".join(f"{strip_control_chars(other)} {its:.3f}" for other, its in others)
        return self._row(path, strip_control_chars(name), f"{value:.3f}", then)

    def _row(self, path: str, name: str, value: str, then: str) -> str:
        path, name = self._fitted(path, self._path, keep_end=True), self._fitted(name, self._class)
        start = f"{path}  {name}  {value:<5}  "
        if self._width is not None and cell_len(start + then) > self._width:
            then = chop(then, self._width - cell_len(start))
        return f"{start}{then}".rstrip() + "\n"

    def _fitted(self, text: str, width: int, keep_end: bool = False) -> str:
        """The text, filled up with blanks; on a terminal shortened to the width, of a path the end kept."""
        if self._width is not None and cell_len(text) > width:
            text = chop(text[::-1], width)[::-1] if keep_end else chop(text, width)
        return text + " " * (width - cell_len(text))


def chop(text: str, width: int) -> str:
    """The text in so many columns of a terminal, with a sign at its end that something is left out."""
    return set_cell_size(text, max(0, width - 1)).rstrip() + "\N{HORIZONTAL ELLIPSIS}" if width > 0 else ""


ROWS: dict[str, type[Rows]] = {"table": Table, "csv": Csv, "jsonl": JsonLines}
