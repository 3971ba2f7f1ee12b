"""Runs tlcli as a user does, a process a run, and reads what it left."""

import json
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Result:
    """One run: its directory, test.json, and the wall time of the whole process."""

    run: Path
    test: dict[str, Any]
    seconds: float

    @property
    def accuracy(self) -> str:
        """`0.851 (0.844 to 0.858)`, with Wilson's 95 % interval."""
        low, high = self.test["accuracy_ci95"]
        return f"{self.test['accuracy']:.3f} ({low:.3f} to {high:.3f})"


def tlcli_train(out: Path, *overrides: str) -> Result:
    """Run `tlcli train` with these overrides in a process of its own; its directory is under `out`."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "tlcli", "train", f"hydra.run.dir='{out}'", *overrides]
    subprocess.run(command, check=True, stdout=2)  # stdout is for the table
    test = json.loads((out / "test.json").read_text(encoding="utf-8"))
    return Result(out, test, time.perf_counter() - began)


def machine() -> str:
    """The processor and the versions, for the line under a table."""
    record = Path("/proc/cpuinfo")
    names = [line for line in record.read_text().splitlines() if "model name" in line] if record.exists() else []
    processor = names[0].split(":")[1].strip() if names else platform.processor()
    packages = ", ".join(f"{name} {version(name).split('+')[0]}" for name in ("torch", "torchvision", "timm"))
    return f"{len(names) or '?'} cores of {processor}, Python {platform.python_version()}, {packages}"


def publish(name: str, header: list[str], rows: list[list[str]], folder: Path) -> None:
    """Print a Markdown table and write it as JSON."""
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print(f"\n{machine()}")
    folder.mkdir(parents=True, exist_ok=True)
    record = {"machine": machine(), "rows": [dict(zip(header, row, strict=True)) for row in rows]}
    (folder / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
