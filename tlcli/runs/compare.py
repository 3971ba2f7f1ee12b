"""Compare finished runs: their configs, and whether the test accuracies of two of them differ significantly."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from tlcli.errors import UsageError
from tlcli.files import expand_user, is_file, read_yaml, resolve_links
from tlcli.runs.predictions import SplitPredictions, read_predictions
from tlcli.runs.run_dir import is_sweep, open_run, read_json
from tlcli.text import flat_keys, one_line

LABELS = ("name", "out")
"""Config keys that name a run or its place; they do not change what it computes."""

SETTING = ("versions.tlcli", "versions.torch", "versions.torchvision", "versions.timm", "machine.processor")

ALPHA = 0.05
"""A difference is significant if p is below this."""


@dataclass(frozen=True, eq=False)
class ComparedRun:
    """A tested run.

    Args:
        config: the values of config.yaml by full key.
        setting: versions, processor, device and precision.
        test: the contents of test.json.
        predictions: of the test images; None if the run did not store them.
    """

    path: Path
    config: Mapping[str, Any]
    setting: Mapping[str, Any]
    test: Mapping[str, Any]
    predictions: SplitPredictions | None


@dataclass(frozen=True)
class ClassRecall:
    """The recall of a class with `n` test images in two runs."""

    name: str
    n: int
    first: float
    second: float


@dataclass(frozen=True)
class PairedTest:
    """McNemar's exact two-sided test of two runs on the same `n` images.

    Args:
        only_first: images that only the first run classifies correctly; `only_second` likewise.
        classes: the recall per class, largest difference first.
    """

    n: int
    both_right: int
    both_wrong: int
    only_first: int
    only_second: int
    p: float
    classes: tuple[ClassRecall, ...]

    @property
    def difference(self) -> float:
        """The accuracy of the first run minus that of the second."""
        return (self.only_first - self.only_second) / self.n

    @property
    def is_significant(self) -> bool:
        return self.p < ALPHA


@dataclass(frozen=True)
class SeedGroup:
    """Runs whose configs differ only in the seed, by index.

    Args:
        deviation: standard deviation of the test accuracies (n - 1).
        ci95: Student's 95 % interval of the mean.
        same_images: True if all runs were tested on the same images.
    """

    runs: tuple[int, ...]
    mean: float
    deviation: float
    ci95: tuple[float, float]
    same_images: bool


@dataclass(frozen=True, eq=False)
class Comparison:
    """The runs and their differences.

    Args:
        config: per key that differs the value of each run, or MISSING; `setting` likewise.
        paired: the test of two runs; if there is none, the reason.
    """

    runs: tuple[ComparedRun, ...]
    config: Mapping[str, tuple[Any, ...]]
    setting: Mapping[str, tuple[Any, ...]]
    paired: PairedTest | str
    seeds: tuple[SeedGroup, ...]


class _Missing:
    """The value of a key that a run does not have."""

    def __repr__(self) -> str:
        return "-"


MISSING = _Missing()


def compare(paths: Sequence[Path]) -> Comparison:
    """Compare tested runs; the folder of a sweep stands for its tested jobs.

    Raises:
        UsageError: fewer than two runs, a run that was not tested, or a file that cannot be read.
    """
    folders: dict[Path, Path] = {}
    for path in map(expand_user, map(str, paths)):
        expanded = [path]
        if is_sweep(path):
            tested = [file.parent for file in path.glob("*/test.json")]
            expanded = sorted(tested, key=lambda job: (len(job.name), job.name))
        elif resolve_links(path) in folders:
            raise UsageError(f"{path}: is named twice")
        folders |= {resolve_links(folder): folder for folder in expanded}
    runs = tuple(read_compared_run(folder) for folder in folders.values())
    if len(runs) < 2:
        raise UsageError("compare takes two or more runs")
    too_many = f"significance is tested for two runs only, not for {len(runs)}"
    paired = paired_test(*runs) if len(runs) == 2 else too_many
    config, setting = _differences([run.config for run in runs]), _differences([run.setting for run in runs])
    return Comparison(runs, config, setting, paired, _seed_groups(runs))


def read_compared_run(path: Path) -> ComparedRun:
    """Return a tested run. Raise UsageError if it was not tested, or if a file is damaged."""
    run = open_run(path)
    info = run.info
    if not is_file(run.test_file):
        raise UsageError(f"{run.path}: has no test.json; its status is {info.get('status', 'unknown')}")
    try:
        test = read_json(run.test_file)
        _ = float(test["accuracy"]), float(test["loss"]), int(test["n"]), [float(v) for v in test["accuracy_ci95"]]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{run.test_file}: damaged ({type(error).__name__}: {error})") from error
    try:
        config = flat_keys(read_yaml(run.config_file))
    except (OSError, ValueError) as error:
        raise UsageError(f"{run.config_file}: cannot be read as YAML ({one_line(error)})") from error
    config = {key: v for key, v in config.items() if key not in LABELS and not key.startswith("hydra.")}
    known = flat_keys({key: info.get(key) or {} for key in ("versions", "machine", "precision")})
    setting = {key.removeprefix("versions."): known[key] for key in SETTING if key in known}
    setting |= {"device": info.get("device"), "precision": known.get("precision.evaluate")}
    predictions = read_predictions(run.test_predictions) if is_file(run.test_predictions) else None
    return ComparedRun(run.path, config, setting, test, predictions)


def _differences(values: Sequence[Mapping[str, Any]]) -> dict[str, tuple[Any, ...]]:
    """Return the keys that differ between runs, with the value of each run."""
    keys = dict.fromkeys(key for own in values for key in own)
    rows = {key: tuple(own.get(key, MISSING) for own in values) for key in keys}
    return {key: row for key, row in rows.items() if any(a != b for a, b in pairwise(row))}


def paired_test(first: ComparedRun, second: ComparedRun) -> PairedTest | str:
    """Return the paired test of two runs, or the reason why there is none. Images are matched by their keys."""
    a, b = first.predictions, second.predictions
    if a is None or b is None:
        run = first if a is None else second
        return f"{run.path} has no test_predictions.safetensors, which newer runs have"
    if reason := _other_images(a, b):
        return reason
    rows = {key: i for i, key in enumerate(b.keys)}
    order = [rows[key] for key in a.keys]
    true = np.array(a.classes, dtype=object)[a.labels.numpy()]
    right_a = _predicted(a) == true
    right_b = _predicted(b)[order] == true
    only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    recalls = []
    for name in dict.fromkeys(true):
        of_class = true == name
        recalls.append(ClassRecall(name, int(of_class.sum()), right_a[of_class].mean(), right_b[of_class].mean()))
    return PairedTest(
        n=len(true),
        both_right=int((right_a & right_b).sum()),
        both_wrong=int((~right_a & ~right_b).sum()),
        only_first=only_a,
        only_second=only_b,
        p=mcnemar(only_a, only_b),
        classes=tuple(sorted(recalls, key=lambda c: (-abs(c.first - c.second), c.name))),
    )


def _predicted(predictions: SplitPredictions) -> np.ndarray:
    """Return the name of the predicted class per row."""
    names: np.ndarray = np.array(predictions.classes, dtype=object)[predictions.logits.argmax(dim=1).numpy()]
    return names


def _other_images(a: SplitPredictions, b: SplitPredictions) -> str | None:
    """Return None if two runs were tested on the same images, otherwise the difference."""
    labels_a, labels_b = (
        {key: run.classes[label] for key, label in zip(run.keys, run.labels.tolist(), strict=True)} for run in (a, b)
    )
    if len(labels_a) < len(a.keys) or len(labels_b) < len(b.keys):
        return "some test images have the same name"
    common = len(labels_a.keys() & labels_b.keys())
    if not common:
        return "their test sets have no image in common"
    if alone := len(labels_a.keys() ^ labels_b.keys()):
        return f"their test sets differ: {common:,} images are in both, {alone:,} in only one"
    other = sum(labels_a[key] != labels_b[key] for key in labels_a)
    return f"their test sets differ: {other:,} of {common:,} images have another label" if other else None


def mcnemar(only_first: int, only_second: int) -> float:
    """Return the exact two-sided p of McNemar's test (McNemar 1947).

    Under the null hypothesis an image that only one run classifies correctly belongs to either with probability 1/2.
    """
    n = only_first + only_second
    return float(stats.binomtest(only_first, n, 0.5).pvalue) if n else 1.0


def _seed_groups(runs: Sequence[ComparedRun]) -> tuple[SeedGroup, ...]:
    """Return the groups of runs whose configs differ only in the seed."""
    indices: dict[str, list[int]] = {}
    for i, run in enumerate(runs):
        rest = sorted((key, value) for key, value in run.config.items() if key != "seed")
        indices.setdefault(repr(rest), []).append(i)
    groups = []
    for members in indices.values():
        if len(members) < 2:
            continue
        values = [float(runs[i].test["accuracy"]) for i in members]
        predictions = [runs[i].predictions for i in members]
        same = all(a is not None and b is not None and not _other_images(a, b) for a, b in pairwise(predictions))
        mean, deviation = float(np.mean(values)), float(np.std(values, ddof=1))
        half = float(stats.t.ppf(0.975, len(values) - 1)) * deviation / math.sqrt(len(values))
        ci95 = max(0.0, mean - half), min(1.0, mean + half)
        groups.append(SeedGroup(tuple(members), mean, deviation, ci95, same))
    return tuple(groups)
