"""Starts the programs beside this file, in an interpreter of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def program(module: str, *words: object, **environment: str) -> Any:
    """What one of them prints, which is JSON."""
    argv = [sys.executable, "-m", f"tests.faults.{module}", *map(str, words)]
    done = subprocess.run(argv, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
