"""Layouts and manifests that people have, hostile ones, and the one line that each mistake gets."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.data.samples import COMMON, digits_spec, folder_spec, manifest_spec, save_image, torchvision_spec
from tests.faults.refusals import refused, untouched
from tlcli.data.dataset import load_dataset
from tlcli.data.listing import Listing, MissingPath, expand_image_paths
from tlcli.data.sources import ImageFolderSpec, ManifestSpec
from tlcli.reporter import Reporter
from tlcli.specs import DatasetSpec, OnBad

MakeFolder = Callable[..., Path]


def keys(listing: Listing, split: str = "all") -> list[tuple[str, str]]:
    return [(key, listing.classes[label]) for key, label in zip(*listing.splits[split], strict=True)]


def assert_refused(spec: DatasetSpec, *words: str, keeps: Path) -> None:
    refused(spec.check, 2, *words, keeps=keeps)


@pytest.mark.parametrize("val", ["val", "valid", "validation", "Val"])
def test_split_folders(make_folder: MakeFolder, val: str) -> None:
    listing = folder_spec(
        make_folder({f"{split}/{name}": 1 for split in ("train", val, "test") for name in ("a", "b")})
    ).list_files()
    assert set(listing.splits) == {"train", "val", "test"}
    assert keys(listing, "val") == [(f"{val}/a/000.png", "a"), (f"{val}/b/000.png", "b")]


def test_a_class_may_be_called_train(make_folder: MakeFolder) -> None:
    assert folder_spec(make_folder({"train": 1, "bus": 1})).list_files().classes == ("bus", "train")


@pytest.mark.parametrize("name", ["run", "tune", "other"])
def test_a_folder_of_runs_is_no_class(make_folder: MakeFolder, name: str) -> None:
    root = make_folder({"a": 1, "b": 1, "outputs/2024-01-02/10-00-00/plots": 1})
    (root / f"outputs/2024-01-02/10-00-00/{name}.json").write_text("{}")
    assert folder_spec(root).list_files().classes == ("a", "b", *(["outputs"] if name == "other" else []))
    assert not folder_spec(root).list_files().ignored.keys() - {".json"}


def test_images_beside_the_folders_of_classes_and_folders_beside_splits_are_counted(make_folder: MakeFolder) -> None:
    assert folder_spec(make_folder({"a": 1, "b": 1, ".": 3})).list_files().ignored == {"image beside the folders": 3}
    root = make_folder({"set/train/a": 1, "set/train/b": 1, "set/train": 2, "set/holdout/a": 1, "set/outputs/x": 0})
    (root / "set/outputs/x/run.json").touch()
    found = folder_spec(root / "set").list_files()
    assert found.ignored == {"image beside the folders": 2, "folder beside the splits": 1}
    assert found.classes == ("a", "b")


def test_classes_may_have_the_same_subfolders(make_folder: MakeFolder) -> None:
    root = make_folder({f"{name}/{time}": 1 for name in ("cat", "dog") for time in ("day", "night")})
    assert folder_spec(root).list_files().classes == ("cat", "dog")


def test_images_are_known_by_their_names_and_other_files_are_counted(make_folder: MakeFolder) -> None:
    skipped = [".git/x", "__MACOSX/a", "a/.cache", "a/__MACOSX", "lost+found", "$RECYCLE.BIN/x", "a/@eaDir", "#recycle"]
    root = make_folder({"a": 1, "b": 1, "a/deep/er": 0, "System Volume Information": 0} | dict.fromkeys(skipped, 1))
    images = {"UPPER.JPG", "deep/er/x.jpeg", "y.webp", "z.TiFF", "v.bmp", "w.pgm", "u.gif"}
    hidden = {".DS_Store", "Thumbs.db", "desktop.ini", "._000.png", ".hidden.jpg"}
    for name in (*images, *hidden, "x.mp4", "y.MP4", "x.jpg.json", "noext"):
        (root / "a" / name).write_bytes(b"")  # listing opens nothing
    listing = folder_spec(root).list_files()
    assert {key for key, _ in keys(listing)} == {f"a/{name}" for name in images} | {"a/000.png", "b/000.png"}
    assert listing.ignored == {".mp4": 2, ".json": 1, "no ending": 1} and listing.classes == ("a", "b")


def test_links_to_classes_and_files_are_followed_and_circles_are_not(make_folder: MakeFolder, tmp_path: Path) -> None:
    root = make_folder({"a": 1})
    save_image(tmp_path / "elsewhere" / "x.png")
    for name, target in (
        ("b", tmp_path / "elsewhere"),
        ("a/loop", root),
        ("a/link.png", tmp_path / "elsewhere" / "x.png"),
        ("a/again", "again"),
        ("circle", "circle"),
        ("gone", "nowhere"),
    ):
        (root / name).symlink_to(target)
    with untouched(root):
        listing = folder_spec(root).list_files()
        assert folder_spec(root).without_bad_classes() == (folder_spec(root), [])
        assert listing.ignored["link to a folder"] == 1
    assert [key for key, _ in keys(listing)] == ["a/000.png", "a/link.png", "b/x.png"]


ROOTS = {
    "fotos": "fotos: no such folder. Did you mean 'photos'?",
    "photos/a/000.png/x": "000.png/x: cannot read this folder (not a directory)",
    "photos/train/a": "photos/train/a: no images in subfolders. Expected one subfolder per class.",
    "circle": "circle: cannot read this folder (too many levels of symbolic links)",
    "pipe": "pipe: cannot read this folder (not a directory). Expected one subfolder per class.",
    "x" * 300: "cannot read this folder (file name too long)",
    "a\0b": "cannot read this folder (embedded null byte)",
    "~nobody-at-all/x": "~nobody-at-all/x: no such home directory",
}


@pytest.mark.parametrize("root", ROOTS, ids=lambda root: ascii(root)[:20])
def test_a_root_that_is_no_dataset(root: str, make_folder: MakeFolder, tmp_path: Path) -> None:
    make_folder({"a": 1, "train/a": 1, "train/b": 1})
    (tmp_path / "circle").symlink_to("circle")
    os.mkfifo(tmp_path / "pipe")
    place = Path(root) if root.startswith("~") else tmp_path / root
    assert_refused(folder_spec(place), ROOTS[root].format(tmp_path), keeps=tmp_path)


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ({"": 0}, "photos: no images in subfolders. Expected one subfolder per class."),
        ({"": 2}, "photos: no images in subfolders."),
        ({"train/a": 1, "train/b": 1, "test": 2}, "photos/test: no images in subfolders."),
        ({"set/a": 1, "set/b": 1}, "photos: only one class, 'set'. Did you mean {}/set?"),
        ({"one/train/a": 1, "one/train/b": 1, "two": 1}, "contains train, so it is not a class. Did you mean {}/one"),
        ({"a/train": 1, "a/val": 1, "b/train": 1}, "Images of a class belong in {}/train/a"),
        ({"a": 3}, "photos: only one class, 'a'"),
        ({"train/a": 1, "train/b": 0}, "photos: train/b: no images in this class; add some, remove the folder"),
        ({"train/a": 1, "train/b": 1, "val/a": 1, "val/c": 1, "val/d": 1}, "val has classes that train lacks: c, d"),
        ({"train/a": 1, "train/Cat": 1, "val/a": 1, "val/cat": 1}, "classes 'Cat' and 'cat' differ only in case"),
        ({"val/a": 1, "val/b": 1}, "photos: has val but no train"),
        (
            {"training_set/a": 1, "training_set/b": 1, "test_set/a": 1, "test_set/b": 1},
            "test_set, training_set all have the subfolders a, b: name the splits train, val and test",
        ),
        ({"train/a": 1, "train/b": 1, "val/a": 1, "valid/a": 1}, "val and valid both stand for val"),
    ],
)
def test_mistakes_of_layout(make_folder: MakeFolder, counts: dict[str, int], words: str) -> None:
    root = make_folder(counts)
    assert_refused(folder_spec(root), words.format(root), keeps=root)


def test_one_class_with_subfolders_can_be_evaluated(make_folder: MakeFolder) -> None:
    root = make_folder({"a/monday": 1, "a/tuesday": 1})
    assert len(folder_spec(root).load(Reporter(), for_training=False).splits["all"]) == 2


def test_one_of_several_classes_can_be_evaluated(make_folder: MakeFolder) -> None:
    one = folder_spec(make_folder({"bees": 2, "wasps": 1}), classes=["bees"])
    for spec, n in ((one, 2), (digits_spec(classes=["7"]), 179)):
        spec.check(for_training=False)
        source = spec.load(Reporter(), for_training=False)
        assert (source.classes, len(source.splits["all"])) == (tuple(spec.classes or ()), n)


def test_endings_that_are_not_read_are_told_if_there_are_no_others(make_folder: MakeFolder) -> None:
    root = make_folder({"a": 0, "b": 0})
    for name in ("a/0.CR2", "a/1.cr2", "b/2.cr2", "b/notes.txt"):
        (root / name).touch()
    assert_refused(folder_spec(root), "photos: no images in subfolders (other files: .cr2 (3), .txt (1)).", keeps=root)


@pytest.mark.skipif(os.uname().sysname == "Darwin", reason="this system takes both for one name")
@pytest.mark.parametrize(
    ("one", "other"), [("Cat", "cat"), ("\u01c5", "\u01c6"), ("stra\u00dfe", "STRASSE"), ("caf\u00e9", "cafe\u0301")]
)
def test_classes_that_look_the_same(make_folder: MakeFolder, one: str, other: str) -> None:
    root = make_folder({one: 1, other: 1})
    words = (repr(one), repr(other), "differ only in case or in how accents are encoded: rename one")
    assert_refused(folder_spec(root), *words, keeps=root)


@pytest.mark.skipif(os.uname().sysname == "Darwin", reason="names of files are UTF-8 on this system")
def test_a_class_whose_name_is_not_utf_8(make_folder: MakeFolder) -> None:
    root = make_folder({"a": 2, "cafe": 2})
    (root / "cafe").rename(root / "caf\udce9")
    assert_refused(folder_spec(root), r"the name of class 'caf\udce9' is not UTF-8: rename its folder", keeps=root)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_folder(make_folder: MakeFolder) -> None:
    root = make_folder({"a": 1, "b": 1})
    (root / "a").chmod(0)
    assert_refused(folder_spec(root), "photos/a: cannot read this folder (permission denied)", keeps=root / "b")
    (root / "a").chmod(0o755)


@pytest.mark.parametrize("name", ["new\nline", "--all", " ", "=1+1", "\x1b[31m", "\u732b" * 85, "x" * 255])
def test_a_class_of_any_name(make_folder: MakeFolder, name: str) -> None:
    root = make_folder({"a": 8, name: 8})
    with untouched(root):
        assert set(load_dataset(folder_spec(root), seed=0, reporter=Reporter()).classes) == {"a", name}
    (root / name / "000.png").write_bytes(b"")
    refused(lambda: load_dataset(folder_spec(root), seed=0, reporter=Reporter()), 1, "does not decode", keeps=root)


def test_selected_classes(make_folder: MakeFolder) -> None:
    root = make_folder({"train/a": 1, "train/b": 0, "train/c": 2, "val/a": 1, "val/c": 1})
    listing = folder_spec(root, classes=["c", "a"]).list_files()
    assert listing.classes == ("a", "c")
    assert list(listing.splits["train"][1]) == [0, 1, 1]
    assert_refused(folder_spec(root, classes=["c", "b"]), "photos: train/b: no images in this class", keeps=root)


@pytest.mark.parametrize("classes", [["cats"], [], ["cats", "cats"], ["cats", "dgos"]])
def test_classes_that_cannot_be_selected(make_folder: MakeFolder, classes: list[str]) -> None:
    words = "has no class 'dgos'. Did you mean 'dogs'?" if "dgos" in classes else "keeps fewer than two"
    root = make_folder({"cats": 1, "dogs": 1, "owls": 1})
    assert_refused(folder_spec(root, classes=classes), "dataset.classes", words, keeps=root)


def test_selected_classes_of_other_kinds(tmp_path: Path) -> None:
    assert_refused(ImageFolderSpec(**COMMON), "dataset.root is not set", keeps=tmp_path)
    assert_refused(digits_spec(classes=["1", "11"]), "digits has no class '11'", keeps=tmp_path)
    assert_refused(torchvision_spec("CIFAR10", tmp_path, classes=["cat"]), "fewer than two", keeps=tmp_path)
    digits_spec(classes=["1", "7"]).check()
    torchvision_spec("CIFAR10", tmp_path).check()


Write = Callable[..., ManifestSpec]
REST = "".join(f"{i}.png,{'xy'[i % 2]}\n" for i in range(1, 8))


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """write(text) -> a spec of labels.csv beside images 0.png to 7.png and whatever else a path may lead to."""
    for name in (*(f"m/{i}.png" for i in range(8)), "m/c, d.png", "outside.png"):
        save_image(tmp_path / name, seed=len(name) + ord(name[2]))
    for name, target in (("circle", "circle"), ("gone", "nowhere"), ("out.png", "../outside.png"), ("up", "..")):
        (tmp_path / "m" / name).symlink_to(target)
    (tmp_path / "m" / "folder.png").mkdir()
    os.mkfifo(tmp_path / "m" / "pipe.png")

    def make(text: str | bytes, **changes: Any) -> ManifestSpec:
        file = tmp_path / "m" / "labels.csv"
        file.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape"))
        return manifest_spec(file, **changes)

    return make


@pytest.mark.parametrize(
    "text",
    [
        'path,label\n0.png,x\n1.png,y\n"c, d.png",x\n',
        '\ufeffpath,label\r\n0.png,x\r\n1.png,y\r\n"c, d.png",x\r\n',
        'id, label ,path\n1, x ,0.png\n2,y, 1.png\n\n3,x,"c, d.png"',
        'path,label,split\n0.png,x,\n1.png,y,\n"c, d.png",x,\n',
        'path,label\n./0.png,x\n../m/1.png,y\n"c, d.png",x\n',
    ],
    ids=["plain", "BOM and CRLF", "other columns and spaces", "empty split", "dots"],
)
def test_manifest(write: Write, text: str) -> None:
    assert keys(write(text).list_files()) == [("0.png", "x"), ("c, d.png", "x"), ("1.png", "y")]


def test_manifest_with_splits_and_root(write: Write, tmp_path: Path) -> None:
    text = 'path,label,split\nm/0.png,x,train\nm/1.png,y,TRAIN\n"m/c, d.png",x,valid\noutside.png,y,test\n'
    listing = write(text, root=str(tmp_path)).list_files()
    assert {split: len(rows) for split, (rows, _) in listing.splits.items()} == {"train": 2, "val": 1, "test": 1}
    absolute = f"path,label\n{tmp_path}/outside.png,x\nm/0.png,y\n"
    assert keys(write(absolute, root=str(tmp_path)).list_files()) == [("outside.png", "x"), ("m/0.png", "y")]
    linked = f"path,label\n{tmp_path}/m/up/outside.png,x\n0.png,y\n"  # the root is m, and up leads out of it
    assert keys(write(linked).list_files()) == [("up/outside.png", "x"), ("0.png", "y")]


ONE_PATH, ONE_LABEL = (f"its first line needs one column '{name}' (columns: " for name in ("path", "label"))
MISTAKES: list[tuple[str | bytes, str]] = [
    ("", ONE_PATH + "none)"),
    ("path;label\n0.png;x\n", ONE_PATH + "path;label)"),
    ("<!DOCTYPE html>\n<html></html>\n", ONE_PATH),
    ("path,label,label\n0.png,x,y\n", ONE_LABEL + "path, label, label)"),
    ("path,label\n", "no data rows"),
    ("path,label\n0.png,x\n1.png,\n", "line 3: the label is empty"),
    ("path,label\n../0\0.png,x\n", "line 2: the path is empty or contains a NUL character"),
    ("path,label\n0.png,x\0\n", "line 2: the label is empty or contains a NUL character"),
    ("path,label\nc, d.png,x\n", "line 2: more fields than columns; quote"),
    ("path,label,split\n0.png,x,dev\n", "line 2: split 'dev' is not one of train, val, test"),
    ("path,label,split\n0.png,x,train\n1.png,y,\n", "line 3: either all rows have a split or none has"),
    ("path,label,split\n0.png,x,test\n1.png,y,test\n", "has test but no train"),
    ("path,label\n0.png,x\nn.png,y\no.png,y\np.png,y\n", "n.png: no such file (2 more"),
    ("path,label\n0.png,x\n1.png,y\n./0.png,x\n", "0.png is named twice (lines 2 and 4)"),
    ("path,label\n0.png,x\n1.png,y\n0.png,y\n", "0.png has two labels: 'x' (line 2) and 'y' (line 4)"),
    ("path,label\n0.png,x\n1.png,x\n", "only one class, 'x'"),
    ("path,label\n0.png,caf\u00e9\n1.png,cafe\u0301\n", "how accents are encoded"),
    (b"path,label\n\xff\xfe.png,x\n", "cannot read this as CSV in UTF-8"),
    ("path,label\n".encode("utf-16"), "cannot read this as CSV in UTF-8"),
    ('path,label\n0.png,x\n"1.png,y\n' + REST, "cannot read this as CSV in UTF-8 (unexpected end"),
    ("path,label\n" + "x" * 200_000 + ",x\n", "cannot read this as CSV in UTF-8 (field larger"),
    *(
        (f"path,label\n{path},x\n", "no such file")
        for path in ("pipe.png", "folder.png", "circle", "gone", "~/0.png", "https://e.org/0", "x" * 300, "\x1b[2J")
    ),
    ('path,label\n"0\n.png",x\n', "line 3: "),
    *(
        (f"path,label\n0.png,x\n{path},y\n", f"line 3: {path} lies outside")
        for path in ("../outside.png", "up/../0.png", "../" * 40 + "etc/passwd", "/dev/zero")
    ),
    *(
        (f'path,label\n0.png,"{first}"\n1.png,"{second}"\n2.png,"{third}"\n', f"line {words}")
        for first, second, third, words in (
            ("12.5", "13", "nan", "2: labels are numbers (12.5). tlcli does single-label classification"),
            ("0.5", "1", "1e-05", "2: labels are numbers (0.5). tlcli does single-label classification"),
            ("cat;dog", "cat", "dog", "2: label 'cat;dog' is a list. tlcli does single-label classification"),
            ("x", "[0, 1]", "y", "3: label '[0, 1]' is a list"),
            ("x", "[a, b]", "y", "3: label '[a, b]' is a list"),
            ("x", "['cat']", "y", "3: label \"['cat']\" is a list"),
            ("x", "[3]", "y", "3: label '[3]' is a list"),
        )
    ),
]


@pytest.mark.parametrize(("text", "words"), MISTAKES, ids=lambda value: ascii(value)[:30])
def test_mistakes_of_manifests(write: Write, text: str | bytes, words: str, tmp_path: Path) -> None:
    spec = write(text)
    assert_refused(spec, f"{spec.file}", words, keeps=tmp_path)


@pytest.mark.parametrize("name", ["pipe.png", "circle", "x" * 300, "~nobody-at-all/x.csv"])
def test_a_manifest_that_is_no_file(name: str, write: Write, tmp_path: Path) -> None:
    place = Path(name) if name.startswith("~") else tmp_path / "m" / name
    words = "no such home directory" if name.startswith("~") else "no such file. dataset.file names a CSV file"
    assert_refused(manifest_spec(place), words, keeps=tmp_path)
    assert_refused(write("path,label\n", root=f"{tmp_path}/m/circle"), "circle: no such folder", keeps=tmp_path)


@pytest.mark.parametrize(
    "labels",
    [
        ("3", "7"),
        ("tench, Tinca tinca", "-1"),
        ("=1+1", "-"),
        ("a/b", ".."),
        ("new\nline", "<b>"),
        ("(none)", "[unknown]"),
        ("1_1", "2_1"),
        ("1E5", "2E5"),
    ],
)
def test_any_other_label_will_do(write: Write, tmp_path: Path, labels: tuple[str, str]) -> None:
    spec = write("path,label\n" + "".join(f'{i}.png,"{labels[i % 2]}"\n' for i in range(8)))
    with untouched(tmp_path):
        assert set(load_dataset(spec, seed=0, reporter=Reporter()).classes) == set(labels)


def test_a_link_may_lead_outside_and_a_file_need_not_be_an_image(write: Write, tmp_path: Path) -> None:
    spec = write("path,label\nout.png,x\nlabels.csv,x\n" + REST, on_bad=OnBad.skip)
    with untouched(tmp_path):
        assert load_dataset(spec, seed=0, reporter=Reporter()).bad_files == ((spec.file, "not an image"),)


LINK = "a link to a folder, which is not followed; name it, too"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["photos"], ["photos/a.PNG", "photos/b.jpg", "photos/sub/c.jpg", "photos/sub/deep/e.gif"]),
        (["photos/notes.txt", "missing.jpg"], ["photos/notes.txt", "missing.jpg"]),
        (["photos/*.jpg"], ["photos/b.jpg"]),
        (["photos/**/*.jpg"], ["photos/b.jpg", "photos/sub/c.jpg"]),
        (["*.bmp"], [MissingPath("*.bmp", "no file matches")]),
        (["photos/**/sub"], [MissingPath("photos/**/sub", "no file matches")]),  # it matches a folder
        (["empty"], [MissingPath("empty", "no images in this folder")]),
        (["loop"], [MissingPath("loop/x.jpg", LINK)]),
        (
            ["linked"],
            ["linked/x.jpg", MissingPath("linked/more", LINK)],
        ),
        (["linked/more"], ["linked/more/c.jpg", "linked/more/deep/e.gif"]),
        (["a[1].jpg"], ["a[1].jpg"]),  # a file of this name
    ],
)
def test_arguments_name_images(arguments: list[str], expected: list[object], tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    photos = "b.jpg a.PNG notes.txt .hidden.jpg Thumbs.db sub/c.jpg sub/.git/d.jpg sub/deep/e.gif sub/@eaDir/f.gif"
    for name in (*(f"photos/{name}" for name in photos.split()), "a[1].jpg", "a1.jpg", "empty/x.txt", "linked/x.jpg"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "linked" / "more").symlink_to(tmp_path / "photos" / "sub")
    (tmp_path / "loop").mkdir()
    (tmp_path / "loop" / "x.jpg").symlink_to(tmp_path / "loop")
    assert list(expand_image_paths(arguments)) == expected
    assert list(expand_image_paths(["a[2].jpg"], patterns=False)) == ["a[2].jpg"]
