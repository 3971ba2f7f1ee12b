"""`tlcli eval`: evaluate a finished run on its own test split, or on another dataset."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlcli.cli.parser import Parser
from tlcli.cli.table import TableColumn, make_table
from tlcli.errors import UsageError
from tlcli.text import did_you_mean, labelled, shown_path, strip_control_chars

if TYPE_CHECKING:
    from tlcli.evaluate import Evaluation

CHOICES = {"split": ("test", "val", "train"), "checkpoint": ("best", "last")}
GROUPS = ("dataset", "device", "cache")
SPLITTING_KEYS = ("dataset.val_fraction", "dataset.test_fraction", "dataset.train_per_class")
MAX_CLASS_ROWS = 20  # with more classes only eval.json has them


def parser() -> Parser:
    """Return the parser of `tlcli eval`."""
    eval_parser = Parser(
        "eval",
        "Evaluate a finished run on its own test split, as it was tested, or on another\n"
        "dataset. Classes are matched by name; a subset of the run's classes is enough.\n"
        "The metrics are written to RUN/eval-1 (eval-2, ...): eval.json,\n"
        "predictions.safetensors and the config of the dataset. Existing files stay.",
        [
            "tlcli eval outputs/2026-05-04/12-30-00",
            "tlcli eval outputs/2026-05-04/12-30-00 dataset=imagefolder dataset.root=new",
        ],
    )
    eval_parser.add_argument("run", metavar="RUN", help="directory of the run")
    eval_parser.add_argument(
        "words",
        nargs="*",
        metavar="KEY=VALUE",
        help="split=test|val|train; checkpoint=best|last (default: best, the epoch best on validation); dataset=... "
        "and its keys as in `tlcli train`: another dataset, of which the test split, else the val split, else all of "
        "it is evaluated; device=..., device.KEY=..., cache.KEY=...: where and how to compute",
    )
    eval_parser.known_words = (
        *(f"{key}={value}" for key, values in CHOICES.items() for value in values),
        *(f"{group}=" for group in GROUPS),
    )
    eval_parser.add_format()
    return eval_parser


def run(argv: list[str]) -> int:
    """Evaluate the run in argv, and return the exit code. All that needs no torch is checked first."""
    from tlcli.cli import fast_imports
    from tlcli.cli.compose import load_spec
    from tlcli.runs.run_dir import open_run

    arguments = parser().parse_intermixed_args(argv)
    path, chosen, overrides = _sort_words([arguments.run, *arguments.words])
    run_dir = open_run(path)
    trained = load_spec(run_dir)
    spec = load_spec(run_dir, overrides) if overrides else trained
    spec.dataset.check(for_training=spec.dataset == trained.dataset)
    with fast_imports():
        from tlcli.evaluate import evaluate_run
    from tlcli.cli.view import TerminalReporter
    from tlcli.reporter import Reporter

    is_json = arguments.format == "json"
    reporter = Reporter() if is_json else TerminalReporter()
    evaluation = evaluate_run(path, chosen.get("checkpoint", "best"), chosen.get("split"), spec, trained, reporter)
    if is_json:
        print(json.dumps({**evaluation.report, "folder": str(evaluation.folder)}, indent=2))
    else:
        _print_table(evaluation)
    return 0


def _sort_words(words: Sequence[str]) -> tuple[Path, dict[str, str], list[str]]:
    """Return the run's directory, split and checkpoint if given, and the overrides of its spec. Raises UsageError."""
    folders = [word for word in words if "=" not in word or Path(word).is_dir()]
    if len(folders) != 1:
        hint = f"{folders[1]!r} is not KEY=VALUE" if folders else "`tlcli list` shows the runs"
        raise UsageError(f"name one run: tlcli eval RUN [KEY=VALUE ...]; {hint}")
    chosen: dict[str, str] = {}
    overrides = []
    for word in (word for word in words if word not in folders):
        key, _, value = word.partition("=")
        name = key.lstrip("+~")
        if key in CHOICES:
            chosen[key] = value
            if value not in CHOICES[key]:
                raise UsageError(f"{word}: choose from {', '.join(CHOICES[key])}.{did_you_mean(value, CHOICES[key])}")
        elif name in SPLITTING_KEYS:
            raise UsageError(f"{word}: cannot be changed after training: the run's dataset is split already")
        elif name == "dataset.range":
            raise UsageError(f"{word}: cannot be changed after training: it is part of the run's preprocessing")
        elif name.split(".")[0] in GROUPS:
            overrides.append(word)
        else:
            hint = did_you_mean(name, [*CHOICES, *GROUPS]) or f" eval takes {', '.join([*GROUPS, *CHOICES])}"
            raise UsageError(f"{word}: cannot be changed after training.{hint}")
    return Path(folders[0]), chosen, overrides


def _print_table(evaluation: "Evaluation") -> None:
    """Print the metrics, and a row per class if there are not too many."""
    from tlcli.cli.view import Screen

    screen = Screen()
    report, calibration, images = evaluation.report, evaluation.report["calibration"], evaluation.images
    (low, high), data = report["accuracy_ci95"], report["dataset"]
    location = data.get("file") or data["root"]
    before, after, t = calibration["ece_before"], calibration["ece_after"], calibration["temperature"]
    lines = {
        "weights": f"{Path(report['checkpoint']).stem}, epoch {report['epoch']}",
        "data": strip_control_chars(data["name"] + (f", {location}" if location else "")),
        "evaluated": f"{report['n']:,} {'image' if report['n'] == 1 else 'images'}: {images.description}",
        "left out": f"{len(images.bad_files):,} that do not decode" if images.bad_files else "",
        "accuracy": f"{report['accuracy']:.4f}, 95 % interval {low:.4f} to {high:.4f} (Wilson)",
        "top-5": "" if report["top5"] is None else f"{report['top5']:.4f}",
        "macro F1": f"{report['macro_f1']:.4f}",
        "loss": f"{report['loss']:.4f}",
        "ECE": f"{after:.4f}" + (f" with the run's temperature {t:.3g} ({before:.4f} without)" if t != 1 else ""),
    }
    if evaluation.same is not None:
        differs = "differs: images, dtypes, versions or machine changed"
        lines["test.json"] = "has the same metrics" if evaluation.same else differs

    def show(label: str, value: str) -> None:
        for line in labelled(label, value, screen.width if screen.is_terminal else None):
            screen.print(line, soft_wrap=True)

    for label, value in lines.items():
        if value:
            show(label, value)
    if rows := class_rows(report):
        columns = [TableColumn("class", left=True), *map(TableColumn, ("precision", "recall", "F1", "images"))]
        screen.print()
        screen.print(make_table(columns, rows))
        screen.print()
    show("written", shown_path(evaluation.folder))


def class_rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return a row per class that has images or was predicted; none if there are too many classes."""
    from tlcli.runs.run_dir import confusion_matrix

    matrix = confusion_matrix(report)
    rows: list[tuple[str, ...]] = []
    n_predicted = [0] * len(report["classes"]) if matrix is None else matrix.sum(axis=0).tolist()
    for (name, metrics), predicted in zip(report["per_class"].items(), n_predicted, strict=True):
        if metrics["support"] or predicted:
            recall, f1 = (f"{metrics[key]:.4f}" if metrics["support"] else "-" for key in ("recall", "f1"))
            precision, support = f"{metrics['precision']:.4f}", f"{metrics['support']:,}"
            rows.append((strip_control_chars(name), precision, recall, f1, support))
    return rows if len(rows) <= MAX_CLASS_ROWS else []
