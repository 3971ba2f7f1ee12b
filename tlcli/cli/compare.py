"""`tlcli compare`: what differs between runs, and whether their accuracies differ by more than chance."""

import json
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlcli.cli.arguments import FORMATS, format_of
from tlcli.cli.run_folders import run_folders
from tlcli.cli.terminal import WHOLE_LINES
from tlcli.errors import UsageError
from tlcli.text import did_you_mean, strip_control_chars

if TYPE_CHECKING:
    from rich.console import RenderableType

    from tlcli.runs.compare import Comparison, Image, NoPair, Pair, Seeds

HELP = """\
usage: tlcli compare RUN RUN ... [--format table|json]

What differs between finished runs: their configs, their test accuracies with
95 % intervals, and the images that one gets right and the other wrong. Two runs
that were tested on the same images are compared image by image (McNemar's exact
test): that settles smaller differences than the intervals can. Of more than two
runs, each is compared with the best one, and p is corrected for their number
(Holm). Chance is that of the test images: another seed gives another run. Runs
that differ in their seed alone are summed up: mean, standard deviation,
Student's interval.

  RUN       a run's directory, or that of a sweep, which stands for its jobs
  --format  table, or json: everything, with all images

examples:
  tlcli compare outputs/2026-05-04/12-30-00 outputs/2026-05-04/12-45-00
  tlcli compare outputs/2026-05-04/13-00-00 --format json > compared.json
"""

MANY_RUNS = 3
"""With more runs than this a config has no column for each."""
MANY_CLASSES, MANY_IMAGES = 20, 10
"""So many rows are shown at the most; JSON has all."""


def run(argv: list[str]) -> int:
    """Compare the runs that argv names; the exit code."""
    if not argv or "-h" in argv or "--help" in argv:
        print(HELP, end="")
        return 0
    shape, words = format_of(argv)
    if flag := next((word for word in words if word.startswith("-")), None):
        raise UsageError(f"unknown flag {flag!r}.{did_you_mean(flag, ['--format', '--help'])}")
    from tlcli.cli.libraries import importing

    with importing():
        from tlcli.runs.compare import compare

    found = compare([Path(word) for word in words])
    if shape == "json":
        print(json.dumps(as_json(found), indent=2))
    else:
        _print(found)
    return 0


def candidates(before: Sequence[str]) -> Iterator[str]:
    """What may follow these words on a command line, for completion."""
    if before and before[-1] == "--format":
        yield from FORMATS
        return
    yield from (folder for folder in run_folders() if folder not in before)
    yield from ("--format", "--help")


def letter(place: int) -> str:
    """What a run is called in tables: A, B, ... Z, R27, R28, ..."""
    return chr(ord("A") + place) if place < 26 else f"R{place + 1}"


# -- JSON


def as_json(found: "Comparison") -> dict[str, Any]:
    """Everything, for programs. Runs are named by their paths; a key that a run does not have is not in its config."""
    from tlcli.runs.compare import MISSING

    paths = [str(run.path) for run in found.runs]

    def by_run(values: Sequence[Any]) -> dict[str, Any]:
        return {path: value for path, value in zip(paths, values, strict=True) if value is not MISSING}

    figures = ("accuracy", "accuracy_ci95", "loss", "macro_f1", "n")
    return {
        "runs": [{"path": str(run.path), **{key: run.test.get(key) for key in figures}} for run in found.runs],
        "config": {key: by_run(values) for key, values in found.config.items()},
        "setting": {key: by_run(values) for key, values in found.setting.items()},
        "best": paths[found.best],
        "pairs": [_pair_json(pair, paths) for pair in found.pairs],
        "seeds": [
            {
                "runs": [paths[i] for i in group.runs],
                "mean": group.mean,
                "standard_deviation": group.deviation,
                "mean_ci95": list(group.ci95),
                "same_images": group.same_images,
            }
            for group in found.seeds
        ],
    }


def _pair_json(pair: "Pair | NoPair", paths: Sequence[str]) -> dict[str, Any]:
    from tlcli.runs.compare import NoPair

    names = {"first": paths[pair.first], "second": paths[pair.second]}
    if isinstance(pair, NoPair):
        return {**names, "paired": False, "why": pair.why}
    return {
        **names,
        "paired": True,
        "n": pair.n,
        "difference": pair.difference,
        "both_right": pair.both_right,
        "both_wrong": pair.both_wrong,
        "mcnemar_p": pair.p,
        "mcnemar_p_holm": pair.p_holm,
        "more_than_chance": pair.settled,
        "least_settled_difference": pair.least,
        "classes": [vars(one) for one in pair.classes],
        "only_first_right": [vars(image) for image in pair.only_first],
        "only_second_right": [vars(image) for image in pair.only_second],
    }


# -- the screen


def _print(found: "Comparison") -> None:
    """Everything that fits a screen, part by part."""
    from tlcli.cli.view import Screen

    screen = Screen()
    if not screen.is_terminal:
        screen = Screen(WHOLE_LINES)
    for number, part in enumerate(_parts(found, screen.width)):
        if number:
            screen.print()
        for what in part:
            screen.print(what, soft_wrap=isinstance(what, str))


def _parts(found: "Comparison", width: int) -> Iterator[list["RenderableType"]]:
    yield list(_runs_part(found, width))
    yield list(_config_part(found, width))
    for group in found.seeds:
        yield list(_wrapped(_seeds_words(group), width))
    pairs = list(found.pairs)
    if len(found.runs) == 2:
        yield from _pair_parts(found, width)
    else:
        yield [line for pair in pairs for line in _wrapped(_short_words(pair), width)]
        yield list(_wrapped(_note_on_many(found), width))


def _runs_part(found: "Comparison", width: int) -> Iterator["RenderableType"]:
    from tlcli.cli.tables import figures_table, labelled, shown_path

    for i, run in enumerate(found.runs):
        yield from labelled(letter(i), strip_control_chars(shown_path(run.path)), width)
    yield ""
    table = figures_table("run", "accuracy", "95 % interval", "loss", "macro F1", "images")
    for i, run in enumerate(found.runs):
        low, high = run.test["accuracy_ci95"]
        figures = f"{run.accuracy:.4f}", f"{low:.4f} to {high:.4f}", f"{run.test['loss']:.4f}"
        f1 = run.test.get("macro_f1")
        table.add_row(letter(i), *figures, "-" if f1 is None else f"{f1:.4f}", f"{run.test['n']:,}")
    yield table


def _config_part(found: "Comparison", width: int) -> Iterator["RenderableType"]:
    """The keys that differ: a column a run where these are few, else the values with the runs that have them."""
    from rich.table import Table

    rows = {**found.config, **found.setting}
    if not rows:
        yield "the configs are the same"
        return
    if len(found.runs) > MANY_RUNS:
        for key, values in rows.items():
            yield from _wrapped(f"{strip_control_chars(key)}: {_grouped(values)}", width)
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for title in ("differs", *(letter(i) for i in range(len(found.runs)))):
        table.add_column(title, overflow="fold")
    for key, values in rows.items():
        table.add_row(strip_control_chars(key), *(_value(value) for value in values))
    yield table


def _grouped(values: Sequence[Any]) -> str:
    """`head (A, C), none (B)`."""
    holders: dict[str, list[str]] = {}
    for i, value in enumerate(values):
        holders.setdefault(_value(value), []).append(letter(i))
    if len(holders) == 1:
        return next(iter(holders))
    return ", ".join(f"{value} ({', '.join(own)})" for value, own in holders.items())


def _value(value: Any) -> str:
    """A value as YAML has it."""
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else strip_control_chars(str(value))


def _seeds_words(group: "Seeds") -> str:
    own = ", ".join(letter(i) for i in group.runs)
    low, high = group.ci95
    images = "" if group.same_images else "; their test images are not all the same"
    return (
        f"{own} differ in their seed alone: accuracy {group.mean:.4f} in the mean, standard deviation "
        f"{group.deviation:.4f}, 95 % interval of the mean {low:.4f} to {high:.4f} "
        f"(Student's t, {len(group.runs)} runs){images}"
    )


def _short_words(pair: "Pair | NoPair") -> str:
    """One pair of many, in a line."""
    from tlcli.runs.compare import NoPair

    a, b = letter(pair.first), letter(pair.second)
    if isinstance(pair, NoPair):
        return f"{a} against {b}: no paired test: {strip_control_chars(pair.why)}"
    verdict = "more than chance" if pair.settled else "within chance"
    counts = f"images right: {len(pair.only_first):,} in {a} alone, {len(pair.only_second):,} in {b} alone"
    return f"{a} against {b}: {_points(pair.difference)} ({counts}), {verdict}: {probability(pair.p_holm)}"


def _note_on_many(found: "Comparison") -> str:
    return (
        f"{letter(found.best)} has the highest test accuracy, in part because it is the highest of {len(found.runs)}. "
        f"p: exact McNemar, corrected for the number of pairs (Holm)."
    )


def _pair_parts(found: "Comparison", width: int) -> Iterator[list["RenderableType"]]:
    """Two runs in full."""
    from tlcli.runs.compare import NoPair

    [pair] = found.pairs
    if isinstance(pair, NoPair):
        yield list(_wrapped(f"no paired test: {strip_control_chars(pair.why)}. Compare the intervals.", width))
        return
    yield list(_wrapped(verdict(pair), width))
    yield list(_classes_part(pair))
    a, b = letter(pair.first), letter(pair.second)
    if pair.only_first:
        yield list(_images_part(f"{a} right, {b} wrong", b, [(one, one.second) for one in pair.only_first]))
    if pair.only_second:
        yield list(_images_part(f"{b} right, {a} wrong", a, [(one, one.first) for one in pair.only_second]))


def verdict(pair: "Pair") -> str:
    """What the paired test of two runs means."""
    a, b = letter(pair.first), letter(pair.second)
    better, worse = (a, b) if pair.difference >= 0 else (b, a)
    moved = " (by their names and labels: the data set was in another place)" if pair.moved else ""
    seen = (
        f"Both were tested on the same {pair.n:,} images{moved}: {pair.both_right:,} right in both, "
        f"{pair.both_wrong:,} wrong in both, {len(pair.only_first):,} right in {a} alone, {len(pair.only_second):,} in "
        f"{b} alone. "
    )
    p = probability(pair.p)
    if pair.settled:
        return f"{seen}{better} is better than {worse} by {_points(abs(pair.difference))}, more than chance: {p}."
    limit = (
        f"{pair.n:,} images, where two runs disagree as often as these, cannot settle a difference below about "
        f"{_points(pair.least)}"
    )
    if pair.difference == 0:
        return f"{seen}Their accuracies are the same: {p}; {limit}."
    return f"{seen}The difference of {_points(abs(pair.difference))} is within chance: {p}; {limit}."


def _classes_part(pair: "Pair") -> Iterator["RenderableType"]:
    """Recall a class in both runs, where it differs."""
    from tlcli.cli.tables import figures_table

    different = [one for one in pair.classes if one.first != one.second]
    if not different:
        yield "every class is found as often by both"
        return
    table = figures_table("recall of", letter(pair.first), letter(pair.second), "difference", "images")
    for one in different[:MANY_CLASSES]:
        change = f"{100 * (one.first - one.second):+.1f}"
        table.add_row(strip_control_chars(one.name), f"{one.first:.4f}", f"{one.second:.4f}", change, f"{one.n:,}")
    yield table
    if len(different) > MANY_CLASSES:
        yield f"and {len(different) - MANY_CLASSES:,} more classes"


def _images_part(title: str, wrong: str, images: Sequence[tuple["Image", str]]) -> Iterator[str]:
    """The first of these images, each with what the run that is wrong says."""
    yield f"{title}: {len(images):,}"
    for image, said in images[:MANY_IMAGES]:
        yield strip_control_chars(f"  {image.key}: {image.true}, {wrong} says {said}")
    if len(images) > MANY_IMAGES:
        yield f"  and {len(images) - MANY_IMAGES:,} more (--format json has all)"


def _points(difference: float) -> str:
    """A difference in accuracy in points of a percent."""
    text = f"{100 * difference:.1f}"
    return f"{text} {'point' if text in ('1.0', '-1.0') else 'points'}"


def probability(p: float) -> str:
    """`p = 0.21`, in as many digits as mean something."""
    return "p < 0.0001" if p < 0.0001 else f"p = {p:.2g}" if p < 0.01 else f"p = {p:.2f}"


def _wrapped(text: str, width: int) -> list[str]:
    """A sentence in lines of this width; whole where no terminal sets one."""
    return [text] if width >= WHOLE_LINES else textwrap.wrap(text, width, break_long_words=False)
