"""The files that a check leaves: CSV for whoever sorts the data out, JSON for programs."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tlcli.checking.check import Findings
from tlcli.text import csv_line


def write_files(folder: Path, found: Findings, summary: Mapping[str, Any]) -> None:
    """summary.json and the three tables; a table is there even where it has no rows."""
    write_table(folder / "duplicates.csv", DUPLICATES, duplicate_rows(found))
    write_table(folder / "labels.csv", LABELS, label_rows(found))
    write_table(folder / "bad_files.csv", ("file", "reason"), found.data.bad_files)
    text = json.dumps(summary, indent=2, allow_nan=False) + "\n"
    (folder / "summary.json").write_text(text, encoding="utf-8")


DUPLICATES = ("group", "kind", "similarity", "splits", "labels", "file", "split", "label")


def duplicate_rows(found: Findings) -> Iterable[Sequence[object]]:
    """A row for each image in a group: `splits` and `labels` say in how many its group is."""
    images, classes = found.images, found.data.classes
    groups = [("exact", 1.0, tuple(group)) for group in found.exact]
    groups += [("near", one.similarity, one.members) for one in found.near]
    for number, (kind, similarity, group) in enumerate(groups, start=1):
        splits, labels = {images.where[i] for i in group}, {int(images.labels[i]) for i in group}
        for i in group:
            own = classes[images.labels[i]]
            yield (
                *(number, kind, f"{similarity:.3f}", len(splits), len(labels)),
                *(images.name(i), images.where[i], own),
            )


LABELS = ("rank", "file", "split", "label", "suggested", "p_label", "p_suggested", "likely")


def label_rows(found: Findings) -> Iterable[Sequence[object]]:
    """A row for each label that may be wrong, the likeliest first."""
    check, images, classes = found.labels, found.images, found.data.classes
    if check is None:
        return
    for rank, i in enumerate(check.suspects.tolist(), start=1):
        label, suggested = int(images.labels[i]), int(check.suggested[i])
        own, other = check.probabilities[i, label], check.probabilities[i, suggested]
        names = (images.name(i), images.where[i], classes[label], classes[suggested])
        yield rank, *names, f"{own:.4f}", f"{other:.4f}", "yes" if check.likely[i] else "no"


def write_table(file: Path, head: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A CSV file, UTF-8; names that are no UTF-8 keep their bytes."""
    with file.open("w", newline="", encoding="utf-8", errors="surrogateescape") as stream:
        stream.writelines(csv_line(row) for row in (head, *rows))
