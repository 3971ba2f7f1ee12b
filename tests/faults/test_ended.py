"""Runs that a signal or a full disk ends: all is readable, and they are resumed to exactly the undisturbed end."""

import json
import sys

import pytest

from tests.faults.programs import UNSHARE, can_mount, output, program, scale

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the harness waits with Linux's pidfd"),
]


def test_killed_runs_are_resumed_exactly() -> None:
    found = program("ended", "KILL", "--times", scale(2, 200))
    assert found["unreadable"] == found["differences"] == found["leftovers"] == []
    assert found["exactly"] == found["times"]


@pytest.mark.parametrize(("name", "code", "seed"), [("INT", "130", 1), ("TERM", "143", 2)])
def test_interrupted_runs_say_so_and_are_resumed_exactly(name: str, code: str, seed: int) -> None:
    found = program("ended", name, "--times", scale(2, 51), "--seed", seed)  # each signal leaves out another job
    assert found["codes"].keys() <= {code, "0"}  # 0: it was done before the signal came
    assert found["codes"][code] > 0
    assert found["statuses"].keys() <= {"interrupted", "done", "none"}
    assert found["unreadable"] == found["differences"] == found["leftovers"] == []
    assert found["exactly"] == found["times"]


@pytest.mark.skipif(not can_mount(), reason="mounting is not allowed here")
def test_a_full_disk_at_any_moment() -> None:
    """One line, and what was good is left: with room again, the run is resumed exactly."""
    levels = scale(3, 20)
    found = [json.loads(line) for line in output("full", levels, before=UNSHARE).splitlines()]
    assert len(found) == levels
    assert {one["code"] for one in found} <= {0, 1}
    assert found[0]["code"] == 1
    for one in found:
        assert one["differences"] == one["unreadable"] == one["drafts"] == []
        assert not one["traceback"] and one["best"] is not False
        if one["code"]:
            assert len(one["said"]) == 1
            assert one["said"][0].startswith("tlcli train: the disk is full, or your quota of it: no space left")
