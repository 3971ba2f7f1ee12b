"""Evaluate a finished run on its own test split, as it was tested, or on another
dataset. Classes are matched by name; a subset of the run's classes is enough.
The metrics are written to RUN/eval-1 (eval-2, ...): eval.json,
predictions.safetensors and the config of the dataset. Nothing is overwritten.

examples:
  tlcli eval outputs/2026-05-04/12-30-00
  tlcli eval outputs/2026-05-04/12-30-00 dataset=imagefolder dataset.root=new
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec.structs import fields

from tlcli.cli import fast_imports
from tlcli.cli.parser import Parser, values_of
from tlcli.cli.table import number_text
from tlcli.errors import UsageError
from tlcli.files import is_dir
from tlcli.interrupts import handle_signals
from tlcli.reporter import Reporter
from tlcli.runs.run_dir import CHECKPOINTS, confusion_matrix, open_run
from tlcli.specs import EVALUATION_KEYS, DatasetSpec, Tta
from tlcli.text import did_you_mean, shown_path, strip_control_chars

if TYPE_CHECKING:
    from tlcli.cli.view import TerminalReporter
    from tlcli.evaluate import Evaluation

CHOICES = {"split": ("test", "val", "train"), "checkpoint": CHECKPOINTS}
GROUPS = ("dataset", "device", "cache", "tta")
FIXED_KEYS = [f"dataset.{f.name}" for f in fields(DatasetSpec) if f.name not in ("name", "root", *EVALUATION_KEYS)]
MAX_CLASS_ROWS = 20  # with more classes only eval.json has them


PARSER = Parser("eval", __doc__)
PARSER.known_words = [f"{key}={value}" for key, values in CHOICES.items() for value in values]
PARSER.known_words += [f"{group}=" for group in GROUPS]
PARSER.add_argument("run", metavar="RUN", help="directory of the run")
words = (
    "split=test|val|train; checkpoint=best|last (default: best); dataset=... and its keys as in `tlcli train`: another "
    "dataset (its test split, or else its val split, or else all of it); device=..., device.KEY=..., "
    "cache.KEY=...: where and how to compute; tta=flip: the mean over each image and its mirror image"
)
PARSER.add_argument("words", nargs="*", default=[], metavar="KEY=VALUE", help=words)
PARSER.add_format()


@handle_signals()
def run(argv: list[str]) -> int:
    """Evaluate the run in argv, and return the exit code. All that needs no torch is checked first."""
    from tlcli.cli.compose import load_spec, require_one_process

    arguments = PARSER.parse_intermixed_args(argv)
    words = [arguments.run, *arguments.words]
    run_word = next((word for word in words if "=" not in word or is_dir(word)), words[0])
    words.remove(run_word)
    chosen, overrides = values_of(words, [*CHOICES])
    for key, values in chosen.items():
        if wrong := [value for value in values if value not in CHOICES[key]]:
            near = did_you_mean(wrong[0], CHOICES[key])
            raise UsageError(f"{key}={wrong[0]}: choose from {', '.join(CHOICES[key])}.{near}")
    for word in overrides:
        name, known = word.lstrip("+~").partition("=")[0], [*GROUPS, *CHOICES]
        if name.split(".")[0] in GROUPS and name not in FIXED_KEYS:
            continue
        if "=" not in word:
            raise UsageError(f"{word}: not KEY=VALUE; name one run: tlcli eval RUN [KEY=VALUE ...]")
        hint = did_you_mean(name, known) or f" eval takes {', '.join(known)}" if name not in FIXED_KEYS else ""
        raise UsageError(f"{word}: cannot be changed after training.{hint}")
    run_dir = open_run(run_word)
    trained = load_spec(run_dir)
    spec = load_spec(run_dir, overrides) if overrides else trained
    if spec.device.processes != trained.device.processes:
        require_one_process(spec)
    if spec.tta is Tta.flip:
        run_dir.check_mirrors("tta=flip")
    spec.dataset.check(for_training=spec.dataset == trained.dataset)
    with fast_imports():
        from tlcli.evaluate import evaluate_run
    from tlcli.cli.view import TerminalReporter

    checkpoint, split = ["best", *chosen["checkpoint"]][-1], [None, *chosen["split"]][-1]
    shown = TerminalReporter() if arguments.format == "table" else None
    evaluation = evaluate_run(run_dir.path, checkpoint, split, spec, trained, shown or Reporter())
    if shown:
        _show(evaluation, shown)
    else:
        print(json.dumps({**evaluation.report, "folder": str(evaluation.folder)}, indent=2))
    return 0


def _show(evaluation: "Evaluation", reporter: "TerminalReporter") -> None:
    """Show the metrics, and a row per class that has images or was predicted if there are not too many."""
    report = evaluation.report
    (low, high), data, calibration = report["accuracy_ci95"], report["dataset"], report["calibration"]
    location = data.get("file") or data["root"]
    n_bad = report["n_bad_files"]
    before, after, t = calibration["ece_before"], calibration["ece_after"], calibration["temperature"]
    why = "images, dtypes, versions or machine changed, or a GPU has rounded differently"
    same = {None: "", True: "has the same metrics", False: f"differs: {why}"}
    lines = {
        "weights": f"{Path(report['checkpoint']).stem}, epoch {report['epoch']}",
        "data": strip_control_chars(data["name"] + (f", {location}" if location else "")),
        "evaluated": f"{report['n']:,} {'image' if report['n'] == 1 else 'images'}: {evaluation.description}",
        "left out": f"files of the dataset that do not decode: {n_bad:,}, see bad_files.csv" if n_bad else "",
        "accuracy": f"{report['accuracy']:.4f}, 95 % interval {low:.4f} to {high:.4f} (Wilson)",
        "top-5": "" if report["top5"] is None else f"{report['top5']:.4f}",
        "macro F1": f"{report['macro_f1']:.4f}",
        "loss": f"{report['loss']:.4f}",
        "tta": "" if report["tta"] == "none" else "mean over each image and its mirror image",
        "ECE": f"{after:.4f}" + (f" with the run's temperature {t:.3g} ({before:.4f} without)" if t != 1 else ""),
        "test.json": same[evaluation.same],
    }
    reporter.show_labelled(*lines.items())
    matrix: Any = confusion_matrix(report)  # None only if it is damaged
    rows = []
    for (name, metrics), predicted in zip(report["per_class"].items(), matrix.sum(axis=0), strict=True):
        if (n := metrics["support"]) or predicted:
            recall, f1 = (number_text(metrics[key] if n else None) for key in ("recall", "f1"))
            rows.append((name, number_text(metrics["precision"]), recall, f1, f"{n:,}"))
    if 0 < len(rows) <= MAX_CLASS_ROWS:
        reporter.show("")
        reporter.show_table(("<class", "precision", "recall", "F1", "images"), rows)
        reporter.show("")
    reporter.show_labelled(("written", shown_path(evaluation.folder)))
