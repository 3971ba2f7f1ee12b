"""Which images arguments name, and in which order."""

from pathlib import Path

import pytest

from tlcli.data.listing import MissingPath, expand_image_paths


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Names alone: nothing here is opened."""
    monkeypatch.chdir(tmp_path)
    names = ("b.jpg", "a.PNG", "notes.txt", ".hidden.jpg", "Thumbs.db", "sub/c.jpg", "sub/.git/d.jpg", "sub/deep/e.gif")
    for name in names:
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "empty").mkdir()
    return tmp_path


def names(*arguments: str, patterns: bool = True) -> list[str | MissingPath]:
    return list(expand_image_paths(arguments, patterns=patterns))


def test_a_folder_is_its_images_sorted_and_then_those_below(folder: Path) -> None:
    assert names("photos") == ["photos/a.PNG", "photos/b.jpg", "photos/sub/c.jpg", "photos/sub/deep/e.gif"]


def test_a_file_is_taken_as_it_is(folder: Path) -> None:
    assert names("photos/notes.txt", "missing.jpg") == ["photos/notes.txt", "missing.jpg"]


def test_a_pattern_is_what_it_matches(folder: Path) -> None:
    assert names("photos/*.jpg") == ["photos/b.jpg"]
    assert names("photos/**/*.jpg") == ["photos/b.jpg", "photos/sub/c.jpg"]
    assert names("phot*") == names("photos")
    assert names("*.bmp") == [MissingPath("*.bmp", "no file matches")]


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(folder: Path) -> None:
    (folder / "a[1].jpg").touch()
    (folder / "a1.jpg").touch()
    assert names("a[1].jpg") == ["a[1].jpg"]
    assert names("a[2].jpg", patterns=False) == ["a[2].jpg"]


def test_links_to_folders_make_no_loop(folder: Path) -> None:
    (folder / "photos/sub/loop.jpg").symlink_to(folder / "photos")
    assert len(names("photos")) == 5  # the link is no image, and is said to be none when it is read
