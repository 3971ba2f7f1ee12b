"""Runs of `tlcli train` in processes that share one import of torch: `python -m tests.faults.whole_runs ROLE FOLDER
NUMBER WORD...`. They write to FOLDER/N and FOLDER/N.log, with the cache of the environment."""

import functools
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.faults.filling import forked, noticing, together
from tlcli.cli import main
from tlcli.cli.process import quiet_libraries
from tlcli.store import cache_dir

quiet_libraries()


def run(folder: Path, name: str, words: list[str]) -> int:
    """A whole run in this process; its exit code."""
    log = os.open(folder / f"{name}.log", os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    return main(["train", f"hydra.run.dir='{folder / name}'", *words])


def at_once(folder: Path, n: int, words: list[str]) -> list[Any]:
    """The exit codes of n runs, all of which look into the cache for the first time at one moment."""
    from tlcli.engine.activations import SplitActivations

    def member(number: int, wait: Callable[[], None]) -> int:
        entry = SplitActivations.entry

        def when_all_are_here(self: SplitActivations, *args: Any) -> Any:
            wait()
            SplitActivations.entry = entry  # type: ignore[method-assign]
            return entry(self, *args)

        SplitActivations.entry = when_all_are_here  # type: ignore[method-assign]
        return run(folder, str(number), words)

    return together(member, n)


def killed(folder: Path, n: int, words: list[str]) -> list[Any]:
    """Runs that die before one of the steps by which they fill the cache, spread evenly over all of them: for each its
    exit code, what lies in the cache then, and the exit code of the run that comes next, called N-next."""

    def dies(left: int | None, name: str) -> int:
        def step(event: str) -> None:
            nonlocal left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left = None if left is None else left - 1
            events.write(f"{event}\n")
            events.flush()

        with (folder / f"{name}.events").open("w") as events:
            noticing(cache_dir() / "activations", step)
            return run(folder, name, words)

    def ended(left: int | None, name: str) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(forked(functools.partial(dies, left, name)), 0)[1])

    def caches(name: str) -> None:
        os.environ["TLCLI_CACHE"] = str(folder / f"{name}.cache")

    caches("whole")
    assert ended(None, "whole") == 0
    steps = len((folder / "whole.events").read_text().split())
    found = []
    for number in range(n):
        name = str(number)
        caches(name)
        code = ended((number * steps) // n + steps // (2 * n), name)
        left = sorted(path.name for path in (cache_dir() / "activations").glob("*"))
        found.append({"code": code, "left": left, "next": ended(None, f"{name}-next")})
    return found


if __name__ == "__main__":
    role, place, number, *rest = sys.argv[1:]
    import tlcli.train  # noqa: F401 - once, for all processes

    sys.stdout.write(json.dumps({"at_once": at_once, "killed": killed}[role](Path(place), int(number), rest)))
