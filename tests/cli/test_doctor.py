"""`tlcli doctor`: every check reports something, none hides another, and nothing says who the user is."""

import json
import os
import re
import sys
import tomllib
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from tests.cli.conftest import Tlcli
from tlcli.cli import doctor


@pytest.fixture
def light(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the checks that need PyTorch."""
    for name in ("_devices", "_weights"):
        monkeypatch.setattr(doctor, name, lambda *args: iter(()))


def test_everything_is_examined_and_nothing_left_behind(monkeypatch, tlcli: Tlcli, tmp_path) -> None:
    monkeypatch.setenv("TLCLI_CACHE", str(tmp_path / "cache"))
    ended = tlcli("doctor", "--format=json")
    assert ended.code == 0
    report = json.loads(ended.out)
    assert report["can_train"]
    assert {"torch", "timm", "Pillow", "python", "tlcli"} <= set(report["versions"]["versions"])
    assert "efficientnet_lite0" in report["weights"]["here"]
    assert {"outputs", "cache"} == set(report["places"])
    assert {"CPU", "in use"} <= set(report["devices"])
    assert report["machine"]["cores"]["usable"] >= 1
    assert "os" in report["devices"]["environment"]
    assert list(tmp_path.iterdir()) == []


def test_neither_home_nor_user_is_in_the_output(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor.Path, "home", lambda: tmp_path)
    monkeypatch.setattr(doctor.getpass, "getuser", lambda: "alice")
    assert doctor.redact(f"{tmp_path}/.cache and {tmp_path}") == "~/.cache and ~"
    assert doctor.redact("/data/alice/x, /data/malice/x") == "/data/$USER/x, /data/malice/x"


def test_the_packages_of_all_extras_are_listed() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {name: words for name, words in project["optional-dependencies"].items() if name not in ("weights", "dev")}
    named = {re.split("[^a-z-]", word)[0] for words in extras.values() for word in words}
    assert named == {*doctor.OPTIONAL_PACKAGES}


def test_a_broken_torch_is_the_answer(monkeypatch: pytest.MonkeyPatch, tlcli: Tlcli) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    ended = tlcli("doctor")
    assert ended.code == 1
    assert ended.out.count("cannot train: cannot import PyTorch or what uses it") == 1
    assert "outputs" in ended.out  # the other checks are there


@pytest.mark.usefixtures("light")
def test_problems_are_warnings_and_a_check_that_fails_hides_no_other(monkeypatch, tlcli: Tlcli) -> None:
    refuse = Mock(side_effect=PermissionError(13, "Permission denied"))
    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr("joblib.cpu_count", Mock(side_effect=RuntimeError("odd")))
    ended = tlcli("doctor")
    assert ended.code == 0
    assert "warning: machine: the check failed (RuntimeError: odd)" in ended.out
    assert "warning: cannot write outputs to" in ended.out
    assert "(Permission denied): set TLCLI_CACHE=FOLDER" in ended.out
    assert ended.out.endswith("tlcli can train here\n")


@pytest.mark.usefixtures("light")
def test_a_missing_package_means_no_training(monkeypatch: pytest.MonkeyPatch, tlcli: Tlcli) -> None:
    monkeypatch.setattr(doctor, "PACKAGES", ("torch", "no-such-package"))
    ended = tlcli("doctor", "--format", "json")
    assert ended.code == 1
    report = json.loads(ended.out)
    problem = {"text": "no-such-package is not installed: pip install --upgrade tlcli", "fails": True}
    assert not report["can_train"] and problem in report["problems"]


def test_memory_of_a_control_group_that_caches_files_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "meminfo": "MemTotal: 16000000 kB\nMemFree: 1000 kB\nMemAvailable: 8000000 kB\n",
        "memory.max": "4000000000\n",
        "memory.current": "3900000000\n",
        "memory.stat": "anon 900000000\nfile 3000000000\ninactive_file 3000000000\nactive_file 0\n",
    }
    monkeypatch.setattr(doctor.Path, "read_text", lambda path, encoding: files[path.name])
    found = list(doctor._machine())
    assert ("machine", "memory", {"total": 4_000_000_000, "free": 3_100_000_000}) in found
    assert not [finding for finding in found if isinstance(finding, doctor.Problem)]


@pytest.mark.usefixtures("light")
def test_a_cache_in_a_folder_that_is_closed_to_the_user_hides_no_place(monkeypatch, tlcli: Tlcli, tmp_path) -> None:
    stat, closed = os.stat, tmp_path / "closed"
    closed.mkdir()

    def refuse(path: Any, **options: Any) -> os.stat_result:
        if str(path).startswith(f"{closed}/"):
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, **options)

    with monkeypatch.context() as patch:
        patch.setenv("TLCLI_CACHE", str(closed / "cache"))
        patch.setattr(os, "stat", refuse)
        report = json.loads(tlcli("doctor", "--format=json").out)
    assert set(report["places"]) == {"outputs", "cache"}
    assert "the check failed" not in str(report["problems"])
