"""`tlcli data check`: planted faults are found and named, and nothing of the data changes."""

import csv
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.conftest import make_folder
from tlcli.cli import main
from tlcli.cli.completion import candidates

SMALL = ("backbone=efficientnet_lite0", "image.size=32", "device=cpu")
FILES = {"summary.json", "duplicates.csv", "labels.csv", "bad_files.csv", "contact_sheet.png"}
SWAPPED = (("train/across/003.png", "train/down/x003.png"), ("train/down/011.png", "train/checks/x011.png"))


def tree(root: Path) -> str:
    """Return a digest of all names, contents and modification times below a folder."""
    total = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        total.update(f"{path.relative_to(root)} {path.stat().st_mtime_ns}".encode())
        total.update(path.read_bytes() if path.is_file() else b"")
    return total.hexdigest()


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


class Checked:
    """A folder with planted faults, and what the command said of it."""

    def __init__(self, root: Path, output: Path) -> None:
        self.root, self.output = root, output

    def rows(self, name: str) -> list[dict[str, str]]:
        return rows(self.output / name)

    @property
    def summary(self) -> dict[str, Any]:
        return json.loads((self.output / "summary.json").read_text())

    def lines(self, kind: str) -> list[str]:
        return [line for one, line in self.summary["verdicts"] if one == kind]


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checked]:
    """Two labels are wrong, an image of test is in train, one of train is in test resized, one is no image."""
    folder = tmp_path_factory.mktemp("check")
    root, output = folder / "=photos", folder / "found"
    for split, n in (("train", 20), ("test", 8)):
        make_folder(root / split, {"across": n, "checks": n, "down": n}, seed=n)
    for source, target in SWAPPED:
        (root / source).rename(root / target)
    scene = Image.fromarray(np.random.default_rng(5).integers(0, 256, (12, 12, 3), dtype=np.uint8)).resize((96, 96))
    scene.save(root / "train/checks/scene.png")
    scene.resize((64, 64)).save(root / "test/checks/small.jpg", quality=70)
    shutil.copyfile(root / "train/across/001.png", root / "test/across/again.png")
    (root / "train/down/page.jpg").write_text("<html>not found</html>")
    (root / "train/down/list.txt").touch()
    before = tree(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        words = ["dataset=imagefolder", f"dataset.root='{root}'", "dataset.val_fraction=0.2", *SMALL]
        assert main(["data", "check", *words, "--output", str(output)]) == 0
    assert tree(root) == before, "something of the data was changed"
    assert {path.name for path in folder.iterdir()} == {"=photos", "found"}
    yield Checked(root, output)


def test_all_files_are_there(checked: Checked) -> None:
    assert {path.name for path in checked.output.iterdir()} == FILES
    with Image.open(checked.output / "contact_sheet.png") as sheet:
        assert min(sheet.size) > 200


def test_wrong_labels_are_named_first(checked: Checked) -> None:
    first = checked.rows("labels.csv")[:4]
    named = {Path(row["file"]).name: (row["label"], row["suggested"]) for row in first}
    assert named["x003.png"] == ("down", "across")
    assert named["x011.png"] == ("checks", "down")
    assert all(float(row["p_label"]) < float(row["p_suggested"]) for row in first)
    assert [row["rank"] for row in first] == [str(rank) for rank in range(1, len(first) + 1)]
    assert any("check contact_sheet.png" in line for line in checked.lines("look"))


def test_copies_across_splits_are_named(checked: Checked) -> None:
    exact = [row for row in checked.rows("duplicates.csv") if row["kind"] == "exact"]
    assert {Path(row["file"]).relative_to(checked.root).as_posix() for row in exact} == {
        "train/across/001.png",
        "test/across/again.png",
    }
    assert checked.summary["exact"]["test_in_train_or_val"] == 1
    assert checked.lines("fix")[1].startswith("1 of test also in train or val, byte for byte")


def test_a_resized_copy_is_a_near_duplicate(checked: Checked) -> None:
    near = [row for row in checked.rows("duplicates.csv") if row["kind"] == "near"]
    groups = [
        {Path(row["file"]).name for row in near if row["group"] == number} for number in {r["group"] for r in near}
    ]
    assert {"scene.png", "small.jpg"} in groups


def test_bad_files_have_reasons(checked: Checked) -> None:
    (row,) = checked.rows("bad_files.csv")
    assert (Path(row["file"]).name, row["reason"]) == ("page.jpg", "a web page, not an image")
    assert checked.lines("fix")[0].startswith("1 of the files do not decode")
    assert "files that are not images by their names are left out: .txt (1)" in checked.summary["notes"]


# -- quick, in an empty folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    make_folder(tmp_path / "photos", {"across": 12, "down": 40})
    return tmp_path / "photos"


def words(root: Path, *more: str) -> list[str]:
    return ["data", "check", "dataset=imagefolder", f"dataset.root={root}", *SMALL, "--quick", *more]


def test_a_sound_folder(photos: Path, tlcli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    ended = tlcli(*words(photos))
    assert (ended.code, ended.err) == (0, "")
    lines = ended.out.splitlines()
    assert lines[0].startswith("checked    imagefolder photos: 52 images")
    assert "good       nothing was found that has to be changed" in lines
    assert "class_weights=balanced" in " ".join(ended.out.split())
    assert max(map(len, lines)) <= 60
    assert "labels     not checked: left out (--quick)" in lines
    (output,) = (tmp_path / "outputs" / "data-check").glob("*/*")
    assert {path.name for path in output.iterdir()} == FILES - {"contact_sheet.png"}


def test_json_is_the_summary_alone(photos: Path, tlcli, tmp_path: Path) -> None:
    ended = tlcli(*words(photos, "--format", "json", "--output", "found"))
    assert json.loads(ended.out) == json.loads((tmp_path / "found" / "summary.json").read_text())


def test_faults_of_layout_are_told_together(photos: Path, tlcli) -> None:
    (photos / "empty").mkdir()
    make_folder(photos, {"Down": 2}, seed=9)
    ended = tlcli(*words(photos, "--format=json"))
    fixes = [line for kind, line in json.loads(ended.out)["verdicts"] if kind == "fix"]
    assert ended.code == 0
    assert fixes[0] == "empty: no images in this class; add some or remove the folder"
    assert fixes[1] == "classes 'Down' and 'down' differ only in case: rename one"


def test_labels_of_copies_that_differ(photos: Path, tlcli) -> None:
    shutil.copyfile(photos / "down/001.png", photos / "across/wrong.png")
    summary = json.loads(tlcli(*words(photos, "--format=json")).out)
    assert summary["exact"]["several_labels"] == 1
    assert any("several labels" in line for kind, line in summary["verdicts"] if kind == "fix")


def test_an_output_with_files_in_it_is_refused(photos: Path, tlcli, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    ended = tlcli(*words(photos, "--output", "full"))
    assert (ended.code, ended.out) == (2, "")
    assert "--output=full: already exists and is not empty" in ended.err
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]


def test_an_output_in_the_data_is_refused(photos: Path, tlcli) -> None:
    before = tree(photos)
    assert tlcli(*words(photos, "--output", f"{photos}/found")).code == 2
    assert tree(photos) == before


def test_nothing_is_left_where_the_check_fails(photos: Path, tlcli, tmp_path: Path) -> None:
    for path in photos.rglob("*.png"):
        path.write_bytes(b"")
    ended = tlcli(*words(photos))
    assert ended.code == 2
    assert ended.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["chek"], "action chek: choose from check. Did you mean 'check'?"),
        (["check", "--formt=json"], "unknown flag '--formt=json'. Did you mean '--format'?"),
        (["check", "--format", "xml"], "--format xml: choose from table, json"),
        (["check", "--output"], "--output: expected one argument"),
        (["check", "photos"], "not 'photos'. Did you mean 'dataset=imagefolder dataset.root=photos'?"),
        (["check", "-m", "seed=1,2"], "data check reads one dataset"),
        (["check", "dataset=imagefolder", "dataset.root=nowhere"], "nowhere: no such folder."),
        (["check", "datset=digits"], "Did you mean 'dataset'?"),
    ],
)
def test_usage_errors(argv: list[str], said: str, photos: Path, tlcli) -> None:
    ended = tlcli("data", *argv)
    assert (ended.code, ended.out) == (2, "")
    assert said in ended.err
    assert ended.err.count("\n") == 1


def test_help_has_two_examples(tlcli) -> None:
    for argv in ([], ["--help"], ["check", "--help"]):
        ended = tlcli("data", *argv)
        assert ended.code == 0
        assert ended.out.count("\n  tlcli data check ") == 2


def test_completion() -> None:
    assert candidates("tlcli data ") == ["check ", "--help ", "--quick ", "--output ", "--format "]
    assert "--quick " in candidates("tlcli data check --q")
    assert candidates("tlcli data check --format ") == ["table ", "json "]
    assert "dataset=imagefolder " in candidates("tlcli data check dataset=im")
