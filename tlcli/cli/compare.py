"""`tlcli compare`: the differences between runs, and whether two of them differ significantly."""

import json
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlcli.cli.folders import run_folders
from tlcli.cli.parser import FORMATS, Parser
from tlcli.cli.table import TableColumn, table_lines, terminal_columns
from tlcli.text import shown_path, strip_control_chars

if TYPE_CHECKING:
    from tlcli.runs.compare import Comparison, PairedTest, SeedGroup

MAX_CLASSES = 20
"""Classes that are listed; JSON has all."""


def parser() -> Parser:
    """Return the parser of `tlcli compare`."""
    compare_parser = Parser(
        "compare",
        "Compare finished runs: the config keys that differ, and test accuracies with\n"
        "95 % intervals. Two runs that were tested on the same images are compared image\n"
        "by image (McNemar's exact test), which detects smaller differences than the\n"
        "intervals do. For runs that differ only in the seed: mean, standard deviation\n"
        "and Student's interval. The test is about other test images, not other seeds.",
        [
            "tlcli compare outputs/2026-05-04/12-30-00 outputs/2026-05-04/12-45-00",
            "tlcli compare outputs/2026-05-04/13-00-00 --format json > compared.json",
        ],
    )
    help_text = "directory of a run, or of a sweep, which stands for its tested jobs"
    compare_parser.add_argument("runs", nargs="+", metavar="RUN", help=help_text)
    compare_parser.add_format()
    return compare_parser


def run(argv: list[str]) -> int:
    """Compare the runs in argv; return the exit code."""
    arguments = parser().parse_args(argv)
    from tlcli.cli.process import fast_imports

    with fast_imports():
        from tlcli.runs.compare import compare

    comparison = compare([Path(word) for word in arguments.runs])
    if arguments.format == "json":
        print(json.dumps(as_json(comparison), indent=2))
    else:
        print("\n\n".join("\n".join(part) for part in _parts(comparison, terminal_columns())))
    return 0


def candidates(before: Sequence[str]) -> Iterator[str]:
    """Yield the words that may follow, for completion."""
    if before and before[-1] == "--format":
        yield from FORMATS
        return
    yield from (folder for folder in run_folders() if folder not in before)
    yield from ("--format", "--help")


def as_json(comparison: "Comparison") -> dict[str, Any]:
    """Return everything. Runs are named by their paths; a key that a run does not have is not in its config."""
    from tlcli.runs.compare import MISSING

    paths = [str(run.path) for run in comparison.runs]

    def by_run(values: Sequence[Any]) -> dict[str, Any]:
        return {path: value for path, value in zip(paths, values, strict=True) if value is not MISSING}

    metrics = ("accuracy", "accuracy_ci95", "loss", "macro_f1", "n")
    return {
        "runs": [{"path": str(run.path), **{key: run.test.get(key) for key in metrics}} for run in comparison.runs],
        "config": {key: by_run(values) for key, values in comparison.config.items()},
        "setting": {key: by_run(values) for key, values in comparison.setting.items()},
        "pairs": [_pair_json(comparison.paired, paths)] if len(paths) == 2 else [],
        "seeds": [
            {
                "runs": [paths[i] for i in group.runs],
                "mean": group.mean,
                "standard_deviation": group.deviation,
                "mean_ci95": list(group.ci95),
                "same_images": group.same_images,
            }
            for group in comparison.seeds
        ],
    }


def _pair_json(paired: "PairedTest | str", paths: Sequence[str]) -> dict[str, Any]:
    names = {"first": paths[0], "second": paths[1]}
    if isinstance(paired, str):
        return {**names, "paired": False, "why": paired}
    return {
        **names,
        "paired": True,
        "n": paired.n,
        "difference": paired.difference,
        "both_right": paired.both_right,
        "both_wrong": paired.both_wrong,
        "n_only_first_right": paired.only_first,
        "n_only_second_right": paired.only_second,
        "mcnemar_p": paired.p,
        "more_than_chance": paired.is_significant,
        "classes": [vars(recall) for recall in paired.classes],
    }


def _letter(index: int) -> str:
    """Return the name of a run in tables: A, B, ... Z, R27, R28, ..."""
    return chr(ord("A") + index) if index < 26 else f"R{index + 1}"


def _parts(comparison: "Comparison", width: int | None) -> Iterator[list[str]]:
    """Yield what is printed, part by part, in lines."""
    numbers = ("accuracy", "95 % interval", "loss", "macro F1", "images")
    columns = [TableColumn("run", left=True), *map(TableColumn, numbers), TableColumn("path", left=True)]
    rows = []
    for i, run in enumerate(comparison.runs):
        test = run.test
        low, high = test["accuracy_ci95"]
        f1 = test.get("macro_f1")
        cells = f"{test['accuracy']:.4f}", f"{low:.4f} to {high:.4f}", f"{test['loss']:.4f}", f1 and f"{f1:.4f}"
        rows.append([_letter(i), *cells, f"{test['n']:,}", shown_path(run.path)])
    yield list(table_lines(columns, rows, width))
    if differences := {**comparison.config, **comparison.setting}:
        names = [TableColumn(title, left=True) for title in ("differs", "values")]
        yield list(table_lines(names, [(key, _values(row)) for key, row in differences.items()], width))
    else:
        yield ["the configs are the same"]
    for group in comparison.seeds:
        yield _wrapped(_seeds_text(group), width)
    paired = comparison.paired
    if isinstance(paired, str):
        yield _wrapped(f"no paired test: {strip_control_chars(paired)}. Compare the intervals.", width)
        return
    yield _wrapped(_verdict(paired), width)
    different = [recall for recall in paired.classes if recall.first != recall.second]
    titles = ("A", "B", "difference", "images")
    recalls = [
        (c.name, f"{c.first:.4f}", f"{c.second:.4f}", f"{100 * (c.first - c.second):+.1f}", f"{c.n:,}")
        for c in different[:MAX_CLASSES]
    ]
    if recalls:
        yield list(table_lines([TableColumn("recall of", left=True), *map(TableColumn, titles)], recalls, width))
    if len(different) > MAX_CLASSES:
        yield [f"and {len(different) - MAX_CLASSES:,} more classes (--format json has all)"]


def _values(values: Sequence[Any]) -> str:
    """Return `head (A, C), none (B)`."""
    holders: dict[str, list[str]] = {}
    for i, value in enumerate(values):
        as_yaml = str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)
        holders.setdefault(as_yaml, []).append(_letter(i))
    return ", ".join(f"{value} ({', '.join(letters)})" for value, letters in holders.items())


def _seeds_text(group: "SeedGroup") -> str:
    low, high = group.ci95
    images = "" if group.same_images else "; their test images are not all the same"
    return (
        f"{', '.join(map(_letter, group.runs))} differ only in the seed: mean accuracy {group.mean:.4f}, standard "
        f"deviation {group.deviation:.4f}, 95 % interval of the mean {low:.4f} to {high:.4f} "
        f"(Student's t, {len(group.runs)} runs){images}"
    )


def _verdict(paired: "PairedTest") -> str:
    better, worse = ("A", "B") if paired.difference >= 0 else ("B", "A")
    points = f"{100 * abs(paired.difference):.1f}"
    points += " point" if points == "1.0" else " points"
    p = "p < 0.0001" if paired.p < 0.0001 else f"p = {paired.p:.2g}" if paired.p < 0.01 else f"p = {paired.p:.2f}"
    counts = (
        f"Both were tested on the same {paired.n:,} images: {paired.both_right:,} right in both, {paired.both_wrong:,} "
        f"wrong in both, {paired.only_first:,} right only in A, {paired.only_second:,} right only in B. "
    )
    if paired.is_significant:
        return f"{counts}{better} is better than {worse} by {points}, which is significant: {p} (exact McNemar test)."
    return f"{counts}The difference of {points} is not significant: {p} (exact McNemar test)."


def _wrapped(text: str, width: int | None) -> list[str]:
    return [text] if width is None else textwrap.wrap(text, width, break_long_words=False)
