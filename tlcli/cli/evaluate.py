"""`tlcli eval`: a finished run on its own test set, or on another data set."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlcli.cli.arguments import FORMATS, format_of
from tlcli.cli.folders import run_folders
from tlcli.errors import UsageError
from tlcli.text import did_you_mean, strip_control_chars

if TYPE_CHECKING:
    from tlcli.evaluate import Evaluation

HELP = """\
usage: tlcli eval RUN [KEY=VALUE ...] [split=test|val|train]
                  [checkpoint=best|last] [--format table|json]

Evaluate a finished run: on its own test set, as it was tested, or on another
data set. Classes are matched by name; some of the run's classes are enough.

  dataset=...     another data set, with its keys (dataset.root=...), as in
                  `tlcli train`. Its test split, else its val split, else all
                  of it is evaluated: nothing is held out
  split           test, val or train; of the run's own data set these are the
                  splits that it was trained with
  checkpoint      best (the epoch best on validation), or last
  device=..., device.KEY=..., cache.KEY=...
                  where and how to compute, as in `tlcli train`
  --format        table, or json: what eval.json has

The figures go to RUN/eval-1 (eval-2, ...): eval.json, predictions.safetensors
and the config of the data set. Nothing that is there is changed.

examples:
  tlcli eval outputs/2026-05-04/12-30-00
  tlcli eval outputs/2026-05-04/12-30-00 dataset=imagefolder dataset.root=new
"""

CHOICES = {"split": ("test", "val", "train"), "checkpoint": ("best", "last")}
GROUPS = ("dataset", "device", "cache")
DRAWN = ("dataset.val_fraction", "dataset.test_fraction", "dataset.train_per_class")
MANY_CLASSES = 20
"""With more classes than this there is no row for each on the screen; eval.json has them all."""


@dataclass(frozen=True)
class Words:
    """A command line, sorted: `overrides` are for the spec."""

    run: Path
    split: str | None
    checkpoint: str
    overrides: tuple[str, ...]
    format: str


def run(argv: list[str]) -> int:
    """Evaluate what argv names; the exit code."""
    if not argv or "-h" in argv or "--help" in argv:
        print(HELP, end="")
        return 0
    words = parse(argv)
    found = _evaluated(words)
    if words.format == "json":
        print(json.dumps({**found.report, "folder": str(found.folder)}, indent=2))
    else:
        _print_table(found)
    return 0


def candidates(before: Sequence[str]) -> Iterator[str]:
    """What may follow these words on a command line, for completion."""
    if before and before[-1] == "--format":
        yield from FORMATS
        return
    if not any("=" not in word and not word.startswith("-") for word in before):
        yield from run_folders()
    yield from (f"{key}={value}" for key, values in CHOICES.items() for value in values)
    yield from ("dataset=", "dataset.root=", "device=", "--format", "--help")


def parse(argv: Sequence[str]) -> Words:
    """Sort the words of a command line. Raises UsageError."""
    shape, rest = format_of(argv)
    places = [word for word in rest if "=" not in word or Path(word).is_dir()]
    if flag := next((word for word in rest if word.startswith("-")), None):
        raise UsageError(f"unknown flag {flag!r}.{did_you_mean(flag, ['--format', '--help'])}")
    if not places:
        raise UsageError("name a run: tlcli eval RUN (`tlcli list` shows them)")
    if len(places) > 1:
        raise UsageError(f"one run at a time: {places[1]!r} is one word too many; other words are KEY=VALUE")
    chosen: dict[str, str] = {}
    overrides = []
    for word in rest:
        key, _, value = word.partition("=")
        if word in places:
            continue
        if key in CHOICES:
            if value not in CHOICES[key]:
                hint = did_you_mean(value, CHOICES[key])
                raise UsageError(f"{key}={value}: choose from {', '.join(CHOICES[key])}.{hint}")
            chosen[key] = value
        else:
            overrides.append(_allowed(word, key))
    return Words(Path(places[0]), chosen.get("split"), chosen.get("checkpoint", "best"), tuple(overrides), shape)


def _allowed(word: str, key: str) -> str:
    """An override that means something for a network that is trained already."""
    name = key.lstrip("+~")
    if name in DRAWN:
        raise UsageError(f"{word}: eval draws no new splits; those of the run's own data set stay as they were")
    if name.split(".")[0] in GROUPS:
        return word
    hint = did_you_mean(name, [*CHOICES, *GROUPS]) or f" eval takes {', '.join([*GROUPS, *CHOICES])}"
    raise UsageError(f"{word}: the run is trained already.{hint}")


def _evaluated(words: Words) -> "Evaluation":
    """Check all that can be checked without torch, and evaluate."""
    from tlcli.cli.process import fast_imports
    from tlcli.cli.saved_config import load_spec
    from tlcli.data.listing import check_dataset
    from tlcli.runs.run_dir import open_run

    run_dir = open_run(words.run)
    trained = load_spec(run_dir)
    spec = load_spec(run_dir, words.overrides) if words.overrides else trained
    check_dataset(spec.dataset, trains=spec.dataset == trained.dataset)
    with fast_imports():
        from tlcli.evaluate import EvaluationRequest, evaluate_run
    from tlcli.cli.view import TerminalReporter
    from tlcli.reporter import Reporter

    asked = EvaluationRequest(words.run, words.checkpoint, words.split, spec, trained)
    return evaluate_run(asked, TerminalReporter() if words.format == "table" else Reporter())


def _print_table(found: "Evaluation") -> None:
    """The figures, and a row a class where there are not too many."""
    from tlcli.cli import tables
    from tlcli.cli.view import Screen

    screen = Screen()
    width = screen.width if screen.is_terminal else None
    for label, value in _lines(found):
        for line in tables.labelled(label, value, width):
            screen.print(line, soft_wrap=True)
    if rows := class_rows(found.report):
        table = tables.figures_table("class", "precision", "recall", "F1", "images")
        for row in rows:
            table.add_row(*row)
        screen.print()
        screen.print(table)
        screen.print()
    for line in tables.labelled("written", tables.shown_path(found.folder), width):
        screen.print(line, soft_wrap=True)


def _lines(found: "Evaluation") -> Iterator[tuple[str, str]]:
    """What stands above the table of classes: a label and a value each."""
    report, calibration = found.report, found.report["calibration"]
    low, high = report["accuracy_ci95"]
    data = report["dataset"]
    place = data.get("file") or data["root"]
    yield "weights", f"{Path(report['checkpoint']).stem}, epoch {report['epoch']}"
    yield "data", strip_control_chars(data["name"] + (f", {place}" if place else ""))
    yield "evaluated", f"{report['n']:,} {'image' if report['n'] == 1 else 'images'}: {found.description}"
    if found.bad_files:
        yield "left out", f"{len(found.bad_files):,} that do not decode"
    yield "accuracy", f"{report['accuracy']:.4f}, 95 % interval {low:.4f} to {high:.4f} (Wilson)"
    if report["top5"] is not None:
        yield "top-5", f"{report['top5']:.4f}"
    yield "macro F1", f"{report['macro_f1']:.4f}"
    yield "loss", f"{report['loss']:.4f}"
    before, after, t = calibration["ece_before"], calibration["ece_after"], calibration["temperature"]
    yield "ECE", f"{after:.4f}" + (f" with the run's temperature {t:.3g} ({before:.4f} without)" if t != 1 else "")
    if found.same is not None:
        yield (
            "test.json",
            "has the same figures"
            if found.same
            else "has other figures: images, formats, versions or machine are others",
        )


def class_rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A row for each class that has images or was predicted; none where there are too many classes."""
    from tlcli.runs.run_dir import confusion_matrix

    matrix = confusion_matrix(report)
    assert matrix is not None
    places = [bool(column.any()) for column in matrix.T]
    shown = [
        (name, own)
        for (name, own), hit in zip(report["per_class"].items(), places, strict=True)
        if own["support"] or hit
    ]
    if len(shown) > MANY_CLASSES:
        return []
    return [
        (
            strip_control_chars(name),
            f"{own['precision']:.4f}",
            f"{own['recall']:.4f}" if own["support"] else "-",
            f"{own['f1']:.4f}" if own["support"] else "-",
            f"{own['support']:,}",
        )
        for name, own in shown
    ]
