"""The files of a run as a report may rely on them: what is missing or of another kind is left out.

A run may have failed at any point, be of an older release, or come from somebody else.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from tlcli.errors import TlcliError
from tlcli.runs.run_dir import RunDir, read_json

Facts = Mapping[str, Any]


@dataclass(frozen=True)
class RunFiles:
    """What a run's directory says. `config_text` is config.yaml as it is, `rows` the lines of metrics.jsonl."""

    run: RunDir
    record: Facts
    test: Facts
    rows: tuple[Facts, ...]
    config: Facts
    config_text: str


def read_run(run: RunDir) -> RunFiles:
    """The files of a run. Raises TlcliError where run.json cannot be read."""
    if not run.info_file.is_file():
        raise TlcliError(f"{run.info_file}: cannot be read: not a regular file")
    try:
        record = read_json(run.info_file)
    except (OSError, ValueError, RecursionError) as exc:
        raise TlcliError(f"{run.info_file}: cannot be read: {' '.join(str(exc).split())}") from exc
    text = _text(run.config_file)
    return RunFiles(run, record, _json(run.test_file), _rows(run.metrics_file), _yaml(text), text)


def number(value: object) -> float | None:
    """A finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def whole(value: object) -> int | None:
    """A whole number, else None."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def facts(value: object) -> Facts:
    """A mapping, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def texts(value: object) -> tuple[str, ...]:
    """The strings of a list, else none."""
    return tuple(one for one in value if isinstance(one, str)) if isinstance(value, list) else ()


def text(value: object) -> str | None:
    """A string that says something, else None."""
    return value if isinstance(value, str) and value else None


def at(value: object, *keys: str) -> Any:
    """What is found down these keys, None where a step of them is missing."""
    for key in keys:
        value = facts(value).get(key)
    return value


def pair(value: object) -> tuple[float, float] | None:
    """Two finite numbers, else None."""
    if not isinstance(value, list) or len(value) != 2:
        return None
    low, high = number(value[0]), number(value[1])
    return None if low is None or high is None else (low, high)


def _json(path: Path) -> Facts:
    if not path.is_file():
        return {}
    try:
        return read_json(path)
    except (OSError, ValueError, RecursionError):
        return {}


def _text(path: Path) -> str:
    if not path.is_file():  # a pipe would be waited for
        return ""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _yaml(text: str) -> Facts:
    try:
        return facts(yaml.safe_load(text))
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}


def _rows(path: Path) -> tuple[Facts, ...]:
    """The lines that are whole: the last one of a killed run may not be."""
    found = []
    for line in _text(path).splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            found.append(row)
    return tuple(found)
