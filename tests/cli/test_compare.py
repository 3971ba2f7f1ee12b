"""`tlcli compare`: what it prints, and what is in its JSON."""

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Tlcli
from tests.runs.test_compare import make_run
from tlcli.cli.completion import candidates


@pytest.fixture
def two(tmp_path: Path) -> tuple[str, str]:
    """B is right on twelve images more."""
    true = [0] * 20 + [1] * 20
    make_run(tmp_path / "first", [1] * 12 + [0] * 8 + [1] * 20, true)
    make_run(tmp_path / "second", [0] * 20 + [1] * 20, true, freeze={"kind": "none"}, epochs=3)
    return "first", "second"


def test_two_runs(tlcli: Tlcli, two: tuple[str, str]) -> None:
    done = tlcli("compare", *two)
    assert done.code == 0, done.err
    lines = [line.split() for line in done.out.splitlines()]
    assert ["A", "0.7000", "0.0000", "to", "1.0000", "0.5000", "0.5000", "40", "first"] in lines
    assert ["freeze.kind", "head", "(A),", "none", "(B)"] in lines
    assert "0 right only in A, 12 right only in B" in done.out
    assert "B is better than A by 30.0 points, which is significant: p = 0.00049" in done.out
    compared = json.loads(tlcli("compare", *two, "--format", "json").out)
    assert compared["config"] == {"freeze.kind": {"first": "head", "second": "none"}, "epochs": {"second": 3}}
    [pair] = compared["pairs"]
    assert (pair["paired"], pair["more_than_chance"], pair["n_only_second_right"]) == (True, True, 12)


def test_a_difference_that_is_not_significant(tlcli: Tlcli, tmp_path: Path) -> None:
    make_run(tmp_path / "a", [1] + [0] * 99, [0] * 100)
    make_run(tmp_path / "b", [0] * 97 + [1] * 3, [0] * 100)
    done = tlcli("compare", "a", "b")
    assert "The difference of 2.0 points is not significant: p = 0.62" in done.out
    assert "the configs are the same" in done.out


def test_test_sets_that_differ(tlcli: Tlcli, tmp_path: Path) -> None:
    classes = ["ant", "\x1b[31mred", "fly"]
    make_run(tmp_path / "a", [0, 1], [0, 1], keys=["x", "y"], classes=classes, note="\x1b[2J")
    make_run(tmp_path / "b", [0, 1], [0, 1], keys=["x", "z"], classes=classes)
    done = tlcli("compare", "a", "b")
    assert "No paired test: their test sets differ: 1 images are in both, 2 in only one" in done.out
    assert "\x1b" not in done.out


def test_more_than_two_runs_have_intervals_and_no_test(tlcli: Tlcli, tmp_path: Path) -> None:
    """Testing each against the best one of 12 equal runs gave 13 % false alarms."""
    for index, n in enumerate((20, 14, 19, 18)):
        config = {"seed": index, "lr": 0.1 if index < 2 else 0.2}
        make_run(tmp_path / str(index), [0] * n + [1] * (20 - n), [0] * 20, **config)  # type: ignore[arg-type]
    done = tlcli("compare", "0", "1", "2", "3")
    assert "0.1 (A, B), 0.2 (C, D)" in done.out
    assert done.out.count("  0.0000 to 1.0000  ") == 4
    assert "Significance is tested for two runs only, not for 4. Compare the intervals." in done.out
    assert "C, D differ only in the seed: mean accuracy 0.9250" in done.out
    assert json.loads(tlcli("compare", "0", "1", "2", "3", "--format", "json").out)["pairs"] == []


def test_errors_and_completion(tlcli: Tlcli, two: tuple[str, str], tmp_path: Path) -> None:
    done = tlcli("compare", "frist", "second")
    assert done.code == 2
    assert "Did you mean 'first'?" in done.err
    make_run(tmp_path / "outputs/2026-01-02/10-00-00", [0, 1], [0, 1])
    assert candidates("tlcli compare first ")[0] == "outputs/2026-01-02/10-00-00 "
