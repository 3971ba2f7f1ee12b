"""A data set ready for use: classes, and train, val and test splits of images that are known to decode."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from msgspec import structs

from tlcli.data.decode import Pixels
from tlcli.data.digits import load_digits
from tlcli.data.duplicates import duplicate_notes
from tlcli.data.listing import list_imagefolder, list_manifest
from tlcli.data.reading import Group, Memory, SoundImages, bad_images, kept, preload_images
from tlcli.data.source import Images, Source, Split, from_listing
from tlcli.data.splits import per_class, stratified_split
from tlcli.data.torchvision_sets import load_torchvision
from tlcli.errors import BadImagesError, UsageError
from tlcli.reporter import Reporter
from tlcli.specs import DatasetSpec, DigitsSpec, ImageFolderSpec, ManifestSpec, OnBad, TorchvisionDatasetSpec

__all__ = [
    "Dataset",
    "Evaluated",
    "Images",
    "SoundImages",
    "Split",
    "images_by_key",
    "load_dataset",
    "load_unchecked",
    "load_whole",
    "preload_images",
]


@dataclass(frozen=True, eq=False)
class Dataset:
    """Three disjoint splits. `notes` are lines that the plan shows; `bad_files` are (file, reason) left out."""

    name: str
    classes: tuple[str, ...]
    train: Split
    val: Split
    test: Split
    notes: tuple[str, ...]
    bad_files: tuple[tuple[str, str], ...]


SOURCES: dict[type[DatasetSpec], Callable[[Any, Reporter], Source]] = {
    DigitsSpec: lambda spec, reporter: load_digits(spec),
    ImageFolderSpec: lambda spec, reporter: from_listing(list_imagefolder(spec)),
    ManifestSpec: lambda spec, reporter: from_listing(list_manifest(spec)),
    TorchvisionDatasetSpec: load_torchvision,
}
"""What makes a source of each kind of spec."""

EVALUATED: dict[type[DatasetSpec], Callable[[Any, Reporter], Source]] = {
    **SOURCES,
    ImageFolderSpec: lambda spec, reporter: from_listing(list_imagefolder(spec, trains=False)),
    ManifestSpec: lambda spec, reporter: from_listing(list_manifest(spec, trains=False)),
}
"""Likewise for what is not trained on: it needs no training images, and one class is enough."""


@dataclass(frozen=True, eq=False)
class Evaluated:
    """One split of a data set as it is; `role` says which: train, val, test, or all of a set that is not split.
    `bad_files` are (file, reason) left out."""

    name: str
    classes: tuple[str, ...]
    role: str
    split: Split
    bad_files: tuple[tuple[str, str], ...]


def load_dataset(spec: DatasetSpec, *, seed: int, reporter: Reporter, sound: SoundImages | None = None) -> Dataset:
    """The images of `spec`, split and cut down; every one decodes. Those read stay in memory up to `spec.ram_gb`.

    All are decoded here, unless `sound` knows which of them decode: then each is when it is first read. Which image is
    in which split is a function of the seed and of the sorted names of each class's files. Exact duplicates that make a
    figure wrong are noted. Raises UsageError where the data cannot be used as it is, BadImages for files that do not
    decode (on_bad=error).
    """
    source = SOURCES[type(spec)](spec, reporter)
    splits, notes = _divide(source, spec, seed)
    splits = _kept(splits, Memory(int(spec.ram_gb * 1e9)))
    splits, bad = _without_bad(splits, spec, reporter, sound)
    if bad:
        notes.append(
            f"{_files(len(bad))} not decode and {'is' if len(bad) == 1 else 'are'} left out: see bad_files.csv"
        )
    _check_filled(source.classes, splits, spec)
    for name in ("val", "test"):
        counts = splits[name].class_counts(len(source.classes))
        if absent := [c for c, n in zip(source.classes, counts, strict=True) if n == 0]:
            notes.append(f"{name} has no images of {_some(absent)}")
    notes += duplicate_notes(splits, source.classes, reporter)
    return Dataset(spec.name, source.classes, **splits, notes=tuple(notes), bad_files=tuple(bad))


def load_unchecked(spec: DatasetSpec, *, seed: int, reporter: Reporter) -> Dataset:
    """The splits that `load_dataset` gives, of which no image was read: to look at a few."""
    source = SOURCES[type(spec)](spec, reporter)
    splits, notes = _divide(source, spec, seed)
    return Dataset(
        spec.name, source.classes, **_kept(splits, Memory(int(spec.ram_gb * 1e9))), notes=tuple(notes), bad_files=()
    )


def images_by_key(spec: DatasetSpec) -> dict[str, Callable[[], Pixels]]:
    """Return one function per image of a data set, by the image's key, that decodes it; nothing is downloaded.

    Raises:
        UsageError, OSError: the data set cannot be read. The functions raise BadImage, a ValueError, and OSError.
    """
    if isinstance(spec, TorchvisionDatasetSpec):
        spec = structs.replace(spec, download=False)
    splits = SOURCES[type(spec)](spec, Reporter()).splits.values()
    return {s.images.key(i): partial(s.images.read, i) for s in splits for i in s.indices.tolist()}


def load_whole(
    spec: DatasetSpec, wanted: str | None, *, seed: int, reporter: Reporter, sound: SoundImages | None = None
) -> Evaluated:
    """The images of `spec` to evaluate on, with none held out: the split `wanted` (train, val, test), or (None) test,
    else val, else all that there is. `spec.test_per_class` limits them.

    Raises UsageError where the data has no such split, BadImages for files that do not decode (on_bad=error).
    """
    source = EVALUATED[type(spec)](spec, reporter)
    role = wanted or next(role for role in ("test", "val", "all", "train") if role in source.splits)
    if role not in source.splits:
        there = "it is not split" if "all" in source.splits else f"it has {' and '.join(source.splits)}"
        raise UsageError(f"split={role}: {spec.name} has no such split ({there}); leave split= out to evaluate it")
    split = _per_class(source.splits[role], source.classes, spec.test_per_class, seed, "test_per_class")
    splits, bad = _without_bad(_kept({role: split}, Memory(int(spec.ram_gb * 1e9))), spec, reporter, sound)
    if len(splits[role]) == 0:
        raise UsageError(f"{spec.name}: no image is left to evaluate on")
    return Evaluated(spec.name, source.classes, role, splits[role], tuple(bad))


def _divide(source: Source, spec: DatasetSpec, seed: int) -> tuple[dict[str, Split], list[str]]:
    """train, val and test from what the source has, and a note for each that it has not."""
    train = source.splits["all"] if "all" in source.splits else source.splits["train"]
    val, test = source.splits.get("val"), source.splits.get("test")
    notes = []
    if test is None and val is not None:
        test, val = val, None
        notes.append("no test split: the val split is the test set")
    if test is None:
        train, test = _held_out(train, source.classes, spec.test_fraction, seed, "test")
        notes.append(f"no test split: {100 * spec.test_fraction:g} % of the images are held out as the test set")
    train = _per_class(train, source.classes, spec.train_per_class, seed, "train_per_class")
    test = _per_class(test, source.classes, spec.test_per_class, seed, "test_per_class")
    if val is None:
        train, val = _held_out(train, source.classes, spec.val_fraction, seed, "val")
        notes.append(f"no val split: {100 * spec.val_fraction:g} % of the training images are held out as val")
    return {"train": train, "val": val, "test": test}, notes


def _held_out(split: Split, classes: tuple[str, ...], fraction: float, seed: int, purpose: str) -> tuple[Split, Split]:
    stay, held = stratified_split(split.labels, classes, fraction, seed=seed, purpose=purpose)
    return split.take(stay), split.take(held)


def _per_class(split: Split, classes: tuple[str, ...], most: int | None, seed: int, purpose: str) -> Split:
    if most is None:
        return split
    return split.take(per_class(split.labels, classes, most, seed=seed, purpose=purpose))


def _kept(splits: dict[str, Split], memory: Memory) -> dict[str, Split]:
    """The splits with images that stay in memory; those that choose from the same images go on doing so."""
    images = {id(s.images): s.images for s in splits.values()}
    wrapped = {key: kept(value, memory) for key, value in images.items()}
    return {name: Split(wrapped[id(s.images)], s.indices, s.labels) for name, s in splits.items()}


def _without_bad(
    splits: dict[str, Split], spec: DatasetSpec, reporter: Reporter, sound: SoundImages | None
) -> tuple[dict[str, Split], list[tuple[str, str]]]:
    """The splits without what does not decode, and (file, reason) of that. Raises BadImages if it is to be an error."""
    groups = _in_use(splits)
    faults = bad_images(groups, reporter, sound)
    if not faults:
        return splits, []
    bad = [(images, i, faults[key]) for images, used in groups for i in used if (key := images.key(i)) in faults]
    files = [(images.name(i), reason) for images, i, reason in bad]
    if spec.on_bad is OnBad.error:
        raise BadImagesError(_do_not_decode(files), files)
    left_out = {(id(images), i) for images, i, _ in bad}
    for name, split in splits.items():
        good = [n for n, i in enumerate(split.indices.tolist()) if (id(split.images), i) not in left_out]
        splits[name] = split.take(np.array(good, dtype=np.int64))
    return splits, files


def _in_use(splits: dict[str, Split]) -> list[Group]:
    """The images of all splits, those that choose from the same images together, in the order of these images."""
    groups: dict[int, Group] = {}
    for split in splits.values():
        groups.setdefault(id(split.images), (split.images, []))[1].extend(split.indices.tolist())
    return [(images, sorted(indices)) for images, indices in groups.values()]


def _do_not_decode(bad: list[tuple[str, str]]) -> str:
    first = ", ".join(f"{file} ({reason})" for file, reason in bad[:5])
    more = f" and {len(bad) - 5} more, all in the run's bad_files.csv" if len(bad) > 5 else ""
    return f"{_files(len(bad))} not decode: {first}{more}; dataset.on_bad=skip leaves them out"


def _check_filled(classes: tuple[str, ...], splits: dict[str, Split], spec: DatasetSpec) -> None:
    """Raise UsageError where a class has nothing to train on, or val or test is empty."""
    for name, count in zip(classes, splits["train"].class_counts(len(classes)), strict=True):
        if count == 0:
            raise UsageError(f"{spec.name}: class {name!r} has no training image left; add some, or leave it out")
    for split in ("val", "test"):
        if len(splits[split]) == 0:
            raise UsageError(f"{spec.name}: too few images, none is left for {split}; give each class at least three")


def _files(n: int) -> str:
    return "1 file does" if n == 1 else f"{n:,} files do"


def _some(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more classes" if len(names) > most else "")
