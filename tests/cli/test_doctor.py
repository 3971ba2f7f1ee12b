"""`tlcli doctor`: every check tells something, none hides another, and nothing says who the user is."""

import json
import sys
from pathlib import Path

import pytest

from tlcli.cli.doctor import candidates, page
from tlcli.doctor import Fact, Problem, examine, findings, system


@pytest.fixture(scope="module")
def all_found() -> list:  # type: ignore[type-arg]
    return examine(Path("outputs"), {"efficientnet_lite0": "lite", "resnet18": "torchvision", "timm": "timm"})


def facts(found) -> dict[str, Fact]:  # type: ignore[no-untyped-def]
    return {f"{fact.topic}/{fact.name}": fact for fact in found if isinstance(fact, Fact)}


def test_everything_is_looked_at(all_found) -> None:
    found = facts(all_found)
    assert {"versions/versions", "machine/cores", "places/outputs", "places/cache", "devices/CPU", "devices/in use",
            "weights/here", "speed/matrix product", "speed/network"} <= set(found)  # fmt: skip
    assert {"torch", "timm", "Pillow", "python", "tlcli"} <= set(found["versions/versions"].value)
    assert "efficientnet_lite0" in found["weights/here"].value
    assert found["speed/network"].value["forward"] > found["speed/network"].value["training"] > 0
    assert not [problem for problem in all_found if isinstance(problem, Problem) and problem.fails]


@pytest.mark.parametrize("width", [60, 100])
def test_a_page_fits_its_width(width: int, all_found) -> None:
    own = [finding for finding in all_found if isinstance(finding, Fact)]
    lines = page(own, [Problem("something is wrong: do this and that, and then some more", False)], width)
    assert max(len(line) for line in lines if "/" not in line) <= width  # a path is never broken
    assert lines[-1] == "tlcli can train here"


def test_neither_home_nor_user_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(findings.Path, "home", classmethod(lambda cls: Path("/home/alice")))
    monkeypatch.setattr(findings.getpass, "getuser", lambda: "alice")
    assert findings.private("/home/alice/.cache and /home/alice") == "~/.cache and ~"
    assert findings.private("/data/alice/x, /data/malice/x") == "/data/$USER/x, /data/malice/x"


def test_a_user_without_a_name_is_no_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown() -> str:
        raise KeyError("uid")

    monkeypatch.setattr(findings.getpass, "getuser", unknown)
    assert findings.private("/data/x") == "/data/x"


def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what needs PyTorch."""
    monkeypatch.setattr("tlcli.doctor._with_torch", lambda backbones: iter(()))


def test_a_broken_torch_is_the_answer(monkeypatch: pytest.MonkeyPatch, tlcli) -> None:
    monkeypatch.setitem(sys.modules, "tlcli.doctor.libraries", None)
    ended = tlcli("doctor")
    assert ended.code == 1
    assert "cannot train: PyTorch, or what builds on it, does not load" in ended.out
    assert "python" in ended.out, "the other checks are there"


def test_places_that_cannot_be_written_are_warnings(monkeypatch: pytest.MonkeyPatch, tlcli) -> None:
    quick(monkeypatch)

    def refuse(**kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(system.tempfile, "TemporaryFile", refuse)
    ended = tlcli("doctor")
    assert ended.code == 0
    assert "warning: activations cannot be kept in" in ended.out
    assert "warning: runs cannot be written to" in ended.out
    assert "Permission denied" in ended.out


def test_a_missing_package_means_no_training(monkeypatch: pytest.MonkeyPatch, tlcli) -> None:
    quick(monkeypatch)
    monkeypatch.setattr(system, "NEEDED", ("torch", "no-such-package"))
    ended = tlcli("doctor", "--format", "json")
    assert ended.code == 1
    found = json.loads(ended.out)
    assert not found["can_train"]
    assert {"text": "no-such-package is not installed: pip install --upgrade tlcli", "fails": True} in found["problems"]


def test_a_check_that_fails_hides_no_other(monkeypatch: pytest.MonkeyPatch, tlcli) -> None:
    quick(monkeypatch)

    def broken() -> int:
        raise RuntimeError("odd")

    monkeypatch.setattr(system, "usable_cores", broken)
    ended = tlcli("doctor")
    assert ended.code == 0
    assert "warning: machine: the check failed (RuntimeError: odd)" in ended.out
    assert "cache" in ended.out


def test_nothing_is_left_behind(monkeypatch: pytest.MonkeyPatch, tlcli, tmp_path: Path) -> None:
    quick(monkeypatch)
    monkeypatch.setenv("TLCLI_CACHE", str(tmp_path / "cache"))
    tlcli("doctor")
    assert list(tmp_path.iterdir()) == []


def test_usage_errors_help_and_completion(tlcli) -> None:
    assert "Did you mean '--format'" in tlcli("doctor", "--fromat").err
    assert tlcli("doctor", "--format", "yml").code == 2
    assert tlcli("doctor", "--help").out.count("  tlcli doctor") == 2
    assert list(candidates([])) == ["--format", "--help"]
