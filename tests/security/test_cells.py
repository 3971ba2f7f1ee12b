"""Words of other people's files in CSV that a spreadsheet opens: no cell is one that it takes for a formula."""

import csv
import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import tlcli
from tests.conftest import make_folder
from tlcli.cli import main
from tlcli.models.tensorfile import CHECKSUM
from tlcli.runs import leaderboard
from tlcli.runs.run_dir import RunDir
from tlcli.text import csv_line

PACKAGE = Path(tlcli.__file__).parent
FORMULAS = (
    "=1+1",
    "+1",
    "-1+cmd|' /C calc'!A0",
    "@SUM(A1)",
    "\tx",
    "\r=x",
    "a\r=x",
    "a\n=x",
    'a",=x',
    '=HYPERLINK("http://x","y")',
)
STARTS = ("=", "+", "-", "@", "\t", "\r")


def rows(text: str) -> list[list[str]]:
    return list(csv.reader(io.StringIO(text, newline="")))


def bad_files_of_a_run(folder: Path) -> str:
    run = RunDir(folder)
    run.write_bad_files([(cell, cell) for cell in FORMULAS])
    return run.bad_files_file.read_bytes().decode()


def leaderboard_of_a_sweep(folder: Path) -> str:
    """Jobs in folders of such names, with such overrides, which failed with such errors."""
    for number, cell in enumerate(FORMULAS):
        name = cell.replace("/", "").strip() if number % 2 else str(number)
        run = RunDir(folder / name)
        run.start(command=cell, overrides=[f"name={cell}", f"{cell.strip()}key={cell}"], config="")
        run.end("failed", cell)
    leaderboard.write(folder)
    return (folder / "leaderboard.csv").read_bytes().decode()


WRITERS: dict[str, Callable[[Path], str]] = {
    "runs/run_dir.py": bad_files_of_a_run,
    "runs/leaderboard.py": leaderboard_of_a_sweep,
}
"""Makes each module write such words to a file."""


def test_csv_is_written_in_one_place() -> None:
    modules = {p.name for p in PACKAGE.rglob("*.py") if re.search(r"csv\.(Dict)?[wW]riter\(", p.read_text("utf-8"))}
    assert modules == {"text.py"}


def safe(text: str) -> None:
    cells = [cell for row in rows(text) for cell in row]
    assert [cell for cell in cells if cell.startswith(STARTS)] == []
    assert "'=1+1" in cells


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_no_cell_of_a_file_is_a_formula(write: Callable[[Path], str], tmp_path: Path) -> None:
    safe(write(tmp_path))


def test_no_cell_of_a_list_is_a_formula(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, cell in enumerate(FORMULAS):
        run = RunDir(tmp_path / str(number))
        run.start(command=cell, overrides=[f"dataset.root={cell}"], config="")
        run.update(name=cell, dataset=cell, backbone=cell, freeze=cell, keep_best=cell)
        run.end(cell, cell)
    leaderboard_of_a_sweep(tmp_path / "=1+1")
    capsys.readouterr()
    assert main(["list", str(tmp_path), "--jobs", "--format", "csv"]) == 0
    safe(capsys.readouterr().out)


def test_no_cell_of_predictions_is_a_formula(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with safe_open(run.best_checkpoint, framework="pt") as content:
        facts = json.loads(content.metadata()["tlcli"])
    del facts[CHECKSUM]
    facts["classes"] = ["=1+1", "@SUM(A1)", "-1"]
    save_file(load_file(run.best_checkpoint), run.best_checkpoint, metadata={"tlcli": json.dumps(facts)})
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path, {"=a": 1, "+b": 1})
    (tmp_path / "@c.png").write_bytes(b"no image")
    capsys.readouterr()
    words = ["=a/000.png", "+b/000.png", "@c.png", "--top", "3", "--format", "csv"]
    assert main(["predict", str(run.path), *words]) == 1
    safe(capsys.readouterr().out)


@pytest.mark.parametrize("cell", [*FORMULAS, "", "a=1", "1-1", "photo.jpg", 7, -1.5])
def test_a_cell_keeps_its_words(cell: object) -> None:
    """An apostrophe in front is what spreadsheets themselves write before text, and shows nothing."""
    ((read,),) = rows(csv_line([cell]))
    assert read == (f"'{cell}" if isinstance(cell, str) and cell.startswith(STARTS) else str(cell))
