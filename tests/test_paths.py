"""Questions about paths are answered, whatever the path."""

from pathlib import Path

import pytest

from tlcli.errors import UsageError
from tlcli.paths import exists, expanded, is_dir, is_file, real


def test_a_name_that_is_too_long_is_nothing(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 5000)
    assert not exists(path) and not is_dir(path) and not is_file(path)


def test_links_in_a_circle_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    assert not exists(tmp_path / "a") and not is_dir(tmp_path / "a") and not is_file(tmp_path / "a")
    assert real(tmp_path / "a").is_relative_to(real(tmp_path))


def test_what_is_there_is_seen(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert exists(tmp_path) and is_dir(tmp_path) and not is_file(tmp_path)
    assert exists(tmp_path / "file") and is_file(tmp_path / "file") and not is_dir(tmp_path / "file")


def test_the_home_of_nobody_is_one_line() -> None:
    with pytest.raises(UsageError, match="no such home directory"):
        expanded("~nobody-at-all/x")
