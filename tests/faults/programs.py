"""Start the programs beside this file in an interpreter of their own, or a function in several forked processes; how
often they try, and where they may mount."""

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
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


def together(work: Callable[[int, Callable[[], object]], Any], n: int, timeout: float = 300) -> list[Any]:
    """Return the results of n processes. Each gets its number, and a function that waits for all of them."""
    fork = multiprocessing.get_context("fork")
    gate, results = fork.Barrier(n, timeout=timeout), fork.Queue()
    members = [fork.Process(target=lambda number=number: results.put(work(number, gate.wait))) for number in range(n)]
    for member in members:
        member.start()
    found = [results.get(timeout=timeout) for _ in members]
    for member in members:
        member.join()
    return found


def scale(quick: int, full: int) -> int:
    """Return how often a test tries: a few times, or with TLCLI_FAULTS=full as often as docs/reliability.md says."""
    return {"quick": quick, "full": full}[os.environ.get("TLCLI_FAULTS") or "quick"]


@cache
def can_mount() -> bool:
    if sys.platform != "linux" or shutil.which("unshare") is None:
        return False
    command = [*UNSHARE, "mount", "-t", "tmpfs", "none", "/mnt"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0
