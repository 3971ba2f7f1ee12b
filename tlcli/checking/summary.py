"""What a check comes to: figures for programs, and for people lines that say what to do."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tlcli import __version__
from tlcli.checking.check import Findings
from tlcli.checking.labels import FOLDS
from tlcli.data.duplicates import conflicting, leaked
from tlcli.data.together import ConcatSplits
from tlcli.specs import ClassWeights

SCHEMA_VERSION = 1
UNEVEN = 3.0
"""Times as many training images in the largest class as in the smallest, from which the balance is worth a line."""
FEW = 10
"""Training images of a class below which its figures are mostly chance."""
SPLITS = ("train", "val", "test")


def summarise(found: Findings) -> dict[str, Any]:
    """All figures as plain data; `verdicts` has what to do, as [kind, line]: fix, look or note."""
    images, data = found.images, found.data
    counts = {
        name: dict(zip(data.classes, split.class_counts(len(data.classes)), strict=True))
        for name, split in images.splits.items()
    }
    near = [one.members for one in found.near]
    summary: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "tlcli": __version__,
        "dataset": found.name,
        "backbone": found.spec.backbone.name,
        "n_images": len(images),
        "classes": list(data.classes),
        "counts": counts,
        "imbalance": round(_imbalance(counts["train"]), 2),
        "sizes": _sizes(found),
        "formats": _tally([one.format for one in found.headers]),
        "modes": _tally([one.mode for one in found.headers]),
        "n_bad_files": len(data.bad_files),
        "ignored_files": dict(found.layout.ignored) if found.layout else {},
        "layout": list(found.layout.problems) if found.layout else [],
        "exact": _duplicates(images, found.exact),
        "near": {**_duplicates(images, near), "not_compared": found.not_compared},
        "labels": _labels(found),
        "notes": [*data.notes, *found.notes],
        "seconds": {**found.seconds, "total": round(sum(found.seconds.values()), 3)},
    }
    return {"verdicts": [list(verdict) for verdict in _verdicts(found, summary)], **summary}


# -- figures


def _imbalance(in_train: Mapping[str, int]) -> float:
    """How many times as many training images the largest class has as the smallest."""
    return max(in_train.values()) / max(1, min(in_train.values()))


def _tally(values: Sequence[str]) -> dict[str, int]:
    """How often each value is there, the most frequent first."""
    return dict(Counter(values).most_common())


def _sizes(found: Findings) -> dict[str, Any]:
    """Pixels; `smaller` counts images whose shorter side is below that of what the network takes."""
    sides = np.array([(one.width, one.height) for one in found.headers])
    return {
        **{
            name: {"min": int(side.min()), "median": float(np.median(side)), "max": int(side.max())}
            for name, side in (("width", sides[:, 0]), ("height", sides[:, 1]))
        },
        "network": found.size,
        "smaller": int((sides.min(axis=1) < found.size).sum()),
    }


def _duplicates(images: ConcatSplits, groups: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Counts of groups, of images in them, of those of one split that are in others, of groups with several labels."""
    return {
        "groups": len(groups),
        "images": sum(map(len, groups)),
        "test_in_train_or_val": len(leaked(images, groups, "test", ("train", "val"))),
        "val_in_train": len(leaked(images, groups, "val", ("train",))),
        "extra_in_train": sum(max(0, sum(images.where[i] == "train" for i in group) - 1) for group in groups),
        "several_labels": len(conflicting(images, groups)),
    }


def _labels(found: Findings) -> dict[str, Any]:
    if found.labels is None:
        return {"checked": False, "why": found.why_no_labels}
    check = found.labels
    return {
        "checked": True,
        "folds": FOLDS,
        "agreement": round(check.agreement(found.images.labels), 4),
        "suspects": len(check.suspects),
        "likely_wrong": int(check.likely[check.suspects].sum()),
        "thresholds": {c: round(float(t), 4) for c, t in zip(found.data.classes, check.thresholds, strict=True)},
    }


# -- words


def _verdicts(found: Findings, summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What to do, the most important first."""
    yield from (("fix", line) for line in summary["layout"])
    if found.layout and found.layout.classes is not None:
        yield "note", f"what follows is about the other {_n(len(found.data.classes), 'class', 'classes')}"
    if n := summary["n_bad_files"]:
        yield "fix", f"{_n(n, 'file does', 'files do')} not decode: see bad_files.csv; replace or remove them"
    yield from _about_duplicates(summary)
    yield from _about_labels(summary["labels"])
    yield from _about_classes(found, summary)
    yield from _about_files(summary)


def _about_duplicates(summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    exact, near = summary["exact"], summary["near"]
    for split, key, others in (("test", "test_in_train_or_val", "train or val"), ("val", "val_in_train", "train")):
        if n := exact[key]:
            yield (
                "fix",
                f"{_n(n, 'image')} of {split} {_is(n)} also in {others}, byte for byte: the accuracy on {split} is too "
                "high; remove them on one side (duplicates.csv)",
            )
        if n := near[key]:
            yield (
                "look",
                f"{_n(n, 'image')} of {split} {'has' if n == 1 else 'have'} a near duplicate in {others} "
                "(duplicates.png): where it is the same picture, remove one",
            )
    if n := exact["several_labels"]:
        yield "fix", f"{_n(n, 'picture')} {_is(n)} there with several labels: at most one is right (duplicates.csv)"
    if n := near["several_labels"]:
        yield "look", f"{_n(n, 'group')} of near duplicates {'has' if n == 1 else 'have'} several labels"
    if n := exact["extra_in_train"]:
        yield "note", f"{_n(n, 'image')} of train {_is(n)} an exact copy of another there, and counts twice in training"


def _about_labels(labels: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if labels["checked"] and (n := labels["suspects"]):
        likely, agreement = labels["likely_wrong"], labels["agreement"]
        differ = "differs" if n == 1 else "differ"
        text = f"{_n(n, 'label')} {differ} from what a probe sees, {likely:,} of them clearly: "
        text += "look at contact_sheet.png and labels.csv, where the likeliest wrong come first"
        if agreement < 0.9:
            text += f"; it agrees with {agreement:.0%} of all labels, so that many of these are right and only hard"
        yield "look", text


def _about_classes(found: Findings, summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    in_train = summary["counts"]["train"]
    if summary["imbalance"] >= UNEVEN:
        most, least = (by(in_train, key=in_train.__getitem__) for by in (max, min))
        weights = "" if found.spec.class_weights is ClassWeights.balanced else "train with class_weights=balanced, and "
        yield (
            "note",
            f"train has {summary['imbalance']:.1f} times as many images of {most} as of {least}: {weights}judge by "
            "macro F1 (keep_best=macro_f1)",
        )
    if few := [f"{name} ({n})" for name, n in in_train.items() if n < FEW]:
        yield "note", f"fewer than {FEW} training images of {_some(few)}: their figures are mostly chance; add some"
    for split in ("val", "test"):
        if none := [name for name, n in summary["counts"][split].items() if n == 0]:
            yield "note", f"{split} has no images of {_some(none)}"


def _about_files(summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    sizes, n = summary["sizes"], summary["sizes"]["smaller"]
    if 2 * n > summary["n_images"]:
        yield (
            "note",
            f"{n:,} of {summary['n_images']:,} images are smaller than the {sizes['network']} px that "
            f"{summary['backbone']} takes: a smaller image.size trains faster and may do as well",
        )
    if ignored := summary["ignored_files"]:
        kinds = _some([f"{kind} ({n})" for kind, n in sorted(ignored.items(), key=lambda item: -item[1])])
        yield "note", f"{_n(sum(ignored.values()), 'file is', 'files are')} no image by name and left out: {kinds}"
    if n := summary["near"]["not_compared"]:
        yield "note", f"{_n(n, 'image is', 'images are')} too small or too plain to have near duplicates told"


def _some(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _n(n: int, one: str, many: str | None = None) -> str:
    return f"{n:,} {one if n == 1 else many or one + 's'}"


def _is(n: int) -> str:
    return "is" if n == 1 else "are"
