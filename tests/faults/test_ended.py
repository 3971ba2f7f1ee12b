"""Runs that a signal ends at a random instant: nothing is unreadable, and they go on to exactly the undisturbed end."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.faults.scale import scale

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the harness waits with Linux's pidfd"),
]
ROOT = Path(__file__).parents[2]


def ended(name: str, times: int) -> dict[str, Any]:
    """What tests.faults.ended found, in a process that has not computed yet."""
    command = [sys.executable, "-m", "tests.faults.ended", name, "--times", str(times)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    sys.stdout.write(done.stdout)  # with `pytest -s`: for docs/reliability.md
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_killed_runs_go_on_exactly() -> None:
    found = ended("KILL", scale(6, 200))
    assert found["unreadable"] == []
    assert found["differences"] == []
    assert found["leftovers"] == []
    assert found["went_on"] + found["not_begun"] == found["exactly"] == found["times"]


@pytest.mark.parametrize(("name", "code"), [("INT", "130"), ("TERM", "143")])
def test_interrupted_runs_say_so_and_go_on_exactly(name: str, code: str) -> None:
    found = ended(name, scale(4, 50))
    assert found["codes"].keys() <= {code, "0"}  # 0: it was done before the signal came
    assert found["codes"][code] > 0
    assert found["statuses"].keys() <= {"interrupted", "done", "none"}
    assert found["unreadable"] == found["differences"] == found["leftovers"] == []
    assert found["exactly"] == found["times"]
