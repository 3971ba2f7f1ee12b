"""`tlcli embed` and `tlcli similar`: what they write and list, and what they refuse."""

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from tests.cli.conftest import Tlcli
from tlcli.cli.embed import vectors_of
from tlcli.embed import Embedder
from tlcli.engine.extraction import BATCH
from tlcli.reporter import Reporter

Trained = Callable[..., Path]


@pytest.fixture
def photos(tmp_path: Path, shapes: Path) -> Path:
    """Eight images of a class of the run and of another, and a file that is not an image."""
    shutil.copytree(shapes / "test/down", tmp_path / "photos/down")
    shutil.copytree(shapes / "test/across", tmp_path / "photos/other")
    (tmp_path / "photos/bad.png").write_text("x")
    return tmp_path / "photos"


def test_the_command_writes_what_it_says(tlcli: Tlcli, trained: Trained, photos: Path) -> None:
    run = str(trained("head", "fp32"))
    ended = tlcli("embed", run, "photos", "none.png", "--to", "f.npz", "--plot", "map.html")
    assert ended.code == 1
    assert ended.err.splitlines()[-3:] == [
        "photos/bad.png: not an image", "none.png: no such file or directory",
        "tlcli embed: 2 of 18 could not be read",
    ]  # fmt: skip
    assert "16 vectors of 256 numbers, 8 of them with a label" in ended.out
    with np.load("f.npz") as file:
        assert sorted(set(file["label"])) == ["", "down"] and len(file["path"]) == 16
    assert "16 images" in Path("map.html").read_text(encoding="utf-8")
    again = tlcli("embed", run, "photos", "--to", "f.npz")
    assert (again.code, "--force" in again.err) == (2, True)
    assert "of them with a label" in tlcli("embed", run, "photos/other", "--to", "f.npz", "--force").out
    bad = tlcli("embed", run, "photos/bad.png", "--to", "g.npz")
    assert (bad.code, bad.err.splitlines()[-1]) == (
        1, "tlcli embed: nothing was written: no image could be read"
    )  # fmt: skip
    assert not Path("g.npz").exists()


def test_a_label_is_the_folder_of_an_image_however_it_is_named(tlcli: Tlcli, trained: Trained, photos, monkeypatch):
    run = str(trained("head", "fp32"))
    monkeypatch.chdir(photos / "down")
    names = [path.name for path in Path().glob("*.png")][:2]
    (photos / "down/inner").mkdir()
    for folder, paths in ((Path(), names), (Path("inner"), [f"../{name}" for name in names])):
        monkeypatch.chdir(photos / "down" / folder)
        assert tlcli("embed", run, *paths, "--to", "f.npz").code == 0
        with np.load("f.npz") as file:
            assert set(file["label"]) == {"down"}, folder


def test_a_folder_that_is_read_only_is_refused_before_images_are_read(tlcli: Tlcli, monkeypatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)
    ended = tlcli("embed", "nowhere", "photos", "--to", "f.npz")
    assert (ended.code, ended.err.count("\n")) == (2, 1) and "f.npz: cannot be written, since . is" in ended.err


def test_a_list_without_images_is_said_to_be_empty(tlcli: Tlcli, trained: Trained, monkeypatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO()))
    ended = tlcli("embed", str(trained("head", "fp32")), "-", "--to", "g.npz")
    assert (ended.code, ended.err.splitlines()[-1]) == (1, "tlcli embed: nothing was written: no image was named")


def test_too_many_images_for_npz_are_refused_before_a_network_is_built(tlcli: Tlcli, photos: Path, monkeypatch) -> None:
    monkeypatch.setattr("tlcli.embed.MAX_NPZ", 16)
    monkeypatch.setattr("tlcli.cli.embed.count_images", lambda paths: None)  # counting all of them takes too long
    ended = tlcli("embed", "nowhere", "photos", "--to", "f.npz")
    assert (ended.code, ended.err) == (2, "tlcli embed: f.npz: holds fewer than 16 images; write a .parquet file\n")


def test_files_that_do_not_decode_are_named_if_there_are_too_few_for_a_map(tlcli: Tlcli, trained, photos) -> None:
    ended = tlcli("embed", str(trained("head", "fp32")), "photos/bad.png", "photos/down/000.png", "--plot", "map.html")
    assert ended.code == 1 and ended.err.splitlines()[-3:] == [
        "photos/bad.png: not an image", "tlcli embed: 1 of 2 could not be read",
        "tlcli embed: a map needs at least 5 images, and there are 1",
    ]  # fmt: skip


def test_vectors_are_kept_if_nobody_reads_the_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    rows, errors = [("good.png", "pixels", 0.5), ("bad.png", None, "not an image")], list[str]()
    embedder = SimpleNamespace(embed=lambda *args, **options: rows)
    monkeypatch.setattr("sys.stderr", Gone())
    assert list(vectors_of("embed", embedder, [], Reporter(), errors)) == rows[:1]  # type: ignore[arg-type]
    assert errors == ["bad.png: not an image"]


def test_similar_embeds_its_image_in_a_batch_as_large_as_the_others(tlcli: Tlcli, trained, photos, monkeypatch) -> None:
    sizes, rows = set[int](), Embedder._rows

    def spy(self, images):
        sizes.add(self._extractor.batch_size)
        return rows(self, images)

    monkeypatch.setattr(Embedder, "_rows", spy)
    folders = ["photos/down"] * (BATCH["cpu"] // 8)
    assert tlcli("similar", str(trained("head", "fp32")), "photos/down/000.png", *folders, "--device=cpu").code == 0
    assert sizes == {BATCH["cpu"]}


def test_similar_lists_the_nearest(tlcli: Tlcli, trained: Trained, photos: Path) -> None:
    run = str(trained("head", "fp32"))
    Image.open(photos / "down/003.png").save(photos / "copy.png")
    ended = tlcli("similar", run, "photos/down/003.png", "photos/down", "photos/copy.png", "--top", "3")
    assert ended.code == 0
    header, first, *others = ended.out.splitlines()
    assert header.split() == ["distance", "image"] and first.split()[1] == "photos/copy.png" and len(others) == 2
    assert abs(float(first.split()[0])) < 1e-4 and "photos/down/003.png" not in ended.out
    distances = [float(line.split()[0]) for line in (first, *others)]
    assert distances == sorted(distances)
    found = tlcli("similar", run, "photos/down/003.png", "photos", "--format=json")
    assert found.code == 1 and found.out.startswith('[\n  {\n    "path": "photos/copy.png"')
    bad = tlcli("similar", run, "photos/bad.png", "photos")
    assert (bad.code, bad.err) == (1, "tlcli similar: photos/bad.png: not an image\n")
