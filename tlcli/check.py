"""Checks a dataset before anything is trained on it: undecodable files, duplicates, labels, class balance."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from msgspec import structs
from torch import Tensor, nn

from tlcli import __version__
from tlcli.data.augment import AugmentNoneSpec
from tlcli.data.dataset import Dataset
from tlcli.data.duplicates import (
    ConcatSplits,
    connected_components,
    cross_split_duplicates,
    exact_duplicates,
    label_conflicts,
    near_duplicates,
)
from tlcli.data.images import Ints
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
MAX_IMBALANCE = 3.0
"""Ratio of the largest to the smallest class in train from which the balance is reported."""
MIN_CLASS_IMAGES = 10
"""Training images of a class below which its metrics are mostly chance."""

Floats = np.ndarray[tuple[int, ...], np.dtype[np.float32]]


@dataclass(frozen=True, eq=False)
class NearDuplicates:
    """Positions of images that are one; `similarity` is the lowest correlation of the pairs that connect them."""

    members: tuple[int, ...]
    similarity: float


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
    """What a check found.

    Groups of `exact` have the same content; groups of `near` include their exact copies. `network_reason` says why
    nothing ran on the network: then `near` is empty and `labels` None. `seconds` are by part.
    """

    spec: TrainSpec
    data: Dataset
    images: ConcatSplits
    problems: Sequence[str] = ()
    exact: Sequence[Sequence[int]] = ()
    near: Sequence[NearDuplicates] = ()
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
        findings.exact = exact_duplicates(images, reporter)
    if quick:
        findings.network_reason = "left out (--quick)"
        return findings
    with findings.timed("features"):
        inputs = _features(findings, accelerator, reporter, session)
    if inputs is None:
        findings.network_reason = "the head of this network is not one linear layer, so there are no features"
        return findings
    with findings.timed("near duplicates"):
        findings.near = _near_groups(images, findings.exact, inputs, reporter)
    with findings.timed("labels"), reporter.track("labels", len(images)) as advance:
        copies = [*findings.exact, *(group.members for group in findings.near)]
        groups = connected_components((group[0], i) for group in copies for i in group[1:])
        findings.labels = check_labels(
            inputs, images.labels, len(data.classes), groups, seed=spec.seed, advance=advance
        )
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


def _near_groups(
    images: ConcatSplits, exact: Sequence[Sequence[int]], inputs: Tensor, reporter: Reporter
) -> list[NearDuplicates]:
    """Return groups of near duplicates. Of exact copies, one is compared."""
    copies = {group[0]: group for group in exact}
    repeated = {i for group in exact for i in group[1:]}
    positions = [i for i in range(len(images)) if i not in repeated]
    pairs = list(near_duplicates(images, positions, inputs[positions].float().numpy(), reporter))
    groups = []
    for group in connected_components((i, j) for i, j, _ in pairs):
        similarity = min(value for i, _, value in pairs if i in set(group))
        groups.append(NearDuplicates(tuple(sorted(k for i in group for k in copies.get(i, [i]))), similarity))
    return groups


def check_labels(
    inputs: Tensor,
    labels: Ints,
    n_classes: int,
    groups: Sequence[Sequence[int]],
    *,
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
    near = [group.members for group in findings.near]
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
        "exact": _count_duplicates(images, findings.exact),
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
            yield (
                "fix",
                (
                    f"{n:,} of {split} also in {others}, byte for byte: the accuracy on {split} is too high; "
                    "remove them from one of the splits (duplicates.csv)"
                ),
            )
        if n := near[key]:
            yield (
                "look",
                (
                    f"{n:,} of {split} with a near duplicate in {others} (contact_sheet.png): if it is the same image, "
                    "remove one"
                ),
            )
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
        balanced = findings.spec.class_weights is ClassWeights.balanced
        weights = "" if balanced else "train with class_weights=balanced, and "
        yield (
            "note",
            (
                f"train has {summary['imbalance']:.1f} times as many images of {largest} as of {smallest}: {weights}"
                "select by macro F1 (keep_best=macro_f1)"
            ),
        )
    if few := [f"{name} ({n})" for name, n in in_train.items() if n < MIN_CLASS_IMAGES]:
        yield (
            "note",
            (
                f"fewer than {MIN_CLASS_IMAGES} training images of {join_limited(few)}: their metrics are mostly "
                "chance; add images"
            ),
        )
    for split in ("val", "test"):
        if absent := [name for name, n in counts[split].items() if n == 0]:
            yield "note", f"{split} has no images of {join_limited(absent)}"
