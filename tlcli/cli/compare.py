"""Compare finished runs: the config keys that differ, and test accuracies with
95 % intervals. Two runs that were tested on the same images are compared image
by image with McNemar's exact test, which accounts for other test images, but not
for other seeds. Runs that differ only in the seed are summarized by their mean,
standard deviation and Student's interval. If a run with folds has no test, the
cross-validated accuracies are compared.

examples:
  tlcli compare outputs/2026-05-04/12-30-00 outputs/2026-05-04/12-45-00
  tlcli compare outputs/2026-05-04/13-00-00 --format json > compared.json
"""

import json
import textwrap
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from tlcli.cli.parser import Parser
from tlcli.cli.table import UNLIMITED_WIDTH, number_text, table_lines, terminal_columns
from tlcli.text import shown_path, strip_control_chars

PARSER = Parser("compare", __doc__)
PARSER.add_argument("runs", nargs="+", metavar="RUN|SWEEP", help="a run, or a sweep for all its tested jobs")
PARSER.add_format()


def run(argv: list[str]) -> int:
    """Compare the runs in argv; return the exit code."""
    arguments = PARSER.parse_intermixed_args(argv)
    from tlcli.cli import fast_imports

    with fast_imports():
        from tlcli.runs.compare import compare

    comparison = compare([Path(word) for word in arguments.runs])
    if arguments.format == "json":
        print(json.dumps(comparison, indent=2, default=str))  # YAML has dates
    else:
        print("\n\n".join(_parts(comparison, terminal_columns())))
    return 0


def _parts(comparison: Mapping[str, Any], width: int | None) -> Iterator[str]:
    """Yield the tables and paragraphs that are printed."""
    fill = partial(textwrap.fill, width=width or UNLIMITED_WIDTH, break_long_words=False)
    # A, B, ... Z, R27, R28, ...
    letters = {run["path"]: chr(ord("A") + i) if i < 26 else f"R{i + 1}" for i, run in enumerate(comparison["runs"])}
    is_crossed = any(run["result"] == "cross_validation" for run in comparison["runs"])
    title = "cross-validated accuracy" if is_crossed else "accuracy"
    titles = ("<run", title, "95 % interval", "loss", "macro F1", "images", "<path")
    rows = []
    for run in comparison["runs"]:
        low, high = run["accuracy_ci95"]
        accuracy, loss, f1 = (number_text(run[key]) for key in ("accuracy", "loss", "macro_f1"))
        metrics = accuracy, f"{low:.4f} to {high:.4f}", loss, f1, f"{run['n']:,}"
        rows.append((letters[run["path"]], *metrics, shown_path(Path(run["path"]))))
    yield "\n".join(table_lines(titles, rows, width))
    different = []
    for key, values in (comparison["config"] | comparison["setting"]).items():
        holders: dict[str, list[str]] = {}  # runs without the key have a dash
        for path, letter in letters.items():
            value = values.get(path, "-")
            as_yaml = str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)
            holders.setdefault(as_yaml, []).append(letter)
        different.append((key, ", ".join(f"{value} ({', '.join(names)})" for value, names in holders.items())))
    lines = table_lines(("<differs", "<values"), different, width)
    yield "\n".join(lines) if different else "the configs are the same"
    for group in comparison["seeds"]:
        low, high = group["mean_ci95"]
        text = (
            f"{', '.join(letters[path] for path in group['runs'])} differ only in the seed: mean accuracy "
            f"{group['mean']:.4f}, standard deviation {group['standard_deviation']:.4f}, 95 % interval of the mean "
            f"{low:.4f} to {high:.4f} (Student's t, {len(group['runs'])} runs)"
        )
        yield fill(text if group["same_images"] else f"{text}; their images are not all the same")
    many = f"Significance is tested for two runs only, not for {len(letters)}. Compare the intervals."
    yield fill(_verdict(comparison["pairs"][0], is_crossed) if comparison["pairs"] else many)


def _verdict(pair: Mapping[str, Any], is_crossed: bool) -> str:
    if not pair["paired"]:
        return f"No paired test: {strip_control_chars(pair['why'])}. Compare the intervals."
    better, worse = ("A", "B") if pair["difference"] >= 0 else ("B", "A")
    points = f"{100 * abs(pair['difference']):.1f} points"
    p = "p < 0.0001" if pair["mcnemar_p"] < 0.0001 else f"p = {pair['mcnemar_p']:.2g}"
    result = f"The difference of {points} is not"
    if pair["more_than_chance"]:
        result = f"{better} is better than {worse} by {points}, which is"
    tested = "The folds of both were tested" if is_crossed else "Both were tested"
    note = "exact McNemar test" + (", approximate here: folds share training images" if is_crossed else "")
    return (
        f"{tested} on {pair['n']:,} images of the same names: {pair['both_right']:,} right in both, "
        f"{pair['both_wrong']:,} wrong in both, {pair['n_only_first_right']:,} right only in A, "
        f"{pair['n_only_second_right']:,} right only in B. {result} significant: {p} ({note})."
    )
