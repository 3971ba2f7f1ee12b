"""Images that a data set has twice, by their content: across splits they make a measured accuracy worth nothing."""

from collections.abc import Iterable, Mapping, Sequence

from tlcli.data.source import Split
from tlcli.data.together import ConcatSplits
from tlcli.reporter import Reporter

LISTED = "`tlcli data check` lists them"


def same_content(images: ConcatSplits, reporter: Reporter) -> list[list[int]]:
    """Positions of images whose files have the same bytes (of arrays: the same pixels), two or more in each group.

    Nothing is read whose digest is known already, as it is of all that were fingerprinted. Raises BadImages.
    """
    groups: dict[bytes, list[int]] = {}
    for position, digest in enumerate(images.digests(reporter)):
        groups.setdefault(digest, []).append(position)
    return [group for group in groups.values() if len(group) > 1]


def leaked(images: ConcatSplits, groups: Iterable[Sequence[int]], split: str, others: Sequence[str]) -> list[list[int]]:
    """For each image of a split that is in another one too: its position, then those of its copies there."""
    found = []
    for group in groups:
        copies = [i for i in group if images.where[i] in others]
        if copies:
            found += [[i, *copies] for i in group if images.where[i] == split]
    return found


def conflicting(images: ConcatSplits, groups: Iterable[Sequence[int]]) -> list[list[int]]:
    """The groups whose images do not all have one label."""
    return [list(group) for group in groups if len({int(images.labels[i]) for i in group}) > 1]


def duplicate_notes(splits: Mapping[str, Split], classes: Sequence[str], reporter: Reporter) -> list[str]:
    """A line for each way in which exact duplicates make a figure of a run wrong: usually none."""
    images = ConcatSplits(splits)
    groups = same_content(images, reporter)
    notes = []
    for split, others in (("test", ("train", "val")), ("val", ("train",))):
        if found := leaked(images, groups, split, others):
            where = " and ".join(o for o in others if any(images.where[i] == o for row in found for i in row[1:]))
            example = f"{images.key(found[0][0])} = {images.key(found[0][1])}"
            figure = "test accuracy" if split == "test" else "validation accuracy"
            notes.append(
                f"{_images(len(found))} of {split} {_are(len(found))} also in {where} (exact duplicates), "
                f"e.g. {example}: {figure} is too high; {LISTED}"
            )
    in_train = [[i for i in group if images.where[i] == "train"] for group in groups]
    if found := conflicting(images, in_train):
        example = " = ".join(f"{images.key(i)} ({classes[images.labels[i]]})" for i in _two_labels(images, found[0]))
        notes.append(
            f"{_images(len(found))} of train {_are(len(found))} there under several labels (exact duplicates), "
            f"e.g. {example}: at most one can be right; {LISTED}"
        )
    return notes


def _two_labels(images: ConcatSplits, group: Sequence[int]) -> tuple[int, int]:
    """Two of a group that have different labels."""
    first = group[0]
    return first, next(i for i in group if images.labels[i] != images.labels[first])


def _images(n: int) -> str:
    return "1 image" if n == 1 else f"{n:,} images"


def _are(n: int) -> str:
    return "is" if n == 1 else "are"
