"""The report: complete, escaped, and nothing from outside; each part has its sentence if it is missing."""

import base64
import io
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from tlcli.engine.metrics import Predictions, compute_report
from tlcli.runs import leaderboard, plots, report
from tlcli.runs.report import ImageReaders, render, run_view, sweep_view
from tlcli.runs.run_dir import RunDir, SplitPredictions, read_predictions, write_json, write_predictions

SCRIPT = "<script>alert(1)</script>"
IMAGE = '"><img src=x onerror=alert(1)>'
TURNED = "\u202eabc\u0627\u0644\u0646\u062d\u0644"
# Names that a dataset may have. The last is how Python has a file's name that is not UTF-8.
HOSTILE = (SCRIPT, IMAGE, "two\nlines", TURNED, "</style><b>", "{{ 7777 * 7 }}", "' onload='alert(1)", "half \udc80")


class Html(HTMLParser):
    """A page as a parser sees it: tags, attributes and text; elements that are open when they should not be."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.attributes: list[tuple[str, str, str]] = []
        self.open: list[str] = []
        self.words = ""
        self.feed(html)
        self.close()
        assert not self.open, self.open
        self.words = " ".join(self.words.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag != "script"
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in ("meta", "img", "source"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


def check(html: str) -> Html:
    """Assert what holds for every report: valid HTML, the policy, charts that are XML, no external address."""
    page = Html(html)
    assert not [name for _, name, _ in page.attributes if name.startswith("on") or name == "style"]
    policy = next(value for _, name, value in page.attributes if name == "content" and "default-src" in value)
    assert re.fullmatch(
        r"default-src 'none'; img-src data:; style-src 'sha256-[A-Za-z0-9+/=]+'; base-uri 'none'; form-action 'none'",
        policy,
    )
    for tag, name, value in page.attributes:
        if name in ("href", "src", "xlink:href", "action", "data", "srcset", "poster"):
            pattern = r"\./[^:]*" if tag == "a" else r"data:image/(jpeg|png|svg\+xml);base64,[A-Za-z0-9+/=]+"
            assert re.fullmatch(pattern, value), (tag, name, value)
        if value.startswith("data:image/svg"):
            for element in ElementTree.fromstring(content_of(value)).iter():
                assert element.tag.rpartition("}")[2] not in ("script", "image", "foreignObject", "a")
                assert all(link.startswith("#") for name, link in element.attrib.items() if name.endswith("href"))
    sheet = html.split("<style>")[1].split("</style>")[0]
    assert "url(" not in sheet and "@import" not in sheet
    return page


def content_of(uri: str) -> bytes:
    return base64.b64decode(uri.partition(",")[2])


def make_run(folder: Path, classes: tuple[str, ...] = ("a", "b"), *, n: int = 60, status: str = "done") -> RunDir:
    """Write a run's directory with random predictions."""
    run, k = RunDir(folder), len(classes)
    random = np.random.default_rng(0)
    run.start(command="tlcli train dataset=digits", overrides=["dataset=digits"], config="epochs: 2\nseed: 0\n")
    labels = torch.tensor(random.integers(0, k, n))
    logits = torch.tensor(random.normal(0, 2, (n, k))).float()
    logits[torch.arange(n), labels] += 2
    for epoch in range(3):
        row = {"epoch": epoch, "loss": 1 / (1 + epoch), "accuracy": 0.5 + epoch / 10}
        run.log_metrics({"split": "train", **row, "lr": {"head": 0.1}})
        run.log_metrics({"split": "val", **row})
    run.update(
        name="a run", classes=list(classes), dataset="digits", backbone="net", freeze="head", n_train=90, n_val=10,
        best={"epoch": 2, "accuracy": 0.7, "macro_f1": 0.7, "loss": 0.3}, keep_best="accuracy",
        parameters={"total": 300, "trainable": 20}, seconds={"setup": 1.0, "train": 2.0, "total": 3.0},
        stages=[{"name": "stem", "parameters": 280, "trainable": 0, "lr": None}],
        calibration={"temperature": 1.3}, versions={"torch": "2.13"},
    )  # fmt: skip
    write_json(run.test_file, {**compute_report(Predictions(logits, labels), classes), "epoch": 2})
    keys = tuple(f"test/{classes[int(t) % k]}/{i}.jpg" for i, t in enumerate(labels))
    write_predictions(run.test_predictions, SplitPredictions(logits, labels, tuple(classes), keys))
    run.end(status, "it broke" if status == "failed" else None)
    return run


def drawn(run: RunDir, images: ImageReaders | None = None) -> Html:
    return check(render("run.html.j2", run_view(RunDir(run.path), images or {})))


# -- what comes from the data


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """Return a run in which every name is hostile."""
    text = " ".join(HOSTILE)
    run = make_run(tmp_path_factory.mktemp("hostile"), HOSTILE, status="failed")
    names = ("name", "error", "dataset", "backbone", "freeze", "started", "keep_best", "status", "n_train", "device")
    run.update(
        **dict.fromkeys((*names, "git_commit"), text), overrides=[text], command=f"tlcli train '{IMAGE}",
        stages=[{"name": text, "parameters": text, "trainable": 3, "lr": text}], machine={"processor": text},
        seconds={text: 1.0, "total": text}, versions={text: text}, cache={"used": False, "why": text},
        parameters={"total": text, "trainable": 1},
    )  # fmt: skip
    run.config_file.write_text(f"dataset: {{kind: imagefolder, root: '{SCRIPT}'}}\n# {SCRIPT} {IMAGE}\n")
    return run


def test_hostile_names_are_text_and_nothing_else(hostile: RunDir) -> None:
    html = render("run.html.j2", run_view(hostile, {}))
    html.encode("utf-8")
    page = check(html)
    for name in HOSTILE[:-1]:
        assert " ".join(name.split()) in page.words
    assert "half \ufffd" in page.words
    assert "54439" not in page.words  # a template's marks within a name mean nothing
    assert html.count("<img src=x") == 0 == html.count("<script") == html.count("onload='")


OTHER_TYPES: tuple[Any, ...] = (
    *(SCRIPT, 7, [], [[SCRIPT]], [[1]], {}, {"x": [1]}, {"x": {"f1": SCRIPT}}, None, True, -1, 1e300),
)


@pytest.fixture
def no_svg(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw charts without writing them, which takes most of the time."""

    def draw_only(draw: Callable[[Any], None], *sizes: object) -> tuple[str, str]:
        draw(Figure().add_axes((0, 0, 1, 1)))
        return "<svg/>", "<svg/>"

    monkeypatch.setattr(plots, "svg", draw_only)


@pytest.mark.slow
@pytest.mark.parametrize("file", ["run.json", "test.json"])
def test_values_of_another_type_are_left_out(tmp_path: Path, file: str, no_svg: None) -> None:
    run = make_run(tmp_path, n=12)
    whole = json.loads((tmp_path / file).read_text())
    damaged = [{**whole, key: OTHER_TYPES[n % len(OTHER_TYPES)]} for n, key in enumerate(whole)]
    for content in [*damaged, *(dict.fromkeys(whole, value) for value in OTHER_TYPES)]:
        write_json(tmp_path / file, content)
        drawn(run)


@pytest.mark.slow
def test_cross_validation_is_shown_without_values_of_another_type(tmp_path: Path, no_svg: None) -> None:
    run = make_run(tmp_path, n=12)
    test = json.loads(run.test_file.read_text())
    folds = {"folds": 2, "fold_accuracies": [0.5, 0.7], "mean": 0.6, "standard_deviation": 0.1}
    folds |= {key: test[key] for key in ("n", "accuracy", "accuracy_ci95", "confusion")}
    run.update(cross_validation=folds)
    words = drawn(run).words.replace("\xa0", " ")
    assert "Mean of the folds 60.0 %, standard deviation 10.0 %" in words and "50.0 %" in words
    for n, key in enumerate(folds):
        for value in OTHER_TYPES[n % 3 :: 3]:
            run.update(cross_validation={**folds, key: value})
            drawn(run)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "\x00\xff", '{"loss": NaN, "split": "val", "epoch": 1}'])
def test_damaged_files_are_left_out(tmp_path: Path, content: str, no_svg: None) -> None:
    run = make_run(tmp_path)
    for file in (run.test_file, run.metrics_file, run.config_file, run.test_predictions):
        file.write_text(content, encoding="utf-8")
    assert "70.0" in drawn(run).words  # validation is all that is known


# -- what is shown


@pytest.mark.filterwarnings("ignore:A single label:UserWarning")  # scikit-learn's, of the figures of one class
@pytest.mark.parametrize("n", [1, 2, 41, 110])
def test_any_number_of_classes(tmp_path: Path, n: int, no_svg: None) -> None:
    classes = tuple(f"class {i}" for i in range(n))
    run = make_run(tmp_path, classes, n=3 * n + 10)
    page, view, test = drawn(run), run_view(run, {}), json.loads(run.test_file.read_text())
    assert all(name in page.words for name in classes)
    counts, rows = np.array(test["confusion"]), test["per_class"].values()
    assert view["class_rows"][0]["f1"] == min(row["f1"] for row in rows if row["support"])
    if n <= report.MAX_TABLE_CLASSES:
        shades = [value for tag, _, value in page.attributes if tag == "td" and re.fullmatch(r"[de]\d+", value)]
        assert len(shades) == (counts > 0).sum()
    else:
        image = Image.open(io.BytesIO(content_of(view["matrix"]["image"])))
        assert np.array_equal(np.asarray(image)[..., 3] > 0, counts > 0)  # one pixel per cell


def test_the_result_comes_first_with_its_interval(tmp_path: Path, no_svg: None) -> None:
    run = make_run(tmp_path, ("ants", "bees"))
    test = json.loads(run.test_file.read_text())
    words = drawn(run).words.replace("\xa0", " ")
    shown = [f"{100 * x:.1f} %" for x in (test["accuracy"], *test["accuracy_ci95"])]
    places = [words.index(figure, words.index("test accuracy") - 12) for figure in shown]
    assert places == sorted(places) and places[-1] < words.index("Training")
    assert "net, trained on 90 images of digits (2 classes: ants, bees); what trained: only its head" in words


def test_a_class_without_test_images_has_no_recall_and_no_f1(tmp_path: Path, no_svg: None) -> None:
    run = make_run(tmp_path, ("a", "b", "c"))
    test = json.loads(run.test_file.read_text())
    for name in ("a", "c"):
        test["per_class"][name] |= {"recall": 0.0, "f1": 0.0, "support": 0}
    write_json(run.test_file, test)
    rows = [(row["name"], row["recall"], row["f1"]) for row in run_view(run, {})["class_rows"]]
    assert rows[0][0] == "b" and rows[1:] == [("a", None, None), ("c", None, None)]


@pytest.mark.parametrize("path", ["/data/photos", "/data/photos/", "C:\\data\\photos", "C:\\data\\photos\\", "photos"])
def test_the_name_of_a_folder_is_that_of_any_system(path: str) -> None:
    assert report.FILTERS["folder_name"](path) == "photos"


def test_mistakes_are_the_most_confident_first(tmp_path: Path, no_svg: None) -> None:
    run = make_run(tmp_path, ("a", "b", "c"), n=200)
    view = run_view(run, {})
    mistakes, undecided = view["mistakes"], view["undecided"]
    test = json.loads(run.test_file.read_text())
    assert mistakes["n"] == 200 - np.trace(np.array(test["confusion"]))
    assert len(mistakes["cards"]) == min(report.GALLERY_IMAGES, mistakes["n"])
    probabilities = [card["guesses"][0][1] for card in mistakes["cards"]]
    assert probabilities == sorted(probabilities, reverse=True)
    for card in mistakes["cards"]:
        assert card["truth"] != card["guesses"][0][0] and card["truth"] in card["name"]
    margins = [card["guesses"][0][1] - card["guesses"][1][1] for card in undecided["cards"]]
    assert margins == sorted(margins)
    assert all(card["is_right"] == (card["truth"] == card["guesses"][0][0]) for card in undecided["cards"])


def test_thumbnails_are_small_jpegs_and_missing_images_have_their_names(tmp_path: Path, no_svg: None) -> None:
    run = make_run(tmp_path)
    present, missing = (card["name"] for card in run_view(run, {})["mistakes"]["cards"][:2])
    pixels = np.full((400, 1000, 3), (200, 30, 30), dtype=np.uint8)
    page = drawn(run, {present: lambda: pixels})
    (picture,) = {value for tag, name, value in page.attributes if name == "src" and "image/jpeg" in value}
    image = Image.open(io.BytesIO(content_of(picture)))
    assert (image.format, image.size) == ("JPEG", (report.THUMBNAIL_SIDE, report.THUMBNAIL_SIDE * 400 // 1000))
    assert np.abs(np.asarray(image).reshape(-1, 3).mean(axis=0) - (200, 30, 30)).max() < 5
    assert missing in page.words and "not found" in page.words


def test_charts_are_the_same_bytes_each_time_and_have_dark_colors(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    html = render("run.html.j2", run_view(run, {}))
    assert html == render("run.html.j2", run_view(run, {}))
    for chart in run_view(run, {})["charts"]:
        light, dark = content_of(chart["light"]).decode(), content_of(chart["dark"]).decode()
        assert light != dark
        assert not [color for color in plots.DARK if color in dark]
        assert "epoch" in light and "validation" in light  # text stays text


@pytest.mark.parametrize(("status", "word"), [("failed", "Failed"), ("running", "Died")])
def test_runs_that_ended_early_have_a_report(tmp_path: Path, status: str, word: str) -> None:
    run = RunDir(tmp_path)
    run.start(command="tlcli train", overrides=[], config="")
    run.update(status=status, error="no space on the disk", pid=2**22 + 1)  # Linux has no such process
    words = drawn(run).words
    assert words.index(word) < words.index("No result")
    assert "no space on the disk" in words
    assert "trained" not in words  # of what is not known nothing is said


@pytest.mark.parametrize(
    ("command", "overrides", "again"),
    [
        ("tlcli train seed=3 hydra.run.dir=here", ["seed=3"], "tlcli train seed=3"),
        ("tlcli train -m seed=3,4 --config-dir my", ["seed=4"], "tlcli train --config-dir my seed=4"),
        ("tlcli train 'name=a b'", ["name=a b"], "tlcli train 'name=a b'"),
        ("tlcli train '~scheduler' +x=1", ["~scheduler", "+x=1"], "tlcli train '~scheduler' +x=1"),
    ],
)
def test_the_command_trains_this_run_alone(tmp_path: Path, command: str, overrides: list[str], again: str) -> None:
    run = RunDir(tmp_path)
    run.start(command=command, overrides=overrides, config="")
    assert run_view(run, {})["command"] == again


# -- sweeps


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six jobs over a rate and a name; the last one failed."""
    folder = tmp_path_factory.mktemp("sweep")
    for i, (rate, name) in enumerate([(r, n) for n in ("adam", SCRIPT) for r in ("1e-4", "1e-3", "1e-1")]):
        run = make_run(folder / str(i), status="failed" if i == 5 else "done")
        best = {"epoch": 2, "accuracy": 0.5 + i / 20, "macro_f1": 0.5, "loss": 0.3}
        run.update(overrides=[f"optimizer.lr={rate}", f"name={name}"], best=best)
    leaderboard.write(folder)
    return folder


def test_a_sweep_has_a_leaderboard_and_one_chart_per_key(sweep: Path) -> None:
    view = sweep_view(sweep, sweep / "report.html")
    page = check(render("sweep.html.j2", view))
    assert [chart["title"] for chart in view["charts"]] == ["optimizer.lr", "name"]
    rates, names = (content_of(chart["light"]).decode() for chart in view["charts"])
    for svg in (rates, names):
        assert len(re.findall(r'<g id="PathCollection_\d+">', svg)) == 5  # the failed job has no metric
    assert all(f">{rate}<" in rates for rate in ("0.0001", "0.001", "0.1"))
    assert ">adam<" in names and ">&lt;script&gt;alert(1)&lt;/script&gt;<" in names
    assert "70.0" in page.words[:60]
    assert all(words in page.words for words in ("Failed", "it broke", SCRIPT))


def test_links_lead_to_the_jobs_from_wherever_the_report_is(tmp_path: Path, no_svg: None) -> None:
    folder, elsewhere = tmp_path / "a sweep", tmp_path / "elsewhere"
    elsewhere.mkdir()
    names = ["javascript:alert(1)", 'x"><b>', "plain"]
    for name in names:
        make_run(folder / name).update(overrides=[f"x={len(name)}"])
    (folder / "plain" / "report.html").write_text("")
    for place in (folder, elsewhere):
        page = check(render("sweep.html.j2", sweep_view(folder, place / "r.html")))
        links = [value for tag, name, value in page.attributes if (tag, name) == ("a", "href")]
        targets = {(place / unquote(link)).resolve() for link in links}
        assert targets == {(folder / n).resolve() for n in names[:2]} | {(folder / "plain" / "report.html").resolve()}


# -- in a browser


@pytest.fixture(scope="module")
def pages(hostile: RunDir, sweep: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write reports of a hostile run, of runs with few and many classes, and of a sweep."""
    folder = tmp_path_factory.mktemp("pages")
    red = np.full((30, 20, 3), (255, 0, 0), dtype=np.uint8)
    many, wide = tuple(f"class {i}" for i in range(60)), tuple(f"{i}" + "w" * 120 for i in range(12))
    runs = {"few": make_run(folder / "few"), "many": make_run(folder / "many", many, n=400)}
    runs |= {"hostile": hostile, "wide": make_run(folder / "wide", wide)}
    html = {"sweep": render("sweep.html.j2", sweep_view(sweep, folder / "sweep.html"))}
    for name, run in runs.items():
        images = dict.fromkeys(read_predictions(run.test_predictions).keys, lambda: red)
        html[name] = render("run.html.j2", run_view(run, images))
    for name, content in html.items():
        (folder / f"{name}.html").write_bytes(content.encode())
    return {name: folder / f"{name}.html" for name in html}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hostile", "few", "many", "wide", "sweep"])
def test_chromium_has_nothing_to_complain_about(browser: Any, pages: dict[str, Path], name: str) -> None:
    for width, scheme, color in [(390, "light", "rgb(255, 255, 255)"), (1280, "dark", "rgb(20, 22, 26)")]:
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        complaints: list[Any] = []
        requests: list[Any] = []
        for event, seen in (("console", complaints), ("pageerror", complaints), ("request", requests)):
            page.on(event, lambda one, seen=seen: seen.append(one))
        page.goto(pages[name].as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") == width  # nothing is wider than the screen
        assert complaints == []
        assert [r.url for r in requests if not r.url.startswith("data:")] == [pages[name].as_uri()]
        assert page.locator("script").count() == page.locator("img:not([src^='data:image/'])").count() == 0
        assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == color
        assert (SCRIPT in page.inner_text("body")) == (name in ("hostile", "sweep"))


@pytest.mark.slow
def test_the_policy_stops_what_it_should(browser: Any, pages: dict[str, Path], tmp_path: Path) -> None:
    html = pages["few"].read_text(encoding="utf-8")
    file = tmp_path / "broken.html"
    file.write_text(html.replace("</main>", '<script>1</script><p style="color: red">x</p></main>'), encoding="utf-8")
    page, complaints = browser.new_page(), []
    page.on("console", lambda message: complaints.append(message.text))
    page.goto(file.as_uri())
    assert len([text for text in complaints if "Content Security Policy" in text]) >= 2
