"""Manifests that name what they should not, or in a way that is not clear.

Byte order marks, CRLF, quoted commas, duplicates, conflicting labels and paths out of the root are in
tests/data/test_listing.py.
"""

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.data.samples import manifest_spec, save_image
from tests.faults.refusals import refused, untouched
from tlcli.data.dataset import Dataset, load_dataset
from tlcli.reporter import Reporter
from tlcli.specs import OnBad

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """write(text): labels.csv beside images 0.png to 7.png and whatever else a path may lead to."""
    for i in range(8):
        save_image(tmp_path / "m" / f"{i}.png", seed=i)
    save_image(tmp_path / "outside.png", seed=9)
    for name, target in (("circle", "circle"), ("gone", "nowhere"), ("out.png", "../outside.png"), ("up", "..")):
        (tmp_path / "m" / name).symlink_to(target)
    (tmp_path / "m" / "folder.png").mkdir()
    os.mkfifo(tmp_path / "m" / "pipe.png")

    def make(text: str | bytes) -> Path:
        file = tmp_path / "m" / "labels.csv"
        file.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape"))
        return file

    return make


def load(file: Path, on_bad: OnBad = OnBad.error) -> Dataset:
    return load_dataset(manifest_spec(file, on_bad=on_bad), seed=0, reporter=Reporter())


REST = "".join(f"{i}.png,{'xy'[i % 2]}\n" for i in range(1, 8))
MISTAKES = {
    "a pipe": ("path,label\npipe.png,x\n", "line 2: ", "pipe.png: not a file, or a broken link"),
    "a folder": ("path,label\nfolder.png,x\n", "folder.png: not a file"),
    "a link to itself": ("path,label\ncircle,x\n", "circle: not a file, or a broken link"),
    "a link to nothing": ("path,label\ngone,x\n", "gone: not a file, or a broken link"),
    "through a circle": ("path,label\ncircle/../0.png,x\n", "line 2: ", "circle/../0.png: no such file"),
    "a link, then ..": ("path,label\nup/../0.png,x\n", "line 2: up/../0.png lies outside"),
    "out by a link and dots": ("path,label\nup/m/../outside.png,x\n", "line 2: up/m/../outside.png lies outside"),
    "dots to the root of all": ("path,label\n" + "../" * 40 + "etc/passwd,x\n", "lies outside", "dataset.root"),
    "a home": ("path,label\n~/0.png,x\n", "~/0.png: no such file"),
    "an address": ("path,label\nhttps://example.com/0.png,x\n", "no such file"),
    "a device": ("path,label\n/dev/zero,x\n", "line 2: /dev/zero lies outside"),
    "a long name": ("path,label\n" + "x" * 300 + ".png,x\n", "line 2", ".png: no such file"),
    "a long path": ("path,label\n" + "x/" * 3000 + "0.png,x\n", "line 2", "0.png: no such file"),
    "a NUL in a path": ("path,label\n../0\0.png,x\n", "line 2: the path contains a NUL character"),
    "a NUL in a label": ("path,label\n0.png,x\0\n", "line 2: the label contains a NUL character"),
    "a line break in a path": ('path,label\n"0\n.png",x\n', "line 3: ", "no such file"),
    "two label columns": ("path,label,label\n0.png,x,y\n", "two columns are called 'label'; rename one"),
    "two path columns": ("path, path ,label\n0.png,1.png,y\n", "two columns are called 'path'; rename one"),
    "a mark alone": ("\ufeff", "no column 'path'", "columns: none"),
    "blank lines alone": ("\n\n\n", "no column 'path'"),
    "tabs": ("path\tlabel\n0.png\tx\n", "no column 'path'"),
    "a web page": ("<!DOCTYPE html>\n<html></html>\n", "no column 'path'"),
    "Excel's first line": ("sep=,\npath,label\n0.png,x\n", "no column 'path' in its first line (columns: sep=, "),
    "every byte": (bytes(range(256)), "not UTF-8 text; save it as CSV in UTF-8"),
    "spaces for a label": ("path,label\n0.png,  \n", "line 2: no label"),
    "an open quote": ('path,label\n0.png,x\n"1.png,y\n' + REST, "not CSV"),
    "accents in two ways": ("path,label\n0.png,caf\u00e9\n1.png,cafe\u0301\n", "how their accents are encoded"),
    "terminal codes": ("path,label\n\x1b[2J\x1b]0;x\x07.png,x\n", "no such file"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line(case: str, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket.socket, "connect", lambda *args: pytest.fail("it asked the network"))
    text, *words = MISTAKES[case]
    file = write(text)
    refused(lambda: manifest_spec(file).check(), 2, f"{file}", *words, keeps=tmp_path)


FILES: dict[str, tuple[str, str]] = {
    "itself a pipe": ("pipe.png", "not a file. dataset.file names a CSV file"),
    "a folder": ("folder.png", "not a file."),
    "a circle": ("circle", "not a file."),
    "long": ("x" * 300, "no such file."),
    "a home": ("~nobody-at-all/x.csv", "no such home directory; write the whole path"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_is_none(case: str, write: Write, tmp_path: Path) -> None:
    name, words = FILES[case]
    place = Path(name) if name.startswith("~") else tmp_path / "m" / name
    refused(lambda: manifest_spec(place).check(), 2, words, keeps=tmp_path)


def test_a_root_that_is_none(write: Write, tmp_path: Path) -> None:
    file = write("path,label\n")
    spec = manifest_spec(file, root=str(tmp_path / "m" / "circle"))
    refused(lambda: spec.check(), 2, "circle: cannot read this folder (too many levels", keeps=tmp_path)


def test_a_link_inside_may_lead_outside_as_in_folders(write: Write, tmp_path: Path) -> None:
    file = write("path,label\nout.png,x\n" + REST)
    with untouched(tmp_path):
        assert len(load(file).train) > 0


@pytest.mark.parametrize("label", ["=1+1", "-", "a/b", "..", "new\nline", "\N{CAT FACE}", "x" * 1000, "<b>", "null"])
def test_any_label_will_do(write: Write, tmp_path: Path, label: str) -> None:
    rows = "".join(f'{i}.png,"{(label, "other")[i % 2]}"\n' for i in range(8))
    file = write("path,label\n" + rows)
    with untouched(tmp_path):
        data = load(file)
    assert set(data.classes) == {label, "other"}


def test_what_a_manifest_names_need_not_be_an_image(write: Write, tmp_path: Path) -> None:
    file = write("path,label\nlabels.csv,x\n" + REST)
    refused(lambda: load(file), 1, "1 file does not decode", "labels.csv (not an image)", keeps=tmp_path)
    with untouched(tmp_path):
        assert load(file, OnBad.skip).bad_files == ((str(file), "not an image"),)
