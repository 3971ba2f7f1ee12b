"""Bytes that nobody thought of: whatever is in a file, what reads it gives something, or an error of ours in one line.

By default a few examples each, always the same; `pytest -m slow tests/faults/test_fuzz.py` tries new ones, many.
"""

import csv
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

from tests.data.samples import manifest_spec
from tests.faults.programs import scale
from tests.runs.test_predictions import SOME
from tlcli.cli.compose import load_spec
from tlcli.data.decode import BadImage, read_image
from tlcli.errors import TlcliError
from tlcli.models.build import read_weights
from tlcli.runs.index import read_entry
from tlcli.runs.run_dir import RunDir, open_run, read_predictions

FEW = settings(max_examples=50, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
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
    return Path(folder.name)


set_hypothesis_home_dir(place())  # else it leaves a folder in the present one


def file_of(content: bytes, name: str) -> Path:
    file = place() / name
    file.write_bytes(content)
    return file


@st.composite
def damaged(draw: st.DrawFn, sound: Callable[[], list[bytes]]) -> bytes:
    """One of the sound files with a few changes: bytes replaced, left out, put in or repeated, or the end cut off."""
    content = bytearray(draw(st.sampled_from(sound())))
    for _ in range(draw(st.integers(0, 6))):
        at = draw(st.integers(0, max(0, min(len(content), 2000) - 1)) | st.integers(0, max(0, len(content) - 1)))
        match draw(st.sampled_from(["flip", "replace", "insert", "remove", "repeat", "cut"])):
            case "flip" if content:
                content[at] ^= 1 << draw(st.integers(0, 7))
            case "replace":
                new = draw(st.binary(min_size=1, max_size=8))
                content[at : at + len(new)] = new
            case "insert":
                content[at:at] = draw(st.binary(max_size=40))
            case "remove":
                del content[at : at + draw(st.integers(1, 64))]
            case "repeat":
                content[at:at] = content[at : at + draw(st.integers(1, 64))]
            case "cut":
                del content[at:]
    return bytes(content)


NASTY = st.sampled_from(['"', '""', ",", "\n", "\r", "\0", "..", "/", "~", "\ufeff", "\u2028", "\x1b", "path", "label"])
CELL = st.one_of(
    st.sampled_from(["0.png", "1.png", "a b.png", "x", "y", "train", "val", "test", ""]),
    st.text(max_size=12),
    st.lists(NASTY, max_size=6).map("".join),
    st.text(min_size=250, max_size=300, alphabet="x/."),
)


@st.composite
def manifests(draw: st.DrawFn) -> bytes:
    columns = draw(
        st.sampled_from([["path", "label"], ["path", "label", "split"], ["label", "path", "id"]])
        | st.lists(CELL, max_size=5)
    )
    rows = draw(st.lists(st.lists(CELL, min_size=len(columns), max_size=len(columns)) | st.lists(CELL), max_size=8))
    text = io.StringIO(newline="")
    if draw(st.booleans()):
        csv.writer(text, lineterminator=draw(st.sampled_from(["\n", "\r\n", "\r"]))).writerows([columns, *rows])
    else:
        text.write("\n".join(",".join(row) for row in [columns, *rows]))
    encoding = draw(st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "latin-1"]))
    return text.getvalue().encode(encoding, "replace")


@cache
def images() -> list[bytes]:
    pixels = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    written = []
    for kind, image, options in [
        ("JPEG", pixels, {"exif": exif}),
        ("JPEG", pixels.convert("CMYK"), {}),
        ("PNG", pixels.convert("RGBA"), {"exif": exif}),
        ("PNG", pixels.convert("P"), {"transparency": 3}),
        ("PNG", Image.fromarray(np.zeros((9, 7), np.uint16)), {}),
        ("GIF", pixels, {"save_all": True, "append_images": [pixels] * 2}),
        ("BMP", pixels, {}),
        ("DIB", pixels.convert("1"), {}),
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

FACTS = {"backbone": "x", "backbone_kind": "timm", "classes": ["a", "b"], "epoch": 1,
         "preprocessing": {"size": 8, "fit": "squash", "mean": [0, 0, 0], "std": [1, 1, 1]}}  # fmt: skip


@cache
def checkpoints() -> list[bytes]:
    tensors = {"w": torch.ones(2, 3), "b": torch.zeros(3, dtype=torch.float16), "n": torch.tensor(1)}
    return [save(tensors), save(tensors, metadata={"tlcli": json.dumps(FACTS)})]


@cache
def state_dicts() -> list[bytes]:
    written = []
    for new in (True, False):
        stream = io.BytesIO()
        torch.save({"state_dict": {"w": torch.ones(2, 3)}, "epoch": 3}, stream, _use_new_zipfile_serialization=new)
        written.append(stream.getvalue())
    return written


@cache
def predictions() -> list[bytes]:
    facts = {"classes": SOME.classes, "keys": SOME.keys, "names": SOME.names}
    return [save({"logits": SOME.logits, "labels": SOME.labels}, metadata={"tlcli": json.dumps(facts)})]


JSON = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
for _ in range(2):
    JSON = JSON | st.lists(JSON, max_size=4) | st.dictionaries(st.text(max_size=8), JSON, max_size=4)


@st.composite
def claims(draw: st.DrawFn, facts: dict[str, Any]) -> str:
    own = json.loads(json.dumps(facts))
    for key in draw(st.lists(st.sampled_from([*facts, "new"]), max_size=3)):
        own[key] = draw(JSON)
    if isinstance(own.get("preprocessing"), dict) and draw(st.booleans()):
        own["preprocessing"][draw(st.sampled_from(["size", "fit", "mean", "std"]))] = draw(JSON)
    return json.dumps(own)


RECORD = {
    "schema_version": 1,
    "status": "done",
    "best": {"accuracy": 0.5},
    "overrides": ["a=1"],
    "started": "2026-01-01",
    "seconds": {"total": 3.0},
    "pid": 1,
    "host": "x",
    "dataset": "digits",
    "keep_best": "accuracy",
}
CONFIG = b"seed: 3\nepochs: 2\ndataset: {kind: digits, name: digits, classes: ['1', '2']}\nfreeze:\n  kind: head\n"


def manifest_is_read(content: bytes) -> None:
    with ours():
        listing = manifest_spec(file_of(content, "labels.csv")).list_files()
        for rows in listing.splits.values():
            assert all((place() / path).is_file() and 0 <= label < len(listing.classes) for path, label in rows)


def image_is_read(content: bytes) -> None:
    for source in (io.BytesIO(content), file_of(content, "image.jpg")):
        with ours():
            pixels = read_image(source)
            assert (pixels.dtype, pixels.ndim, pixels.shape[2]) == (np.uint8, 3, 3)
            assert pixels.size


def checkpoint_is_read(content: bytes) -> None:
    with ours():
        read_weights(file_of(content, "w.safetensors"))


def state_dict_is_read(content: bytes) -> None:
    with ours():
        found = read_weights(file_of(content, "w.pth"))
        assert all(isinstance(tensor, torch.Tensor) for tensor in found.state.values())


def predictions_are_read(content: bytes) -> None:
    with ours():
        found = read_predictions(file_of(content, "p.safetensors"))
        assert found.logits.shape == (len(found.keys), len(found.classes))
        assert all(0 <= label < len(found.classes) for label in found.labels.tolist())


def record_is_read(content: bytes) -> None:
    (place() / "run").mkdir(exist_ok=True)
    file_of(content, "run/run.json")
    with ours():
        open_run(place() / "run")
    assert isinstance(read_entry(place() / "run").status, str)


def config_is_read(content: bytes) -> None:
    (place() / "run").mkdir(exist_ok=True)
    file_of(content, "run/config.yaml")
    with ours():
        load_spec(RunDir(place() / "run"))


def packed(**tensors: torch.Tensor) -> Callable[[str], bytes]:
    return lambda text: save(tensors, metadata={"tlcli": text})


ANYTHING = st.binary(max_size=300)
OF_PREDICTIONS = claims({"classes": list(SOME.classes), "keys": list(SOME.keys), "names": list(SOME.names)})
OF_CHECKPOINTS = (claims(FACTS) | st.text(max_size=60)).map(packed(w=torch.ones(1)))
RECORDS = claims(RECORD).map(str.encode) | damaged(lambda: [json.dumps(RECORD).encode()])
TRIED: dict[str, tuple[Callable[[bytes], None], st.SearchStrategy[bytes]]] = {
    "manifests": (manifest_is_read, manifests() | damaged(lambda: [b"path,label\n0.png,x\n1.png,y\n"])),
    "images": (image_is_read, damaged(images) | ANYTHING | HEADERS),
    "checkpoints": (checkpoint_is_read, damaged(checkpoints) | ANYTHING),
    "state dicts": (state_dict_is_read, damaged(state_dicts) | ANYTHING),
    "claims of checkpoints": (checkpoint_is_read, OF_CHECKPOINTS),
    "predictions": (predictions_are_read, damaged(predictions) | ANYTHING),
    "claims of predictions": (
        predictions_are_read,
        OF_PREDICTIONS.map(packed(logits=SOME.logits, labels=SOME.labels)),
    ),
    "records": (record_is_read, RECORDS | ANYTHING),
    "configs": (config_is_read, damaged(lambda: [CONFIG])),
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, about what it reads
@pytest.mark.parametrize(
    "how_often", [pytest.param(FEW, id="few"), pytest.param(MANY, marks=pytest.mark.slow, id="many")]
)
@pytest.mark.parametrize("name", TRIED)
def test_what_reads_bytes_gives_something_or_one_line(
    name: str, how_often: settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    # what says that it has more pixels is not unpacked, so that an example takes milliseconds
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500_000)
    reads, examples = TRIED[name]
    how_often(given(examples)(lambda example: reads(example)))()
