"""Readers of files give something for any bytes, or an error of ours in one line.

By default a few examples each, always the same; `pytest -m slow tests/faults/test_fuzz.py` tries many new ones.
"""

import io
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir
from PIL import Image
from safetensors.torch import save

from tests.data.samples import manifest_spec, parquet_spec, tar_spec, write_parquet, write_tar
from tests.faults.programs import scale
from tests.runs.test_predictions import SOME
from tlcli.cli.compose import load_spec
from tlcli.data.decode import BadImage, read_image
from tlcli.data.listing import ClassChoice, list_manifest
from tlcli.errors import TlcliError
from tlcli.models.build import read_weights
from tlcli.reporter import Reporter
from tlcli.runs.index import read_entry
from tlcli.runs.run_dir import RunDir, open_run, read_predictions
from tlcli.specs import TrainSpec

FEW = settings(max_examples=25, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
MANY = settings(max_examples=scale(500, 20_000), deadline=None, database=None, suppress_health_check=list(HealthCheck))


@contextmanager
def ours() -> Iterator[None]:
    try:
        yield
    except (TlcliError, BadImage) as error:
        assert str(error).strip()


kept: list[Any] = []


@cache
def place() -> Path:
    kept.append(folder := tempfile.TemporaryDirectory())
    for name in ("0.png", "1.png", "a b.png"):
        (Path(folder.name) / name).touch()
    (Path(folder.name) / "run").mkdir()
    return Path(folder.name)


set_hypothesis_home_dir(place())  # else it leaves a folder in the present one


def file_of(content: bytes, name: str) -> Path:
    file = place() / name
    file.write_bytes(content)
    return file


@st.composite
def damaged(draw: st.DrawFn, sound: Callable[[], list[bytes]]) -> bytes:
    """Replace a few slices of a sound file by other bytes, longer or shorter ones, or none."""
    content = bytearray(draw(st.sampled_from(sound())))
    for _ in range(draw(st.integers(0, 6))):
        at = draw(st.integers(0, min(len(content), 2000)) | st.integers(0, len(content)))
        end = at + draw(st.integers(0, 64) | st.just(len(content)))
        content[at:end] = draw(st.binary(max_size=40) | st.just(bytes(content[at:end] * 2)))
    return bytes(content)


NASTY = st.sampled_from(['"', '""', ",", "\n", "\r", "\0", "..", "/", "~", "\ufeff", "\u2028", "\x1b", "path", "label"])
CELL = st.one_of(
    st.sampled_from(["0.png", "1.png", "a b.png", "x", "y", "train", "val", "test", ""]),
    st.text(max_size=12),
    st.lists(NASTY, max_size=6).map("".join),
)
ROWS = st.builds(
    lambda columns, rows: "\n".join(",".join(row) for row in [columns, *rows]),
    st.sampled_from([["path", "label"], ["path", "label", "split"], ["label", "path", "id"]]) | st.lists(CELL),
    st.lists(st.lists(CELL, max_size=4), max_size=4),
)
MANIFESTS = st.builds(
    lambda text, encoding: text.encode(encoding, "replace"),
    ROWS,
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "latin-1"]),
)


@cache
def images() -> list[bytes]:
    pixels = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    written = []
    for kind, image, options in [
        ("JPEG", pixels, {"exif": exif}),
        ("JPEG", pixels.convert("CMYK"), {}),
        ("PNG", pixels.convert("P"), {"transparency": 3}),
        ("PNG", Image.fromarray(np.zeros((9, 7), np.uint16)), {}),
        ("GIF", pixels, {"save_all": True, "append_images": [pixels] * 2}),
        ("BMP", pixels, {}),
        ("WEBP", pixels.convert("RGBA"), {"lossless": True}),
        ("TIFF", pixels, {"compression": "tiff_lzw", "exif": exif}),
        ("TIFF", Image.fromarray(np.ones((9, 7), np.float32)), {}),
        ("PPM", pixels, {}),
        ("AVIF", pixels, {}),
    ]:
        stream = io.BytesIO()
        image.save(stream, kind, **options)
        written.append(stream.getvalue())
    return written


HEADERS = st.one_of(
    st.from_regex(rb"P[1-6Ff][ \n][0-9#-]{1,12} [0-9.-]{1,12}[ \n][0-9.-]{0,6}\n.{0,20}", fullmatch=True),
    st.builds(
        bytes.__add__, st.sampled_from([b"GIF89a", b"BM", b"\x89PNG\r\n\x1a\n", b"II*\0", b"MM\0*"]), st.binary()
    ),
)
WEIGHTS = {"w": torch.ones(2, 3), "b": torch.zeros(3, dtype=torch.float16), "n": torch.tensor(1)}
PREPROCESSING = {"size": 8, "fit": "squash", "mean": [0, 0, 0], "std": [1, 1, 1]}
FACTS = {"backbone": "x", "backbone_kind": "timm", "classes": ["a", "b"], "epoch": 1, "preprocessing": PREPROCESSING}
NAMES = {"classes": list(SOME.classes), "keys": list(SOME.keys), "names": SOME.names}
RECORD = {"schema_version": 1, "status": "done", "best": {"accuracy": 0.5}, "overrides": ["a=1"], "pid": 1, "host": "x",
          "started": "2026-01-01", "seconds": {"total": 3.0}, "dataset": "digits", "keep_best": "accuracy"}  # fmt: skip
CONFIG = b"seed: 3\nepochs: 2\ndataset: {kind: digits, name: digits, classes: ['1', '2']}\nfreeze:\n  kind: head\n"


@cache
def state_dicts() -> list[bytes]:
    written = []
    for new in (True, False):
        stream = io.BytesIO()
        torch.save({"state_dict": {"w": torch.ones(2, 3)}, "epoch": 3}, stream, _use_new_zipfile_serialization=new)
        written.append(stream.getvalue())
    return written


JSON = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
for _ in range(2):
    JSON = JSON | st.lists(JSON, max_size=4) | st.dictionaries(st.text(max_size=8), JSON, max_size=4)


def claims(facts: dict[str, Any]) -> st.SearchStrategy[str]:
    """JSON of the facts with other values for some keys, at the top and one level below."""
    others = st.dictionaries(st.sampled_from([*facts, "new"]), JSON, max_size=3)
    below = st.dictionaries(st.sampled_from(["size", "fit", "mean", "std"]), JSON, max_size=1)
    nested = {"preprocessing": PREPROCESSING} if "preprocessing" in facts else {}
    merged = lambda new, inner: {**facts, **{key: value | inner for key, value in nested.items()}, **new}  # noqa: E731
    return st.builds(merged, others, below).map(json.dumps)


def packed(tensors: dict[str, torch.Tensor], text: str) -> bytes:
    return save(tensors, metadata={"tlcli": text})


def read_manifest(content: bytes) -> None:
    spec = manifest_spec(file_of(content, "labels.csv"))
    listing = list_manifest(spec.file, spec.root, ClassChoice())
    for rows in listing.splits.values():
        for path, label in zip(*rows, strict=True):
            assert (place() / path).is_file() and 0 <= label < len(listing.classes)


def read_pixels(content: bytes) -> None:
    for source in (io.BytesIO(content), file_of(content, "image.jpg")):
        with ours():
            pixels = read_image(source)
            assert (pixels.dtype, pixels.ndim, pixels.shape[2]) == (np.uint8, 3, 3)
            assert pixels.size


def read_tensors(content: bytes, name: str) -> None:
    assert all(isinstance(tensor, torch.Tensor) for tensor in read_weights(file_of(content, name)).state.values())


def read_logits(content: bytes) -> None:
    found = read_predictions(file_of(content, "p.safetensors"))
    assert found.logits.shape == (len(found.keys), len(found.classes))
    assert all(0 <= label < len(found.classes) for label in found.labels.tolist())


def read_record(content: bytes) -> None:
    file_of(content, "run/run.json")
    assert isinstance(read_entry(place() / "run")["status"], str)
    open_run(place() / "run")


def read_config(content: bytes) -> None:
    file_of(content, "run/config.yaml")
    assert isinstance(load_spec(RunDir(place() / "run")), TrainSpec)


def read_shards(content: bytes, name: str) -> None:
    spec = tar_spec if name.endswith(".tar") else parquet_spec
    for split in spec(file_of(content, name)).load(Reporter()).splits.values():
        for i in range(len(split)):
            with ours():
                assert split.read(i).ndim == 3


@cache
def shards(ending: str) -> list[bytes]:
    """Return archives, with a name that needs a header of its own, or parquet files, of three images."""
    files, names = images()[:3], ["a", "b", "c" * 120]
    if ending == ".tar":
        labels = {f"{name}.cls": name[:1].encode() for name in names}
        members = [*zip((f"{name}.png" for name in names), files, strict=True), *labels.items()]
        return [write_tar(place() / "sound.tar", members).read_bytes()]
    labelled = ([0, 1, 1], ["x", "y"]), (["x", "y", "y"], None)
    return [write_parquet(place() / "y.parquet", files, *own, rows_per_group=2).read_bytes() for own in labelled]


ANYTHING = st.binary(max_size=300)
LOGITS = {"logits": SOME.logits, "labels": SOME.labels}
TRIED: dict[str, tuple[Callable[[bytes], None], st.SearchStrategy[bytes]]] = {
    "manifests": (read_manifest, MANIFESTS | damaged(lambda: [b"path,label\n0.png,x\n1.png,y\n"])),
    "images": (read_pixels, damaged(images) | ANYTHING | HEADERS),
    "archives": (lambda content: read_shards(content, "x.tar"), damaged(lambda: shards(".tar")) | ANYTHING),
    "parquet": (lambda content: read_shards(content, "x.parquet"), damaged(lambda: shards(".parquet")) | ANYTHING),
    "checkpoints": (
        lambda content: read_tensors(content, "w.safetensors"),
        damaged(lambda: [save(WEIGHTS), packed(WEIGHTS, json.dumps(FACTS))])
        | ANYTHING
        | (claims(FACTS) | st.text(max_size=60)).map(lambda text: packed({"w": torch.ones(1)}, text)),
    ),
    "state dicts": (lambda content: read_tensors(content, "w.pth"), damaged(state_dicts) | ANYTHING),
    "predictions": (
        read_logits,
        damaged(lambda: [packed(LOGITS, json.dumps(NAMES))])
        | ANYTHING
        | claims(NAMES).map(lambda text: packed(LOGITS, text)),
    ),
    "records": (read_record, claims(RECORD).map(str.encode) | ANYTHING),
    "configs": (read_config, damaged(lambda: [CONFIG])),
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, about what it reads
@pytest.mark.parametrize(
    "how_often", [pytest.param(FEW, id="few"), pytest.param(MANY, marks=pytest.mark.slow, id="many")]
)
@pytest.mark.parametrize("name", TRIED)
def test_any_bytes_are_read_or_refused_in_one_line(name: str, how_often: settings, monkeypatch) -> None:
    # what says that it has more pixels is not unpacked, so that an example takes milliseconds
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500_000)
    reads, examples = TRIED[name]

    def read(example: bytes) -> None:
        with ours():
            reads(example)

    how_often(given(examples)(read))()
