"""`tlcli predict`: what it writes in each format, how it ends, and what it refuses."""

import csv
import io
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image

from tests.cli.conftest import Ended, Tlcli
from tlcli.cli import main
from tlcli.errors import TlcliError
from tlcli.predict import Prediction, Predictor
from tlcli.runs.load import LoadedRun


@pytest.fixture(scope="module")
def run(trained: Callable[..., Path]) -> str:
    return str(trained("head", "fp32"))


@pytest.fixture
def photos(tmp_path: Path, shapes: Path) -> Path:
    """Two images and a hidden one."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for name in ("a.png", ".b.png", "more/c.png"):
        shutil.copy(shapes / "test/checks/000.png", folder / name)
    return folder


def lines(ended: Ended) -> list[dict[str, Any]]:
    return [json.loads(line) for line in ended.out.splitlines()]


def test_a_pipe_gets_one_object_per_line(tlcli: Tlcli, run: str, photos: Path) -> None:
    ended = tlcli("predict", run, "photos")
    assert (ended.code, ended.err) == (0, "")
    rows = lines(ended)
    assert [row["path"] for row in rows] == ["photos/a.png", "photos/more/c.png"]
    assert rows[0].keys() == {"path", "prediction", "probability", "top", "unknown_score", "unknown"}
    top = rows[0]["top"]
    assert [rows[0]["prediction"], rows[0]["probability"]] == top[0]
    assert sum(value for _, value in top) == pytest.approx(1, abs=1e-6)
    assert {name for name, _ in top} == {"across", "checks", "down"}


def test_a_bad_file_is_a_row_and_the_exit_code(tlcli: Tlcli, run: str, photos: Path) -> None:
    (photos / "=1+1.png").write_bytes(b"no image")
    ended = tlcli("predict", run, "photos", "missing.jpg", "--top", "1")
    assert (ended.code, ended.err) == (1, "tlcli predict: 2 of 4 have no prediction: see their errors\n")
    first, *others, last = lines(ended)
    assert first == {"path": "photos/=1+1.png", "error": "not an image"}
    assert last == {"path": "missing.jpg", "error": "no such file or directory"}
    assert [len(row["top"]) for row in others] == [1, 1]


def test_csv_has_a_header_and_no_formulas(run: str, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (photos / "=1+1.png").write_bytes(b"no image")
    monkeypatch.chdir(photos)
    assert main(["predict", run, "=1+1.png", "a.png", "--format=csv", "--top", "2", "--output=found.csv"]) == 1
    bad, good = csv.DictReader(io.StringIO(Path("found.csv").read_text(encoding="utf-8")))
    columns = "path,prediction,probability,class_2,probability_2,unknown_score,unknown,error"
    assert ",".join(bad) == columns
    assert (bad["path"], bad["error"]) == ("'=1+1.png", "not an image")
    assert float(good["probability"]) >= float(good["probability_2"]) > 0


class Terminal(io.StringIO):
    """A stdout that says that it is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("width", [40, 100])
def test_a_table_fits_a_terminal(run: str, photos: Path, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.chdir(photos.parent)
    for name in ("x" * 90 + ".png", "esc\x1b[31m.png"):
        shutil.copy(photos / "a.png", photos / name)
    monkeypatch.setattr(sys, "stdout", stdout := Terminal())
    assert main(["predict", run, "photos", "--top", "1"]) == 0
    shown = stdout.getvalue()
    assert max(map(len, shown.splitlines())) <= width
    assert "\x1b" not in shown
    assert "checks" in shown or "down" in shown or "across" in shown


def test_the_bar_is_gone_before_the_table(run: str, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    monkeypatch.setattr(sys, "stderr", terminal)
    assert main(["predict", run, str(photos)]) == 0
    before, header, _ = terminal.getvalue().partition("image ")
    assert header and "predicting" in before
    assert before.endswith("\x1b[?25h\r")  # the cursor is shown again, at the start of a line


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_the_rows_so_far(number, code: int, tlcli: Tlcli, run: str, photos: Path, monkeypatch) -> None:
    predict = Predictor.predict

    def interrupted(*args: Any, **options: Any) -> Iterator[Prediction]:
        yield from islice(predict(*args, **options), 1)
        os.kill(os.getpid(), number)

    monkeypatch.setattr(Predictor, "predict", interrupted)
    ended = tlcli("predict", run, "photos", "--format=table")
    assert ended.code == code
    assert [line.split()[0] for line in ended.out.splitlines()] == ["image", "photos/a.png"]


def test_a_list_on_stdin(tlcli: Tlcli, run: str, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(photos / "a.png", photos / "[1].png")
    names = b"photos/a.png\r\n\nphotos/[1].png\nphotos/more\nphotos/*.png\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(names)))
    ended = tlcli("predict", run, "-", "photos/a.png")
    assert ended.code == 1  # a name with a star in it is a name: a list has no patterns
    assert [row["path"] for row in lines(ended)] == [
        "photos/a.png", "photos/[1].png", "photos/more/c.png", "photos/*.png", "photos/a.png",
    ]  # fmt: skip


def test_a_file_that_exists_is_not_written_to(tlcli: Tlcli, run: str, photos: Path) -> None:
    (photos / "mine.csv").write_text("mine")
    ended = tlcli("predict", run, "photos", "--output", "photos/mine.csv")
    assert (ended.code, "photos/mine.csv: already exists" in ended.err) == (2, True)
    assert (photos / "mine.csv").read_text() == "mine"


@pytest.mark.parametrize(("form", "first"), [("csv", "path"), ("jsonl", "")])
def test_an_empty_list_makes_a_file_and_a_failure_none(tlcli, run, form, first, tmp_path, monkeypatch) -> None:
    def fail(*args: Any, **options: Any) -> Iterator[Prediction]:
        raise KeyboardInterrupt

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    words = ("predict", run, "-", f"--format={form}")
    assert tlcli(*words, "--output=~/all").code == 0
    assert Path("all").read_text(encoding="utf-8").partition(",")[0] == first
    monkeypatch.setattr(Predictor, "predict", fail)
    assert (tlcli(*words, "--output=none").code, Path("none").exists()) == (130, False)


def test_a_reader_that_leaves_ends_it_quietly(run: str, photos: Path, monkeypatch, capsys) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(sys, "stdout", os.fdopen(writer, "w"))
    assert main(["predict", run, str(photos)]) == 1
    sys.stdout.close()  # as Python does at exit: nothing is left that it could not write
    assert capsys.readouterr().err == ""


def test_heat_maps_are_a_file_per_image_also_if_names_are_equal(tlcli: Tlcli, run: str, photos: Path) -> None:
    for name in ("more/a.png", "a.bmp", "a-2.png"):
        Image.open(photos / "more/c.png").save(photos / name)
    (photos / "bad.png").write_bytes(b"no image")
    ended = tlcli("predict", run, "photos", "--heatmaps", "out/maps")
    rows = lines(ended)
    files = [row["heatmap"] for row in rows if "error" not in row]
    assert (ended.code, len(rows), len(set(files))) == (1, 6, 5)
    assert sorted(map(str, Path("out/maps").iterdir())) == sorted(files)
    for row in rows:
        if "error" not in row:
            assert Path(row["heatmap"]).name.startswith(Path(row["path"]).stem)
            drawn = np.asarray(Image.open(row["heatmap"])).astype(int)
            assert drawn.shape == (32, 32, 3) and (drawn[..., 0] - drawn[..., 2]).max() > 60
    ended = tlcli("predict", run, "photos/a.png", "--heatmaps=more", "--format=csv", "--top=1")
    assert ended.out.splitlines()[0] == "path,prediction,probability,unknown_score,unknown,heatmap,error"
    assert ended.out.splitlines()[1].endswith(",more/a.jpg,")


def test_heat_maps_are_not_classified_in_a_folder_of_images(tlcli: Tlcli, run: str, photos: Path) -> None:
    for name in ("b", "c", "d"):  # the maps are listed after them, when there are some
        shutil.copy(photos / "a.png", photos / f"{name}.png")
    ended = tlcli("predict", run, "photos", "--heatmaps", "photos/maps", "--batch-size=1")
    assert [row["path"] for row in lines(ended)] == [f"photos/{name}.png" for name in ("a", "b", "c", "d", "more/c")]


def test_a_network_that_has_no_heat_maps_is_refused(tlcli: Tlcli, run: str, photos: Path, monkeypatch) -> None:
    monkeypatch.setattr(LoadedRun, "explain", Mock(side_effect=TlcliError("no heat map: no grid")))
    ended = tlcli("predict", run, "photos", "--heatmaps", "maps")
    assert (ended.code, ended.err) == (2, "tlcli predict: --heatmaps: no heat map: no grid; leave it out\n")
    assert not Path("maps").exists()


def test_heat_maps_go_into_a_new_folder(tlcli: Tlcli, run: str, photos: Path) -> None:
    before = {path: path.read_bytes() for path in photos.rglob("*.png")}
    ended = tlcli("predict", run, "photos", "--heatmaps", "photos")
    assert (ended.code, ended.err) == (2, "tlcli predict: --heatmaps photos: already exists; choose another folder\n")
    assert {path: path.read_bytes() for path in photos.rglob("*.*") if path.is_file()} == before
    (photos / "bad.png").write_bytes(b"no image")
    assert tlcli("predict", run, "photos/bad.png", "--heatmaps", "maps").code == 1
    assert not Path("maps").exists()


def test_reject_answers_unknown_above_the_threshold(tlcli: Tlcli, run: str, photos, tmp_path, monkeypatch) -> None:
    own = tmp_path / "run"
    shutil.copytree(run, own)
    info = json.loads((own / "run.json").read_text())
    images = ("photos/a.png", "photos/noise.png")
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(photos / "noise.png")
    scores = [row["unknown_score"] for row in lines(tlcli("predict", str(own), *images))]
    for threshold, unknown in ((max(scores), [False, False]), (np.mean(scores), [s > np.mean(scores) for s in scores])):
        (own / "run.json").write_text(json.dumps(info | {"unknown": {"threshold": float(threshold)}}))
        plain, rejected = (lines(tlcli("predict", str(own), *images, *flag)) for flag in ((), ("--reject",)))
        assert [row["unknown"] for row in plain] == unknown
        assert [row["prediction"] == "unknown" for row in rejected] == unknown
        assert all(row["prediction"] == row["top"][0][0] for row in plain)
        assert [row["probability"] is None for row in rejected] == unknown
        table = [*csv.DictReader(io.StringIO(tlcli("predict", str(own), *images, "--reject", "--format=csv").out))]
        assert [row["probability"] == "" for row in table] == unknown
        found = [[row["class_1"], float(row["probability_1"])] for row in table]
        assert found == [row["top"][0] for row in rejected], "the most likely class, also of a rejected image"
    monkeypatch.setattr(sys, "stdout", stdout := Terminal())
    assert main(["predict", str(own), *images, "--reject"]) == 0
    assert len([line for line in stdout.getvalue().splitlines() if " unknown " in line]) == 1
    others: list[tuple[dict[str, Any], str, str]] = [
        ({"unknown": None}, "best", "held out fewer than 100 images; train with"),
        ({"best": {"epoch": 99}, "unknown": {"threshold": 1.0}}, "last", "leave out --checkpoint last"),
    ]
    for changed, checkpoint, reason in others:
        (own / "run.json").write_text(json.dumps(info | changed))
        ended = tlcli("predict", str(own), *images, "--reject", "--checkpoint", checkpoint)
        assert ended.code == 2 and ended.err.count("\n") == 1 and reason in ended.err
    (own / "run.json").write_text(json.dumps(info | {"unknown": {"threshold": 1.0}}))
    (own / "unknown.safetensors").unlink()
    assert "unknown.safetensors, which is missing" in tlcli("predict", str(own), *images, "--reject").err
