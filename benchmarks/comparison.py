"""Tables of the rows of benchmarks.quality: accuracy and seconds per task, and differences from a base recipe."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binomtest

from benchmarks.run import publish

SAMPLES = 2000  # of the bootstrap

Row = dict[str, Any]
Rows = dict[tuple[str, int], Row]
"""The rows of one recipe, by task and seed."""


def tables(rows: Sequence[Row], base: str, out: Path) -> None:
    """Print the tables of all recipes, and those of the differences from the base recipe if it has rows."""
    recipes = latest(rows)
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    accuracy_table(recipes, tasks, out)
    if base in recipes and len(recipes) > 1:
        difference_tables(recipes, base, tasks, out)
    other_source_table(recipes, tasks, out)


def latest(rows: Sequence[Row]) -> dict[str, Rows]:
    """Return the rows of the latest commit of each recipe. If a run has two rows, the second one counts."""
    commits = {row["recipe"]: row["commit"] for row in rows}
    recipes: dict[str, Rows] = {name: {} for name in commits}
    for row in rows:
        if row["commit"] == commits[row["recipe"]]:
            recipes[row["recipe"]][row["task"], row["seed"]] = row
    return recipes


def accuracy_table(recipes: Mapping[str, Rows], tasks: Sequence[str], out: Path) -> None:
    """Print the accuracy and seconds of each recipe per task, and over the tasks that all recipes have."""
    lines, common = [], []
    for task in tasks:
        groups = [of_task(rows, task) for rows in recipes.values()]
        row = next(row for group in groups for row in group)
        cells = [f"{spread(accuracies(group))}{seconds_text([group])}" if group else "" for group in groups]
        lines.append([task, f"{row['n_train']:,}", f"{row['n']:,}", *cells])
        common += [groups] if all(groups) else []
    if common:
        cells = [
            f"{np.mean([np.mean(accuracies(group)) for group in groups]):.3f}{seconds_text(groups)}"
            for groups in zip(*common, strict=True)
        ]
        lines.append([f"mean of {len(common)} tasks, total time", "", "", *cells])
    commits = [f"{name} ({next(iter(rows.values()))['commit']})" for name, rows in recipes.items()]
    publish("accuracy", ["task, mean (range) over seeds", "training images", "test images", *commits], lines, out)


def difference_tables(recipes: Mapping[str, Rows], base: str, tasks: Sequence[str], out: Path) -> None:
    """Print the mean difference of each recipe from the base, the ratio of seconds, and the differences per task.

    Only tasks and seeds count that both have. The p-values per task are McNemar's, corrected for seeds and tasks.
    """
    summary, columns = [], {}
    for name, rows in recipes.items():
        if name == base:
            continue
        by_task = {task: values for task in tasks if len(values := differences(rows, recipes[base], task))}
        mean, low, high = interval(list(by_task.values()))
        texts = f"{100 * mean:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})", seconds_ratio(rows, recipes[base])
        summary.append([name, str(len(by_task)), *texts])
        p_values = holm({task: mcnemar(values) for task, values in by_task.items()})
        columns[name] = {task: f"{100 * by_task[task].mean():+.1f} (p = {p:.2g})" for task, p in p_values.items()}
    header = ["recipe", "tasks", f"mean difference from {base}, points (95 %)", "time over its time"]
    publish("differences", header, summary, out)
    lines = [[task, *(cells.get(task, "") for cells in columns.values())] for task in tasks]
    publish("differences_per_task", [f"difference from {base}, points", *columns], lines, out)


def other_source_table(recipes: Mapping[str, Rows], tasks: Sequence[str], out: Path) -> None:
    """Print the accuracy on test images of another source than the training images."""
    lines = []
    for task in tasks:
        groups = [[row["other_source"] for row in of_task(rows, task)] for rows in recipes.values()]
        if other := next((row for group in groups for row in group if row), None):
            lines.append([task, f"{other['n']:,}", *(spread(accuracies(group)) if group else "" for group in groups)])
    if lines:
        publish("other_source", ["task, images of another source", "test images", *recipes], lines, out)


# -- statistics -------------------------------------------------------------------------------------------------------


def differences(rows: Rows, base: Rows, task: str) -> np.ndarray:
    """Return (seeds, images): 1 if only the recipe is correct, -1 if only the base is, otherwise 0."""
    common = sorted(key for key in rows.keys() & base.keys() if key[0] == task)
    return np.array([is_correct(rows[key]) - is_correct(base[key]) for key in common])


def is_correct(row: Row) -> np.ndarray:
    """Return 1 or 0 per test image, int64."""
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(row["correct"]), np.uint8), count=row["n"])
    return bits.astype(np.int64)


def interval(by_task: Sequence[np.ndarray]) -> tuple[float, float, float]:
    """Return the mean over tasks of (seeds, images), with its 95 % bootstrap interval over seeds and images."""
    generator, total = np.random.default_rng(0), np.zeros(SAMPLES)
    for values in by_task:
        n_seeds, n_images = values.shape
        weights = generator.multinomial(n_seeds, np.full(n_seeds, 1 / n_seeds), SAMPLES) / n_seeds
        images = generator.integers(n_images, size=(SAMPLES, n_images))
        total += np.take_along_axis(weights @ values, images, axis=1).mean(1)
    low, high = np.quantile(total / len(by_task), [0.025, 0.975])
    return float(np.mean([values.mean() for values in by_task])), float(low), float(high)


def mcnemar(values: np.ndarray) -> float:
    """Return the p-value of McNemar's exact test: the smallest of the seeds, with Bonferroni's correction."""
    wins, losses = (values > 0).sum(1), (values < 0).sum(1)
    p_values = [binomtest(int(w), int(w + n)).pvalue if w + n else 1.0 for w, n in zip(wins, losses, strict=True)]
    return min(1.0, len(p_values) * min(p_values))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Return the p-values with Holm's correction."""
    corrected, highest = {}, 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[name]))
        corrected[name] = highest
    return corrected


# -- cells ------------------------------------------------------------------------------------------------------------


def of_task(rows: Rows, task: str) -> list[Row]:
    """Return the rows of a task."""
    return [row for (name, _), row in rows.items() if name == task]


def accuracies(rows: Sequence[Row]) -> list[float]:
    """Return the accuracy of each row."""
    return [row["accuracy"] for row in rows]


def spread(values: Sequence[float]) -> str:
    """Return `0.851 (0.844 to 0.858)`, mean and range."""
    return f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def seconds_text(groups: Sequence[Sequence[Row]]) -> str:
    """Return `, 35 s`, the sum over tasks of the mean over seeds; nothing if a task was not timed."""
    timed = [[row["seconds"] for row in group if row["seconds"] is not None] for group in groups]
    return f", {sum(np.mean(seconds) for seconds in timed):.0f} s" if all(timed) else ""


def seconds_ratio(rows: Rows, base: Rows) -> str:
    """Return `0.52x` over the runs of the same machine that have seconds in both recipes."""
    pairs = [(rows[key], base[key]) for key in rows.keys() & base.keys()]
    pairs = [pair for pair in pairs if pair[0]["machine"] == pair[1]["machine"] and all(r["seconds"] for r in pair)]
    return f"{sum(a['seconds'] for a, _ in pairs) / sum(b['seconds'] for _, b in pairs):.2f}x" if pairs else ""
