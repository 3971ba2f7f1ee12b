"""Runs of `tlcli train` in processes that share one import of torch: `python -m tests.faults.whole_runs at_once
FOLDER NUMBER WORD...`. They write to FOLDER/N and FOLDER/N.log, with the cache of the environment."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.faults.filling import together
from tlcli.cli import main, quiet_libraries

quiet_libraries()


def run(folder: Path, name: str, words: list[str]) -> int:
    """Run in this process and return the exit code."""
    log = os.open(folder / f"{name}.log", os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    return main(["train", f"hydra.run.dir='{folder / name}'", *words])


def at_once(folder: Path, n: int, words: list[str]) -> list[Any]:
    """Return the exit codes of n runs that first read the cache at the same moment."""
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


if __name__ == "__main__":
    _, place, number, *rest = sys.argv[1:]
    import tlcli.train  # noqa: F401 - once, for all processes

    sys.stdout.write(json.dumps(at_once(Path(place), int(number), rest)))
