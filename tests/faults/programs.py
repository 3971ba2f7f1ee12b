"""Starts the programs beside this file, in an interpreter of their own."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def output(module: str, *words: object, before: Sequence[str] = (), **environment: str) -> str:
    """Return what one of them prints; with `pytest -s` it is shown, for docs/reliability.md."""
    argv = [*before, sys.executable, "-m", f"tests.faults.{module}", *map(str, words)]
    done = subprocess.run(argv, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    sys.stdout.write(done.stdout)
    return done.stdout


def program(module: str, *words: object, **environment: str) -> Any:
    """Return what one of them prints, which is JSON."""
    return json.loads(output(module, *words, **environment))
