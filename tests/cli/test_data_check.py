"""`tlcli data check`: planted faults are found and named, and nothing of the data changes."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import make_folder
from tests.faults.refusals import untouched
from tlcli.cli import main

SMALL = ("backbone=efficientnet_lite0", "image.size=32", "device=cpu")
FILES = {"summary.json", "duplicates.csv", "labels.csv", "bad_files.csv", "contact_sheet.png"}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Check photos: two labels are wrong, test has an image of train and one resized, and one file is no image."""
    root = tmp_path_factory.mktemp("check") / "photos"
    for split, n in (("train", 16), ("test", 4)):
        make_folder(root / split, {"=across": n, "checks": n, "down": n}, seed=n)
    (root / "train/=across/003.png").rename(root / "train/down/x003.png")
    (root / "train/down/011.png").rename(root / "train/checks/x011.png")
    scene = Image.fromarray(np.random.default_rng(5).integers(0, 256, (12, 12, 3), dtype=np.uint8)).resize((96, 96))
    scene.save(root / "train/checks/scene.png")
    scene.resize((64, 64)).save(root / "test/checks/small.jpg", quality=70)
    shutil.copyfile(root / "train/=across/001.png", root / "test/=across/again.png")
    (root / "train/down/page.jpg").write_text("<html>not found</html>")
    (root / "train/down/list.txt").touch()
    words = ["dataset=imagefolder", f"dataset.root='{root}'", "dataset.val_fraction=0.2", *SMALL]
    with untouched(root):
        assert main(["data", "check", *words, "--output", str(root.parent / "found")]) == 0
    return root.parent / "found"


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_planted_faults_are_verdicts(found: Path) -> None:
    assert {path.name for path in found.iterdir()} == FILES
    with Image.open(found / "contact_sheet.png") as sheet:
        assert sum(n > 0 for n in sheet.convert("L").histogram()) > 200, "it shows no images"
    summary = json.loads((found / "summary.json").read_text())
    (fix_files, fix_test), look = ([t for kind, t in summary["verdicts"] if kind == k] for k in ("fix", "look"))
    assert fix_files.startswith("1 of the files do not decode")
    assert fix_test.startswith("1 of test also in train or val, byte for byte")
    assert fix_test.endswith("keep one of the copies (duplicates.csv)")
    assert any("check contact_sheet.png" in line for line in look)
    assert "left out, since they are no images of a class: .txt (1)" in summary["notes"]
    assert summary["exact"]["test_in_train_or_val"] == 1
    assert min(summary["seconds"].values()) >= 0
    (row,) = rows(found / "bad_files.csv")
    assert (Path(row["file"]).name, row["reason"]) == ("page.jpg", "not an image")


def test_wrong_labels_are_named_first(found: Path) -> None:
    first = rows(found / "labels.csv")[:4]
    named = {Path(row["file"]).name: (row["label"], row["suggested"]) for row in first}
    assert named["x003.png"] == ("down", "'=across")  # a spreadsheet would evaluate a cell that starts with =
    assert named["x011.png"] == ("checks", "down")
    assert all(float(row["p_label"]) < float(row["p_suggested"]) for row in first)
    assert [row["rank"] for row in first] == ["1", "2", "3", "4"][: len(first)]


def test_copies_are_named_by_group(found: Path) -> None:
    table = rows(found / "duplicates.csv")
    groups = {(row["kind"], row["group"]): set[str]() for row in table}
    for row in table:
        groups[row["kind"], row["group"]].add(Path(row["file"]).name)
    assert groups["exact", "1"] == {"001.png", "again.png"}
    assert ("near", {"scene.png", "small.jpg"}) in [(kind, names) for (kind, _), names in groups.items()]


# -- quick, in an empty folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    make_folder(tmp_path / "photos", {"across": 12, "down": 40}, side=8)
    return tmp_path / "photos"


def words(root: Path, *more: str) -> list[str]:
    return ["data", "check", "dataset=imagefolder", f"dataset.root={root}", *SMALL, "--quick", *more]


def test_a_sound_folder(photos: Path, tlcli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tlcli.cli.data_check.terminal_columns", lambda: 60)
    ended = tlcli(*words(photos))
    assert (ended.code, ended.err) == (0, "")
    lines = ended.out.splitlines()
    assert lines[0].startswith("checked    imagefolder photos: 52 images")
    assert "good       nothing was found that has to be changed" in lines
    assert "class_weights=balanced" in " ".join(ended.out.split())
    assert max(map(len, lines)) <= 60
    assert "labels     not checked: left out (--quick)" in lines
    assert [line.split() for line in lines[-2:]] == [["across", "9", "1", "2"], ["down", "29", "3", "8"]]
    (output,) = (tmp_path / "outputs" / "data-check").glob("*/*")
    assert {path.name for path in output.iterdir()} == FILES - {"contact_sheet.png"}


def test_faults_of_layout_and_labels_are_told_together(photos: Path, tlcli, tmp_path: Path) -> None:
    (photos / "empty").mkdir()
    make_folder(photos, {"Down": 2}, seed=9)
    make_folder(photos, {"up": 3}, seed=10)
    shutil.copyfile(photos / "up/001.png", photos / "across/wrong.png")
    ended = tlcli(*words(photos, "--format=json", "--output", "found"))
    summary = json.loads(ended.out)
    assert summary == json.loads((tmp_path / "found" / "summary.json").read_text())
    fixes = [line for kind, line in summary["verdicts"] if kind == "fix"]
    assert ended.code == 0
    assert fixes[0].startswith("empty: no images in this class; add some, remove the folder, or name the others in")
    assert fixes[1] == "classes 'Down' and 'down' differ only in case or in how accents are encoded: rename one"
    assert fixes[-1].startswith("1 groups of exact duplicates have several labels")


def test_an_output_with_files_or_in_the_data_is_refused(photos: Path, tlcli, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "labels.csv").write_text("mine")
    with untouched(tmp_path):
        for folder, said in (("full", "already exists and is not empty"), (photos / "found", "is inside the dataset")):
            ended = tlcli(*words(photos, "--output", str(folder)))
            assert (ended.code, ended.out) == (2, "")
            assert said in ended.err


def test_nothing_is_left_when_the_check_fails(photos: Path, tlcli, tmp_path: Path) -> None:
    for path in photos.rglob("*.png"):
        path.write_bytes(b"")
    ended = tlcli(*words(photos))
    assert ended.code == 2
    assert ended.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_help_has_two_examples(tlcli) -> None:
    for argv in ([], ["check", "--help"]):
        assert tlcli("data", *argv).out.count("\n  tlcli data check ") == 2
