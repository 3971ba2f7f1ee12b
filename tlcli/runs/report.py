"""The report of a run or a sweep: one HTML file that needs no other file, no script and no network.

Its Content-Security-Policy allows one style sheet, by its digest, and images that are in the file. Runs may have
failed or come from other people: jinja2 escapes their text, and what is missing or of another type is left out.
"""

import base64
import hashlib
import io
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import torch
from jinja2 import ChainableUndefined, Environment, FileSystemLoader
from markupsafe import Markup
from PIL import Image

from tlcli import __version__
from tlcli.data.decode import BadImage, Pixels
from tlcli.engine.metrics import calibrated, expected_calibration_error, reliability, risk_coverage
from tlcli.errors import TlcliError, UsageError
from tlcli.runs import leaderboard, plots
from tlcli.runs.load import LoadedRun, load_run
from tlcli.runs.run_dir import (
    REFIT,
    STATE_FILE,
    RunDir,
    confusion_matrix,
    has_folds,
    integer,
    mapping,
    number,
    pair,
    read_json,
    read_predictions,
    rerun_command,
    text,
    total_seconds,
)
from tlcli.specs import options
from tlcli.text import duration_text

View = dict[str, Any]
ImageReaders = Mapping[str, Callable[[], Pixels]]

GENERATOR = "tlcli report"  # in a report's generator tag, by which a later report knows that it may replace the file
TEMPLATES = Path(__file__).parent / "templates"
MAX_TABLE_CLASSES = 40  # above, the confusion matrix is an image: the cells of a table would be too small to read
MAX_SHOWN_CLASSES = 40  # whose most confident correct answer is shown
GALLERY_IMAGES, THUMBNAIL_SIDE = 24, 160


def run_view(run: RunDir, images: ImageReaders, images_reason: str | None = None) -> View:
    """Return what the page of a run shows.

    `images` has functions that decode the images of the run's dataset, by key; `images_reason` says why it is empty.
    """
    info, test, config, status = run.info, run.test(), run.config(), run.status
    name, accuracy = text(info.get("name")) or run.path.resolve().name, number(test.get("accuracy"))
    freeze = text(info.get("freeze")) or text(mapping(config.get("freeze")).get("kind")) or ""
    strategy = options("freeze").get(freeze)
    seconds = [(phase, number(value)) for phase, value in mapping(info.get("seconds")).items() if phase != "total"]
    rows: list[View] = [{**mapping(row), "name": name} for name, row in mapping(test.get("per_class")).items()]
    for row in rows:
        row["f1"], row["support"] = number(row.get("f1")), integer(row.get("support"))
        if not row["support"]:
            row["recall"] = row["f1"] = None
    view: View = {
        "run_name": name,
        "title": f"{status.capitalize() if accuracy is None else percent(accuracy)} {name}",
        "status": status,
        "info": info,
        "test": test,
        "config": config,
        "config_text": run.config_file.read_text("utf-8", "replace") if run.config_file.is_file() else "",
        "trained": strategy.part if strategy else freeze and f"freeze={freeze}",
        "matrix": _matrix(test),
        "folds": None,
        # the lowest F1 first; classes without test images come last
        "class_rows": sorted(rows, key=lambda row: (not row["support"], row["f1"] is None, row["f1"])),
        "seconds": total_seconds(info),
        "phases": {phase: value for phase, value in seconds if value is not None},
        "command": rerun_command(info),
        "left_out": integer(mapping(info.get("first_fit")).get("n_val")),
    }
    if accuracy is not None:
        support = [row["support"] or 0 for row in rows]
        is_known = len(support) > 1 and min(support) >= 0 < sum(support)
        baseline = max(support) / sum(support) if is_known else None  # of always naming the most frequent class
        view["result"] = {"accuracy": accuracy, "baseline": baseline, "interval": pair(test.get("accuracy_ci95"))}
        if interval := view["result"]["interval"]:
            alt = f"Accuracy {percent(accuracy)} and its interval on a scale from 0 to 100 %"
            draw = partial(plots.draw_interval, value=accuracy, interval=interval, baseline=baseline)
            view["result"]["chart"] = _chart("", alt, draw, (1000, 28), (0, 0, 0, 0))
    if folds := mapping(info.get("cross_validation")):
        accuracies, matrix = folds.get("fold_accuracies"), _matrix({**folds, "classes": info.get("classes")})
        view["folds"] = {**folds, "interval": pair(folds.get("accuracy_ci95")), "matrix": matrix}
        view["folds"]["accuracies"] = accuracies if isinstance(accuracies, list) else []
    view |= _training(run.metrics(), integer(mapping(info.get("best")).get("epoch")))
    return view | _predictions(run, images, images_reason)


def _chart(
    title: str, alt: str, draw: Callable[[Any], None], size: Any = (420, 262), margins: Any = (48, 14, 40, 46)
) -> View:
    light, dark = (_data_uri("image/svg+xml", image.encode()) for image in plots.svg(draw, size, margins))
    return {"title": title, "alt": alt, "light": light, "dark": dark}


def image_uri(image: Image.Image, form: str, **options: Any) -> str:
    """Return an image as a data: URI, in a format of Pillow with its options."""
    file = io.BytesIO()
    image.save(file, form, **options)
    return _data_uri(f"image/{form.lower()}", file.getvalue())


def _data_uri(media_type: str, content: bytes) -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode('ascii')}"


def _training(rows: Sequence[View], best_epoch: int | None) -> View:
    """Return loss and accuracy and the highest learning rate by epoch, the curves, and the splits that have metrics."""
    epochs: dict[int, View] = {}
    for row in rows:
        epoch, split = integer(row.get("epoch")), row.get("split")
        if epoch is not None and split in list(plots.LABELS):
            view = epochs.setdefault(epoch, {"epoch": epoch, "train": {}, "val": {}, "lr": None})
            view[split] = {key: number(row.get(key)) for key in ("loss", "accuracy")}
            rates = [rate for value in mapping(row.get("lr")).values() if (rate := number(value)) is not None]
            view["lr"] = max(rates, default=view["lr"])
    views, charts = [view for _, view in sorted(epochs.items())], []
    for key, form in (("loss", FILTERS["decimal"]), ("accuracy", percent)):
        points = {}
        for split in plots.LABELS:
            values = [(view["epoch"], view[split].get(key)) for view in views]
            points[split] = [(epoch, value) for epoch, value in values if value is not None and abs(value) < 1e100]
        if points := {split: values for split, values in points.items() if values}:
            ends = [f"{plots.LABELS[s]} from {form(v[0][1])} to {form(v[-1][1])}" for s, v in points.items()]
            marked = best_epoch if best_epoch in epochs else None
            draw = partial(plots.draw_curve, points=points, key=key, best_epoch=marked)
            charts.append(_chart(key.capitalize(), f"{key.capitalize()} by epoch: {'; '.join(ends)}", draw))
    splits = {split: label for split, label in plots.LABELS.items() if any(view[split] for view in views)}
    return {"epochs": views, "charts": charts, "splits": splits}


def _matrix(test: View) -> View | None:
    """Return the confusion matrix, shaded by the share of the row, and the pairs of classes with the most mistakes."""
    counts, classes = confusion_matrix(test), test.get("classes")
    if counts is None or not all(isinstance(name, str) for name in classes or ()):
        return None
    n, diagonal, totals = len(counts), np.eye(len(counts), dtype=bool), counts.sum(axis=1)
    shares = counts / np.maximum(totals, 1)[:, None]
    levels = np.where(counts > 0, np.clip(np.rint(np.where(diagonal, shares, 2 * shares) * 10), 1, 10), 0).astype(int)
    wrong = np.where(diagonal, 0, counts)
    order = np.argsort(-wrong, axis=None, kind="stable")[: 8 if n <= MAX_TABLE_CLASSES else 20]
    pairs = [(t, p, int(wrong[t, p]), int(totals[t])) for t, p in (divmod(int(i), n) for i in order) if wrong[t, p]]
    view: View = {"classes": classes, "pairs": pairs, "rows": [], "image": None}
    if n <= MAX_TABLE_CLASSES:
        names = np.char.add(np.where(diagonal, "d", "e"), levels.astype(str))
        view["rows"] = [list(zip(counts[t].tolist(), names[t].tolist(), strict=True)) for t in range(n)]
    else:  # one pixel per cell, transparent, so that it suits light and dark mode
        rgb = np.where(diagonal[..., None], (52, 110, 182), (200, 100, 30))
        alpha = np.where(levels > 0, 55 + 20 * levels, 0)[..., None]
        view["image"] = image_uri(Image.fromarray(np.concatenate([rgb, alpha], axis=2).astype(np.uint8)), "PNG")
    return view


def _predictions(run: RunDir, images: ImageReaders, images_reason: str | None) -> View:
    """Return the galleries and the calibration, or the reasons why there are none."""
    try:
        if not run.test_predictions.exists():
            raise UsageError("tlcli writes them since 0.3.0" if run.test_file.exists() else "this run was not tested")
        saved = read_predictions(run.test_predictions)
        logits, labels = saved.logits, saved.labels
        if not len(labels) or not logits.isfinite().all():
            raise UsageError(f"{run.test_predictions}: no finite logits in it")
    except UsageError as exc:
        reason = f"No predictions of test images: {exc}."
        return {"images_reason": reason, "calibration_reason": reason}
    temperature = number(mapping(run.info.get("calibration")).get("temperature")) or 1.0
    scale = temperature if temperature > 0 else 1.0
    p, truth = calibrated(logits, scale).numpy(), labels.numpy()
    top, predicted = torch.from_numpy(p).topk(min(2, p.shape[1]))[0].numpy(), p.argmax(axis=1)
    order, margin = np.argsort(-top[:, 0], kind="stable"), top[:, 0] - top[:, -1]  # the most confident first
    wrong, right = order[predicted[order] != truth[order]], order[predicted[order] == truth[order]]
    right = right[np.unique(truth[right], return_index=True)[1]]  # one of each class
    close = np.argsort(margin, kind="stable")[: (margin < 0.5).sum() if p.shape[1] > 1 else 0]
    loaded, reasons = None, [images_reason] if images_reason else []
    try:
        loaded = load_run(run.path) if images else None
    except TlcliError as exc:
        reasons.append(f"No heat maps: {str(exc).rstrip('.')}.")

    def gallery(order: np.ndarray, guesses: int, network: LoadedRun | None, limit: int = GALLERY_IMAGES) -> View:
        cards = []
        for i in order[:limit]:
            best = np.argsort(-p[i], kind="stable")[:guesses]
            card = {"name": saved.keys[i], "truth": saved.classes[truth[i]], "is_right": predicted[i] == truth[i]}
            card["guesses"] = [(saved.classes[k], float(p[i, k])) for k in best]
            cards.append({**card, **_thumbnails(images, saved.keys[i], network, saved.classes[predicted[i]])})
        return {"n": len(order), "cards": cards, "has_maps": any(card["map"] for card in cards)}

    view: View = {"mistakes": gallery(wrong, 1, loaded), "undecided": gallery(close, 2, None)}
    view["right"] = gallery(right, 1, loaded, MAX_SHOWN_CLASSES)
    cards = [card for name in ("mistakes", "undecided", "right") for card in view[name]["cards"]]
    if (missing := sum(card["picture"] is None for card in cards)) and images:
        reasons.append(f"{missing} of the {len(cards)} images on this page are not where they were, or do not decode.")
    view["images_reason"] = " ".join(reasons)
    if len(saved.classes) > 1:
        scales = {"scaled": scale} if scale == 1 else {"unscaled": 1.0, "scaled": scale}
        bins = {name: reliability(logits, labels, t) for name, t in scales.items()}
        draw, alt = partial(plots.draw_reliability, series=bins), "The share of right images by probability, in 15 bins"
        errors = [expected_calibration_error(logits, labels, t) for t in (1.0, scale)]
        chart = _chart("Share that was right", alt, draw, (340, 350), (48, 20, 40, 48))
        view["calibration"] = {"temperature": scale, "errors": errors, "chart": chart}
        curve, alt = risk_coverage(logits, labels, scale), "Share of errors by the share of answered images"
        draw = partial(plots.draw_risk_coverage, curve=curve["points"])
        at = [(share, *next(p[1:] for p in curve["points"] if p[0] >= share)) for share in (0.5, 0.8, 0.95)]
        view["risk"] = {
            "chart": _chart("Share of errors", alt, draw, (340, 262), (48, 20, 40, 46)),
            "at": at,
            "area": curve["area"],
        }
    return view


def _thumbnails(images: ImageReaders, key: str, network: LoadedRun | None, name: str) -> View:
    """Return an image, and its heat map for a class, as small JPEGs in data: URIs; None if there is none."""
    view: View = {"picture": None, "map": None}
    try:
        pixels = images[key]()
    except (KeyError, BadImage, OSError):
        return view
    picture = Image.fromarray(pixels)
    picture.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.LANCZOS)
    view["is_small"] = max(picture.size) < 96  # shown pixel by pixel
    options = {"quality": 95, "subsampling": 0} if view["is_small"] else {"quality": 80, "subsampling": 2}
    view["picture"] = image_uri(picture, "JPEG", optimize=True, **options)
    if network:
        with suppress(TlcliError, ValueError):  # a network without positions; a class that the checkpoint lacks
            view["map"] = image_uri(network.explain(pixels, name, THUMBNAIL_SIDE), "JPEG", optimize=True, **options)
    return view


def sweep_view(folder: Path, output: Path) -> View:
    """Return what the page of a sweep shows, for a report at `output`. Raise UsageError if the sweep has no run."""
    board = leaderboard.read(folder)
    jobs: list[View] = board["jobs"]
    if not jobs:
        raise UsageError(f"{folder}: no run in this sweep")
    metric, is_share = board["figure"].replace("_", " "), board["figure"] != "loss"
    search: View = {}
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):  # no search, or a damaged file
        search = _search_view(read_json(folder / STATE_FILE), metric, is_share)
    result = [job for job in jobs if job["name"] == search.get("best")] or [job for job in jobs if job["rank"] == 1]
    best = result[0] if result else None
    title = FILTERS["percent" if is_share else "decimal"](best["validation"]) if best else ""
    done, charts = [job for job in jobs if job["rank"] is not None], []
    for key in board["keys"]:
        having = [job for job in done if key in job["values"]]
        if points := [(printable(job["values"][key]), job["validation"], job["rank"] == 1) for job in having]:
            draw = partial(plots.draw_jobs, jobs=points, is_share=is_share)
            alt = f"Validation {metric} of {len(points)} jobs against {key}"
            charts.append(_chart(key, alt, draw, (420, 244), (48, 14, 34, 30)))
    for job in jobs:  # a link, percent-encoded, to its report, or to its directory without one
        report = folder / job["name"] / "report.html"
        target = report if report.is_file() else report.parent
        try:
            relative = Path(os.path.relpath(target.resolve(), output.resolve().parent)).as_posix()
        except ValueError:  # another drive
            relative = target.name
        job["link"] = "./" + quote(os.fsencode(relative)) + ("" if target is report else "/")
    run, is_one_run = RunDir(folder / jobs[0]["name"]), has_folds(folder)
    counted = [job for job in jobs if not is_one_run or job["name"] == REFIT]  # whose time includes that of its folds
    return {
        **board,
        "seconds": sum(job["seconds"] or 0.0 for job in counted),
        "best": best,
        "search": search,
        "run_name": folder.resolve().name,
        "title": f"{title} {folder.resolve().name}".strip(),
        "info": {} if jobs[0]["status"] == "damaged" else run.info,
        "config": run.config(),
        "metric": metric,
        "is_share": is_share,
        "n_done": sum(job["status"] == "done" for job in jobs),
        "charts": charts,
    }


def _search_view(state: View, metric: str, is_share: bool) -> View:
    """Return the history of a search and the importance of its keys, from tune.json."""
    trials = [(int(trial["name"]), float(trial["value"])) for trial in state["trials"] if trial["value"] is not None]
    shares = {str(key): float(share) for key, share in state["importances"].items()}
    draw, alt = partial(plots.draw_history, trials=trials, is_share=is_share), f"Validation {metric} of each trial"
    charts = [_chart("History", alt, draw, (420, 244), (48, 14, 34, 40))] if trials else []
    if shares:
        alt = f"Shares: {', '.join(f'{key} {share:.0%}' for key, share in shares.items())}"
        draw = partial(plots.draw_importances, shares=shares)
        charts.append(_chart("Importance", alt, draw, (420, 34 * len(shares) + 60), (190, 20, 20, 30)))
    return {"n_trials": len(trials), "charts": charts, "best": state["best"], "command": state["command"]}


def tolerant(form: Callable[..., str]) -> Callable[..., str]:
    """Return a filter that shows a number in a form, and anything else as a dash."""
    return lambda value, *args: "\N{EN DASH}" if number(value) is None else form(value, *args)


percent = tolerant(lambda share, digits=1: f"{100 * share:.{digits}f}\N{NO-BREAK SPACE}%")
FILTERS: dict[str, Callable[..., str]] = {
    "percent": percent,
    "count": tolerant(lambda n: f"{n:,.0f}"),
    "decimal": tolerant(lambda value, form=".3f": f"{value:{form}}"),
    "seconds": tolerant(duration_text),
    "folder_name": lambda path: re.split(r"[/\\]", str(path).rstrip("/\\"))[-1],  # of Windows, too
}


def printable(value: Any) -> Any:
    """Return text without what no HTML or SVG file may contain: lone surrogates of file names, control characters."""
    if isinstance(value, Markup):
        return value
    pattern = "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]"
    return re.sub(pattern, "\N{REPLACEMENT CHARACTER}", str(value))


PAGES = Environment(
    loader=FileSystemLoader(TEMPLATES),
    autoescape=True,
    undefined=ChainableUndefined,
    finalize=printable,
    trim_blocks=True,
    lstrip_blocks=True,
)
PAGES.filters.update(FILTERS)


def render(template: str, view: View, generator: str = GENERATOR, script: str | None = None) -> str:
    """Return the HTML of a page; every value of the view is escaped. `script` names a file beside the template."""
    parts = {"style": "style.css"} | ({"script": script} if script else {})
    head: View = {"generator": f"{generator} {__version__}", "script": ""}
    for part, name in parts.items():
        content = (TEMPLATES / name).read_text(encoding="utf-8")
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()  # CSP Level 3, 2.3.1
        head |= {part: Markup(content), f"{part}_digest": f"sha256-{digest}"}
    return PAGES.get_template(template).render(view, **head)
