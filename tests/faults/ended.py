"""Runs that are ended at random instants by a signal and then resumed: python -m tests.faults.ended KILL --times 200

Each run is a forked process, so that torch is imported once; the process that forks never computes, because a forked
one would wait for its threads. Prints one JSON object.
"""

import argparse
import json
import os
import random
import select
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tests.conftest import make_folder
from tests.faults.programs import together
from tests.faults.runs_alike import differences, unreadable
from tlcli.cli import main, quiet_libraries
from tlcli.runs.run_dir import RunDir, read_json

COMMON = ("image.size=32", "batch_size=8", "device.precision=fp32", "device.channels_last=true", "dataset=imagefolder")
JOBS = {  # many short epochs on a cold cache; a state after each step
    "cached": ("freeze=head", "epochs=30", "optimizer=sgd", "optimizer.lr=0.1", "cache.mode=require"),
    "live": ("freeze=last_stages", "epochs=2", "cache.mode=off", "checkpoint.every_minutes=1e-9", "log_every=1"),
    "workers": ("freeze=last_stages", "epochs=2", "cache.mode=off", "device.workers=2"),
}


def end_runs(number: signal.Signals, times: int, seed: int) -> dict[str, Any]:
    draw = random.Random(seed)
    found: dict[str, Any] = {"codes": Counter(), "statuses": Counter(), "exactly": 0}
    found |= {key: [] for key in ("unreadable", "differences", "leftovers")}
    with tempfile.TemporaryDirectory() as name:
        root, jobs, names = make_images(Path(name)), dict[str, Job](), [*JOBS]
        for i in range(seed, seed + times):  # the jobs in turn, from the seed-th on
            job_name = names[i % len(names)]
            if job_name not in jobs:
                jobs[job_name] = Job(Path(name) / job_name, (*COMMON, *JOBS[job_name], root))
            for key, value in jobs[job_name].ended(number, draw.uniform(-0.1, 1.0), i).items():
                if isinstance(found[key], Counter):
                    found[key][value] += 1
                else:
                    found[key] += value
    return {"signal": number.name, "times": times, **found}


def make_images(folder: Path) -> str:
    """Make a folder of images and return the override that names it."""
    for split, n in (("train", 20), ("test", 8)):
        make_folder(folder / "images" / split, {"across": n, "checks": n, "down": n}, seed=n)
    return f"dataset.root='{folder / 'images'}'"


class Job:
    """A command line, its undisturbed run, and the seconds that this takes before and after its run.json is there."""

    def __init__(self, folder: Path, words: Sequence[str]) -> None:
        self.folder, self.words, self.whole = folder, words, folder / "whole"
        process = Forked(self._argv(self.whole), self.folder / "cache-whole")
        self.seconds_before = process.until_begun(self.whole)
        start = time.perf_counter()
        assert process.wait() == 0, process.log.read_text()
        self.seconds = time.perf_counter() - start

    def _argv(self, out: Path) -> list[str]:
        return ["train", f"hydra.run.dir='{out}'", *self.words]

    def ended(self, number: signal.Signals, instant: float, i: int) -> dict[str, Any]:
        """End a run at an instant (0 to 1: of its duration, negative: before it has a run.json), and resume it."""
        out, cache = self.folder / str(i), self.folder / f"cache{i}"
        process = Forked(self._argv(out), cache)
        if instant >= 0:
            process.until_begun(out)
        process.has_ended(instant * self.seconds if instant >= 0 else -10 * instant * self.seconds_before)
        os.killpg(process.pid, number)  # as terminals and `timeout` do
        code, begun, damage = str(process.wait()), RunDir(out).info_file.exists(), apart(unreadable, out)
        status = read_json(RunDir(out).info_file)["status"] if begun else "none"
        run = out if begun else out.with_name(f"{i}-anew")
        again = Forked(["train", "--resume", str(out)] if begun else self._argv(run), cache)
        is_done = again.wait() == 0
        unlike = apart(differences, self.whole, run) if is_done else [again.log.read_text()[-300:]]
        left = [path.name for path in run.rglob(".*") if path.name != ".hydra"]
        for path in (out, run, cache):
            shutil.rmtree(path, ignore_errors=True)
        return {
            "codes": code, "statuses": status, "unreadable": damage, "leftovers": left,
            "differences": [f"{instant:.3f}: {what}" for what in unlike], "exactly": is_done and not unlike,
        }  # fmt: skip


class Forked:
    """tlcli in a forked process with its own cache; its output goes to a file beside that."""

    def __init__(self, argv: Sequence[str], cache: Path) -> None:
        cache.mkdir(parents=True, exist_ok=True)
        self.log = cache.with_suffix(".log")
        self._start = time.perf_counter()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                self._run(argv, cache)
            finally:
                os._exit(1)
        self.handle = os.pidfd_open(self.pid)

    def _run(self, argv: Sequence[str], cache: Path) -> None:
        from tlcli.runs import checkpointing
        from tlcli.runs.recorder import Recorder

        os.setsid()
        with self.log.open("wb") as log:
            for stream in (1, 2):
                os.dup2(log.fileno(), stream)
        os.environ["TLCLI_CACHE"] = str(cache)
        Recorder._plot = lambda *args: None  # type: ignore[method-assign,assignment]
        checkpointing.MAX_TIME_SHARE = 1e9
        code = main(argv)
        sys.stdout.flush()
        os._exit(code)

    def until_begun(self, out: Path) -> float:
        """Wait until the run has a run.json; return the seconds since the process began."""
        while not RunDir(out).info_file.exists() and not self.has_ended(0.001):
            pass
        return time.perf_counter() - self._start

    def has_ended(self, seconds: float | None) -> bool:
        return bool(select.select([self.handle], [], [], seconds)[0])

    def wait(self) -> int:
        """Wait for the process and return its exit code, or minus the signal."""
        _, status = os.waitpid(self.pid, 0)
        os.close(self.handle)
        return os.waitstatus_to_exitcode(status)


def apart(lines: Callable[..., Iterable[str]], *arguments: Path) -> list[str]:
    """Call a function in a forked process and return its result."""
    return together(lambda number, wait: list(lines(*arguments)), 1)[0]


def import_torch() -> None:
    quiet_libraries()
    import tlcli.engine.session
    import tlcli.runs.resume_state
    import tlcli.train  # noqa: F401


if __name__ == "__main__":
    command = argparse.ArgumentParser()
    command.add_argument("signal", choices=["KILL", "INT", "TERM"])
    command.add_argument("--times", type=int, default=20)
    command.add_argument("--seed", type=int, default=0)
    given = command.parse_args()
    import_torch()
    sys.stdout.write(json.dumps(end_runs(signal.Signals[f"SIG{given.signal}"], given.times, given.seed), indent=1))
