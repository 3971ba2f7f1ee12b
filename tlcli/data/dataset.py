"""A dataset ready for use: classes, and train, val and test splits of images that are known to decode."""

import hashlib
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from msgspec import structs

from tlcli.data.decode import BadImage, DeepImages, Pixels, RawImage, ValueRange, decoder
from tlcli.data.images import (
    ConcatSplits,
    DigestRecord,
    ImageArrays,
    ImageFiles,
    ImageSource,
    Ints,
    MemoryBudget,
    Source,
    Split,
    cross_split_duplicates,
    exact_duplicates,
    fingerprint,
    label_conflicts,
    map_in_threads,
)
from tlcli.errors import BadImagesError, UsageError
from tlcli.reporter import Reporter
from tlcli.specs import DatasetSpec, OnBad, Verify
from tlcli.store import Store
from tlcli.text import join_limited

DECODE_CHUNK = 4  # images per task: its cost is small, and large photographs do not fill the memory
PERCENTILES = (0.1, 99.9)
PERCENTILE_SAMPLE = 1 << 24  # pixels of all training images from which the percentiles are computed
ImageSelections = Sequence[tuple[ImageSource, list[int]]]
DECODE_NOTES, RANGE_NOTES = "images", "ranges"


@dataclass(frozen=True, eq=False)
class Dataset:
    """Three disjoint splits.

    `notes` are lines for the plan, `bad_files` are (file, reason) of images that are left out, `value_range` maps
    images deeper than 8 bits; None is the full range of their type.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    val: Split
    test: Split
    notes: tuple[str, ...]
    bad_files: tuple[tuple[str, str], ...]
    value_range: ValueRange | None = None


@dataclass(frozen=True, eq=False)
class EvaluationSplit:
    """One split of a dataset as it is; `split_name` is train, val, test, or all of a dataset without splits.

    `bad_files` are (file, reason) of images that are left out.
    """

    name: str
    classes: tuple[str, ...]
    split_name: str
    split: Split
    bad_files: tuple[tuple[str, str], ...]


def load_dataset(spec: DatasetSpec, *, seed: int, reporter: Reporter, store: Store | None = None) -> Dataset:
    """Load the images of `spec`, split and limited; every one decodes. They stay in memory up to `spec.ram_gb`.

    All are decoded here, unless the store knows which of them decode: then each is decoded when it is first read. Which
    image is in which split is a function of the seed and of the sorted names of each class's files.

    Raises:
        UsageError: the data cannot be used as it is.
        BadImagesError: files do not decode, and on_bad=error.
    """
    classes, splits, notes, value_range = _open(spec, seed, reporter, store)
    splits, bad, deep = _without_bad(splits, spec, value_range, reporter, store)
    if bad:
        notes.append(f"{_count_bad(bad)} and {'is' if len(bad) == 1 else 'are'} left out: see bad_files.csv")
    notes += deep.notes(value_range)
    for name, count in zip(classes, splits["train"].class_counts(len(classes)), strict=True):
        if count == 0:
            raise UsageError(f"{spec.name}: class {name!r} has no training image left; add some, or leave it out")
    for name in ("val", "test"):
        if len(splits[name]) == 0:
            raise UsageError(f"{spec.name}: too few images, none is left for {name}; give each class at least three")
        counts = splits[name].class_counts(len(classes))
        if absent := [c for c, n in zip(classes, counts, strict=True) if n == 0]:
            notes.append(f"{name} has no images of {join_limited(absent)}")
    notes += _duplicate_notes(splits, classes, reporter)
    return Dataset(spec.name, classes, **splits, notes=tuple(notes), bad_files=tuple(bad), value_range=value_range)


def load_without_decoding(spec: DatasetSpec, *, seed: int, reporter: Reporter) -> Dataset:
    """Return the splits of `load_dataset` before any image is read, for commands that read a few."""
    classes, splits, notes, value_range = _open(spec, seed, reporter, None)
    return Dataset(spec.name, classes, **splits, notes=tuple(notes), bad_files=(), value_range=value_range)


def images_by_key(spec: DatasetSpec, value_range: Any = None) -> dict[str, Callable[[], Pixels]]:
    """Return a function per image of a dataset, by its key, that decodes the image. Nothing is downloaded.

    Args:
        value_range: of a run's preprocessing, as run.json has it.

    Raises:
        UsageError, OSError: the dataset cannot be read. The functions raise BadImage, a ValueError, and OSError.
    """
    splits = spec.offline().load(Reporter()).splits
    numbers = [value for value in value_range or () if isinstance(value, int | float)]
    value_range = (numbers[0], numbers[1]) if len(numbers) == 2 and numbers[0] < numbers[1] else None
    _set_up_memory(splits, structs.replace(spec, ram_gb=0.0), value_range)
    return {s.images.key(i): partial(s.images.read, i) for s in splits.values() for i in s.indices.tolist()}


def load_evaluation_split(
    spec: DatasetSpec, split_name: str | None, *, seed: int, reporter: Reporter, store: Store | None = None
) -> EvaluationSplit:
    """Load the images of `spec` to evaluate on, with none held out.

    Args:
        split_name: train, val or test; None is test, else val, else all images. `spec.test_per_class` limits them.

    Raises:
        UsageError: the data has no such split.
        BadImagesError: files do not decode, and on_bad=error.
    """
    source = _load_source(spec, reporter, store, for_training=False)
    chosen = split_name or next(name for name in ("test", "val", "all", "train") if name in source.splits)
    if chosen not in source.splits:
        present = "it is not split" if "all" in source.splits else f"it has {' and '.join(source.splits)}"
        raise UsageError(f"split={chosen}: {spec.name} has no such split ({present}); omit split= to evaluate it")
    split = limit_per_class(source.splits[chosen], source.classes, spec.test_per_class, seed, "test_per_class")
    value_range = _resolve_range(spec, split, reporter, store)
    _set_up_memory({chosen: split}, spec, value_range)
    splits, bad, _ = _without_bad({chosen: split}, spec, value_range, reporter, store)
    if len(splits[chosen]) == 0:
        raise UsageError(f"{spec.name}: no image is left to evaluate on")
    return EvaluationSplit(spec.name, source.classes, chosen, splits[chosen], tuple(bad))


def _open(
    spec: DatasetSpec, seed: int, reporter: Reporter, store: Store | None
) -> tuple[tuple[str, ...], dict[str, Split], list[str], ValueRange | None]:
    """Return the classes, the splits, notes for the plan and the range. With range=auto, train images are read."""
    source = _load_source(spec, reporter, store, for_training=True)
    splits, notes = _divide(source, spec, seed)
    value_range = _resolve_range(spec, splits["train"], reporter, store)
    _set_up_memory(splits, spec, value_range)
    return source.classes, splits, notes, value_range


def _load_source(spec: DatasetSpec, reporter: Reporter, store: Store | None, *, for_training: bool) -> Source:
    """Return the source of a dataset, whose digests are remembered in the store."""
    source: Source = spec.load(reporter, for_training=for_training)
    files = [s.images for s in source.splits.values() if isinstance(s.images, ImageFiles)]
    if store is not None and files:
        record = DigestRecord(store, files[0].root, verify_all=spec.verify is Verify.full)
        for images in files:
            images.record = record
    return source


def _set_up_memory(splits: Mapping[str, Split], spec: DatasetSpec, value_range: ValueRange | None) -> None:
    """Let the images of the splits share `spec.ram_gb` of memory, and map them from a range."""
    memory = MemoryBudget(int(spec.ram_gb * 1e9))
    for split in splits.values():
        if isinstance(split.images, ImageFiles):
            split.images.value_range = value_range
        if not isinstance(split.images, ImageArrays):
            split.images.memory = memory


# -- splits -----------------------------------------------------------------------------------------------------------


def _divide(source: Source, spec: DatasetSpec, seed: int) -> tuple[dict[str, Split], list[str]]:
    """Return train, val and test, and a note for each that the source does not have."""
    train = source.splits["all"] if "all" in source.splits else source.splits["train"]
    val, test = source.splits.get("val"), source.splits.get("test")
    notes = list(source.notes)
    if test is None and val is not None:
        test, val = val, None
        notes.append("no test split: the val split is the test set")
    if test is None:
        stay, held = stratified_split(train.labels, source.classes, spec.test_fraction, seed=seed, purpose="test")
        train, test = train.take(stay), train.take(held)
        notes.append(f"no test split: {100 * spec.test_fraction:g} % of the images are held out as the test set")
    train = limit_per_class(train, source.classes, spec.train_per_class, seed, "train_per_class")
    test = limit_per_class(test, source.classes, spec.test_per_class, seed, "test_per_class")
    if val is None:
        stay, held = stratified_split(train.labels, source.classes, spec.val_fraction, seed=seed, purpose="val")
        train, val = train.take(stay), train.take(held)
        notes.append(f"no val split: {100 * spec.val_fraction:g} % of the training images are held out as val")
    return {"train": train, "val": val, "test": test}, notes


def limit_per_class(split: Split, classes: Sequence[str], limit: int | None, seed: int, purpose: str) -> Split:
    """Return at most `limit` images per class, in order; a smaller choice is part of a larger one."""
    if limit is None:
        return split
    parts = _shuffled_by_class(split.labels, classes, seed, purpose)
    return split.take(np.sort(np.concatenate([part[:limit] for part in parts])))


def stratified_split(
    labels: Ints, classes: Sequence[str], fraction: float, *, seed: int, purpose: str
) -> tuple[Ints, Ints]:
    """Return positions that stay and positions that are held out, each ascending.

    The fraction of each class, rounded, is held out: at least one image, but one always stays. The choice is a function
    of the seed, the class's name and the order of its files only.
    """
    stay, held = [], []
    for part in _shuffled_by_class(labels, classes, seed, purpose):
        n = min(max(1, int(len(part) * fraction + 0.5)), max(0, len(part) - 1))
        held.append(part[:n])
        stay.append(part[n:])
    return np.sort(np.concatenate(stay)), np.sort(np.concatenate(held))


def _shuffled_by_class(labels: Ints, classes: Sequence[str], seed: int, purpose: str) -> Iterator[Ints]:
    for c, name in enumerate(classes):
        random = np.random.default_rng([seed, zlib.crc32(f"{purpose}/{name}".encode())])
        yield random.permutation(np.flatnonzero(labels == c))


# -- decoding ---------------------------------------------------------------------------------------------------------


def _resolve_range(spec: DatasetSpec, train: Split, reporter: Reporter, store: Store | None) -> ValueRange | None:
    """Return the values that become 0 and 255; with range=auto percentiles of the deep images in train."""
    images = train.images
    if spec.range != "auto" or not isinstance(images, ImageFiles):
        return None if spec.range == "auto" else spec.range
    indices = train.indices.tolist()
    key, known = _recall(store, RANGE_NOTES, [(images, indices)], None, reporter)
    if isinstance(known, list) and len(known) == 2:
        return known[0], known[1]
    size = max(1, PERCENTILE_SAMPLE // max(1, len(indices)))

    def sample(index: int) -> np.ndarray[Any, Any]:
        try:
            raw = images.read_raw(index)
        except BadImage:
            return np.empty(0)
        values = raw.values[np.isfinite(raw.values)] if raw.is_deep else np.empty(0)
        return values[:: -(-len(values) // size)] if len(values) else values

    parts = []
    with reporter.track("values", len(indices)) as advance:
        for part in map_in_threads(sample, indices, DECODE_CHUNK):
            parts.append(part.astype(np.float32))
            advance(1)
    values = np.concatenate(parts)
    if not len(values):
        return None
    low, high = (float(v) for v in np.percentile(values, PERCENTILES))
    high = high if high > low else low + max(1.0, abs(low) * 1e-6)
    if store is not None and key is not None:
        store.add_note(RANGE_NOTES, key, [low, high])
    return low, high


def _without_bad(
    splits: dict[str, Split], spec: DatasetSpec, value_range: ValueRange | None, reporter: Reporter, store: Store | None
) -> tuple[dict[str, Split], list[tuple[str, str]], DeepImages]:
    """Return the splits without images that do not decode, (file, reason) of those, and statistics of deep images.

    Raise BadImagesError if bad images are errors.
    """
    by_source: dict[ImageSource, list[int]] = {}
    for split in splits.values():
        if not isinstance(split.images, ImageArrays):
            by_source.setdefault(split.images, []).extend(split.indices.tolist())
    used = [(images, sorted(indices)) for images, indices in by_source.items()]
    faults, deep = find_bad_images(used, value_range, reporter, store)
    bad = [(images, i) for images, indices in used for i in indices if images.key(i) in faults]
    files = [(images.name(i), faults[images.key(i)]) for images, i in bad]
    if files and spec.on_bad is OnBad.error:
        first = ", ".join(f"{file} ({reason})" for file, reason in files[:5])
        more = f" and {len(bad) - 5} more, all in the run's bad_files.csv" if len(bad) > 5 else ""
        raise BadImagesError(f"{_count_bad(bad)}: {first}{more}; dataset.on_bad=skip leaves them out", files)
    left_out = set(bad)
    for name, split in splits.items() if bad else ():
        good = [n for n, i in enumerate(split.indices.tolist()) if (split.images, i) not in left_out]
        splits[name] = split.take(np.array(good, dtype=np.int64))
    return splits, files, deep


def _count_bad(bad: Sequence[object]) -> str:
    return "1 file does not decode" if len(bad) == 1 else f"{len(bad):,} files do not decode"


def find_bad_images(
    used: ImageSelections, value_range: ValueRange | None, reporter: Reporter, store: Store | None
) -> tuple[dict[str, str], DeepImages]:
    """Return the key and the fault of each image that does not decode, and statistics of deep images.

    Decodes all images, and keeps what fits in memory, unless the store knows the result for these very bytes, names,
    decoder and range.
    """
    deep = DeepImages()
    if not used:
        return {}, deep
    key, known = _recall(store, DECODE_NOTES, used, value_range, reporter)
    with suppress(TypeError, KeyError):  # unknown, or damaged
        deep = DeepImages(**known["deep"] | {"levels": set(known["deep"]["levels"])})
        return {str(k): str(v) for k, v in known["bad"].items()}, deep
    bad: dict[str, str] = {}
    with reporter.track("decoding", sum(len(indices) for _, indices in used)) as advance:
        for images, indices in used:
            for index, pixels in _decode(images, indices, deep):
                if isinstance(pixels, BadImage):
                    bad[images.key(index)] = str(pixels)
                advance(1)
    if store is not None and key is not None:
        stats = {"levels": sorted(deep.levels), "images": deep.images, "reduced": deep.reduced}
        stats |= {"low": deep.low, "high": deep.high} if deep.images else {}
        store.add_note(DECODE_NOTES, key, {"bad": bad, "deep": stats})
    return bad, deep


def preload_images(splits: Iterable[Split], reporter: Reporter) -> None:
    """Decode ahead, in threads, as many images of these splits as fit in memory, the first split first.

    For uncached training: what a DataLoader worker decodes is lost to the others, what was in memory before is shared.
    Raise BadImagesError for a file that can no longer be read.
    """
    for split in splits:
        images = split.images
        missing = [index for index in split.indices.tolist() if index not in images.pixels]
        if missing and images.memory is not None and images.memory.left > 0:
            with reporter.track("decoding", len(missing)) as advance:
                for index, pixels in _decode(images, missing, DeepImages()):
                    if isinstance(pixels, BadImage):
                        raise BadImagesError(f"{images.name(index)}: {pixels}")
                    if index not in images.pixels:
                        break  # the memory is full
                    advance(1)


def _decode(images: ImageSource, indices: Sequence[int], deep: DeepImages) -> Iterator[tuple[int, Pixels | BadImage]]:
    """Yield each image or its fault, in order. Images are kept in that order too, while there is memory."""

    def decode(index: int) -> tuple[RawImage | None, Pixels | BadImage]:
        try:
            if not isinstance(images, ImageFiles):
                return None, images.decode(index)
            raw = images.read_raw(index)
            return raw, raw.to_pixels(images.value_range)
        except BadImage as error:
            return None, error

    for index, (raw, pixels) in zip(indices, map_in_threads(decode, indices, DECODE_CHUNK), strict=True):
        if not isinstance(pixels, BadImage):
            if raw is not None:
                deep.add(raw, pixels)
            images.store(index, pixels)
        yield index, pixels


def _recall(
    store: Store | None, notes: str, used: ImageSelections, value_range: ValueRange | None, reporter: Reporter
) -> tuple[str | None, Any]:
    """Return a digest of all images, the decoder and the range, and what the store knows of it.

    The digest is None without a store or if a file cannot be read.
    """
    if store is None:
        return None, None
    digest = hashlib.sha256(f"{decoder()} {value_range}".encode())
    try:
        for images, indices in used:
            digest.update(fingerprint(images, indices, reporter).encode())
            if isinstance(images, ImageFiles) and images.record is not None:
                images.record.save()
    except BadImagesError:
        return None, None
    return digest.hexdigest(), store.read_notes(notes).get(digest.hexdigest())


# -- duplicates -------------------------------------------------------------------------------------------------------


def _duplicate_notes(splits: Mapping[str, Split], classes: Sequence[str], reporter: Reporter) -> Iterator[str]:
    """Yield a line for each way in which exact duplicates make a metric of a run wrong."""
    images = ConcatSplits(splits)
    groups = exact_duplicates(images, reporter)
    for split, others, metric in (("test", ("train", "val"), "test"), ("val", ("train",), "validation")):
        if rows := cross_split_duplicates(images, groups, split, others):
            sources = [o for o in others if any(images.split_names[i] == o for row in rows for i in row[1:])]
            yield (
                f"{len(rows):,} image{'s' * (len(rows) > 1)} of {split} also in {' and '.join(sources)} (exact "
                f"duplicates), e.g. {images.key(rows[0][0])} = {images.key(rows[0][1])}: {metric} accuracy is too "
                "high; `tlcli data check` lists them"
            )
    in_train = [[i for i in group if images.split_names[i] == "train"] for group in groups]
    if conflicts := label_conflicts(images, in_train):
        first = conflicts[0][0]
        other = next(i for i in conflicts[0] if images.labels[i] != images.labels[first])
        example = " = ".join(f"{images.key(i)} ({classes[images.labels[i]]})" for i in (first, other))
        yield (
            f"{len(conflicts):,} image{'s' * (len(conflicts) > 1)} of train with several labels (exact duplicates), "
            f"e.g. {example}: at most one is right; `tlcli data check` lists them"
        )
