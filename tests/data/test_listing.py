"""Layouts that people have, and the one line that each mistake gets."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.data.samples import COMMON, digits_spec, folder_spec, list_spec, manifest_spec, save_image, torchvision_spec
from tlcli.data.listing import Listing
from tlcli.data.sources import ImageFolderSpec
from tlcli.errors import UsageError
from tlcli.specs import DatasetSpec

MakeFolder = Callable[..., Path]


def refused(spec: DatasetSpec, *words: str) -> None:
    """Assert that the spec raises a UsageError of one line with these words."""
    with pytest.raises(UsageError) as caught:
        spec.check()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def files(listing: Listing, root: Path, split: str) -> list[tuple[str, str]]:
    return [(key, listing.classes[label]) for key, label in listing.splits[split]]


def test_imports_nothing_slow() -> None:
    code = "import sys, tlcli.data.listing; print({'torch', 'numpy', 'sklearn', 'PIL'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


# -- folders ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("val", ["val", "valid", "validation", "Val"])
def test_split_folders(make_folder: MakeFolder, val: str) -> None:
    root = make_folder({f"{split}/{name}": 1 for split in ("train", val, "test") for name in ("a", "b")})
    listing = list_spec(folder_spec(root))
    assert set(listing.splits) == {"train", "val", "test"}
    assert files(listing, root, "val") == [(f"{val}/a/000.png", "a"), (f"{val}/b/000.png", "b")]


def test_a_class_may_be_called_train(make_folder: MakeFolder) -> None:
    assert list_spec(folder_spec(make_folder({"train": 1, "bus": 1}))).classes == ("bus", "train")


def test_what_is_an_image(make_folder: MakeFolder) -> None:
    root = make_folder({"a": 1, "b": 1, ".git/x": 1, "__MACOSX/a": 1, "a/.cache": 1, "a/__MACOSX": 1})
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", "._000.png", ".hidden.jpg", "notes.txt", "x.jpg.json"):
        (root / "a" / name).write_bytes(b"")
    for name in ("a/UPPER.JPG", "a/deep/er/x.jpeg", "a/y.webp", "a/z.TiFF", "a/v.bmp", "a/w.pgm", "a/u.gif"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")  # listing opens nothing
    names = {path for path, _ in files(list_spec(folder_spec(root)), root, "all")}
    want = {"UPPER.JPG", "deep/er/x.jpeg", "y.webp", "z.TiFF", "v.bmp", "w.pgm", "u.gif", "000.png"}
    assert names == {f"a/{name}" for name in want} | {"b/000.png"}


def test_links(make_folder: MakeFolder, tmp_path: Path) -> None:
    root = make_folder({"a": 1})
    save_image(tmp_path / "elsewhere" / "x.png")
    (root / "b").symlink_to(tmp_path / "elsewhere")
    (root / "a" / "loop").symlink_to(root)
    (root / "a" / "replace_with_hardlink.png").symlink_to(tmp_path / "elsewhere" / "x.png")
    listing = list_spec(folder_spec(root))
    assert [path for path, _ in files(listing, root, "all")] == ["a/000.png", "a/replace_with_hardlink.png", "b/x.png"]


def test_no_such_folder(make_folder: MakeFolder, tmp_path: Path) -> None:
    root = make_folder({"a": 1, "b": 1})
    refused(folder_spec(tmp_path / "fotos"), f"{tmp_path}/fotos: no such folder", "Did you mean 'photos'?")
    refused(folder_spec(tmp_path / "x" / "y"), f"{tmp_path}/x/y: no such folder")
    refused(folder_spec(root / "a" / "000.png"), "000.png: not a folder")
    refused(ImageFolderSpec(**COMMON), "dataset.root is not set")


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ({"": 0}, ["photos: no images found. Expected one subfolder per class."]),
        ({"a": 0, "b": 0}, ["photos: no images found."]),
        ({"set/a": 1, "set/b": 1}, ["photos: only one class, 'set'", "Did you mean", "photos/set?"]),
        ({"x": 0, ".y/train/a": 1}, ["photos: no images found."]),
        ({"one/train/a": 1, "one/train/b": 1, "two": 1}, ["holds a dataset", "photos/one?"]),
        ({"a/train": 1, "a/val": 1, "b/train": 1}, ["photos/a/train: a split inside a class", "photos/train/a"]),
        ({"a": 3}, ["photos: only one class, 'a'"]),
        ({"train/a": 3}, ["photos: only one class, 'a'"]),
        ({"": 2}, ["photos: images lie in the folder itself", "one subfolder per class"]),
        ({"train/a": 1, "train/b": 1, "test": 2}, ["photos/test: images lie in the folder itself"]),
        ({"train": 2, "val": 2}, ["photos/train: images lie in the folder itself"]),
        ({"train/a": 1, "train/b": 0}, ["photos: train/b: no images in this class; add some or remove the folder"]),
        ({"a": 1, "b": 0, "c": 0}, ["photos: b: no images in this class"]),
        ({"train/a": 1, "train/b": 1, "val/a": 1, "val/b": 0}, ["photos: val/b: no images in this class"]),
        ({"train/a": 1, "train/b": 1, "val/a": 1, "val/c": 1, "val/d": 1}, ["val has classes that train lacks: c, d"]),
        ({"train/a": 1, "train/b": 1, "test/B": 1}, ["test has classes that train lacks: B"]),
        ({"Cat": 1, "cat": 1}, ["'Cat' and 'cat' differ only in case"]),
        ({"val/a": 1, "val/b": 1}, ["photos: has val but no train"]),
        ({"train/a": 1, "train/b": 1, "val/a": 1, "valid/a": 1}, ["val and valid both stand for val"]),
    ],
)
def test_mistakes(make_folder: MakeFolder, counts: dict[str, int], words: list[str]) -> None:
    refused(folder_spec(make_folder(counts)), *words)


def test_a_class_folder_as_root(make_folder: MakeFolder) -> None:
    root = make_folder({"train/a": 1, "train/b": 1})
    refused(folder_spec(root / "train" / "a"), "photos/train/a: images lie", f"Did you mean {root / 'train'}?")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_folder(make_folder: MakeFolder) -> None:
    root = make_folder({"a": 1, "b": 1})
    (root / "a").chmod(0)
    refused(folder_spec(root), "photos/a: not readable")
    (root / "a").chmod(0o755)


def test_classes_to_keep(make_folder: MakeFolder) -> None:
    root = make_folder({"train/a": 1, "train/b": 0, "train/c": 2, "val/a": 1, "val/c": 1})
    listing = list_spec(folder_spec(root, classes=["c", "a"]))
    assert listing.classes == ("a", "c")
    assert [label for _, label in listing.splits["train"]] == [0, 1, 1]
    refused(folder_spec(root, classes=["c", "b"]), "photos: train/b: no images in this class")


@pytest.mark.parametrize(
    ("classes", "words"),
    [
        (["cats", "dgos"], ["dataset.classes", "photos has no class 'dgos'. Did you mean 'dogs'?"]),
        (["cats"], ["dataset.classes keeps fewer than two"]),
        ([], ["dataset.classes keeps fewer than two"]),
        (["cats", "cats"], ["dataset.classes keeps fewer than two"]),
    ],
)
def test_classes_that_cannot_be_kept(make_folder: MakeFolder, classes: list[str], words: list[str]) -> None:
    refused(folder_spec(make_folder({"cats": 1, "dogs": 1, "owls": 1}), classes=classes), *words)


def test_classes_of_other_kinds(tmp_path: Path) -> None:
    refused(digits_spec(classes=["1", "11"]), "digits has no class '11'")
    refused(torchvision_spec("CIFAR10", tmp_path, classes=["cat"]), "fewer than two")
    digits_spec(classes=["1", "7"]).check()
    torchvision_spec("CIFAR10", tmp_path).check()


# -- manifest ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """write(text) -> a CSV file beside images a.png, b.png and "c, d.png", and one in a folder next to its own."""
    for name in ("a.png", "b.png", "c, d.png", "../outside.png"):
        save_image(tmp_path / "m" / name)

    def make(text: str | bytes) -> Path:
        file = tmp_path / "m" / "labels.csv"
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return file

    return make


@pytest.mark.parametrize(
    "text",
    [
        'path,label\na.png,x\nb.png,y\n"c, d.png",x\n',
        '\ufeffpath,label\r\na.png,x\r\nb.png,y\r\n"c, d.png",x\r\n',
        'id, label ,path\n1, x ,a.png\n2,y, b.png\n\n3,x,"c, d.png"',
        'path,label,split\na.png,x,\nb.png,y,\n"c, d.png",x,\n',
        'path,label\n./a.png,x\n../m/b.png,y\n"c, d.png",x\n',
    ],
    ids=["plain", "BOM and CRLF", "other columns and spaces", "empty split", "dots"],
)
def test_manifest(write: Callable[..., Path], text: str) -> None:
    listing = list_spec(manifest_spec(write(text)))
    assert listing.classes == ("x", "y")
    assert [(key, label) for key, label in listing.splits["all"]] == [
        ("a.png", 0),
        ("c, d.png", 0),
        ("b.png", 1),
    ]


def test_manifest_with_splits_and_root(write: Callable[..., Path], tmp_path: Path) -> None:
    text = 'path,label,split\nm/a.png,x,train\nm/b.png,y,TRAIN\n"m/c, d.png",x,valid\noutside.png,y,test\n'
    listing = list_spec(manifest_spec(write(text), root=str(tmp_path)))
    assert {split: len(rows) for split, rows in listing.splits.items()} == {"train": 2, "val": 1, "test": 1}
    absolute = f"path,label\n{tmp_path}/outside.png,x\nm/a.png,y\n"
    assert len(list_spec(manifest_spec(write(absolute), root=str(tmp_path))).splits["all"]) == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["no column 'path'", "columns: none"]),
        ("file,label\na.png,x\n", ["no column 'path'", "columns: file, label"]),
        ("path;label\na.png;x\n", ["no column 'path'", "columns: path;label"]),
        ("path,class\na.png,x\n", ["no column 'label'", "columns: path, class"]),
        ("path,label\n", ["no data rows"]),
        ("path,label\na.png,x\nb.png,\n", ["line 3: no label"]),
        ("path,label\na.png,x\nb.png\n", ["line 3: no label"]),
        ("path,label\n,x\n", ["line 2: no path"]),
        ("path,label\nc, d.png,x\n", ["line 2: more fields than columns", "quote"]),
        ("path,label,split\na.png,x,dev\n", ["line 2: split 'dev' is not one of train, val, test"]),
        ("path,label,split\na.png,x,train\nb.png,y,\n", ["line 3: no split", "1 such row"]),
        ("path,label,split\na.png,x,test\nb.png,y,test\n", ["has test but no train"]),
        ("path,label\na.png,x\nn.png,y\no.png,y\np.png,y\n", ["line 3:", "n.png: no such file", "2 more"]),
        ("path,label\na.png,x\n../outside.png,y\n", ["line 3: ../outside.png lies outside", "dataset.root"]),
        ("path,label\na.png,x\n/etc/passwd,y\n", ["line 3: /etc/passwd lies outside"]),
        ("path,label\na.png,x\nb.png,y\n./a.png,x\n", ["a.png is named twice (lines 2 and 4)"]),
        ("path,label\na.png,x\nb.png,y\na.png,y\n", ["a.png has two labels: 'x' (line 2) and 'y' (line 4)"]),
        ("path,label\na.png,x\nb.png,x\n", ["only one class, 'x'"]),
        ("path,label\na.png,x\nb.png,X\n", ["differ only in case"]),
        ("path,label,split\na.png,x,train\nb.png,y,val\n", ["val has classes that train lacks: y"]),
        (b"path,label\n\xff\xfe.png,x\n", ["not UTF-8"]),
        ("path,label\n".encode("utf-16"), ["not UTF-8"]),
        ('path,label\n"a.png,x\n', ["not CSV"]),
        ("path,label\na\0.png,x\n", ["line 2"]),
        ("path,label\n" + "x" * 200_000 + ",x\n", ["not CSV"]),
    ],
)
def test_manifest_mistakes(write: Callable[..., Path], text: Any, words: list[str]) -> None:
    refused(manifest_spec(write(text)), "labels.csv", *words)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (["12.5", "13", "nan"], ["line 2: labels are numbers (12.5)", "single-label classification"]),
        (["cat;dog", "cat", "dog"], ["line 2: label 'cat;dog' is a list", "single-label classification"]),
        (["x", "[0, 1]", "y"], ["line 3: label '[0, 1]' is a list"]),
        (["a|b", "b|c", "c|a"], ["line 2: label 'a|b' is a list"]),
    ],
)
def test_labels_that_are_numbers_or_lists(write: Callable[..., Path], labels: list[str], words: list[str]) -> None:
    rows = [f'{name},"{label}"' for name, label in zip(("a.png", "b.png", '"c, d.png"'), labels, strict=True)]
    refused(manifest_spec(write("path,label\n" + "\n".join(rows))), *words)


@pytest.mark.parametrize("labels", [["3", "7", "3"], ["tench, Tinca tinca", "crane, bird", "crane"], ["-1", "+1", "0"]])
def test_labels_that_only_look_like_it(write: Callable[..., Path], labels: list[str]) -> None:
    rows = [f'{name},"{label}"' for name, label in zip(("a.png", "b.png", '"c, d.png"'), labels, strict=True)]
    assert set(list_spec(manifest_spec(write("path,label\n" + "\n".join(rows)))).classes) == set(labels)


def test_every_problem_of_a_folder_is_named_and_the_rest_is_usable(make_folder: MakeFolder) -> None:
    root = make_folder({"train/a": 2, "train/b": 3, "train/Cat": 2, "train/cat": 1, "test/a": 1, "test/d": 1})
    (root / "train" / "empty").mkdir()
    spec, problems = folder_spec(root).without_bad_classes()
    assert problems == [
        "train/empty: no images in this class; add some or remove the folder",
        "test has classes that train lacks: d",
        "classes 'Cat' and 'cat' differ only in case: rename one",
    ]
    assert list_spec(spec).classes == ("Cat", "a", "b")
    assert folder_spec(root, classes=("a", "b")).without_bad_classes() == (folder_spec(root, classes=("a", "b")), [])


def test_files_that_are_not_images_are_counted(make_folder: MakeFolder) -> None:
    root = make_folder({"a": 2, "b": 2})
    for name in ("x.mp4", "y.MP4", "notes.txt", "noext", ".hidden", "Thumbs.db"):
        (root / "a" / name).touch()
    assert list_spec(folder_spec(root)).ignored == {".mp4": 2, ".txt": 1, "no ending": 1}
