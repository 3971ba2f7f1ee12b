"""Files that are no images, images of every kind, and names of every kind: in training and in predict alike."""

import csv
import io
import os
import socket
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, PngImagePlugin

from tests.data.samples import folder_spec, save_image
from tests.data.test_dataset import all_names
from tests.data.test_decode import png
from tests.faults.refusals import refused, untouched
from tlcli.data.batches import ImageBatches, Preprocessing
from tlcli.data.dataset import Dataset, load_dataset
from tlcli.data.listing import expand_image_paths
from tlcli.predict import decode_image
from tlcli.reporter import Reporter
from tlcli.runs.load import pixels_of
from tlcli.runs.run_dir import RunDir
from tlcli.specs import Fit, OnBad

PREPROCESSING = Preprocessing(16, Fit.squash, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
AS_ROOT = pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for i in range(16):
        save_image(tmp_path / "photos" / "ab"[i % 2] / f"{i // 2}.png", seed=i)
    return tmp_path / "photos"


def load(root: Path, on_bad: OnBad = OnBad.error) -> Dataset:
    return load_dataset(folder_spec(root, on_bad=on_bad), seed=0, reporter=Reporter())


def as_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        here = Path.cwd()
        os.chdir(path.parent)  # the name of a socket may have about 100 bytes
        one.bind(path.name)
        os.chdir(here)


def as_unreadable(path: Path) -> None:
    save_image(path)
    path.chmod(0)


def as_damaged(path: Path) -> None:
    """Write a PNG with a wrong checksum."""
    content = bytearray(save_image(path).read_bytes())
    content[-20] ^= 0xFF
    path.write_bytes(content)


def as_bomb_of_text(path: Path) -> None:
    """Write a PNG whose compressed comment of 10 kB expands to 10 MB."""
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "x" * 10_000_000, zip=True)
    Image.new("RGB", (1, 1)).save(path, pnginfo=text)


TALL_GIF = b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + b",\0\0\0\0\1\0\1\0\0\2\2D\1\0;"
FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "zero bytes.jpg": (lambda path: path.touch(), "empty"),
    "web page.jpg": (lambda path: path.write_text("<!DOCTYPE html><html></html>"), "not an image"),
    "archive.jpg": (lambda path: path.write_bytes(b"PK\3\4" + bytes(200)), "not an image"),
    "truncated.jpg": (lambda path: path.write_bytes(save_image(path).read_bytes()[:-99]), "truncated"),
    "checksum.png": (as_damaged, "damaged"),
    "bomb.png": (lambda path: path.write_bytes(png(30_000, 30_000)), "too many pixels"),
    "bomb.gif": (lambda path: path.write_bytes(TALL_GIF), "too many pixels"),
    "bomb of text.png": (as_bomb_of_text, "damaged (Decompressed"),
    "pipe.jpg": (os.mkfifo, "not a regular file"),
    "socket.jpg": (as_socket, "not a regular file"),
    "endless.jpg": (lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
    "dangling.jpg": (lambda path: path.symlink_to("nowhere.jpg"), "no such file or directory"),
    "circle.jpg": (lambda path: path.symlink_to(path.name), "too many levels of symbolic links"),
    "unreadable.jpg": (as_unreadable, "permission denied"),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[AS_ROOT] if name.startswith("unread") else []) for name in FAULTS]
)
def test_a_bad_file_is_named_left_out_and_answered_by_predict(name: str, photos: Path) -> None:
    make, reason = FAULTS[name]
    file = photos / "a" / name
    whole = {str(path) for path in photos.rglob("*.png")}
    make(file)
    line = refused(lambda: load(photos), 1, f"1 file does not decode: {file} (", reason, keeps=photos)
    assert line.endswith("; dataset.on_bad=skip leaves them out")
    with untouched(photos):
        data = load(photos, OnBad.skip)
        path, answer = decode_image(str(file), PREPROCESSING)
    ((bad, why),) = data.bad_files
    assert bad == path == str(file)
    assert isinstance(answer, str)
    assert reason in why and reason in answer
    assert "\n" not in answer
    assert "files that do not decode are left out: 1, see bad_files.csv" in data.notes
    assert Counter(all_names(data)) == Counter(whole)


@pytest.mark.parametrize("workers", [0, 2])
def test_no_image_is_replaced_by_its_neighbor(photos: Path, workers: int) -> None:
    for i in (0, 3, 7):
        (photos / "a" / f"{i}.png").write_bytes(b"")
    data = load(photos, OnBad.skip)
    given = []
    for split in (data.train, data.val, data.test):
        batches = ImageBatches(split, PREPROCESSING, batch_size=3, workers=workers)
        given += [pair for images, labels in batches.epoch(1) for pair in zip(images, labels.tolist(), strict=True)]
    wanted = [(p, "ab".index(p.parent.name)) for p in photos.rglob("*.png") if p.stat().st_size]
    for path, label in wanted:
        own = PREPROCESSING.apply(pixels_of(path))
        assert sum(torch.equal(own, x) and label == y for x, y in given) == 1, path
    assert len(given) == len(wanted) == 13


ROTATED = Image.Exif()
ROTATED[0x0112] = 6
ODD: dict[str, tuple[str, tuple[int, int], dict[str, Any]]] = {
    "cmyk.jpg": ("CMYK", (40, 30), {}),
    "clear palette.gif": ("P", (40, 30), {"transparency": 3}),
    "rgba.webp": ("RGBA", (40, 30), {"lossless": True}),
    "float.tif": ("F", (40, 30), {}),
    "1 bit.png": ("1", (40, 30), {}),
    "rotated.jpg": ("RGB", (40, 30), {"exif": ROTATED}),
    "animated.gif": ("RGB", (40, 30), {"save_all": True, "append_images": [Image.new("RGB", (40, 30), "red")]}),
    "png.jpg": ("RGB", (40, 30), {"format": "PNG"}),
    "one pixel.png": ("RGB", (1, 1), {}),
    "wide.png": ("RGB", (20_000, 1), {}),
}


@pytest.mark.parametrize("fit", Fit)
def test_train_and_predict_see_the_same_images(photos: Path, fit: Fit) -> None:
    for name, (mode, size, options) in ODD.items():
        image = Image.radial_gradient("L").resize(size).convert(mode)
        image = image.point(lambda value: value / 255) if mode == "F" else image
        image.save(photos / "a" / name, **options)
    preprocessing = Preprocessing(24, fit, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    with untouched(photos):
        data = load(photos)
        assert set(ODD) <= {Path(name).name for name in all_names(data)}
        for split in (data.train, data.val, data.test):
            batches = ImageBatches(split, preprocessing, batch_size=4, workers=0)
            for i, trained in enumerate(torch.cat([x for x, _ in batches.in_order()])):
                answered = decode_image(split.name(i), preprocessing)[1]
                assert isinstance(answered, torch.Tensor)
                assert torch.equal(trained, answered), split.name(i)
                assert torch.equal(trained, preprocessing.apply(pixels_of(split.name(i)))), split.name(i)


NAMES = [
    "Zo\u00eb \u732b \N{CAT FACE}.png",
    "\u05d0\u05d1\u05d2 right to left.png",
    "\u202egnp.exe.png",
    "new\nline.png",
    "--output.png",
    "=HYPERLINK(1).png",
    "[1]*?.png",
    "quote'and\"quote.png",
    "100%s {x} ${oc.env:HOME}.png",
    "\x1b[31mred\x07.png",
    "\u732b" * 83 + "ab.png",
    os.fsdecode(b"not \xff\xfe utf-8.png"),
]


def test_any_name_will_do(photos: Path) -> None:
    files = [str(save_image(photos / "a" / name, seed=50 + i)) for i, name in enumerate(NAMES)]
    with untouched(photos):
        data = load(photos)
        assert [all_names(data).count(file) for file in files] == [1] * len(files)
        assert set(files) <= set(expand_image_paths([str(photos / "a")]))
        for file in files:
            assert list(expand_image_paths([file])) == [file]
            assert isinstance(decode_image(file, PREPROCESSING)[1], torch.Tensor)
        assert len({split.fingerprint() for split in (data.train, data.val, data.test)}) == 3


@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name)[:24])
def test_a_bad_file_of_any_name_is_one_line_and_one_row(photos: Path, name: str, tmp_path: Path) -> None:
    file = photos / "a" / name
    file.write_bytes(b"")
    refused(lambda: load(photos), 1, "1 file does not decode: ", "(empty)", keeps=photos)
    run = RunDir(tmp_path)
    run.write_bad_files(load(photos, OnBad.skip).bad_files)
    text = run.bad_files_file.read_bytes().decode("utf-8", "surrogateescape")
    assert list(csv.reader(io.StringIO(text, newline=""))) == [["file", "reason"], [str(file), "empty"]]
