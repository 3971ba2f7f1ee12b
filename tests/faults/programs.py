"""Start the programs beside this file in an interpreter of their own; how often they try, and where they may mount."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

UNSHARE = ("unshare", "-rm")  # a command runs as root of its own namespace, where it may mount


def output(module: str, *words: object, before: Sequence[str] = (), **environment: str) -> str:
    """Return the output of one of them; `pytest -s` shows it too, for docs/reliability.md."""
    argv = [*before, sys.executable, "-m", f"tests.faults.{module}", *map(str, words)]
    root, environ = Path(__file__).parents[2], {**os.environ, **environment}
    done = subprocess.run(argv, cwd=root, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    sys.stdout.write(done.stdout)
    return done.stdout


def program(module: str, *words: object, **environment: str) -> Any:
    """Return the output of one of them, which is JSON."""
    return json.loads(output(module, *words, **environment))


def scale(quick: int, full: int) -> int:
    """Return how often a test tries: a few times, or with TLCLI_FAULTS=full as often as docs/reliability.md says."""
    return {"quick": quick, "full": full}[os.environ.get("TLCLI_FAULTS") or "quick"]


@cache
def can_mount() -> bool:
    if sys.platform != "linux" or shutil.which("unshare") is None:
        return False
    command = [*UNSHARE, "mount", "-t", "tmpfs", "none", "/mnt"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0
