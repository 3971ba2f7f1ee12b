"""Start-up times, whole process, warm disk: python -m benchmarks.startup"""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.run import publish

TLCLI = [sys.executable, "-m", "tlcli"]
COMMANDS = {
    "`tlcli --help`": ["--help"],
    "`tlcli train --cfg job`": ["train", "--cfg", "job"],
    "a usage error": ["train", "optimzer=sgd"],
}
ROUNDS = 7


def whole_process(words: list[str], folder: Path) -> float:
    """Return the wall time of a process."""
    began = time.perf_counter()
    subprocess.run([*TLCLI, *words], cwd=folder, capture_output=True)
    return time.perf_counter() - began


def first_line(folder: Path) -> float:
    """Return seconds from the start of `tlcli train` to its first line, and stop the run."""
    began = time.perf_counter()
    with subprocess.Popen([*TLCLI, "train"], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        process.stdout.readline()
        seconds = time.perf_counter() - began
        process.terminate()
        process.stdout.read()
    return seconds


def main() -> None:
    """Run each command once per round, after one round that warms the disk, and print median and range."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        timers = {what: (lambda words=words: whole_process(words, folder)) for what, words in COMMANDS.items()}
        timers["first line of `tlcli train`"] = lambda: first_line(folder)
        rounds = [{what: timer() for what, timer in timers.items()} for _ in range(ROUNDS + 1)][1:]
    rows = []
    for what in timers:
        seconds = [one[what] for one in rounds]
        rows.append([what, f"{statistics.median(seconds):.2f} s", f"{min(seconds):.2f} to {max(seconds):.2f} s"])
    publish("startup", ["command", "median", "range"], rows, Path(tempfile.mkdtemp(prefix="startup_")))


if __name__ == "__main__":
    main()
