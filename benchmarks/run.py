"""Run tlcli in one process per run and read the run directory; run each baseline in its own process."""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.figures import HEADER, Measure

ROOT = Path(__file__).resolve().parents[1]
"""The checkout, from which baselines are imported."""

TLCLI = [sys.executable, "-m", "tlcli", "train"]

BACKBONES = {
    "resnet18": ("backbone=resnet18", "backbone.weights=none"),
    "efficientnet_lite0": ("backbone=efficientnet_lite0",),
}
"""Speed does not depend on the values of weights, so ResNet-18 starts from random ones: its published weights need a
network. EfficientNet-Lite0's come with tlcli."""


@dataclass(frozen=True)
class Ended:
    """The wall time and peak resident memory of a process that succeeded."""

    seconds: float
    peak_gb: float


@dataclass(frozen=True)
class Result:
    """One run: directory, test.json, wall time of the whole process and peak resident memory."""

    run: Path
    test: dict[str, Any]
    seconds: float
    peak_gb: float = 0.0

    @property
    def accuracy(self) -> str:
        """Return `0.851 (0.844 to 0.858)`, with Wilson's 95 % interval."""
        low, high = self.test["accuracy_ci95"]
        return f"{self.test['accuracy']:.3f} ({low:.3f} to {high:.3f})"

    @cached_property
    def facts(self) -> dict[str, Any]:
        """Return the contents of run.json."""
        return read_json(self.run / "run.json")

    def phases(self, *names: str) -> float:
        """Return the seconds of these phases together; a missing phase counts 0."""
        return sum(self.facts["seconds"].get(name, 0.0) for name in names)

    def training_speed(self) -> float:
        """Return images per second in training, over all epochs except the first."""
        later = self.epochs("train")[1:]
        return float(self.facts["n_train"] * len(later) / sum(epoch["seconds"] for epoch in later))

    def epochs(self, split: str) -> list[dict[str, Any]]:
        """Return the lines of metrics.jsonl of this split, one per epoch."""
        lines = (self.run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [row for row in map(json.loads, lines) if row["split"] == split]


def tlcli_train(out: Path, *overrides: str, cache: Path | None = None) -> Result:
    """Run `tlcli train` with these overrides in its own process, with the run directory `out`.

    Activations are stored under `cache`; without it the run has an empty cache that is removed afterwards.
    """
    with _cache(cache) as folder:
        ended = whole_process([*TLCLI, f"hydra.run.dir='{out}'", *overrides], {"TLCLI_CACHE": str(folder)})
    return Result(out, read_json(out / "test.json"), ended.seconds, ended.peak_gb)


def tlcli_sweep(out: Path, *overrides: str, cache: Path | None = None) -> tuple[list[Result], float]:
    """Run `tlcli train -m`. Return one result per job, in order, and the wall time of the whole process."""
    with _cache(cache) as folder:
        command = [*TLCLI, "-m", f"hydra.sweep.dir='{out}'", *overrides]
        ended = whole_process(command, {"TLCLI_CACHE": str(folder)})
    jobs = sorted((file.parent for file in out.glob("*/test.json")), key=lambda job: int(job.name))
    return [Result(job, read_json(job / "test.json"), float("nan")) for job in jobs], ended.seconds


@contextmanager
def _cache(folder: Path | None) -> Iterator[Path]:
    """Yield this folder, or a temporary one."""
    if folder is not None:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="activations_") as name:
        yield Path(name)


def whole_process(command: Sequence[str], environment: Mapping[str, str], cwd: Path | None = None) -> Ended:
    """Run a command, in the folder `cwd`. Raise CalledProcessError if it fails.

    The memory is that of the largest of the process and its children. Linux counts from before the command is loaded,
    so it is never less than the memory of the calling process.
    """
    began = time.perf_counter()
    variables = {**os.environ, **environment}
    process = subprocess.Popen(command, stdout=2, env=variables, cwd=cwd)  # stdout has the tables
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - began
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    in_bytes = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Ended(seconds, in_bytes / 1e9)


def alone(function: Callable[..., dict[str, Any]], **arguments: Any) -> dict[str, Any]:
    """Return the result of a benchmark module's function in a new process, with its wall time as `process_seconds`.

    Allocator settings, threads and warm caches would outlive a call in this process.
    """
    spec = sys.modules[function.__module__].__spec__  # __name__ is __main__ under `python -m`
    assert spec is not None
    code = (
        f"import json, sys; from {spec.name} import {function.__name__} as function; "
        f"print(json.dumps(function(**json.loads(sys.argv[1]))))"
    )
    began = time.perf_counter()
    command = [sys.executable, "-c", code, json.dumps(arguments)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT).stdout
    seconds = time.perf_counter() - began
    return {**json.loads(output.splitlines()[-1]), "process_seconds": seconds}


def read_json(file: Path) -> Any:
    """Return the contents of a JSON file."""
    return json.loads(file.read_text(encoding="utf-8"))


def parser(documentation: str | None) -> argparse.ArgumentParser:
    """Return the parser of DATA [--small] [--out FOLDER]."""
    command = argparse.ArgumentParser(description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("data", type=Path, help="has cifar10/{train,test}/CLASS/* and hymenoptera/{train,val}/CLASS/*")
    command.add_argument("--small", action="store_true", help="tiny settings, to test that it runs")
    command.add_argument("--out", type=Path, help="folder for runs and JSON (default: a new temporary folder)")
    return command


def out_folder(given: Path | None, name: str) -> Path:
    """Return the given folder, or a new one, as an absolute path."""
    folder = (given or Path(tempfile.mkdtemp(prefix=f"{name}_"))).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def machine() -> str:
    """Return the processor and the versions, for the line under a table."""
    record = Path("/proc/cpuinfo")
    lines = record.read_text().splitlines() if record.exists() else []
    names = [line for line in lines if "model name" in line]
    processor = names[0].split(":")[1].strip() if names else platform.processor()
    flags = next((set(line.split()) for line in lines if line.startswith("flags")), set())
    if bfloat16 := sorted(flags & {"avx512_bf16", "amx_bf16"}):
        processor += f" ({', '.join(bfloat16)})"
    packages = ", ".join(f"{name} {version(name).split('+')[0]}" for name in ("torch", "torchvision", "timm"))
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else len(names)
    cores = f"{usable} of {len(names)}" if usable < len(names) else f"{len(names) or '?'}"
    return f"{cores} cores of {processor}, Python {platform.python_version()}, {packages}"


def publish(
    name: str, header: list[str], rows: list[list[str]], folder: Path, figures: Mapping[str, Any] | None = None
) -> None:
    """Print a Markdown table and write it as JSON, with the underlying figures."""
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print(f"\n{machine()}\n", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.json"
    record = {"machine": machine(), "rows": [dict(zip(header, row, strict=True)) for row in rows]}
    file.write_text(json.dumps({**record, "figures": figures or {}}, indent=2) + "\n", encoding="utf-8")
    print(f"written to {file}", file=sys.stderr, flush=True)


def publish_measures(name: str, measures: list[Measure], folder: Path) -> list[Measure]:
    """Print bars with their measurements, write them as JSON, and return them."""
    publish(name, HEADER, [m.row for m in measures], folder, {"measures": [m.to_json() for m in measures]})
    return measures
