"""Compare two runs to the last bit, times apart."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tlcli.models.tensorfile import read_tensors
from tlcli.runs.run_dir import RunDir, read_json

TIMES = {"seconds", "images_per_second"}


def differences(one: Path, other: Path) -> Iterator[str]:
    """Return one line per difference of two finished runs: weights, metrics, test result, predictions."""
    a, b = RunDir(one), RunDir(other)
    for name in ("best_checkpoint", "last_checkpoint", "val_predictions", "test_predictions"):
        one_file, other_file = getattr(a, name), getattr(b, name)
        if one_file.exists() or other_file.exists() or name.endswith("checkpoint"):
            yield from (f"{name}: {what}" for what in _tensors(one_file, other_file))
    if rows(a) != rows(b):
        yield f"metrics.jsonl: {len(rows(a))} and {len(rows(b))} rows"
    if read_json(a.test_file) != read_json(b.test_file):
        yield "test.json"
    records = [read_json(run.info_file) for run in (a, b)]
    for key in ("status", "best", "calibration", "frozen_tensors_verified", "precision"):
        if records[0].get(key) != records[1].get(key):
            yield f"run.json, {key}: {records[0].get(key)} and {records[1].get(key)}"


def rows(run: RunDir) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl without times."""
    lines = map(json.loads, run.metrics_file.read_text(encoding="utf-8").splitlines())
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def _tensors(one: Path, other: Path) -> Iterator[str]:
    (a, facts), (b, other_facts) = read_tensors(one), read_tensors(other)
    if facts != other_facts:
        yield "facts"
    if a.keys() != b.keys():
        yield "other tensors"
    elif unlike := [name for name in a if not torch.equal(a[name], b[name])]:
        yield f"{len(unlike)} tensors, {unlike[0]} first"


def unreadable(folder: Path) -> Iterator[str]:
    """Return the files of a run, finished or not, that cannot be read."""
    for path in folder.rglob("*"):
        try:
            if path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
            elif path.suffix == ".safetensors":
                read_tensors(path)
            elif path.name == "metrics.jsonl":
                for line in path.read_text(encoding="utf-8").splitlines():
                    json.loads(line)
        except Exception as error:
            yield f"{path.relative_to(folder)}: {error}"
