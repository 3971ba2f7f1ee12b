"""Embeddings are what the head of a run takes, and what is written of them can be read without tlcli."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import slow
from tlcli import embed
from tlcli.device import cpu_has_bfloat16
from tlcli.embed import Embedder, Map, check_output, vector_file
from tlcli.engine.session import Session
from tlcli.errors import TlcliError, UsageError
from tlcli.runs.load import load_run
from tlcli.runs.run_dir import RunDir, read_json, read_predictions
from tlcli.specs import Precision
from tlcli.store import Store, cache_dir
from tlcli.transfer.cut import NoCut

CPU = torch.device("cpu")
Trained = Callable[..., Path]


def embedder(run: Path, precision: Precision = Precision.auto, batch_size: int | None = None) -> Embedder:
    return Embedder(load_run(run), CPU, Store(cache_dir()), precision, batch_size)


def vectors(source: Embedder, images: list[str]) -> torch.Tensor:
    return torch.stack([vector for _, _, vector in source.embed(images) if isinstance(vector, torch.Tensor)])


@pytest.mark.parametrize("precision", ["fp32", *slow("bf16")])
def test_with_freeze_head_they_equal_the_cache(trained: Trained, precision: str) -> None:
    if precision == "bf16" and not cpu_has_bfloat16():
        pytest.skip("this CPU has no bfloat16")
    run = trained("head", precision)
    (key,) = read_json(run / "run.json")["cache"]["entries"]["test"]
    store = Store(cache_dir())
    (entry,) = [entry for entry in store.entries() if entry.key == key]
    (cached,) = Session(store, 0).tensors(store.find(entry.key))
    names = read_predictions(RunDir(run).test_predictions).names
    assert torch.equal(vectors(embedder(run, batch_size=32), names), cached.float())


def test_a_network_without_a_cut_has_the_same_vectors(trained: Trained, shapes: Path, monkeypatch) -> None:
    run, images = trained("head", "fp32"), sorted(map(str, shapes.glob("test/*/00*.png")))
    expected = vectors(embedder(run), images)
    monkeypatch.setattr(embed, "split_frozen", lambda *args: NoCut("for the test"))
    assert torch.allclose(vectors(embedder(run), images), expected, atol=1e-5)
    assert expected.shape == (len(images), 256)


def test_a_backbone_needs_no_run(spec: Any, shapes: Path) -> None:
    source = Embedder(
        spec("backbone=timm", "backbone.name=test_resnet", "backbone.weights=none").backbone,
        CPU,
        Store(cache_dir()),
        Precision.auto,
        None,
    )
    images = [str(shapes / f"test/{name}/000.png") for name in ("across", "down")]
    assert torch.allclose(vectors(source, images[:1])[0], vectors(source, images)[0], atol=1e-5)


def test_a_loaded_run_is_not_changed(trained: Trained, shapes: Path) -> None:
    run = load_run(trained("head", "fp32"))
    image = str(shapes / "test/down/000.png")
    expected = run.predict(image)
    vectors(Embedder(replace(run), CPU, Store(cache_dir()), Precision.auto, None), [image])
    assert dict(run.predict(image)) == pytest.approx(dict(expected), abs=1e-6)


# -- files


def rows(n: int) -> list[embed.Row]:
    return [(f"{i}/\udc80.png", "odd\udc80" if i % 2 else None, torch.full((3,), float(i))) for i in range(n)]


def write(path: Path, n: int, *, force: bool = False) -> None:
    with vector_file(path, "a run", force=force) as add:
        for row in rows(n):
            add(row)


def test_parquet_is_written_by_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(embed, "ROW_GROUP", 4)
    write(tmp_path / "f.parquet", 9)
    file = parquet.ParquetFile(tmp_path / "f.parquet")
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [4, 4, 1]
    table = file.read().to_pydict()
    assert table["path"][3] == "3/\\udc80.png" and table["label"][:2] == [None, "odd\\udc80"]
    assert table["vector"] == [[float(i)] * 3 for i in range(9)]
    assert file.schema_arrow.metadata[b"source"] == b"a run"
    assert [path.name for path in tmp_path.iterdir()] == ["f.parquet"]


def test_npz_has_no_pickled_objects_and_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "f.npz", 5)
    with np.load(tmp_path / "f.npz", allow_pickle=False) as file:
        assert list(file["path"]) == [path for path, _, _ in rows(5)]
        assert list(file["label"]) == ["", "odd\udc80", "", "odd\udc80", ""]
        assert file["vector"].dtype == np.float32 and file["vector"][4].tolist() == [4, 4, 4]
    monkeypatch.setattr(embed, "MAX_NPZ", 5)
    with pytest.raises(UsageError, match=r"fewer than 5 images; write a \.parquet file"):
        write(tmp_path / "more.npz", 5)
    assert [path.name for path in tmp_path.iterdir()] == ["f.npz"]


def test_a_file_is_replaced_only_by_force_and_only_when_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "f.npz"
    message = "already exists: choose another file, or replace it with --force"
    with pytest.raises(UsageError, match=message), vector_file(path, "", force=False) as add:
        add(rows(1)[0])
        path.write_text("mine")  # it appears while images are embedded
    with pytest.raises(KeyboardInterrupt), vector_file(path, "", force=True):
        raise KeyboardInterrupt
    assert path.read_text() == "mine"
    write(path, 2, force=True)
    assert np.load(path)["vector"].shape == (2, 3)
    for bad, message in [("f.csv", "must end in .parquet or .npz"), ("no/f.npz", "not a file in an existing folder")]:
        with pytest.raises(UsageError, match=message):
            check_output(tmp_path / bad, embed.SUFFIXES, force=True)
    monkeypatch.setattr(embed, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'tlcli\[parquet\]'"):
        check_output(tmp_path / "f.parquet", embed.SUFFIXES, force=False)


def test_two_processes_that_write_one_file_do_not_write_into_each_other(tmp_path: Path, monkeypatch) -> None:
    parquet, path = pytest.importorskip("pyarrow.parquet"), tmp_path / "f.parquet"
    monkeypatch.setattr(embed, "ROW_GROUP", 1)
    with vector_file(path, "", force=True) as add:
        add(rows(1)[0])
        monkeypatch.setattr("os.getpid", lambda: 1)  # the other process
        write(path, 3, force=True)
        assert parquet.read_table(path).num_rows == 3
        add(rows(1)[0])
    assert parquet.read_table(path).num_rows == 2 and list(tmp_path.iterdir()) == [path]


# -- the map


def clusters(n: int, name: str = "image") -> Map:
    """Return a map of images of two classes whose vectors point in two directions."""
    random, made = np.random.default_rng(0), Map()
    for i in range(n):
        vector = torch.from_numpy(random.normal(0, 0.1, 60).astype(np.float32)) + torch.eye(60)[i % 2]
        pixels = torch.full((3, 80, 80), 255 * (i % 2), dtype=torch.uint8)
        made.add((f"{name}{i}.png", ("dark", "</script><b>light")[i % 2], vector), pixels)
    return made


def test_a_map_keeps_a_random_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embed, "MAX_POINTS", 20)
    made = clusters(200)
    numbers = [int(re.findall(r"\d+", path)[0]) for (path, _, _), _ in made.points]
    assert len(set(numbers)) == 20 and made.seen == 200 and 60 < np.mean(numbers) < 140
    assert "a random sample of 200" in made.html("x")
    with pytest.raises(TlcliError, match="at least 5 images, and there are 4"):
        clusters(4).html("x")


def test_a_map_keeps_no_batch_of_vectors() -> None:
    made, batch = Map(), torch.zeros(32, 60)
    made.add(("image.png", None, batch[7]), torch.zeros(3, 8, 8, dtype=torch.uint8))
    (_, _, vector), _ = made.points[0]
    assert vector.untyped_storage().nbytes() == 60 * 4


def test_a_map_has_coordinates_if_tsne_finds_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for images that are all equal."""
    monkeypatch.setattr("sklearn.manifold.TSNE.fit_transform", lambda _, x: np.full((len(x), 2), np.nan))
    data = json.loads(re.findall(r'id="points">(.*?)</script>', clusters(6).html("x"))[0])
    assert data["x"] == data["y"] == [0] * 6


@pytest.mark.slow
def test_a_map_shows_neighbors_and_their_images(browser: Any, tmp_path: Path) -> None:
    file = tmp_path / "map.html"
    file.write_text(clusters(40).html("<b>run"), encoding="utf-8")
    for width, scheme, color in [(390, "light", "rgb(255, 255, 255)"), (1280, "dark", "rgb(20, 22, 26)")]:
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        seen: list[Any] = []
        page.on("console", lambda message, seen=seen: seen.append(message.text))
        page.on("request", lambda request, seen=seen: seen.append(request.url))
        page.goto(file.as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") == width
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == color
        box = page.locator("canvas").bounding_box()
        x, y = page.evaluate("place(3)")
        page.mouse.move(box["x"] + x, box["y"] + y)
        assert page.inner_text(".card strong") == "</script><b>light"
        assert page.evaluate("document.querySelector('.card img').naturalWidth") == 64
        page.locator(".legend button").first.click()
        assert page.evaluate("[0, 1].map(isShown)") == [False, True]
        # the nearest neighbor of each point is of its class
        distance = "[i === j ? 9 : Math.hypot(x - u, data.y[i] - data.y[j]), j]"
        nearest = f"data.x.map((x, i) => data.x.map((u, j) => {distance}).sort((a, b) => a[0] - b[0])[0][1])"
        nearest += ".filter((j, i) => data.label[i] === data.label[j]).length"
        assert page.evaluate(nearest) >= 38
        assert [url for url in seen if not url.startswith("data:image/jpeg")] == [file.as_uri()]
