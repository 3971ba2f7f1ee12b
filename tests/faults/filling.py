"""Runs that first read a cold cache at the same moment: `python -m tests.faults.filling FOLDER N WORD ...`

Prints their exit codes as JSON. PyTorch has no threads yet in this process, so that it can be forked.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.faults.programs import together
from tlcli.cli import main, quiet_libraries


def runs(folder: Path, n: int, words: list[str]) -> list[Any]:
    """Return the exit codes of n runs, which print to FOLDER/N.log."""
    import tlcli.train  # noqa: F401 - once, for all processes
    from tlcli.engine.activations import SplitActivations

    entry = SplitActivations.entry

    def member(number: int, wait: Callable[[], object]) -> int:
        def when_all_are_here(self: SplitActivations, *args: Any) -> Any:
            wait()
            SplitActivations.entry = entry  # type: ignore[method-assign]
            return entry(self, *args)

        SplitActivations.entry = when_all_are_here  # type: ignore[method-assign]
        with (folder / f"{number}.log").open("wb") as log:
            for stream in (1, 2):
                os.dup2(log.fileno(), stream)
        return main(["train", f"hydra.run.dir='{folder / str(number)}'", *words])

    return together(member, n)


if __name__ == "__main__":
    quiet_libraries()
    place, number, *rest = sys.argv[1:]
    sys.stdout.write(json.dumps(runs(Path(place), int(number), rest)))
