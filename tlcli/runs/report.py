"""The report of a run or a sweep: one HTML file that needs no other file, no script and no network.

Its Content-Security-Policy allows one style sheet, by its digest, and images that are in the file. Everything that
comes from a run is escaped by jinja2. A run may have failed at any point, be of an older release, or come from another
person: values that are missing or of another type are left out.
"""

import base64
import hashlib
import io
import math
import os
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path, PurePath
from typing import Any, TypeVar
from urllib.parse import quote

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from tlcli import __version__
from tlcli.data.decode import BadImage, Pixels
from tlcli.engine.calibration import expected_calibration_error, reliability
from tlcli.errors import TlcliError, UsageError
from tlcli.files import atomic_write
from tlcli.registry import options
from tlcli.runs import leaderboard, plots
from tlcli.runs.load import calibrated
from tlcli.runs.predictions import read_predictions
from tlcli.runs.run_dir import RunDir, confusion_matrix, process_has_exited
from tlcli.text import duration_text

T = TypeVar("T")
View = dict[str, Any]
ImageReaders = Mapping[str, Callable[[], Pixels]]

GENERATOR = "tlcli report"
"""Content of a report's generator tag, by which a later report recognizes that it may replace the file."""

TEMPLATES = Path(__file__).parent / "templates"
MAX_TABLE_CLASSES = 40
"""Classes above which the confusion matrix is an image: the cells of a table would be too small to read."""

GALLERY_IMAGES, THUMBNAIL_SIDE, PIXELATED_SIDE = 24, 160, 96
"""Images of a gallery, pixels of the longer side, and the side below which an image is shown pixel by pixel."""

UNDECIDED_MARGIN = 0.5
"""Difference of the two highest probabilities below which an image is undecided."""

CHART_SIZE, CHART_MARGINS = (420, 262), (48, 14, 40, 46)
PHASES = {
    "setup": "Load data and network",
    "extract": "Run the frozen part",
    "probe": "Fit the first head",
    "train": "Train",
    "validate": "Validate",
    "test": "Test",
    "plots": "Draw plots",
    "calibrate": "Calibrate",
}


# -- values of a type


def of_type(value: Any, kind: type[T]) -> T | None:
    """Return the value if it has this type, else None. A float is finite, and may be stored as an int."""
    if kind is float and type(value) is int and abs(value) < 2**53:
        value = float(value)
    if (
        isinstance(value, bool)
        or not isinstance(value, kind)
        or (isinstance(value, float) and not math.isfinite(value))
    ):
        return None
    return value


def get(values: Any, path: str, kind: type[T]) -> T | None:
    """Return the value at a path such as `best.epoch` if it has this type, else None."""
    for key in path.split("."):
        values = values.get(key) if isinstance(values, Mapping) else None
    return of_type(values, kind)


def strings(values: Any) -> list[str]:
    """Return the strings of a list."""
    return [value for value in values if isinstance(value, str)] if isinstance(values, list) else []


# -- a run


def run_view(run: RunDir, images: ImageReaders, images_reason: str | None = None) -> View:
    """Return what the page of a run shows.

    Args:
        images: functions that decode the images of the run's data set, by key.
        images_reason: why there are no images.
    """
    info, test, rows = run.info, run.test(), run.metrics()
    status = get(info, "status", str) or "damaged"
    if status == "running" and process_has_exited(info):
        status = "killed"
    name, accuracy = get(info, "name", str) or run.path.resolve().name, get(test, "accuracy", float)
    best_epoch = get(info, "best.epoch", int)
    seconds = {key: of_type(value, float) for key, value in (get(info, "seconds", dict) or {}).items()}
    total_seconds = seconds.pop("total", None)
    is_cached = (get(info, "cache", dict) or {}).get("used") is True
    stage_types = {"name": str, "parameters": int, "trainable": int, "lr": float}
    stages = [
        {key: get(stage, key, kind) for key, kind in stage_types.items()} for stage in get(info, "stages", list) or []
    ]
    return {
        "run_name": name,
        "title": f"{status.capitalize() if accuracy is None else percent(accuracy)} {name}",
        "started": _date(info.get("started")),
        "status": status,
        "error": get(info, "error", str),
        "result": None if accuracy is None else _result(accuracy, test),
        "best_accuracy": get(info, "best.accuracy", float),
        "best_epoch": best_epoch,
        "subject": _subject(info, run.config()),
        "n_train": get(info, "n_train", int),
        "settings": _settings(info, run.config()),
        "terms": _terms(info, test),
        "charts": _curves(rows, best_epoch),
        "epochs": _epochs(rows),
        "matrix": _matrix(test),
        "class_rows": _class_rows(test),
        **_predictions(run, images, images_reason),
        "stages": stages,
        "parameters": [get(info, f"parameters.{key}", int) for key in ("trainable", "total")],
        "verified": get(info, "frozen_tensors_verified", int),
        "cached_at": get(info, "cache.at", str) if is_cached else None,
        "uncached_reason": None if is_cached else get(info, "cache.why", str),
        "total_seconds": total_seconds,
        "phases": [(PHASES.get(key, key), value) for key, value in seconds.items() if value is not None],
        "environment": _environment(info),
        "command": _rerun_command(info),
        "config": run.config_file.read_text("utf-8", "replace") if run.config_file.is_file() else "",
    }


def _result(accuracy: float, test: View) -> View:
    """Return the accuracy, its interval, the accuracy of always naming the most frequent class, and a chart."""
    low, high = [of_type(value, float) for value in (*(get(test, "accuracy_ci95", list) or ()), None, None)[:2]]
    support = [get(row, "support", int) or 0 for row in (get(test, "per_class", dict) or {}).values()]
    baseline = max(support) / sum(support) if len(support) > 1 and sum(support) > 0 else None
    view: View = {"accuracy": accuracy, "n": get(test, "n", int), "baseline": baseline, "interval": None}
    if low is not None and high is not None:
        draw = partial(plots.draw_interval, value=accuracy, interval=(low, high), baseline=baseline)
        alt = f"Accuracy {percent(accuracy)} and its interval on a scale from 0 to 100 %"
        view |= {"interval": (low, high), "chart": _chart("", alt, draw, (1000, 28), (0, 0, 0, 0))}
    return view


def _chart(
    title: str,
    alt: str,
    draw: Callable[[Any], None],
    size: tuple[int, int] = CHART_SIZE,
    margins: tuple[int, int, int, int] = CHART_MARGINS,
) -> View:
    """Return a chart with its images for light and dark mode. `alt` says in words what it shows."""
    light, dark = (data_uri("image/svg+xml", text.encode()) for text in plots.svg(draw, size, margins))
    return {"title": title, "alt": alt, "light": light, "dark": dark}


def data_uri(media_type: str, content: bytes) -> str:
    """Return a data: URI."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode('ascii')}"


def _date(value: Any) -> str | None:
    """Return `24 November 2026, 16:14 UTC` for a time in ISO 8601; None for anything else."""
    try:
        when = datetime.fromisoformat(str(value))
    except ValueError:
        return None
    when = when if when.tzinfo else when.replace(tzinfo=UTC)
    return f"{when.day} {when:%B %Y, %H:%M} {when.tzname()}"


def _subject(info: View, config: View) -> View:
    """Return what was trained on what. The name of the user's own images is the name of their folder or list."""
    place = get(config, "dataset.root", str) or get(config, "dataset.file", str)
    dataset = get(info, "dataset", str) or get(config, "dataset.name", str) or "a data set"
    if place and get(config, "dataset.kind", str) != "torchvision":
        dataset = PurePath(place).name or dataset
    freeze = get(info, "freeze", str) or get(config, "freeze.kind", str) or ""
    strategy = options("freeze").get(freeze)
    trained = strategy.describe(get(config, "freeze", dict) or {}) if strategy else freeze and f"freeze={freeze}"
    return {
        "backbone": get(info, "backbone", str) or get(config, "backbone.name", str) or "a network",
        "weights": get(config, "backbone.weights", str),
        "dataset": dataset,
        "classes": strings(info.get("classes")),
        "trained": trained,
    }


def _settings(info: View, config: View) -> list[str]:
    """Return how the run was trained, as `key=value`."""
    keys = ("epochs", "batch_size", "optimizer.kind", "optimizer.lr", "scheduler.kind", "augment.kind")
    values = {key.removesuffix(".kind"): get(config, key, object) for key in keys}
    values |= {"image.size": get(info, "preprocessing.size", int), "seed": get(info, "seed", int)}
    return [f"{key}={value}" for key, value in values.items() if isinstance(value, int | float | str)]


def _terms(info: View, test: View) -> list[tuple[str, str, str]]:
    """Return the numbers beside the result, those that there are: name, value, note."""
    epoch, n_val, total = (get(info, key, int) for key in ("best.epoch", "n_val", "parameters.total"))
    note = f"epoch {epoch}" + (f", {count(n_val)} images" if n_val else "")
    terms = [
        ("Validation accuracy", percent(get(info, "best.accuracy", float)), note),
        ("Test top-5", percent(get(test, "top5", float)), "the class is among the five most probable"),
        ("Macro F1", decimal(get(test, "macro_f1", float)), "mean over classes, on test"),
        ("Calibration error", percent(get(test, "calibration.ece_after", float)), "expected, on test"),
        ("Time", seconds_text(get(info, "seconds.total", float)), "from start to result"),
        ("Trainable", count(get(info, "parameters.trainable", int)), f"of {count(total)} parameters"),
    ]
    return [term for term in terms if term[1] != MISSING]


def _curves(rows: Sequence[View], best_epoch: int | None) -> list[View]:
    """Return charts of loss and accuracy by epoch."""
    charts = []
    for key in ("loss", "accuracy"):
        points: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            epoch, value = get(row, "epoch", int), get(row, key, float)
            if epoch is not None and value is not None and abs(epoch) < 2**53 and abs(value) < 1e100:
                points.setdefault(str(row.get("split")), []).append((epoch, value))
        points = {split: sorted(points[split]) for split in plots.LABELS if split in points}
        if points:
            words = percent if key == "accuracy" else decimal
            parts = [f"{plots.LABELS[s]} from {words(v[0][1])} to {words(v[-1][1])}" for s, v in points.items()]
            marked = best_epoch if any(best_epoch == epoch for v in points.values() for epoch, _ in v) else None
            draw = partial(plots.draw_curve, points=points, key=key, best_epoch=marked)
            charts.append(_chart(key.capitalize(), f"{key.capitalize()} by epoch: {'; '.join(parts)}", draw))
    return charts


def _epochs(rows: Sequence[View]) -> list[View]:
    """Return loss and accuracy of train and val and the highest learning rate, one row per epoch."""
    epochs: dict[int, View] = {}
    for row in rows:
        epoch, split = get(row, "epoch", int), row.get("split")
        if epoch is None or split not in ("train", "val"):
            continue
        view = epochs.setdefault(epoch, {"epoch": epoch, "train": {}, "val": {}, "lr": None})
        view[split] = {key: get(row, key, float) for key in ("loss", "accuracy")}
        rates = [of_type(rate, float) for rate in (get(row, "lr", dict) or {}).values()]
        view["lr"] = max((rate for rate in rates if rate is not None), default=view["lr"])
    return [epochs[epoch] for epoch in sorted(epochs)]


def _matrix(test: View) -> View | None:
    """Return the confusion matrix and the pairs of classes with the most mistakes.

    The shade of a cell is its share of the row. Mistakes are few, and what one looks for: their shade is twice as
    strong.
    """
    counts, classes = confusion_matrix(test), strings(test.get("classes"))
    if counts is None or len(classes) != len(counts):
        return None
    n, diagonal = len(classes), np.eye(len(classes), dtype=bool)
    shares = counts / np.maximum(counts.sum(axis=1), 1)[:, None]
    levels = np.where(counts > 0, np.clip(np.rint(np.where(diagonal, shares, 2 * shares) * 10), 1, 10), 0).astype(int)
    wrong = np.where(diagonal, 0, counts)
    order = [
        divmod(int(i), n) for i in np.argsort(-wrong, axis=None, kind="stable")[: 8 if n <= MAX_TABLE_CLASSES else 20]
    ]
    pairs = [(classes[t], classes[p], int(counts[t, p]), int(counts[t].sum())) for t, p in order if wrong[t, p]]
    view: View = {"classes": classes, "rows": [], "image": None, "pairs": pairs if n > 6 else [], "has_room": n <= 6}
    if n <= MAX_TABLE_CLASSES:
        names = np.char.add(np.where(diagonal, "d", "e"), levels.astype(str))
        view["rows"] = [list(zip(counts[t].tolist(), names[t].tolist(), strict=True)) for t in range(n)]
    else:  # one pixel per cell, on the color of the page
        rgb = np.where(diagonal[..., None], (52, 110, 182), (200, 100, 30))
        alpha = np.where(levels > 0, 55 + 20 * levels, 0)[..., None]
        file = io.BytesIO()
        Image.fromarray(np.concatenate([rgb, alpha], axis=2).astype(np.uint8)).save(file, "PNG")
        view["image"] = data_uri("image/png", file.getvalue())
    return view


def _class_rows(test: View) -> list[View]:
    """Return the metrics of each class, the lowest F1 first; classes without test images come last."""
    types = {"precision": float, "recall": float, "f1": float, "support": int}
    per_class = get(test, "per_class", dict) or {}
    rows: list[View] = [
        {"name": str(name), **{key: get(row, key, kind) for key, kind in types.items()}}
        for name, row in per_class.items()
    ]
    return sorted(rows, key=lambda row: (not row["support"], 2.0 if row["f1"] is None else row["f1"]))


def _predictions(run: RunDir, images: ImageReaders, images_reason: str | None) -> View:
    """Return the galleries and the calibration, or the reasons why there are none."""
    view: View = {"mistakes": None, "undecided": None, "images_reason": images_reason, "calibration": None}
    temperature = get(run.info, "calibration.temperature", float)
    try:
        if not run.test_predictions.exists():
            tested = run.test_file.exists()
            raise UsageError("tlcli writes them since 0.3.0" if tested else "this run was not tested")
        saved = read_predictions(run.test_predictions)
        logits, labels = saved.logits.double(), saved.labels
        if not len(labels) or not logits.isfinite().all():
            raise UsageError(f"{run.test_predictions}: no finite logits in it")
    except UsageError as exc:
        reason = f"No predictions of test images: {exc}."
        return {**view, "images_reason": reason, "calibration_reason": reason}
    has_temperature = temperature is not None and temperature > 0
    scale = temperature if temperature is not None and has_temperature else 1.0
    p, truth = calibrated(logits, scale).numpy(), labels.numpy()
    top = np.sort(p, axis=1)[:, -2:]
    predicted, margin = p.argmax(axis=1), top[:, -1] - top[:, 0]
    wrong, close = np.flatnonzero(predicted != truth), np.flatnonzero(margin < UNDECIDED_MARGIN)
    wrong = wrong[np.argsort(-p[wrong, predicted[wrong]], kind="stable")]
    close = close[np.argsort(margin[close], kind="stable")] if p.shape[1] > 1 else close[:0]

    def gallery(order: np.ndarray, guesses: int) -> View:
        cards = []
        for i in order[:GALLERY_IMAGES]:
            best = np.argsort(-p[i], kind="stable")[:guesses]
            card = {"name": saved.keys[i], "truth": saved.classes[truth[i]], "is_right": predicted[i] == truth[i]}
            card["guesses"] = [(saved.classes[k], float(p[i, k])) for k in best]
            cards.append({**card, **_thumbnail(images.get(saved.keys[i]))})
        return {"n": len(order), "cards": cards}

    view |= {"mistakes": gallery(wrong, 1), "undecided": gallery(close, 2)}
    view["calibration_reason"] = None if has_temperature else "This run has no temperature; tlcli fits one since 0.4.0."
    if has_temperature and len(saved.classes) > 1:
        scales = {"scaled": scale} if scale == 1 else {"unscaled": 1.0, "scaled": scale}
        bins = {name: [b for b in reliability(logits, labels, t) if b[2]] for name, t in scales.items()}
        draw, alt = partial(plots.draw_reliability, series=bins), "The share of right images by probability, in 15 bins"
        errors = [expected_calibration_error(logits, labels, t) for t in (1.0, scale)]
        chart = _chart("Share that was right", alt, draw, (340, 350), (48, 20, 40, 48))
        view["calibration"] = {"temperature": scale, "errors": errors, "chart": chart}
    return view


def _thumbnail(read: Callable[[], Pixels] | None) -> View:
    """Return a small JPEG of an image as a data: URI, None if it cannot be read. No metadata of the file goes in."""
    try:
        image = Image.fromarray(read()) if read else None
    except (BadImage, OSError):
        image = None
    if image is None:
        return {"picture": None, "is_small": False}
    image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.LANCZOS)
    is_small, file = max(image.size) < PIXELATED_SIDE, io.BytesIO()
    image.save(file, "JPEG", quality=95 if is_small else 80, subsampling=0 if is_small else 2, optimize=True)
    return {"picture": data_uri("image/jpeg", file.getvalue()), "is_small": is_small}


def _environment(info: View) -> list[tuple[str, str]]:
    """Return rows of name and text: machine, device, versions, commit."""
    cores = get(info, "machine.cores", int)
    machine = [get(info, f"machine.{key}", str) for key in ("processor", "architecture", "system")]
    versions = [f"{name}\N{NO-BREAK SPACE}{number}" for name, number in (get(info, "versions", dict) or {}).items()]
    rows = [
        ("Machine", ", ".join(part for part in (*machine, f"{cores} cores" if cores else None) if part)),
        ("Device", get(info, "numerics.device", str) or get(info, "device", str)),
        ("Versions", ", ".join(versions)),
        ("Commit", get(info, "git_commit", str)),
    ]
    return [(name, text) for name, text in rows if text]


def _rerun_command(info: View) -> str:
    """Return the command that trains this run again in a new directory; for a job of a sweep, that job alone."""
    command, overrides = get(info, "command", str) or "tlcli train", strings(info.get("overrides"))
    try:
        words = shlex.split(command)
    except ValueError:
        return command
    flags = [w for w in words if (w.startswith("-") or "=" not in w) and w not in ("-m", "--multirun", *overrides)]
    return shlex.join([*flags, *overrides])


# -- a sweep


def sweep_view(folder: Path, output: Path) -> View:
    """Return what the page of a sweep shows, for a report that is written to `output`.

    Raises:
        UsageError: the sweep has no run.
    """
    board = leaderboard.read(folder)
    if not board.jobs:
        raise UsageError(f"{folder}: no run in this sweep")
    metric, is_share = board.figure.replace("_", " "), board.figure != "loss"
    best = next((job for job in board.jobs if job.rank == 1), None)
    done = [job for job in board.jobs if job.rank is not None]
    charts = []
    for key in board.keys:
        values = [(job.values.get(key), of_type(job.validation, float), job.rank == 1) for job in done]
        jobs = [(printable(value), v, is_best) for value, v, is_best in values if value is not None and v is not None]
        if jobs:
            draw = partial(plots.draw_jobs, jobs=jobs, is_share=is_share)
            alt = f"Validation {metric} of {len(jobs)} jobs against {key}"
            charts.append(_chart(key, alt, draw, (420, 244), (48, 14, 34, 30)))
    run = RunDir(folder / (best or board.jobs[0]).name)
    try:
        info = run.info
    except TlcliError:
        info = {}
    seconds = [job.seconds for job in board.jobs if job.seconds is not None]
    return {
        "run_name": folder.resolve().name,
        "title": f"{(percent if is_share else decimal)(best.validation)} {folder.name}" if best else folder.name,
        "started": _date(info.get("started")),
        "subject": _subject(info, run.config()),
        "metric": metric,
        "is_share": is_share,
        "keys": board.keys,
        "jobs": [{**vars(job), "link": _link(folder / job.name, output)} for job in board.jobs],
        "n_done": len(done),
        "seconds": sum(seconds) if seconds else None,
        "charts": charts,
        "command": board.command,
    }


def _link(run: Path, output: Path) -> str:
    """Return the link from a sweep's report to the report of a job, or to its directory if it has none.

    It is percent-encoded, so that the name of a directory is a path and nothing else.
    """
    report = run / "report.html"
    target = report if report.is_file() else run
    try:
        relative = Path(os.path.relpath(target.resolve(), output.resolve().parent)).as_posix()
    except ValueError:  # another drive
        relative = target.name
    return "./" + quote(os.fsencode(relative)) + ("" if target is report else "/")


# -- HTML

MISSING = "\N{EN DASH}"


def percent(value: Any, digits: int = 1) -> str:
    """Return `93.5 %`; a dash for anything but a number."""
    share = of_type(value, float)
    return MISSING if share is None else f"{100 * share:.{digits}f}\N{NO-BREAK SPACE}%"


def count(value: Any) -> str:
    """Return `3,373,570`; a dash for anything but a whole number."""
    n = of_type(value, int)
    return MISSING if n is None else f"{n:,}"


def decimal(value: Any, form: str = ".3f") -> str:
    """Return `0.137`; a dash for anything but a number."""
    number = of_type(value, float)
    return MISSING if number is None else f"{number:{form}}"


def seconds_text(value: Any) -> str:
    """Return a duration; a dash for anything but a number."""
    seconds = of_type(value, float)
    return MISSING if seconds is None else duration_text(seconds)


def printable(value: Any) -> Any:
    """Return text without what no HTML or SVG file may contain: lone surrogates of file names, control characters."""
    if isinstance(value, Markup):
        return value
    pattern = "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]"
    return re.sub(pattern, "\N{REPLACEMENT CHARACTER}", str(value))


@cache
def _environment_of_templates() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(percent=percent, count=count, decimal=decimal, seconds=seconds_text)
    return environment


def render(template: str, view: View) -> str:
    """Return the HTML of a page; every value of the view is escaped."""
    style = (TEMPLATES / "style.css").read_text(encoding="utf-8")
    digest = "sha256-" + base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()  # CSP Level 3, 2.3.1
    page = _environment_of_templates().get_template(template)
    return page.render(view, style=Markup(style), style_digest=digest, generator=f"{GENERATOR} {__version__}")


def check_output(file: Path) -> None:
    """Raise UsageError unless a report may be written to this path: nothing is there, or an earlier report."""
    remedy = "choose another file with --output FILE"
    if file.is_dir():
        raise UsageError(f"--output {file}: this is a directory; {remedy}")
    if not file.parent.is_dir():
        raise UsageError(f"--output {file}: {file.parent} is not a directory; {remedy}")
    if os.path.lexists(file):
        tag = f'<meta name="generator" content="{GENERATOR}'.encode()
        try:
            with file.open("rb") as stream:
                is_report = not file.is_symlink() and file.is_file() and tag in stream.read(2048)
        except OSError:
            is_report = False
        if not is_report:
            raise UsageError(f"{file} already exists and is not a report of tlcli; {remedy}")


def save(html: str, file: Path) -> None:
    """Write a report in one atomic step. Raise UsageError if another file is there or it cannot be written."""
    check_output(file)
    try:
        with atomic_write(file) as stream:
            stream.write(html.encode())  # as bytes: the digest of the style sheet is over \n
    except OSError as exc:
        raise UsageError(f"{file}: cannot write ({exc.strerror or exc}); choose another file with --output") from exc
