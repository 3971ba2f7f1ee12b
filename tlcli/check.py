"""Checks a dataset before anything is trained on it: undecodable files, duplicates, labels, class balance."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from msgspec import structs
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn

from tlcli import __version__
from tlcli.data.augment import AugmentNoneSpec
from tlcli.data.dataset import Dataset
from tlcli.data.images import ConcatSplits, Ints, positions_by_class, tracked_map
from tlcli.device import setup_process
from tlcli.engine.activations import load_workload
from tlcli.engine.decisions import decide
from tlcli.engine.inputs import Inputs
from tlcli.engine.metrics import features
from tlcli.engine.session import Session
from tlcli.files import write_csv
from tlcli.reporter import Reporter
from tlcli.runs.plots import draw_sheet
from tlcli.runs.run_dir import write_json
from tlcli.specs import HeadInit, OnBad, TrainSpec
from tlcli.text import join_limited
from tlcli.transfer.contract import linear_head
from tlcli.transfer.freeze import HeadSpec
from tlcli.transfer.probe import fit_probe

SCHEMA_VERSION = 2
FOLDS = 5
MAX_IMBALANCE = 3.0  # ratio of the largest to the smallest class in train from which the balance is reported
MIN_CLASS_IMAGES = 10  # training images of a class below which its metrics are mostly chance
THUMBNAIL_SIDE = 32
NEIGHBORS = 10  # nearest neighbors per image whose thumbnails are compared; larger groups are found through chains
MAX_RESIDUAL, MIN_CORRELATION = 2.5, 0.95
"""Limits for two thumbnails of one image: the root mean square difference of gray values after the best linear change
of brightness and contrast (copies in another size or quality had 2.5 or less in 99 %, neighboring slices of a scan 3.3
or more), and the correlation, which keeps plain images apart."""

MAX_GROUPS, MAX_SUSPECTS = 12, 30  # on the contact sheet
CELLS_PER_ROW = 5

Floats = np.ndarray[tuple[int, ...], np.dtype[np.float32]]
Table = list[Sequence[object]]
Duplicates = tuple[str, float, list[int]]  # exact or near, the lowest correlation of connecting pairs, positions
Suspect = tuple[int, int, float, float, bool]  # position, suggested class, its own and that one's probability, likely


def check_data(spec: TrainSpec, reporter: Reporter, session: Session, folder: Path, *, quick: bool) -> dict[str, Any]:
    """Check every image of a dataset, write the findings into a folder and return the summary, or raise UsageError.

    With `quick` no network runs, so neither near duplicates nor wrong labels are found.
    """
    start, seconds = time.perf_counter(), dict[str, float]()

    def lap(part: str) -> None:
        seconds[part] = time.perf_counter() - start - sum(seconds.values())

    accelerator = setup_process(spec.device)
    dataset, problems = spec.dataset.without_bad_classes()
    spec = structs.replace(spec, dataset=structs.replace(dataset, on_bad=OnBad.skip))
    data = session.dataset(spec.dataset, spec.seed, reporter)
    images = ConcatSplits(data.splits)
    lap("reading")
    first = images.first_copies(reporter)
    lap("exact duplicates")
    notes, near = list(data.notes), list[tuple[float, list[int]]]()
    suspects, labels = list[Suspect](), dict[str, Any]()
    inputs = None if quick else _features(spec, data, accelerator, session, reporter, notes)
    checked: dict[str, Any] = {"checked": inputs is not None}
    if inputs is None:
        no_features = "the head of this network is not one linear layer, so there are no features"
        checked["why"] = "left out (--quick)" if quick else no_features
    else:
        lap("features")
        near, group_of = near_duplicates(images, first, inputs.numpy(), reporter)
        lap("near duplicates")
        suspects, labels = check_labels(inputs, images.labels, data.classes, group_of, spec.seed, reporter)
        lap("labels")
    copies = (group.tolist() for group in positions_by_class(first, len(images)))
    duplicates = [("exact", 1.0, group) for group in copies if len(group) > 1]
    duplicates += [("near", *group) for group in near]
    near_first = np.arange(len(images))
    for _, group in near:
        near_first[group] = group[0]
    _write_files(folder, images, data, duplicates, suspects)
    lap("contact sheet")
    by_split = {name: split.class_counts(len(data.classes)) for name, split in images.splits.items()}
    summary = {
        "schema_version": SCHEMA_VERSION,
        "tlcli": __version__,
        "dataset": spec.dataset.title,
        "backbone": spec.backbone.name,
        "n_images": len(images),
        "classes": list(data.classes),
        "counts": {name: dict(zip(data.classes, counts, strict=True)) for name, counts in by_split.items()},
        "imbalance": round(max(by_split["train"]) / max(1, min(by_split["train"])), 2),
        "n_bad_files": len(data.bad_files),
        "layout": list(problems),
        "exact": _count_duplicates(images, first),
        "near": _count_duplicates(images, near_first) | checked,
        "labels": checked | labels,
        "notes": notes,
        "seconds": {part: round(s, 3) for part, s in {**seconds, "total": sum(seconds.values())}.items()},
        "output": str(folder),
    }
    summary = {"verdicts": list(_verdicts(summary)), **summary}
    write_json(folder / "summary.json", summary)
    return summary


def _features(
    spec: TrainSpec, data: Dataset, accelerator: torch.device, session: Session, reporter: Reporter, notes: list[str]
) -> Tensor | None:
    """Return the input (N, D) of the head, in order; None if it is not one linear layer."""
    freeze = HeadSpec(bn_stats=spec.freeze.bn_stats, head_init=HeadInit.random)
    spec = structs.replace(spec, freeze=freeze, augment=AugmentNoneSpec(erasing=0.0, mixup=0.0, cutmix=0.0))
    workload = replace(load_workload(spec, data, accelerator, session), needs_probe=True)
    classifier = workload.classifier
    if not classifier.pretrained:
        notes.append("the features are of random weights: they say little about labels")
    if linear_head(classifier) is None:
        return None
    inputs = Inputs(decide(workload), workload)
    inputs.device.place(classifier.network)
    names = [name for name in ("train_eval", "val", "test") if len(workload.split(name))]
    loaders = [inputs.open(name, reporter) for name in names]
    return torch.cat([features(inputs, x, reporter, "features")[0] for x in loaders])


def near_duplicates(
    images: ConcatSplits, first: Ints, features: Floats, reporter: Reporter
) -> tuple[list[tuple[float, list[int]]], Ints]:
    """Find images that are one image in another size, format, compression or brightness, by features (N, D).

    Only the first of several exact copies is compared; `first` (N) has its position. Return the lowest correlation and
    the positions of each group, with exact copies; and for each image (N) the number of its group of near or exact
    duplicates. Raise BadImagesError.
    """
    n = len(images)
    pairs, correlations = _near_pairs(images, np.unique(first), features, reporter)
    edges = np.concatenate([np.stack([first, np.arange(n)], axis=1), pairs])
    graph = coo_array((np.ones(len(edges)), edges.T), shape=(n, n))
    n_groups, group_of = connected_components(graph, directed=False)
    members = positions_by_class(group_of, n_groups)
    numbers, lowest = group_of[pairs[:, 0]], np.ones(n)
    np.minimum.at(lowest, numbers, correlations)
    return [(float(lowest[g]), members[g].tolist()) for g in np.unique(numbers)], group_of


def _near_pairs(images: ConcatSplits, positions: Ints, features: Floats, reporter: Reporter) -> tuple[Ints, Floats]:
    """Return (P, 2) near duplicates among these positions, and the correlation (P) of their thumbnails."""
    from sklearn.neighbors import NearestNeighbors

    if len(positions) < 2:
        return np.empty((0, 2), dtype=np.int64), np.empty(0, dtype=np.float32)
    unit = features[positions] - features[positions].mean(axis=0)
    unit /= np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-12)
    search = NearestNeighbors(n_neighbors=min(NEIGHBORS, len(positions) - 1), algorithm="brute").fit(unit)
    neighbors = search.kneighbors(return_distance=False)
    gray = np.empty((len(positions), THUMBNAIL_SIDE**2), dtype=np.float32)

    def thumbnail(i: int) -> Floats:
        image = Image.fromarray(images.read(i)).convert("L")
        small = image.resize((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.BILINEAR, reducing_gap=3)
        return np.asarray(small, dtype=np.float32).ravel()

    for row, values in zip(gray, tracked_map(thumbnail, positions.tolist(), 16, reporter, "comparing"), strict=True):
        row[:] = values - values.mean()
    contrast = np.sqrt((gray**2).mean(axis=1))
    pairs, correlations = [], []
    for other in neighbors.T:
        covariance = np.einsum("np,np->n", gray, gray[other]) / THUMBNAIL_SIDE**2
        correlation = np.minimum(covariance / np.maximum(contrast * contrast[other], 1e-6), 1)
        variance = (1 - correlation**2) * np.maximum(contrast, contrast[other]) ** 2  # that no linear change explains
        same = np.flatnonzero((correlation >= MIN_CORRELATION) & (variance <= MAX_RESIDUAL**2))
        pairs.append(positions[np.stack([same, other[same]], axis=1)])
        correlations.append(correlation[same])
    return np.concatenate(pairs), np.concatenate(correlations)


def check_labels(
    inputs: Tensor, labels: Ints, classes: Sequence[str], group_of: Ints, seed: int, reporter: Reporter
) -> tuple[list[Suspect], dict[str, Any]]:
    """Find labels (N) that a linear probe on features (N, D), fitted to other images, takes for another class.

    This is confident learning (Northcutt, Jiang and Chuang 2021): out-of-fold probabilities, and per class the mean
    probability of its own images as the threshold above which an image counts as one of it. Return suspects, ranked by
    the probability of their label (on CIFAR-10 with 250 of 5,000 labels changed this found 220 in the first 500, the
    normalized margin 194), and metrics. `group_of` has the number of each image's group of duplicates, ascending by
    first image; a group is in one fold, else a copy with the same wrong label would confirm it.
    """
    folds = np.empty(len(labels), dtype=np.int64)
    random = np.random.default_rng([seed, FOLDS])
    for label in np.unique(labels):
        members = random.permutation(np.flatnonzero(labels == label))
        folds[members] = (np.arange(len(members)) + random.integers(FOLDS)) % FOLDS
    folds = folds[np.unique(group_of, return_index=True)[1]][group_of]
    probabilities = np.zeros((len(labels), len(classes)), dtype=np.float32)
    known = np.zeros(len(labels), dtype=bool)  # if images of the class are in other folds
    with reporter.track("labels", len(labels)) as advance:
        for fold in np.unique(folds):
            held, rest = np.flatnonzero(folds == fold), np.flatnonzero(folds != fold)
            present, relabeled = np.unique(labels[rest], return_inverse=True)
            known[held] = np.isin(labels[held], present)
            if len(present) > 1:
                probe = nn.Linear(inputs.shape[1], len(present))
                fit_probe(probe, inputs[rest], torch.from_numpy(relabeled))
                with torch.inference_mode():
                    probabilities[np.ix_(held, present)] = torch.softmax(probe(inputs[held]), dim=1).numpy()
            advance(len(held))
    rows = np.arange(len(labels))
    given = probabilities[rows, labels]
    counts = np.bincount(labels[known], minlength=len(classes))
    sums = np.bincount(labels[known], weights=given[known], minlength=len(classes))
    thresholds = np.where(counts > 0, sums / np.maximum(counts, 1), 1).astype(np.float32)
    others = probabilities.copy()
    others[rows, labels] = -1
    suggested = others.argmax(axis=1)
    highest = others[rows, suggested]
    above = probabilities >= thresholds
    likely = above.any(axis=1) & (np.where(above, probabilities, -1).argmax(axis=1) != labels)
    order = np.flatnonzero((given < highest) & known)
    order = order[np.argsort(given[order], kind="stable")]
    columns = (order, suggested[order], given[order], highest[order], likely[order])
    return list(zip(*(column.tolist() for column in columns), strict=True)), {
        "folds": FOLDS,
        "agreement": round(float((probabilities.argmax(axis=1) == labels).mean()), 4),
        "suspects": len(order),
        "likely_wrong": int(likely[order].sum()),
        "thresholds": {name: round(float(t), 4) for name, t in zip(classes, thresholds, strict=True)},
    }


def _write_files(
    folder: Path, images: ConcatSplits, data: Dataset, duplicates: Sequence[Duplicates], suspects: Sequence[Suspect]
) -> None:
    """Write the tables, and a contact sheet with groups across splits or with several classes first."""
    table: Table = [("group", "kind", "similarity", "splits", "labels", "file", "split", "label")]
    ranked = []
    for number, (kind, similarity, group) in enumerate(duplicates, start=1):
        places = {i: (images.split_names[i], data.classes[images.labels[i]]) for i in group}
        n_splits, n_labels = (len(set(values)) for values in zip(*places.values(), strict=True))
        about = number, kind, f"{similarity:.3f}", n_splits, n_labels
        table += [(*about, images.name(i), *place) for i, place in places.items()]
        one_each = {place: i for i, place in reversed(places.items())}
        shown = list(dict.fromkeys([*one_each.values(), *group]))[:CELLS_PER_ROW]
        title = f"{kind} {number}: {len(group):,} images, {about[2]}"
        cells = [(i, f"{title}\n{': '.join(places[i])}") for i in shown]
        ranked.append(((n_splits == 1, n_labels == 1, kind == "exact", number), cells))
    write_csv(folder / "duplicates.csv", table)
    table, cells = [("rank", "file", "split", "label", "suggested", "p_label", "p_suggested", "likely")], []
    for rank, (i, suggested, p_label, p_suggested, likely) in enumerate(suspects, start=1):
        names = data.classes[images.labels[i]], data.classes[suggested]
        chances = f"{p_label:.4f}", f"{p_suggested:.4f}", "yes" if likely else "no"
        table.append((rank, images.name(i), images.split_names[i], *names, *chances))
        cells.append((i, f"{rank}. {names[0]} {p_label:.0%}\nlooks like {names[1]} {p_suggested:.0%}"))
    write_csv(folder / "labels.csv", table)
    write_csv(folder / "bad_files.csv", [("file", "reason"), *data.bad_files])
    rows = [row for _, row in sorted(ranked)[:MAX_GROUPS]]
    rows += [cells[n : n + CELLS_PER_ROW] for n in range(0, min(MAX_SUSPECTS, len(cells)), CELLS_PER_ROW)]
    if rows:
        named = [[(i, f"{text}\n{images.key(i).rpartition('/')[2]}", "black") for i, text in row] for row in rows]
        draw_sheet(images.read, named, folder / "contact_sheet.png")


def _count_duplicates(images: ConcatSplits, first: Ints) -> dict[str, Any]:
    """Return the numbers of duplicates; `first` (N) is the same for the images of a group: the first one's position."""
    n_copies, in_train = np.bincount(first), first[images.split_names == "train"]
    return {
        "groups": int((n_copies > 1).sum()),
        "images": int(n_copies[n_copies > 1].sum()),
        "test_in_train_or_val": len(images.duplicates_across(first, "test", ("train", "val"))),
        "val_in_train": len(images.duplicates_across(first, "val", ("train",))),
        "extra_in_train": len(in_train) - len(np.unique(in_train)),
        "several_labels": len(np.unique(first[images.label_conflicts(first)])),
    }


def _verdicts(summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield what to do, the most important first, as (fix, look or note, text)."""
    exact, near, labels, in_train = summary["exact"], summary["near"], summary["labels"], summary["counts"]["train"]
    yield from (("fix", text) for text in summary["layout"])
    copies = "byte for byte: its accuracy is too high; keep one of the copies (duplicates.csv)"
    alike = "(contact_sheet.png): if it is the same image, remove one"
    counted = [
        ("fix", summary["n_bad_files"], "of the files do not decode: see bad_files.csv; replace or remove them"),
        ("fix", exact["test_in_train_or_val"], f"of test also in train or val, {copies}"),
        ("look", near["test_in_train_or_val"], f"of test with a near duplicate in train or val {alike}"),
        ("fix", exact["val_in_train"], f"of val also in train, {copies}"),
        ("look", near["val_in_train"], f"of val with a near duplicate in train {alike}"),
        ("fix", exact["several_labels"], "groups of exact duplicates have several labels: at most one is right"),
        ("look", near["several_labels"], "groups of near duplicates have several labels"),
        ("note", exact["extra_in_train"], "of train are exact copies of others there, and count twice in training"),
    ]
    if labels["checked"]:
        text = f"labels differ from the prediction of a probe, {labels['likely_wrong']:,} of them clearly: check "
        text += f"contact_sheet.png and labels.csv; the probe agrees with {labels['agreement']:.0%} of all labels"
        counted.append(("look", labels["suspects"], text))
    yield from ((kind, f"{n:,} {text}") for kind, n, text in counted if n)
    if summary["imbalance"] >= MAX_IMBALANCE:
        largest, smallest = (choose(in_train, key=in_train.__getitem__) for choose in (max, min))
        text = f"train has {summary['imbalance']:.1f} times as many images of {largest} as of {smallest}: "
        yield "note", text + "train with class_weights=balanced, and select by macro F1 (keep_best=macro_f1)"
    if few := [f"{name} ({n})" for name, n in in_train.items() if n < MIN_CLASS_IMAGES]:
        text = f"fewer than {MIN_CLASS_IMAGES} training images of {join_limited(few)}"
        yield "note", f"{text}: their metrics are mostly chance; add images"
