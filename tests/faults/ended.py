"""Runs that are ended at random instants by a signal, and then go on: python -m tests.faults.ended KILL --times 200

Each run is a forked process, so that torch is imported once; the process that forks never computes, for what it forks
would wait for its threads. Prints one JSON object: how many there were, in which stage each was, what could not be
read, how many went on to exactly the end of the undisturbed run.
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
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.conftest import make_folder
from tests.faults.runs_alike import differences, unreadable
from tlcli.cli.process import quiet_libraries
from tlcli.runs.run_dir import RunDir, read_json

COMMON = ("image.size=32", "batch_size=8", "device.precision=fp32", "device.channels_last=true", "dataset=imagefolder")
JOBS = {
    "cached": ("freeze=head", "epochs=30", "optimizer=sgd", "optimizer.lr=0.1", "cache.mode=require"),
    "live": ("freeze=last_stages", "epochs=2", "cache.mode=off", "checkpoint.every_minutes=1e-9", "log_every=1"),
}
"""A run whose frozen part fills a cold cache, with many short epochs; and one that writes its state after each step."""


def main(number: signal.Signals, times: int, seed: int) -> dict[str, Any]:
    """End so many runs, half of each job, and go on with each."""
    draw, result = random.Random(seed), Result()
    with scratch() as folder:
        images = folder / "images"
        for split, n in (("train", 20), ("test", 8)):
            make_folder(images / split, {"across": n, "checks": n, "down": n}, seed=n)
        for name, words in JOBS.items():
            job = Job(name, (*COMMON, *words, f"dataset.root='{images}'"), folder)
            for i in range(times // 2):
                result.add(job.ended(number, draw.uniform(-0.1, 1.0), i))
    return {"signal": number.name, "times": 2 * (times // 2), **result.found}


class Result:
    """Counts of what came out."""

    def __init__(self) -> None:
        self.found: dict[str, Any] = {
            "stages": Counter(), "codes": Counter(), "statuses": Counter(), "unreadable": [],
            "went_on": 0, "not_begun": 0, "exactly": 0, "differences": [], "leftovers": [], "slowest_end": 0.0,
        }  # fmt: skip

    def add(self, one: dict[str, Any]) -> None:
        for key in ("stages", "codes", "statuses"):
            self.found[key][one[key]] += 1
        for key in ("unreadable", "differences", "leftovers"):
            self.found[key] += one[key]
        for key in ("went_on", "not_begun", "exactly"):
            self.found[key] += one[key]
        self.found["slowest_end"] = round(max(self.found["slowest_end"], one["slowest_end"]), 2)


class Job:
    """A command line, its undisturbed run, and how long that takes from the moment that it has a run.json."""

    def __init__(self, name: str, words: Sequence[str], folder: Path) -> None:
        self.folder, self.words = folder / name, words
        self.whole = self.folder / "whole"
        process = Forked(self._argv(self.whole), self.folder / "cache-whole")
        self.before = process.until_begun(self.whole)
        start = time.perf_counter()
        assert process.wait(None) == 0, (self.folder / "cache-whole.log").read_text()
        self.seconds = time.perf_counter() - start

    def _argv(self, out: Path) -> list[str]:
        return ["train", f"hydra.run.dir='{out}'", *self.words]

    def ended(self, number: signal.Signals, instant: float, i: int) -> dict[str, Any]:
        """End a run at an instant (0 to 1: of its duration, negative: before it has a run.json), and go on with it."""
        out, cache = self.folder / str(i), self.folder / f"cache{i}"
        process = Forked(self._argv(out), cache)
        if instant >= 0:
            process.until_begun(out)
            process.wait(instant * self.seconds)
        else:
            process.wait(-10 * instant * self.before)
        start = time.perf_counter()
        process.send(number)
        code = process.wait(None)
        found: dict[str, Any] = {"codes": str(code), "slowest_end": time.perf_counter() - start}
        found["stages"] = stage(RunDir(out))
        found["unreadable"] = [f"{found['stages']}: {what}" for what in apart(unreadable, out)]
        begun = RunDir(out).info_file.exists()
        found["statuses"] = read_json(RunDir(out).info_file)["status"] if begun else "none"
        again = Forked(["train", "--resume", str(out)] if begun else self._argv(out.with_name(f"{i}-anew")), cache)
        ended = again.wait(None)
        run = out if begun else out.with_name(f"{i}-anew")
        unlike = apart(differences, self.whole, run) if ended == 0 else [again.log.read_text()[-300:]]
        found |= {"not_begun": not begun, "went_on": begun and ended == 0, "exactly": ended == 0 and not unlike}
        found["differences"] = [f"{found['stages']}, {instant:.3f}: {what}" for what in unlike]
        found["leftovers"] = [path.name for path in run.rglob(".*") if path.name != ".hydra"]
        for path in (out, run, cache):
            shutil.rmtree(path, ignore_errors=True)
        return found


class Forked:
    """tlcli in a forked process, with a cache of its own; what it prints goes to a file beside that."""

    def __init__(self, argv: Sequence[str], cache: Path) -> None:
        cache.mkdir(parents=True, exist_ok=True)
        self.log = cache.with_suffix(".log")
        self._start = time.perf_counter()
        self._pid = os.fork()
        if self._pid == 0:
            self._run(argv, cache)
        self._handle = os.pidfd_open(self._pid)

    def _run(self, argv: Sequence[str], cache: Path) -> None:
        code = 1
        try:
            os.setsid()
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
            with self.log.open("wb") as log:
                for stream in (1, 2):
                    os.dup2(log.fileno(), stream)
            os.environ["TLCLI_CACHE"] = str(cache)
            from tlcli.cli import main as tlcli
            from tlcli.runs import checkpointing
            from tlcli.runs.recorder import Recorder

            Recorder._plot = lambda *args: None  # type: ignore[method-assign,assignment]
            checkpointing.MAX_TIME_SHARE = 1e9
            code = tlcli(list(argv))
            sys.stdout.flush()
        finally:
            os._exit(code)

    def until_begun(self, out: Path) -> float:
        """Wait until the run has a run.json; seconds since the process began."""
        while not RunDir(out).info_file.exists() and not self._has_ended(0.001):
            pass
        return time.perf_counter() - self._start

    def _has_ended(self, seconds: float | None) -> bool:
        return bool(select.select([self._handle], [], [], seconds)[0])

    def wait(self, seconds: float | None) -> int | None:
        """The exit code, or minus the signal, once the process has ended; None if it has not after so many seconds."""
        if not self._has_ended(seconds):
            return None
        if seconds is not None:
            return None
        _, status = os.waitpid(self._pid, 0)
        os.close(self._handle)
        return os.waitstatus_to_exitcode(status)

    def send(self, number: signal.Signals) -> None:
        signal.pidfd_send_signal(self._handle, number)


def apart(lines: Callable[..., Iterable[str]], *arguments: Path) -> list[str]:
    """What a function gives, called in a forked process."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(writer, json.dumps(list(lines(*arguments))).encode()[:60_000])
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        content = pipe.read()
    os.waitpid(pid, 0)
    found: list[str] = json.loads(content)
    return found


def stage(run: RunDir) -> str:
    """How far a run had come when it ended."""
    if not run.info_file.exists():
        return "before run.json"
    if run.test_file.exists():
        return "after the test"
    if any(path.name.startswith(".") for path in run.best_checkpoint.parent.glob(".*")):
        return "within the writing of a checkpoint"
    if run.state_file.exists():
        return "training, validation or test"
    return "loading, or filling the cache"


@contextmanager
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


if __name__ == "__main__":
    command = argparse.ArgumentParser()
    command.add_argument("signal", choices=["KILL", "INT", "TERM"])
    command.add_argument("--times", type=int, default=20)
    command.add_argument("--seed", type=int, default=0)
    given = command.parse_args()
    quiet_libraries()
    import tlcli.engine.session
    import tlcli.runs.resume_state
    import tlcli.train  # noqa: F401 - what a forked process then has

    sys.stdout.write(json.dumps(main(signal.Signals[f"SIG{given.signal}"], given.times, given.seed), indent=1))
