"""`tlcli report`: from a run's directory to one file."""

import base64
import io
import re
import shutil
import webbrowser
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jinja2 import StrictUndefined
from PIL import Image

from tests.cli.conftest import Ended
from tests.cli.test_export import small_run
from tlcli.data.decode import read_image
from tlcli.runs.report import PAGES, render, run_view, sweep_view
from tlcli.runs.run_dir import RunDir, read_predictions

Tlcli = Callable[..., Ended]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run(tmp_path_factory.mktemp("report"), "backbone=resnet18")


def pictures(html: str) -> list[np.ndarray]:
    """Return the pixels of each image in a page."""
    found = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', html)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(one)))) for one in found]


def test_a_run_becomes_one_file_with_its_images(tlcli: Tlcli, trained: Path) -> None:
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file() and path.name != "report.html"}
    ended = tlcli("report", str(trained))
    assert (ended.code, ended.out, ended.err) == (0, f"{trained / 'report.html'}\n", "")
    html = (trained / "report.html").read_text(encoding="utf-8")
    assert "test accuracy" in html
    shown = pictures(html)
    found = read_predictions(RunDir(trained).test_predictions)
    wrong = int((found.logits.argmax(dim=1) != found.labels).sum())
    assert len(shown) >= wrong > 0
    first = html.split('<ul class="gallery">')[1].split('class="file" title="')[1].split('"')[0]
    assert first in found.keys
    far = {key: np.abs(shown[0].astype(int) - read_image(trained.parent / "images" / key)).mean() for key in found.keys}
    assert min(far, key=lambda key: far[key]) == first  # the picture is of the image that its name says
    assert {path: path.read_bytes() for path in before} == before


def test_images_that_are_gone_leave_their_names(tlcli: Tlcli, trained: Path, tmp_path: Path) -> None:
    config = trained / "config.yaml"
    text = config.read_text(encoding="utf-8")
    config.write_text(re.sub(r"root: .*", "root: /no/such/place", text), encoding="utf-8")
    try:
        assert tlcli("report", str(trained), "--output", str(tmp_path / "r.html")).code == 0
    finally:
        config.write_text(text, encoding="utf-8")
    html = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert pictures(html) == []
    assert "The images are not shown, because the dataset cannot be read: /no/such/place" in html
    assert "not found" in html


def test_a_relative_output_and_the_browser(tlcli: Tlcli, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    monkeypatch.setattr(webbrowser, "open", lambda address: shown.append(address) is None)
    ended = tlcli("report", "--open", str(trained), "--output=here.html")
    assert (ended.code, ended.out) == (0, "here.html\n")
    assert shown == [Path("here.html").resolve().as_uri()]
    monkeypatch.setattr(webbrowser, "open", lambda address: False)
    ended = tlcli("report", "--open", str(trained), "--output=here.html")
    assert ended.code == 1
    assert "no browser was found; open here.html" in ended.err


def test_nothing_else_is_overwritten(tlcli: Tlcli, trained: Path, tmp_path: Path) -> None:
    notes, link = tmp_path / "notes.html", tmp_path / "link.html"
    notes.write_text("mine")
    link.symlink_to(trained / "report.html")
    for output in (notes, link):
        ended = tlcli("report", str(trained), "--output", str(output))
        assert ended.code == 2
        assert "not a report of tlcli" in ended.err
    assert notes.read_text() == "mine"


def test_templates_name_nothing_that_a_complete_run_lacks(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    ("words", "says"),
    [
        (["nowhere"], "nowhere: no such directory"),
        (["."], "not a run or a sweep"),
        (["--outptu", "x"], "Did you mean '--output'?"),
        (["RUN", "--output", "."], "--output .: not a file in an existing directory"),
    ],
)
def test_mistakes_are_one_line(tlcli: Tlcli, trained: Path, words: list[str], says: str) -> None:
    ended = tlcli("report", *[str(trained) if word == "RUN" else word for word in words])
    assert ended.code == 2
    assert says in ended.err
    assert ended.err.count("\n") == 1


@pytest.mark.parametrize("bounds", [5, [1, 1], ["a"], {}])
def test_a_hostile_range_in_run_json_is_ignored(tlcli: Tlcli, trained: Path, tmp_path: Path, bounds: object) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    RunDir(run).update(preprocessing=RunDir(run).info["preprocessing"] | {"range": bounds})
    assert tlcli("report", str(run)).code == 0


def test_a_damaged_run_json_is_one_line(tlcli: Tlcli, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{")
    ended = tlcli("report", str(tmp_path))
    assert ended.code == 2
    assert "run.json: damaged" in ended.err
    assert not (tmp_path / "report.html").exists()
