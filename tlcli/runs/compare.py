"""Compare finished runs: their configs, and whether the test accuracies of two of them differ significantly."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy import stats

from tlcli.errors import UsageError
from tlcli.files import expand_user, is_file, read_yaml, resolve_links
from tlcli.runs.predictions import SplitPredictions, read_predictions
from tlcli.runs.run_dir import is_sweep, open_run, read_json
from tlcli.text import flat_keys, one_line

METRICS = ("accuracy", "accuracy_ci95", "loss", "macro_f1", "n")

LABELS = ("name", "out")
"""Config keys that name a run or its place; they do not change what it computes."""

SETTING = ("versions.tlcli", "versions.torch", "versions.torchvision", "versions.timm", "machine.processor")

ALPHA = 0.05
"""A difference is significant if p is below this."""


@dataclass(frozen=True, eq=False)
class TestedRun:
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
class PairedTest:
    """McNemar's exact two-sided test of two runs on the same `n` images.

    `n_only_first_right` counts the images that only the first run classifies correctly; `difference` is the accuracy of
    the first run minus that of the second.
    """

    first: str
    second: str
    n: int
    difference: float
    both_right: int
    both_wrong: int
    n_only_first_right: int
    n_only_second_right: int
    mcnemar_p: float
    more_than_chance: bool
    paired: Literal[True] = True


@dataclass(frozen=True)
class NoPairedTest:
    """Two runs without a paired test, and the reason."""

    first: str
    second: str
    why: str
    paired: Literal[False] = False


@dataclass(frozen=True)
class SeedGroup:
    """Runs whose configs differ only in the seed, and the mean of their test accuracies.

    The standard deviation has n - 1 degrees of freedom, the 95 % interval of the mean is Student's. `same_images`: all
    runs were tested on the same images.
    """

    runs: tuple[str, ...]
    mean: float
    standard_deviation: float
    mean_ci95: tuple[float, float]
    same_images: bool


@dataclass(frozen=True)
class Comparison:
    """The metrics of the runs and their differences. Runs are named by their paths.

    Args:
        config: per key that differs the value of each run that has the key; `setting` likewise.
        pairs: the test of two runs; empty for more than two.
    """

    runs: tuple[Mapping[str, Any], ...]
    config: Mapping[str, Mapping[str, Any]]
    setting: Mapping[str, Mapping[str, Any]]
    pairs: tuple[PairedTest | NoPairedTest, ...]
    seeds: tuple[SeedGroup, ...]


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
    runs = [read_tested_run(folder) for folder in folders.values()]
    if len(runs) < 2:
        raise UsageError("compare takes two or more runs")
    return Comparison(
        runs=tuple({"path": str(run.path), **{key: run.test.get(key) for key in METRICS}} for run in runs),
        config=_differences({str(run.path): run.config for run in runs}),
        setting=_differences({str(run.path): run.setting for run in runs}),
        pairs=(paired_test(*runs),) if len(runs) == 2 else (),
        seeds=_seed_groups(runs),
    )


def read_tested_run(path: Path) -> TestedRun:
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
    return TestedRun(run.path, config, setting, test, predictions)


def _differences(values: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the keys that differ between runs, with the value of each run."""
    keys = dict.fromkeys(key for own in values.values() for key in own)
    rows = {key: {path: own[key] for path, own in values.items() if key in own} for key in keys}
    return {
        k: row for k, row in rows.items() if len(row) < len(values) or any(a != b for a, b in pairwise(row.values()))
    }


def paired_test(first: TestedRun, second: TestedRun) -> PairedTest | NoPairedTest:
    """Return the paired test of two runs. Images are matched by their keys."""
    names = str(first.path), str(second.path)
    a, b = first.predictions, second.predictions
    if a is None or b is None:
        run = first if a is None else second
        return NoPairedTest(*names, f"{run.path} has no test_predictions.safetensors, which newer runs have")
    if reason := _other_images(a, b):
        return NoPairedTest(*names, reason)
    rows = {key: i for i, key in enumerate(b.keys)}
    true = np.array(a.classes, dtype=object)[a.labels.numpy()]
    right_a = _predicted(a) == true
    right_b = _predicted(b)[[rows[key] for key in a.keys]] == true
    n, only_a, only_b = len(true), int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    p = mcnemar(only_a, only_b)
    return PairedTest(
        *names,
        n=n,
        difference=(only_a - only_b) / n,
        both_right=int((right_a & right_b).sum()),
        both_wrong=int((~right_a & ~right_b).sum()),
        n_only_first_right=only_a,
        n_only_second_right=only_b,
        mcnemar_p=p,
        more_than_chance=p < ALPHA,
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


def _seed_groups(runs: Sequence[TestedRun]) -> tuple[SeedGroup, ...]:
    by_config: dict[str, list[TestedRun]] = {}
    for run in runs:
        rest = sorted((key, value) for key, value in run.config.items() if key != "seed")
        by_config.setdefault(repr(rest), []).append(run)
    groups = []
    for members in by_config.values():
        if len(members) < 2:
            continue
        values = [float(run.test["accuracy"]) for run in members]
        predictions = [run.predictions for run in members]
        same = all(a is not None and b is not None and not _other_images(a, b) for a, b in pairwise(predictions))
        mean, deviation = float(np.mean(values)), float(np.std(values, ddof=1))
        half = float(stats.t.ppf(0.975, len(values) - 1)) * deviation / math.sqrt(len(values))
        ci95 = max(0.0, mean - half), min(1.0, mean + half)
        groups.append(SeedGroup(tuple(str(run.path) for run in members), mean, deviation, ci95, same))
    return tuple(groups)
