"""Words of other people's files in CSV that a spreadsheet opens: no cell is one that it takes for a formula."""

import csv
import io
from pathlib import Path

import pytest

from tlcli.cli import main
from tlcli.runs import leaderboard
from tlcli.runs.run_dir import RunDir
from tlcli.text import csv_line

FORMULAS = (
    *("=1+1", "+1", "-1+cmd|' /C calc'!A0", "@SUM(A1)", "\tx", "\r=x", "a\r=x", "a\n=x", 'a",=x'),
    '=HYPERLINK("http://x","y")',
)
STARTS = ("=", "+", "-", "@", "\t", "\r")


def test_no_cell_of_a_run_a_sweep_or_a_list_is_a_formula(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Jobs in folders of such names, with such overrides and facts, which failed with such errors."""
    for number, cell in enumerate(FORMULAS):
        run = RunDir(tmp_path / (cell.replace("/", "").strip() if number % 2 else str(number)))
        run.start(command=cell, overrides=[f"name={cell}", f"{cell.strip()}key={cell}"], config="")
        run.update(name=cell, dataset=cell, backbone=cell, freeze=cell, keep_best=cell)
        run.end("failed", cell)
        run.write_bad_files([(cell, cell)])
    leaderboard.write(tmp_path)
    capsys.readouterr()
    assert main(["list", str(tmp_path), "--jobs", "--format", "csv"]) == 0
    bad_files = "".join(file.read_bytes().decode() for file in sorted(tmp_path.glob("*/bad_files.csv")))
    for text in (bad_files, (tmp_path / "leaderboard.csv").read_bytes().decode(), capsys.readouterr().out):
        cells = [cell for row in csv.reader(io.StringIO(text, newline="")) for cell in row]
        assert [cell for cell in cells if cell.startswith(STARTS)] == []
        assert "'=1+1" in cells


@pytest.mark.parametrize("cell", [*FORMULAS, "", "a=1", "1-1", "photo.jpg", 7, -1.5])
def test_a_cell_keeps_its_words(cell: object) -> None:
    """An apostrophe in front is what spreadsheets themselves write before text, and shows nothing."""
    ((read,),) = csv.reader(io.StringIO(csv_line([cell]), newline=""))
    assert read == (f"'{cell}" if isinstance(cell, str) and cell.startswith(STARTS) else str(cell))
