"""One run's directory: the names of its files, and how each is written."""

import hashlib
import json
import os
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tlcli.files import atomic_write
from tlcli.text import csv_line

SCHEMA_VERSION = 1


class RunDir:
    """A run's directory. Files are written as the run goes; run.json always has the present status."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.record_file = path / "run.json"
        self.metrics_file = path / "metrics.jsonl"
        self.test_file = path / "test.json"
        self.val_predictions = path / "val_predictions.safetensors"
        self.test_predictions = path / "test_predictions.safetensors"
        self.log_file = path / "run.log"
        self.config_file = path / "config.yaml"
        self.bad_files_file = path / "bad_files.csv"
        self.best = path / "checkpoints" / "best.safetensors"
        self.last = path / "checkpoints" / "last.safetensors"
        self.state = path / "checkpoints" / "state.safetensors"
        self.plots = path / "plots"

    def start(self, *, command: str, overrides: Sequence[str], config: str) -> None:
        """Write config.yaml and a run.json with the status `running`; the directory is there afterwards."""
        self.path.mkdir(parents=True, exist_ok=True)
        self.write_config(config)
        self.update(
            schema_version=SCHEMA_VERSION,
            status="running",
            command=command,
            cwd=str(Path.cwd()),
            overrides=list(overrides),
            started=now(),
            pid=os.getpid(),
            host=host_digest(),
        )

    def write_config(self, config: str) -> None:
        """Write config.yaml, in one atomic step."""
        with atomic_write(self.config_file) as file:
            file.write(config.encode())

    def go_on(self, command: str) -> None:
        """Write a run.json with the status `running` for a run that ended before its time."""
        before = read_json(self.record_file).get("resumed", [])
        self.update(
            status="running",
            error=None,
            ended=None,
            pid=os.getpid(),
            host=host_digest(),
            resumed=[*before, {"command": command, "started": now()}],
        )

    def update(self, **facts: Any) -> None:
        """Add facts to run.json, in one atomic step."""
        record = read_json(self.record_file) if self.record_file.exists() else {}
        write_json(self.record_file, {**record, **facts})

    def end(self, status: str, error: str | None = None) -> None:
        """Write the final status: done, failed or interrupted."""
        self.update(status=status, error=error, ended=now())

    def log_metrics(self, row: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl; whoever follows the file sees it at once."""
        with self.metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")

    def metrics_bytes(self) -> int:
        """The size of metrics.jsonl."""
        return self.metrics_file.stat().st_size if self.metrics_file.exists() else 0

    def write_bad_files(self, files: Sequence[tuple[str, str]]) -> None:
        """List the files that do not decode, each with its reason; nothing where there are none."""
        if files:
            with self.bad_files_file.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
                file.writelines(csv_line(row) for row in [("file", "reason"), *files])


def now() -> str:
    """The present time, UTC, ISO 8601 to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def host_digest() -> str:
    """Tells whether a run was on this machine, so that its pid means something; it does not tell the machine's name."""
    return hashlib.sha256(platform.node().encode()).hexdigest()[:12]


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a run."""
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError(f"{path}: not a JSON object")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write an object so that a reader finds the old file or the new one, never a part."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    with atomic_write(path) as file:
        file.write(text.encode())
