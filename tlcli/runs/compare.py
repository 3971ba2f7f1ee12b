"""Compare finished runs: their configs, and whether the accuracies of two of them differ significantly."""

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
from tlcli.runs.run_dir import (
    REFIT,
    RunDir,
    has_folds,
    integer,
    is_sweep,
    mapping,
    number,
    open_run,
    pair,
    read_predictions,
    result_of_search,
)
from tlcli.text import flat_keys, natural_order, one_line

LABELS = ("name", "out")  # config keys that name a run or its place; they do not change what it computes
SETTING = ("versions.tlcli", "versions.torch", "versions.torchvision", "versions.timm", "machine.processor")
ALPHA = 0.05  # a difference is significant if p is below this


@dataclass(frozen=True, eq=False)
class TestedRun:
    """A tested run: config.yaml by full key, versions and machine, metrics, (true, predicted) by key if stored.

    `result` is "test", or "cross_validation" for the out-of-fold predictions of the training images.
    """

    path: str
    result: str
    config: Mapping[str, Any]
    setting: Mapping[str, Any]
    test: Mapping[str, Any]
    predictions: Mapping[str, tuple[str, str]] | None


def compare(paths: Sequence[Path]) -> dict[str, Any]:
    """Return what `tlcli compare --format json` prints. A sweep stands for its tested jobs, and folds for their refit.

    If a run has no test.json, the results of all are those of cross-validation.
    `config` and `setting` have the keys that differ with their values by run, `pairs` the paired test if there are two
    runs, `seeds` the groups of runs that differ only in the seed. Raise UsageError for fewer than two runs, a run that
    is named twice or has no such result, or a file that cannot be read.
    """
    folders: dict[Path, Path] = {}
    for path in map(expand_user, map(str, paths)):
        path = path / REFIT if has_folds(path) else path
        if is_sweep(path):
            files = list(path.rglob("test.json")) or path.rglob(f"{REFIT}/val_predictions.safetensors")
            found = {file.parent for file in files} - {result_of_search(path)}
            jobs = sorted(found, key=lambda job: natural_order(str(job)))
            folders |= {resolve_links(job): job for job in jobs}
        elif resolve_links(path) in folders:
            raise UsageError(f"{path}: is named twice")
        else:
            folders[resolve_links(path)] = path
    opened = [open_run(folder) for folder in folders.values()]
    untested = [run for run in opened if not is_file(run.test_file)]
    without = [run for run in [*untested, *opened] if not mapping(run.info.get("cross_validation"))]
    if untested and without:
        if without[0] in untested:
            run, remedy = without[0], "finish it with `tlcli train --resume`"
            if run.status == "done":  # a trial of a search
                remedy = f"test it with `tlcli eval {run.path}`"
            raise UsageError(f"{run.path}: has no test.json; its status is {run.status}; {remedy}")
        raise UsageError(f"{without[0].path}: is tested, not cross-validated; {untested[0].path} has no test.json")
    result = "cross_validation" if untested else "test"
    runs = [_read_tested_run(run, result) for run in opened]
    if len(runs) < 2:
        raise UsageError(f"compare takes two or more runs that are tested; found {len(runs)}")
    return {
        "runs": [{"path": run.path, "result": run.result, **run.test} for run in runs],
        "config": _differences({run.path: run.config for run in runs}),
        "setting": _differences({run.path: run.setting for run in runs}),
        "pairs": [paired_test(*runs)] if len(runs) == 2 else [],
        "seeds": _seed_groups(runs),
    }


def _read_tested_run(run: RunDir, result: str) -> TestedRun:
    test, metrics_file, predictions_file = run.test(), run.test_file, run.test_predictions
    if result == "cross_validation":
        test = {**mapping(run.info.get("best")), **mapping(run.info.get("cross_validation"))}
        metrics_file, predictions_file = run.info_file, run.val_predictions
    metrics = {"accuracy": number, "accuracy_ci95": pair, "loss": number, "macro_f1": number, "n": integer}
    values: dict[str, Any] = {name: read(test.get(name)) for name, read in metrics.items()}
    if missing := [name for name, value in values.items() if value is None and name != "macro_f1"]:
        raise UsageError(f"{metrics_file}: damaged ({missing[0]} is missing or not a number)")
    try:
        config = flat_keys(read_yaml(run.config_file))
    except (OSError, ValueError) as error:
        raise UsageError(f"{run.config_file}: cannot be read as YAML ({one_line(error)})") from error
    config = {key: v for key, v in config.items() if key not in LABELS and not key.startswith("hydra.")}
    known = flat_keys({key: mapping(run.info.get(key)) for key in ("versions", "machine", "precision")})
    setting = {key.removeprefix("versions."): known[key] for key in SETTING if key in known}
    setting |= {"device": run.info.get("device"), "precision": known.get("precision.evaluate")}
    predictions = None
    if is_file(predictions_file):
        stored = read_predictions(predictions_file)
        chosen = stored.logits.argmax(dim=1).tolist() if stored.keys else []
        rows = zip(stored.keys, stored.labels.tolist(), chosen, strict=True)
        predictions = {key: (stored.classes[true], stored.classes[said]) for key, true, said in rows}
    return TestedRun(str(run.path), result, config, setting, values, predictions)


def _differences(values: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the keys that differ between runs, with the value of each run."""
    keys = dict.fromkeys(key for by_key in values.values() for key in by_key)
    rows = {key: {path: by_key[key] for path, by_key in values.items() if key in by_key} for key in keys}
    return {
        k: row for k, row in rows.items() if len(row) < len(values) or any(a != b for a, b in pairwise(row.values()))
    }


def paired_test(first: TestedRun, second: TestedRun) -> dict[str, Any]:
    """Return McNemar's exact two-sided test (McNemar 1947) of two runs on the same images, matched by their keys.

    `difference` is the accuracy of the first run minus that of the second. Without a test, `paired` is False and `why`
    is the reason.
    """
    names = {"first": first.path, "second": second.path}
    if reason := _other_images(first, second):
        return {**names, "why": reason, "paired": False}
    answers = [run.predictions or {} for run in (first, second)]
    a, b = ({key for key, (true, predicted) in by_key.items() if predicted == true} for by_key in answers)
    n, both, only_a, only_b = map(len, (answers[0], a & b, a - b, b - a))
    p = float(stats.binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0
    return {
        **names,
        "n": n,
        "difference": (only_a - only_b) / n,
        "both_right": both,
        "both_wrong": n - both - only_a - only_b,
        "n_only_first_right": only_a,
        "n_only_second_right": only_b,
        "mcnemar_p": p,
        "more_than_chance": p < ALPHA,
        "paired": True,
    }


def _other_images(first: TestedRun, second: TestedRun) -> str | None:
    """Return None if the results of two runs are of the same images, otherwise the difference."""
    labels, sets = [], "test sets" if first.result == "test" else "cross-validated sets"
    for run in (first, second):
        if run.predictions is None:
            name = "test_predictions" if first.result == "test" else "val_predictions"
            return f"{run.path} has no {name}.safetensors, which newer runs have"
        labels.append({key: true for key, (true, _) in run.predictions.items()})
        if len(run.predictions) < run.test["n"]:
            return "some images have the same name"
    a, b = labels
    common = len(a.keys() & b.keys())
    if not common:
        return f"their {sets} have no image in common"
    if alone := len(a.keys() ^ b.keys()):
        return f"their {sets} differ: {common:,} images are in both, {alone:,} in only one"
    other = sum(a[key] != b[key] for key in a)
    return f"their {sets} differ: {other:,} of {common:,} images have another label" if other else None


def _seed_groups(runs: Sequence[TestedRun]) -> list[dict[str, Any]]:
    """Return the mean accuracy, with Student's interval, of each two or more runs that differ only in the seed."""
    by_config: dict[str, list[TestedRun]] = {}
    for run in runs:
        rest = {key: value for key, value in sorted(run.config.items()) if key != "seed"}
        versions = {name: value for name, value in run.setting.items() if f"versions.{name}" in SETTING}
        by_config.setdefault(repr((rest, versions)), []).append(run)
    groups = []
    for same in by_config.values():
        members = list({run.config.get("seed"): run for run in same}.values())  # a repetition is no other seed
        if len(members) == 1:
            continue
        values = [run.test["accuracy"] for run in members]
        mean, deviation = float(np.mean(values)), float(np.std(values, ddof=1))
        half = float(stats.t.ppf(0.975, len(values) - 1)) * deviation / math.sqrt(len(values))
        groups.append(
            {
                "runs": [run.path for run in members],
                "mean": mean,
                "standard_deviation": deviation,
                "mean_ci95": [max(0.0, mean - half), min(1.0, mean + half)],
                "same_images": not any(_other_images(a, b) for a, b in pairwise(members)),
            }
        )
    return groups
