"""`tlcli report`: from a run's directory to one file."""

import base64
import io
import re
import shutil
import webbrowser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jinja2 import StrictUndefined
from PIL import Image

from tests.cli.conftest import Tlcli
from tests.cli.test_export import small_run
from tests.conftest import TINY
from tlcli.data.decode import read_image
from tlcli.runs.report import PAGES, render, run_view, sweep_view
from tlcli.runs.run_dir import RunDir, read_predictions


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run(tmp_path_factory.mktemp("report"), *TINY)


def pictures(html: str) -> list[np.ndarray]:
    """Return the pixels of each image in a page."""
    found = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', html)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(one)))) for one in found]


def test_a_run_becomes_one_file_with_its_images(tlcli: Tlcli, trained: Path) -> None:
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file() and path.name != "report.html"}
    ended = tlcli("report", str(trained))
    assert (ended.code, ended.out, ended.err) == (0, f"{trained / 'report.html'}\n", "")
    html = (trained / "report.html").read_text(encoding="utf-8")
    shown = pictures(html)
    predictions = read_predictions(RunDir(trained).test_predictions)
    n_wrong = int((predictions.logits.argmax(dim=1) != predictions.labels).sum())
    answers = set(predictions.labels[predictions.logits.argmax(dim=1) == predictions.labels].tolist())
    assert len(shown) >= n_wrong > 0
    assert html.count('alt="Heat map for') == min(n_wrong, 24) + len(answers)
    assert "In gray, with a heat map" in html and "not where they were" not in html
    assert shown[0].std(axis=2).max() > 10 and shown[0].shape == shown[1].shape  # the image, then its map
    first = html.split('<ul class="gallery')[1].split('class="file" title="')[1].split('"')[0]
    images = {key: read_image(trained.parent / "images" / key).astype(int) for key in predictions.keys}
    assert min(images, key=lambda key: np.abs(shown[0] - images[key]).mean()) == first  # the image of this name
    assert {path: path.read_bytes() for path in before} == before


def test_images_that_have_moved_are_counted(tlcli: Tlcli, trained: Path, tmp_path: Path) -> None:
    home = Path(shutil.copytree(trained.parent, tmp_path / "home"))
    run, predictions = home / trained.name, read_predictions(RunDir(trained).test_predictions)
    RunDir(run).write_config((run / "config.yaml").read_text().replace(str(trained.parent), str(home)))
    for key in predictions.keys[1::2]:
        (home / "images" / key).unlink()
    assert tlcli("report", str(run)).code == 0
    words = " ".join((run / "report.html").read_text(encoding="utf-8").split())
    n_cards = words.count('<span class="file"')
    n_missing = words.count('<span class="picture none">')
    assert n_cards > n_missing > 0
    assert f"{n_missing} of the {n_cards} images on this page are not where they were" in words
    shutil.rmtree(home / "images")
    assert tlcli("report", str(run)).code == 0
    words = (run / "report.html").read_text(encoding="utf-8")
    assert "The images are not shown, because the dataset cannot be read" in words and "Heat map" not in words


def test_a_run_without_its_weights_has_a_report_without_maps(tlcli: Tlcli, trained: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    (run / "checkpoints/best.safetensors").write_bytes(b"damaged")
    assert tlcli("report", str(run)).code == 0
    html = (run / "report.html").read_text(encoding="utf-8")
    assert "No heat maps:" in html and 'alt="Heat map' not in html and pictures(html)


def test_a_relative_output_and_the_browser(tlcli: Tlcli, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    monkeypatch.setattr(webbrowser, "open", lambda address: shown.append(address) is None)
    ended = tlcli("report", "--open", str(trained), "--output=here.html")
    assert (ended.code, ended.out) == (0, "here.html\n")
    assert shown == [Path("here.html").resolve().as_uri()]
    monkeypatch.setattr(webbrowser, "open", lambda address: False)
    ended = tlcli("report", "--open", str(trained), "--output=here.html")  # an earlier report is replaced
    assert ended.code == 1
    assert "no browser was found; open here.html" in ended.err


def test_a_sweep_has_its_name_however_its_folder_is_written(tlcli, trained: Path, tmp_path: Path, monkeypatch) -> None:
    shutil.copytree(trained, tmp_path / "swept/0")
    (tmp_path / "swept/sweep.json").touch()
    monkeypatch.chdir("swept")
    assert tlcli("report", ".").code == 0
    assert "swept</title>" in Path("report.html").read_text(encoding="utf-8")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tlcli("report", "~/swept").out == f"{tmp_path / 'swept/report.html'}\n"


@pytest.mark.parametrize("content", ["mine", "<!doctype html><title>tlcli report</title>", "", None])
def test_nothing_else_is_overwritten(tlcli: Tlcli, trained: Path, tmp_path: Path, content: str | None) -> None:
    output = tmp_path / "notes.html"
    if content is None:
        output.symlink_to(trained / "run.json")
    else:
        output.write_text(content)
    before = output.read_bytes()
    ended = tlcli("report", str(trained), "--output", str(output))
    assert (ended.code, "not a report of tlcli" in ended.err) == (2, True)
    assert output.read_bytes() == before


def test_templates_name_nothing_that_a_complete_run_lacks(trained: Path, tmp_path, monkeypatch) -> None:
    class Missing(StrictUndefined):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            raise AssertionError(self._undefined_message)

    monkeypatch.setattr(PAGES, "undefined", Missing)
    for rate in ("0.1", "0.2"):
        shutil.copytree(trained, tmp_path / rate)
        RunDir(tmp_path / rate).update(overrides=[f"optimizer.lr={rate}"])
    render("run.html.j2", run_view(RunDir(trained), {}))
    render("sweep.html.j2", sweep_view(tmp_path, tmp_path / "r.html"))
    with pytest.raises(AssertionError, match="acuracy"):
        PAGES.from_string("{{ 1 if info.acuracy is number }}").render(info={})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "nowhere: no such directory"),
        (["."], "not a run or a sweep"),
        (["damaged"], "run.json: damaged"),
        (["--outptu", "x"], "Did you mean '--output'?"),
        (["RUN", "--output", "."], "--output .: not a file in an existing directory"),
    ],
)
def test_mistakes_are_one_line(tlcli: Tlcli, trained: Path, words: list[str], message: str) -> None:
    Path("damaged").mkdir()
    Path("damaged/run.json").write_text("{")
    ended = tlcli("report", *[str(trained) if word == "RUN" else word for word in words])
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert message in ended.err
    assert not Path("damaged/report.html").exists()


@pytest.mark.parametrize("bounds", [5, ["a"]])
def test_a_hostile_range_in_run_json_is_ignored(tlcli: Tlcli, trained: Path, tmp_path: Path, bounds: object) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    RunDir(run).update(preprocessing=RunDir(run).info["preprocessing"] | {"range": bounds})
    assert tlcli("report", str(run)).code == 0
