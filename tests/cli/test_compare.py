"""`tlcli compare`: what it prints, and what is in its JSON."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Ended
from tests.runs.test_compare import make_run
from tlcli.cli import compare

Tlcli = Callable[..., Ended]


@pytest.fixture
def two(tmp_path: Path) -> tuple[str, str]:
    """B is right on twelve images more."""
    true = [0] * 20 + [1] * 20
    make_run(tmp_path / "first", [1] * 12 + [0] * 8 + [1] * 20, true)
    make_run(tmp_path / "second", [0] * 20 + [1] * 20, true, freeze={"kind": "none"})
    return "first", "second"


def test_two_runs(tlcli: Tlcli, two: tuple[str, str]) -> None:
    done = tlcli("compare", *two)
    assert done.code == 0, done.err
    lines = [line.split() for line in done.out.splitlines()]
    assert ["freeze.kind", "head", "none"] in lines
    assert ["ant", "0.4000", "1.0000", "-60.0", "20"] in lines
    assert "B is better than A by 30.0 points, more than chance: p = 0.00049." in done.out
    assert "B right, A wrong: 12" in done.out
    assert "  test/0.png: ant, A says bee" in done.out
    assert "and 2 more (--format json has all)" in done.out
    assert "A right, B wrong" not in done.out


def test_a_difference_within_chance_says_what_could_be_settled(tlcli: Tlcli, tmp_path: Path) -> None:
    true = [0] * 100
    make_run(tmp_path / "a", [1] + [0] * 99, true)
    make_run(tmp_path / "b", [0] * 97 + [1] * 3, true)
    done = tlcli("compare", "a", "b")
    assert "The difference of 2.0 points is within chance: p = 0.62; 100 images" in done.out
    assert "cannot settle a difference below about 6.0 points" in done.out
    assert "the configs are the same" in done.out


def test_test_sets_that_differ(tlcli: Tlcli, tmp_path: Path) -> None:
    make_run(tmp_path / "a", [0, 1], [0, 1], keys=["x", "y"])
    make_run(tmp_path / "b", [0, 1], [0, 1], keys=["x", "z"])
    done = tlcli("compare", "a", "b")
    assert "no paired test: their test sets differ: 1 images are in both, 2 in one alone" in done.out


def test_many_runs(tlcli: Tlcli, tmp_path: Path) -> None:
    true = [0] * 20
    for place, n in enumerate((20, 14, 19, 18)):
        make_run(tmp_path / str(place), [0] * n + [1] * (20 - n), true, seed=place, lr=0.1 if place < 2 else 0.2)
    done = tlcli("compare", "0", "1", "2", "3")
    assert "lr: 0.1 (A, B), 0.2 (C, D)" in done.out
    assert "A against B: 30.0 points (images right: 6 in A alone, 0 in B alone), within chance: p = 0.09" in done.out
    assert "C, D differ in their seed alone: accuracy 0.9250 in the mean" in done.out


def test_json_has_everything(tlcli: Tlcli, two: tuple[str, str]) -> None:
    found = json.loads(tlcli("compare", *two, "--format", "json").out)
    assert found["config"] == {"freeze.kind": {"first": "head", "second": "none"}}
    assert found["best"] == "second"
    [pair] = found["pairs"]
    assert (pair["paired"], pair["more_than_chance"], pair["both_right"]) == (True, True, 28)
    assert len(pair["only_second_right"]) == 12
    assert pair["only_second_right"][0]["key"] == "test/0.png"
    assert [run["path"] for run in found["runs"]] == ["first", "second"]


def test_nothing_in_a_name_reaches_the_terminal_as_a_command(tlcli: Tlcli, tmp_path: Path) -> None:
    classes = ["ant", "\x1b[31mred", "fly"]
    make_run(tmp_path / "a", [0, 0], [0, 1], classes=classes, note="\x1b[2J")
    make_run(tmp_path / "b", [1, 1], [0, 1], classes=classes)
    assert "\x1b" not in tlcli("compare", "a", "b").out


def test_errors_help_and_completion(tlcli: Tlcli, two: tuple[str, str], tmp_path: Path) -> None:
    done = tlcli("compare", "--help")
    assert (done.code, done.out.count("  tlcli compare ")) == (0, 2)
    assert (done := tlcli("compare", "first")).code == 2
    assert "two or more runs" in done.err
    assert "Did you mean 'first'?" in tlcli("compare", "frist", "second").err
    assert "Did you mean '--format'?" in tlcli("compare", *two, "--fromat=json").err
    make_run(tmp_path / "outputs/2026-01-02/10-00-00", [0, 1], [0, 1])
    assert next(compare.candidates(["first"])) == "outputs/2026-01-02/10-00-00"
    assert list(compare.candidates(["x", "--format"])) == ["table", "json"]
