"""All that is wrong with a folder is told at once, and what is left can be used."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.data.samples import folder_spec
from tlcli.data.layout import survey, usable
from tlcli.data.listing import list_imagefolder
from tlcli.errors import UsageError

MakeFolder = Callable[..., Path]


def test_a_sound_folder(make_folder: MakeFolder) -> None:
    root = make_folder({"train/a": 2, "train/b": 2, "test/a": 1, "test/b": 1})
    found = survey(folder_spec(root))
    assert (found.problems, found.classes, found.ignored) == ((), None, {})
    spec = folder_spec(root)
    assert usable(spec, found) is spec


def test_problems_are_told_together_and_the_rest_is_usable(make_folder: MakeFolder) -> None:
    root = make_folder({"a": 2, "b": 3, "cat": 1, "Cat": 2})
    (root / "empty").mkdir()
    spec = folder_spec(root)
    with pytest.raises(UsageError):
        list_imagefolder(spec)
    found = survey(spec)
    assert found.problems == (
        "empty is an empty class folder: fill or remove it",
        "class names that differ only in case: Cat, cat; rename all but one",
    )
    assert list_imagefolder(usable(spec, found)).classes == ("Cat", "a", "b")


def test_classes_that_train_lacks(make_folder: MakeFolder) -> None:
    root = make_folder({"train/a": 2, "train/b": 2, "test/a": 1, "test/c": 1})
    found = survey(folder_spec(root))
    assert found.problems == ("test has classes that train lacks: c",)
    assert found.classes == ("a", "b")


def test_the_chosen_classes_alone_are_looked_at(make_folder: MakeFolder) -> None:
    root = make_folder({"a": 2, "b": 3})
    (root / "empty").mkdir()
    assert survey(folder_spec(root, classes=["a", "b"])).problems == ()


def test_files_that_are_no_images_are_counted(make_folder: MakeFolder) -> None:
    root = make_folder({"a": 2, "b": 2})
    for name in ("x.heic", "y.HEIC", "notes.txt", "noext", ".hidden", "Thumbs.db"):
        (root / "a" / name).touch()
    assert survey(folder_spec(root)).ignored == {".heic": 2, ".txt": 1, "no extension": 1}


def test_one_class_left_is_not_enough(make_folder: MakeFolder) -> None:
    root = make_folder({"a": 2})
    (root / "b").mkdir()
    spec = folder_spec(root)
    assert usable(spec, survey(spec)) is spec
