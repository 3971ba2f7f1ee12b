"""Checks a dataset before anything is trained on it: undecodable files, duplicates, labels, class balance."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from msgspec import structs
from PIL import Image
from torch import Tensor, nn

from tlcli import __version__
from tlcli.data.augment import AugmentNoneSpec
from tlcli.data.dataset import Dataset
from tlcli.data.decode import Pixels
from tlcli.data.images import (
    ConcatSplits,
    Ints,
    cross_split_duplicates,
    exact_duplicates,
    label_conflicts,
    map_in_threads,
)
from tlcli.device import setup_process
from tlcli.engine.activations import Workload, image_size
from tlcli.engine.decisions import decide
from tlcli.engine.inputs import Inputs
from tlcli.engine.metrics import features
from tlcli.engine.session import Session
from tlcli.reporter import Reporter
from tlcli.specs import ClassWeights, HeadInit, OnBad, TrainSpec
from tlcli.text import join_limited
from tlcli.transfer.contract import apply_freeze, fit_probe, linear_head
from tlcli.transfer.freeze import HeadSpec

SCHEMA_VERSION = 2
FOLDS = 5
MAX_IMBALANCE = 3.0  # ratio of the largest to the smallest class in train from which the balance is reported
MIN_CLASS_IMAGES = 10  # training images of a class below which its metrics are mostly chance
THUMBNAIL_SIDE = 32
NEIGHBORS = 10
"""Nearest neighbors per image whose thumbnails are compared. Larger groups are found through their chains."""
MAX_RESIDUAL, MIN_CORRELATION = 2.5, 0.95
"""Two thumbnails are one image if, after the best linear change of brightness and contrast, their gray values differ by
at most this root mean square. Copies (half and a third of the size, 1.5 times, JPEG of quality 25) of brain scans,
aerial images and textures had 0.4 to 1.1 in the median and below 2.5 in 99 %; neighboring slices of a scan 3.3 or more.
The correlation keeps plain images apart, which differ by little whatever they show."""

Floats = np.ndarray[tuple[int, ...], np.dtype[np.float32]]


@dataclass(frozen=True, eq=False)
class LabelCheck:
    """Labels that are likely wrong.

    `suspects` are positions of images that a probe takes for another class, the most likely wrong first. Of each image
    `suggested` is that class, and `likely` is True if the image counts as one of it. `probabilities` (N, classes) are
    out-of-fold, `thresholds` (classes).
    """

    suspects: Ints
    suggested: Ints
    likely: np.ndarray[Any, np.dtype[np.bool_]]
    probabilities: Floats
    thresholds: Floats


@dataclass(eq=False)
class Findings:
    """The findings of a check.

    `duplicates` are (exact or near, similarity, positions): exact ones have the same content, near ones include exact
    copies, and their similarity is the lowest correlation of the pairs that connect them. `network_reason` says why
    nothing ran on the network: then there are no near duplicates and `labels` is None. `seconds` are by part.
    """

    spec: TrainSpec
    data: Dataset
    images: ConcatSplits
    problems: Sequence[str] = ()
    duplicates: list[tuple[str, float, list[int]]] = field(default_factory=list)
    labels: LabelCheck | None = None
    network_reason: str | None = None
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The dataset's name, and the name of its folder if it has one."""
        root = self.spec.dataset.root
        return f"{self.data.name} {Path(root).name}" if root else self.data.name

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the seconds of the block to those of this part."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] = round(self.seconds.get(part, 0.0) + time.perf_counter() - start, 3)


def check_data(spec: TrainSpec, reporter: Reporter, session: Session, *, quick: bool) -> Findings:
    """Check every image of the dataset of a spec. The data is not changed. Raise UsageError if it is unusable.

    Args:
        quick: run no network, so find neither near duplicates nor wrong labels.
    """
    start = time.perf_counter()
    accelerator = setup_process(spec.device)
    dataset, problems = spec.dataset.without_bad_classes()
    spec = structs.replace(
        spec,
        dataset=structs.replace(dataset, on_bad=OnBad.skip),
        freeze=HeadSpec(bn_stats=spec.freeze.bn_stats, head_init=HeadInit.random),
        augment=AugmentNoneSpec(erasing=0.0),
    )
    data = session.dataset(spec.dataset, spec.seed, reporter)
    images = ConcatSplits({"train": data.train, "val": data.val, "test": data.test})
    findings = Findings(spec, data, images, problems)
    findings.seconds["reading"] = round(time.perf_counter() - start, 3)
    with findings.timed("exact duplicates"):
        exact = exact_duplicates(images, reporter)
        findings.duplicates = [("exact", 1.0, group) for group in exact]
    if quick:
        findings.network_reason = "left out (--quick)"
        return findings
    with findings.timed("features"):
        inputs = _features(findings, accelerator, reporter, session)
    if inputs is None:
        findings.network_reason = "the head of this network is not one linear layer, so there are no features"
        return findings
    with findings.timed("near duplicates"):
        repeated = {i for group in exact for i in group[1:]}  # of exact copies, one is compared
        positions = [i for i in range(len(images)) if i not in repeated]
        pairs = list(near_duplicates(images, positions, inputs[positions].float().numpy(), reporter))
        copies = {group[0]: group for group in exact}
        for group in connected_components((i, j) for i, j, _ in pairs):
            similarity = min(value for i, _, value in pairs if i in set(group))
            findings.duplicates.append(("near", similarity, sorted(k for i in group for k in copies.get(i, [i]))))
    with findings.timed("labels"), reporter.track("labels", len(images)) as advance:
        groups = connected_components((group[0], i) for _, _, group in findings.duplicates for i in group[1:])
        findings.labels = check_labels(inputs, images.labels, len(data.classes), groups, spec.seed, advance)
    return findings


def _features(findings: Findings, accelerator: torch.device, reporter: Reporter, session: Session) -> Tensor | None:
    """Return the input of the head for each image, in order; None if the head is not one linear layer."""
    spec, data = findings.spec, findings.data
    classifier = session.model(spec.backbone, data.classes, size=image_size(spec), seed=spec.seed)
    if not classifier.pretrained:
        findings.notes.append("the features are of random weights: they say little about labels")
    head = linear_head(classifier)
    if head is None:
        return None
    classifier.network.to(accelerator)
    contract = apply_freeze(spec.freeze, classifier)
    workload = Workload(data, classifier, contract, spec, accelerator, session, needs_probe=True)
    inputs = Inputs(decide(workload), workload)
    inputs.device.place(classifier.network)
    loaders = [inputs.open(name, reporter) for name in ("train_eval", "val", "test")]
    return torch.cat([features(classifier.network, head, x, inputs.device, reporter, "features")[0] for x in loaders])


def near_duplicates(
    images: ConcatSplits, positions: Sequence[int], features: np.ndarray[Any, np.dtype[np.float32]], reporter: Reporter
) -> Iterator[tuple[int, int, float]]:
    """Yield (i, j, correlation of the thumbnails) of near duplicates among images at `positions`, i < j.

    They are one image in another size, format, compression or brightness. Raise BadImagesError for an unreadable file.

    Args:
        features: of the backbone for these images, (N, D).
    """
    from sklearn.neighbors import NearestNeighbors

    if len(positions) < 2:
        return
    centered = features - features.mean(axis=0)
    unit = centered / np.maximum(np.linalg.norm(centered, axis=1, keepdims=True), 1e-12)
    search = NearestNeighbors(n_neighbors=min(NEIGHBORS + 1, len(positions)), algorithm="brute").fit(unit)
    neighbors = search.kneighbors(return_distance=False, n_neighbors=min(NEIGHBORS, len(positions) - 1))
    thumbnails = []
    with reporter.track("comparing", len(positions)) as advance:
        for thumbnail in map_in_threads(lambda i: _thumbnail(images.read(i)), positions, 16):
            thumbnails.append(thumbnail)
            advance(1)
    gray = np.stack(thumbnails) - np.mean(thumbnails, axis=1, keepdims=True)
    contrast = np.sqrt((gray**2).mean(axis=1))
    pairs = {(min(i, j), max(i, j)) for i, row in enumerate(neighbors.tolist()) for j in row}
    for i, j in sorted(pairs):
        high = max(float(contrast[i]), float(contrast[j]))
        correlation = float((gray[i] * gray[j]).mean() / max(float(contrast[i] * contrast[j]), 1e-6))
        if correlation >= MIN_CORRELATION and (1 - min(1.0, correlation) ** 2) * high**2 <= MAX_RESIDUAL**2:
            yield (*sorted((positions[i], positions[j])), min(1.0, correlation))


def _thumbnail(image: Pixels) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return the gray values of a small square, (1024)."""
    gray = Image.fromarray(image).convert("L")
    small = gray.resize((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.BILINEAR, reducing_gap=3)
    return np.asarray(small, dtype=np.float32).ravel()


def connected_components(pairs: Iterable[tuple[int, int]]) -> list[list[int]]:
    """Return groups of positions that are connected by pairs, each ascending, in the order of their first members."""
    group_of: dict[int, list[int]] = {}
    for i, j in pairs:
        merged = {*group_of.get(i, [i]), *group_of.get(j, [j])}
        group = sorted(merged)
        group_of.update(dict.fromkeys(group, group))
    return sorted({id(group): group for group in group_of.values()}.values())


def check_labels(
    inputs: Tensor,
    labels: Ints,
    n_classes: int,
    groups: Sequence[Sequence[int]],
    seed: int,
    advance: Callable[[int], None] = lambda images: None,
) -> LabelCheck:
    """Return the labels (N) that a linear probe on features (N, D), fitted to other images, finds likely wrong.

    This is confident learning (Northcutt, Jiang and Chuang 2021): out-of-fold probabilities, and per class the mean
    probability of its own images as the threshold above which an image counts as one of it. Suspects are ranked by the
    probability of their label, lowest first. (On 5,000 images of CIFAR-10 with 50 and 250 labels changed this found 35
    in the first 100 and 220 in the first 500; the normalized margin found 26 and 194.)

    Args:
        groups: of duplicates. Each is in one fold: else a copy with the same wrong label would confirm it.
    """
    folds = np.empty(len(labels), dtype=np.int64)
    random = np.random.default_rng([seed, FOLDS])
    for label in np.unique(labels):
        members = random.permutation(np.flatnonzero(labels == label))
        folds[members] = (np.arange(len(members)) + random.integers(FOLDS)) % FOLDS
    for group in groups:
        folds[list(group)] = folds[group[0]]
    probabilities = np.zeros((len(labels), n_classes), dtype=np.float32)
    for fold in np.unique(folds):
        held, rest = np.flatnonzero(folds == fold), np.flatnonzero(folds != fold)
        present, relabeled = np.unique(labels[rest], return_inverse=True)
        if len(present) > 1:
            probe = nn.Linear(inputs.shape[1], len(present))
            fit_probe(probe, inputs[rest], torch.from_numpy(relabeled))
            with torch.inference_mode():
                probabilities[np.ix_(held, present)] = torch.softmax(probe(inputs[held]), dim=1).numpy()
        advance(len(held))
    rows = np.arange(len(labels))
    given = probabilities[rows, labels]
    counts = np.bincount(labels, minlength=n_classes)
    sums = np.bincount(labels, weights=given, minlength=n_classes)
    thresholds = np.where(counts > 0, sums / np.maximum(counts, 1), 1).astype(np.float32)
    others = probabilities.copy()
    others[rows, labels] = -1
    suggested = others.argmax(axis=1)
    above = probabilities >= thresholds
    likely = above.any(axis=1) & (np.where(above, probabilities, -1).argmax(axis=1) != labels)
    suspects = np.flatnonzero(given < others[rows, suggested])
    suspects = suspects[np.argsort(given[suspects], kind="stable")]
    return LabelCheck(suspects, suggested, likely, probabilities, thresholds)


# -- summary ----------------------------------------------------------------------------------------------------------


def summarize(findings: Findings) -> dict[str, Any]:
    """Return all metrics as plain data; `verdicts` has what to do, as [kind, text]: fix, look or note."""
    images, data, reason = findings.images, findings.data, findings.network_reason
    counts = {
        name: dict(zip(data.classes, split.class_counts(len(data.classes)), strict=True))
        for name, split in images.splits.items()
    }
    exact, near = ([group for kind, _, group in findings.duplicates if kind == wanted] for wanted in ("exact", "near"))
    checked: dict[str, Any] = {"checked": reason is None} | ({} if reason is None else {"why": reason})
    labels = dict(checked)
    if (check := findings.labels) is not None:
        labels |= {
            "folds": FOLDS,
            "agreement": round(float((check.probabilities.argmax(axis=1) == images.labels).mean()), 4),
            "suspects": len(check.suspects),
            "likely_wrong": int(check.likely[check.suspects].sum()),
            "thresholds": {c: round(float(t), 4) for c, t in zip(data.classes, check.thresholds, strict=True)},
        }
    in_train = counts["train"].values()
    summary: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "tlcli": __version__,
        "dataset": findings.name,
        "backbone": findings.spec.backbone.name,
        "n_images": len(images),
        "classes": list(data.classes),
        "counts": counts,
        "imbalance": round(max(in_train) / max(1, min(in_train)), 2),
        "n_bad_files": len(data.bad_files),
        "layout": list(findings.problems),
        "exact": _count_duplicates(images, exact),
        "near": _count_duplicates(images, near) | checked,
        "labels": labels,
        "notes": [*data.notes, *findings.notes],
        "seconds": {**findings.seconds, "total": round(sum(findings.seconds.values()), 3)},
    }
    return {"verdicts": [list(verdict) for verdict in _verdicts(findings, summary)], **summary}


def _count_duplicates(images: ConcatSplits, groups: Sequence[Sequence[int]]) -> dict[str, Any]:
    in_train = [sum(images.split_names[i] == "train" for i in group) for group in groups]
    return {
        "groups": len(groups),
        "images": sum(map(len, groups)),
        "test_in_train_or_val": len(cross_split_duplicates(images, groups, "test", ("train", "val"))),
        "val_in_train": len(cross_split_duplicates(images, groups, "val", ("train",))),
        "extra_in_train": sum(max(0, n - 1) for n in in_train),
        "several_labels": len(label_conflicts(images, groups)),
    }


def _verdicts(findings: Findings, summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield what to do, the most important first."""
    exact, near, labels, counts = (summary[key] for key in ("exact", "near", "labels", "counts"))
    yield from (("fix", text) for text in summary["layout"])
    if summary["layout"]:
        yield "note", f"the rest of this check is about the other {len(summary['classes'])} classes"
    if n := summary["n_bad_files"]:
        yield "fix", f"{n:,} of the files do not decode: see bad_files.csv; replace or remove them"
    for split, key, others in (("test", "test_in_train_or_val", "train or val"), ("val", "val_in_train", "train")):
        if n := exact[key]:
            text = f"{n:,} of {split} also in {others}, byte for byte: the accuracy on {split} is too high; "
            yield "fix", text + "remove them from one of the splits (duplicates.csv)"
        if n := near[key]:
            text = f"{n:,} of {split} with a near duplicate in {others} (contact_sheet.png)"
            yield "look", f"{text}: if it is the same image, remove one"
    if n := exact["several_labels"]:
        yield "fix", f"{n:,} groups of exact duplicates have several labels: at most one is right (duplicates.csv)"
    if n := near["several_labels"]:
        yield "look", f"{n:,} groups of near duplicates have several labels"
    if n := exact["extra_in_train"]:
        yield "note", f"{n:,} of train are exact copies of others there, and count twice in training"
    if n := labels.get("suspects", 0):
        text = f"{n:,} labels differ from the prediction of a probe, {labels['likely_wrong']:,} of them clearly: check "
        text += "contact_sheet.png and labels.csv, most likely wrong first"
        if labels["agreement"] < 0.9:
            text += f"; the probe agrees with {labels['agreement']:.0%} of all labels, so many of these are only hard"
        yield "look", text
    in_train: Mapping[str, int] = counts["train"]
    if summary["imbalance"] >= MAX_IMBALANCE:
        largest, smallest = (choose(in_train, key=in_train.__getitem__) for choose in (max, min))
        text = f"train has {summary['imbalance']:.1f} times as many images of {largest} as of {smallest}: "
        if findings.spec.class_weights is not ClassWeights.balanced:
            text += "train with class_weights=balanced, and "
        yield "note", text + "select by macro F1 (keep_best=macro_f1)"
    if few := [f"{name} ({n})" for name, n in in_train.items() if n < MIN_CLASS_IMAGES]:
        text = f"fewer than {MIN_CLASS_IMAGES} training images of {join_limited(few)}"
        yield "note", f"{text}: their metrics are mostly chance; add images"
