"""`tlcli predict`: what it writes in each format, how it ends, and what it refuses."""

import csv
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Ended
from tests.conftest import finish
from tlcli.cli import main
from tlcli.cli.completion import candidates


@pytest.fixture(scope="module")
def run(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the directory of a finished run on the shapes."""
    words = ["dataset=imagefolder", f"dataset.root='{shapes}'", "image.size=32", "epochs=1", "freeze=head"]
    words += ["backbone=resnet18", "backbone.weights=none", "device.precision=fp32"]
    return str(finish(tmp_path_factory.mktemp("runs") / "run", *words))


@pytest.fixture
def photos(tmp_path: Path, shapes: Path) -> Path:
    """Two images and a hidden one."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for name in ("a.png", ".b.png", "more/c.png"):
        shutil.copy(shapes / "test/checks/000.png", folder / name)
    return folder


def lines(ended: Ended) -> list[dict[str, object]]:
    return [json.loads(line) for line in ended.out.splitlines()]


def test_a_pipe_gets_an_object_a_line(tlcli: Callable[..., Ended], run: str, photos: Path) -> None:
    ended = tlcli("predict", run, "photos")
    assert (ended.code, ended.err) == (0, "")
    rows = lines(ended)
    assert [row["path"] for row in rows] == ["photos/a.png", "photos/more/c.png"]
    assert rows[0].keys() == {"path", "prediction", "probability", "top"}
    top = rows[0]["top"]
    assert isinstance(top, list)
    assert [rows[0]["prediction"], rows[0]["probability"]] == top[0]
    assert sum(value for _, value in top) == pytest.approx(1, abs=1e-6)
    assert {name for name, _ in top} == {"across", "checks", "down"}


def test_a_bad_file_is_a_row_and_the_exit_code(tlcli: Callable[..., Ended], run: str, photos: Path) -> None:
    (photos / "=1+1.png").write_bytes(b"no image")
    ended = tlcli("predict", run, "photos", "missing.jpg", "--top", "1")
    assert ended.code == 1
    assert lines(ended)[0] == {"path": "photos/=1+1.png", "error": "not an image"}
    assert lines(ended)[3] == {"path": "missing.jpg", "error": "no such file or directory"}
    assert [len(row["top"]) for row in lines(ended)[1:3]] == [1, 1]  # type: ignore[arg-type]
    assert ended.err == "tlcli predict: 2 of 4 have no prediction: see their errors\n"


def test_csv_has_a_header_and_no_formulas(
    tlcli: Callable[..., Ended], run: str, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (photos / "=1+1.png").write_bytes(b"no image")
    monkeypatch.chdir(photos)
    file = photos / "found.csv"
    assert main(["predict", run, "=1+1.png", "a.png", "--format=csv", "--top", "2", f"--output={file}"]) == 1
    rows = list(csv.DictReader(io.StringIO(file.read_text(encoding="utf-8"))))
    assert list(rows[0]) == ["path", "prediction", "probability", "class_2", "probability_2", "error"]
    assert rows[0]["path"] == "'=1+1.png"
    assert rows[0]["error"] == "not an image"
    assert float(rows[1]["probability"]) >= float(rows[1]["probability_2"]) > 0


@pytest.mark.parametrize("width", [40, 100])
def test_a_table_fits_a_terminal(run: str, photos: Path, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.chdir(photos.parent)
    (photos / ("x" * 90 + ".png")).write_bytes((photos / "a.png").read_bytes())
    (photos / "esc\x1b[31m.png").write_bytes((photos / "a.png").read_bytes())
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert main(["predict", run, "photos", "--top", "1"]) == 0
    shown = sys.stdout.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, shown.splitlines())) <= width
    assert "\x1b" not in shown
    assert "checks" in shown or "down" in shown or "across" in shown


def test_a_list_on_stdin(tlcli: Callable[..., Ended], run: str, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (photos / "[1].png").write_bytes((photos / "a.png").read_bytes())
    names = b"photos/a.png\r\n\nphotos/[1].png\nphotos/more\nphotos/*.png\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(names)))
    ended = tlcli("predict", run, "-", "photos/a.png")
    assert ended.code == 1  # a name with a star in it is a name: a list has no patterns
    assert [row["path"] for row in lines(ended)] == [
        "photos/a.png", "photos/[1].png", "photos/more/c.png", "photos/*.png", "photos/a.png",
    ]  # fmt: skip


def test_a_file_that_is_there_is_not_written_to(tlcli: Callable[..., Ended], run: str, photos: Path) -> None:
    (photos / "mine.csv").write_text("mine")
    ended = tlcli("predict", run, "photos", "--output", "photos/mine.csv")
    assert ended.code == 2
    assert "photos/mine.csv: already exists" in ended.err
    assert (photos / "mine.csv").read_text() == "mine"


def test_a_failure_leaves_no_empty_file(tlcli: Callable[..., Ended], photos: Path) -> None:
    ended = tlcli("predict", "nowhere", "photos", "--output", "new.jsonl")
    assert ended.code == 2
    assert ended.err == "tlcli predict: nowhere: no such run directory.\n"
    assert not Path("new.jsonl").exists()


@pytest.mark.parametrize(
    "words, message",
    [
        (["r"], "the following arguments are required: PATH"),
        (["--top", "3"], "the following arguments are required: RUN, PATH"),
        (["r", "x", "--tpo", "3"], "Did you mean '--top'"),
        (["r", "x", "--top"], "--top: expected one argument"),
        (["r", "x", "--top", "0"], "--top: must be a whole number from 1, not '0'"),
        (["r", "x", "--batch-size=many"], "--batch-size: must be a whole number from 1"),
        (["r", "x", "--format", "jsn"], "choose from table, csv, jsonl"),
        (["r", "x", "--checkpoint", "first"], "choose from best, last"),
        (["r", "-", "-"], "stdin (-) is named twice"),
    ],
)
def test_usage_errors_are_one_line_at_once(tlcli: Callable[..., Ended], words: list[str], message: str) -> None:
    ended = tlcli("predict", *words)
    assert ended.code == 2
    assert message in ended.err
    assert ended.err.count("\n") == 1


def test_completion(tlcli: Callable[..., Ended]) -> None:
    Path("outputs/2026-01-01/10-00-00").mkdir(parents=True)
    Path("outputs/2026-01-01/10-00-00/run.json").write_text("{}")
    assert candidates("tlcli predict ou") == ["outputs/2026-01-01/10-00-00 "]
    assert candidates("tlcli predict outputs/x a.jpg --pre") == ["--precision "]
    assert candidates("tlcli predict outputs/x a.jpg --format c") == ["csv "]


def test_a_reader_that_leaves_ends_it_quietly(run: str, photos: Path) -> None:
    command = [sys.executable, "-m", "tlcli", "predict", run, "-"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as process:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        names = f"{photos / 'a.png'}\n".encode() * 2000
        os.set_blocking(process.stdin.fileno(), True)
        process.stdin.write(names[: 2**15])
        process.stdin.flush()
        process.stdin.close()
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 1
