"""What differs between runs, and whether their test accuracies differ by more than chance."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml  # type: ignore[import-untyped]
from scipy import stats

from tlcli.errors import UsageError
from tlcli.files import expand_user, resolve_links
from tlcli.runs.predictions import SplitPredictions, read_predictions
from tlcli.runs.run_dir import SWEEP_FILES, RunDir, open_run, read_json

LABELS = ("name", "out")
"""Keys of a config that say what a run is called and where it goes, not what it does."""

LEVEL = 0.05
"""Below this p a difference counts as more than chance."""


@dataclass(frozen=True, eq=False)
class Run:
    """One finished run. `config` has its values by their full keys, `setting` what it ran on; `test` is test.json, and
    `rows` the predictions on the test images, None where the run kept none."""

    path: Path
    config: Mapping[str, Any]
    setting: Mapping[str, Any]
    test: Mapping[str, Any]
    rows: SplitPredictions | None

    @property
    def accuracy(self) -> float:
        return float(self.test["accuracy"])


@dataclass(frozen=True)
class Image:
    """A test image that one run gets right and the other wrong, with what each says."""

    key: str
    name: str
    true: str
    first: str
    second: str


@dataclass(frozen=True)
class ClassPair:
    """One class: the share of its `n` images that each run finds."""

    name: str
    n: int
    first: float
    second: float


@dataclass(frozen=True, eq=False)
class Pair:
    """Two runs on the same test images, `n` of them. `first` and `second` are places in the list of runs.

    `p` is McNemar's, exact and two-sided; `p_holm` the same, corrected for the number of pairs (Holm 1979).
    `least`: the smallest difference in accuracy that would be more than chance, as often as these two disagree.
    """

    first: int
    second: int
    n: int
    both_right: int
    both_wrong: int
    only_first: tuple[Image, ...]
    only_second: tuple[Image, ...]
    p: float
    p_holm: float
    least: float
    classes: tuple[ClassPair, ...]
    moved: bool

    @property
    def difference(self) -> float:
        """Accuracy of the first less that of the second."""
        return (len(self.only_first) - len(self.only_second)) / self.n

    @property
    def settled(self) -> bool:
        """Whether it is more than chance."""
        return self.p_holm < LEVEL


@dataclass(frozen=True)
class NoPair:
    """Two runs between which there is no paired test, and why."""

    first: int
    second: int
    why: str


@dataclass(frozen=True)
class Seeds:
    """Runs of one configuration with different seeds: mean and standard deviation (n - 1) of their test accuracies, and
    Student's 95 % interval of the mean. `same_images`: whether all were tested on the same images."""

    runs: tuple[int, ...]
    mean: float
    deviation: float
    ci95: tuple[float, float]
    same_images: bool


@dataclass(frozen=True, eq=False)
class Comparison:
    """Runs, and what differs: `config` and `setting` have for each key that differs the value of each run, or MISSING.
    `pairs`: the two runs, or each run against that of the highest test accuracy, which is `best`."""

    runs: tuple[Run, ...]
    config: Mapping[str, tuple[Any, ...]]
    setting: Mapping[str, tuple[Any, ...]]
    best: int
    pairs: tuple[Pair | NoPair, ...]
    seeds: tuple[Seeds, ...]


class _Missing:
    """A key that a run does not have."""

    def __repr__(self) -> str:
        return "-"


MISSING = _Missing()


def compare(paths: Sequence[Path]) -> Comparison:
    """Compare finished runs; the folder of a sweep stands for those of its jobs that were tested.

    Raises UsageError for fewer than two runs, a run that was not tested, or files that cannot be read.
    """
    runs = tuple(read_run(path) for path in _each_run(paths))
    if len(runs) < 2:
        raise UsageError("compare takes two or more runs")
    best = max(range(len(runs)), key=lambda i: (runs[i].accuracy, -float(runs[i].test["loss"])))
    wanted = [(0, 1)] if len(runs) == 2 else [(best, i) for i in range(len(runs)) if i != best]
    return Comparison(
        runs,
        config=_differences([run.config for run in runs]),
        setting=_differences([run.setting for run in runs]),
        best=best,
        pairs=_corrected([_pair(runs, first, second) for first, second in wanted]),
        seeds=_seeds(runs),
    )


# -- reading


def _each_run(paths: Sequence[Path]) -> list[Path]:
    """The directories of single runs, each once."""
    found: dict[Path, Path] = {}
    for path in paths:
        if any((path / name).is_file() for name in SWEEP_FILES) and not (path / "run.json").exists():
            jobs = [p.parent for p in path.glob("*/run.json") if (p.parent / "test.json").is_file()]
            own = sorted(jobs, key=lambda job: (len(job.name), job.name))
        else:
            own = [path]
        for one in own:
            place = resolve_links(expand_user(str(one)))
            if place in found and len(own) == 1:
                raise UsageError(f"{one}: is named twice")
            found[place] = one
    return list(found.values())


def read_run(path: Path) -> Run:
    """A finished run. Raises UsageError where it was not tested, or where its files are damaged."""
    run = open_run(path)
    info = run.info
    if not run.test_file.is_file():
        raise UsageError(f"{run.path}: has no test.json; its status is {info.get('status', 'unknown')}")
    try:
        test = read_json(run.test_file)
        _ = float(test["accuracy"]), float(test["loss"]), int(test["n"]), [float(v) for v in test["accuracy_ci95"]]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{run.test_file}: damaged ({type(error).__name__}: {error})") from error
    rows = read_predictions(run.test_predictions) if run.test_predictions.is_file() else None
    return Run(run.path, _config(run), _setting(info), test, rows)


def _config(run: RunDir) -> dict[str, Any]:
    try:
        content = yaml.safe_load(run.config_file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{run.config_file}: cannot be read as YAML ({' '.join(str(error).split())[:200]})") from error
    if not isinstance(content, dict):
        raise UsageError(f"{run.config_file}: holds no config (keys and values)")
    return {key: value for key, value in flat(content).items() if key not in LABELS and not key.startswith("hydra.")}


def flat(node: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """A tree of mappings as its leaves by their full keys; lists are leaves."""
    found: dict[str, Any] = {}
    for key, value in node.items():
        if isinstance(value, dict) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _setting(info: Mapping[str, Any]) -> dict[str, Any]:
    """What a run ran on, as far as it can change a figure."""
    known = flat({key: info.get(key) or {} for key in ("versions", "machine", "precision")})
    wanted = ("versions.tlcli", "versions.torch", "versions.torchvision", "versions.timm", "machine.processor")
    facts = {key.removeprefix("versions."): known[key] for key in wanted if key in known}
    return {**facts, "device": info.get("device"), "precision": known.get("precision.evaluate")}


def _differences(configs: Sequence[Mapping[str, Any]]) -> dict[str, tuple[Any, ...]]:
    """The keys whose values are not all the same, with the value of each."""
    keys = dict.fromkeys(key for config in configs for key in config)
    values = {key: tuple(config.get(key, MISSING) for config in configs) for key in keys}
    return {key: own for key, own in values.items() if any(a != b for a, b in pairwise(own))}


# -- pairs


def _pair(runs: Sequence[Run], first: int, second: int) -> Pair | NoPair:
    """The paired test of two runs, or why there is none."""
    a, b = runs[first].rows, runs[second].rows
    for run, rows in ((runs[first], a), (runs[second], b)):
        if rows is None:
            return NoPair(first, second, f"{run.path} has no test_predictions.safetensors, which newer runs have")
    assert a is not None
    assert b is not None
    if why := _other_images(a, b):
        return NoPair(first, second, why)
    places = {key: i for i, key in enumerate(b.keys)}
    order = torch.tensor([places[key] for key in a.keys], dtype=torch.int64)
    said_a, said_b = _said(a), _said(b)[order.numpy()]
    true = np.array(a.classes, dtype=object)[a.labels.numpy()]
    right_a, right_b = said_a == true, said_b == true

    def images(where: np.ndarray) -> tuple[Image, ...]:
        return tuple(Image(a.keys[i], a.names[i], true[i], said_a[i], said_b[i]) for i in np.flatnonzero(where))

    only_a, only_b = images(right_a & ~right_b), images(right_b & ~right_a)
    n = len(true)
    p = mcnemar(len(only_a), len(only_b))
    return Pair(
        first,
        second,
        n=n,
        both_right=int((right_a & right_b).sum()),
        both_wrong=int((~right_a & ~right_b).sum()),
        only_first=only_a,
        only_second=only_b,
        p=p,
        p_holm=p,
        least=least_settled(len(only_a) + len(only_b)) / n,
        classes=_class_pairs(true, right_a, right_b),
        moved=runs[first].config.get("dataset.root") != runs[second].config.get("dataset.root"),
    )


def _said(rows: SplitPredictions) -> np.ndarray:
    """The name of the likeliest class of each row."""
    said: np.ndarray = np.array(rows.classes, dtype=object)[rows.logits.argmax(dim=1).numpy()]
    return said


def _other_images(a: SplitPredictions, b: SplitPredictions) -> str | None:
    """Why two runs were not tested on the same images; None where they were. Images are matched by their keys."""
    theirs, ours = ({key: rows.classes[label] for key, label in _labels(rows)} for rows in (a, b))
    if len(theirs) < len(a.keys) or len(ours) < len(b.keys):
        return "some test images have one and the same name"
    if common := len(theirs.keys() & ours.keys()):
        alone = len(theirs.keys() ^ ours.keys())
        if alone:
            return f"their test sets differ: {common:,} images are in both, {alone:,} in one alone"
        other = sum(theirs[key] != ours[key] for key in theirs)
        return f"their test sets differ: {other:,} of {common:,} images have another label" if other else None
    return "their test sets have no image in common"


def _labels(rows: SplitPredictions) -> list[tuple[str, int]]:
    return list(zip(rows.keys, rows.labels.tolist(), strict=True))


def _class_pairs(true: np.ndarray, right_a: np.ndarray, right_b: np.ndarray) -> tuple[ClassPair, ...]:
    """Each class with its recall in both runs, those that differ most first."""
    found = []
    for name in dict.fromkeys(true):
        own = true == name
        found.append(ClassPair(name, int(own.sum()), float(right_a[own].mean()), float(right_b[own].mean())))
    return tuple(sorted(found, key=lambda c: (-abs(c.first - c.second), c.name)))


def mcnemar(only_first: int, only_second: int) -> float:
    """The exact two-sided p of McNemar's test: of the images that one alone gets right, each falls to either with
    probability one half (McNemar 1947)."""
    n = only_first + only_second
    return float(stats.binomtest(only_first, n, 0.5).pvalue) if n else 1.0


def least_settled(disagreements: int) -> int:
    """The smallest difference, in images, that would be more than chance where two runs disagree on so many. Fewer than
    six never settle anything: six of six is the first that does."""
    n = max(disagreements, 6)
    return next(2 * more - n for more in range(n // 2, n + 1) if 2 * more > n and mcnemar(more, n - more) < LEVEL)


def _corrected(pairs: Sequence[Pair | NoPair]) -> tuple[Pair | NoPair, ...]:
    """The pairs with Holm's correction for their number."""
    tested = [pair for pair in pairs if isinstance(pair, Pair)]
    corrected = iter(holm([pair.p for pair in tested]))
    return tuple(replace(pair, p_holm=next(corrected)) if isinstance(pair, Pair) else pair for pair in pairs)


def holm(values: Sequence[float]) -> list[float]:
    """p-values corrected so that the chance of one false alarm among all stays below the level (Holm 1979)."""
    found, highest = [0.0] * len(values), 0.0
    for rank, i in enumerate(sorted(range(len(values)), key=lambda i: values[i])):
        highest = max(highest, min(1.0, (len(values) - rank) * values[i]))
        found[i] = highest
    return found


# -- seeds


def _seeds(runs: Sequence[Run]) -> tuple[Seeds, ...]:
    """The groups of runs whose configs are the same but for the seed."""
    groups: dict[str, list[int]] = {}
    for i, run in enumerate(runs):
        rest = {key: value for key, value in run.config.items() if key != "seed"}
        groups.setdefault(repr(sorted(rest.items())), []).append(i)
    return tuple(_group(runs, own) for own in groups.values() if len(own) > 1)


def _group(runs: Sequence[Run], own: Sequence[int]) -> Seeds:
    values = [runs[i].accuracy for i in own]
    rows = [runs[i].rows for i in own]
    same = all(a is not None and b is not None and _other_images(a, b) is None for a, b in pairwise(rows))
    mean, deviation = float(np.mean(values)), float(np.std(values, ddof=1))
    half = float(stats.t.ppf(0.975, len(values) - 1)) * deviation / math.sqrt(len(values))
    return Seeds(tuple(own), mean, deviation, (max(0.0, mean - half), min(1.0, mean + half)), same)
