"""A disk that is full ends a run in one line, and leaves what was good: with room again, it goes on exactly."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.mounts import UNSHARE, can_mount
from tests.faults.scale import scale

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(not can_mount(), reason="mounting is not allowed here")
def test_a_full_disk_at_any_moment() -> None:
    levels = scale(5, 20)
    command = [*UNSHARE, sys.executable, "-m", "tests.faults.full", str(levels)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    sys.stdout.write(done.stdout)  # with `pytest -s`: for docs/reliability.md
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == levels
    assert {one["code"] for one in found} <= {0, 1}
    assert found[0]["code"] == 1
    for one in found:
        assert one["differences"] == one["unreadable"] == one["drafts"] == []
        assert not one["traceback"]
        assert one["best"] is not False
        if one["code"]:
            assert len(one["said"]) == 1
            assert one["said"][0].startswith("tlcli train: the disk is full: no space left")
