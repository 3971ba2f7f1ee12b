"""A dataset ready for use: classes, and train, val and test splits of images that are known to decode."""

import hashlib
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from msgspec import structs

from tlcli.data.decode import BadImage, Pixels, RawImage, ValueRange, decoder
from tlcli.data.duplicates import duplicate_notes
from tlcli.data.images import (
    CachedImages,
    DigestRecord,
    ImageArrays,
    ImageFiles,
    ImageSource,
    Ints,
    MemoryBudget,
    Source,
    Split,
    fingerprint,
    map_in_threads,
    unreadable,
)
from tlcli.errors import BadImagesError, UsageError
from tlcli.reporter import Reporter
from tlcli.specs import DatasetSpec, OnBad, Verify
from tlcli.store import Store
from tlcli.text import join_limited

DECODE_CHUNK = 4
"""Images per task: enough that its cost is small, few enough that large photographs do not fill the memory."""
MIN_LEVELS = 64
PERCENTILES = (0.1, 99.9)
PERCENTILE_SAMPLE = 1 << 24
"""Pixels of all training images from which the percentiles are computed."""
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
    source = _load_source(spec, reporter, store, for_training=True)
    splits, notes = _divide(source, spec, seed)
    value_range = _resolve_range(spec, splits["train"], reporter, store)
    splits = _with_memory_cache(splits, spec, value_range)
    splits, bad, deep = _without_bad(splits, spec, value_range, reporter, store)
    if bad:
        notes.append(f"{_count_bad(bad)} and {'is' if len(bad) == 1 else 'are'} left out: see bad_files.csv")
    notes += deep.notes(value_range)
    for name, count in zip(source.classes, splits["train"].class_counts(len(source.classes)), strict=True):
        if count == 0:
            raise UsageError(f"{spec.name}: class {name!r} has no training image left; add some, or leave it out")
    for name in ("val", "test"):
        if len(splits[name]) == 0:
            raise UsageError(f"{spec.name}: too few images, none is left for {name}; give each class at least three")
        counts = splits[name].class_counts(len(source.classes))
        if absent := [c for c, n in zip(source.classes, counts, strict=True) if n == 0]:
            notes.append(f"{name} has no images of {join_limited(absent)}")
    notes += duplicate_notes(splits, source.classes, reporter)
    return Dataset(
        spec.name, source.classes, **splits, notes=tuple(notes), bad_files=tuple(bad), value_range=value_range
    )


def load_without_decoding(spec: DatasetSpec, *, seed: int, reporter: Reporter) -> Dataset:
    """Return the splits of `load_dataset` before any image is read, for commands that read a few."""
    source: Source = spec.load(reporter)
    splits, notes = _divide(source, spec, seed)
    value_range = _resolve_range(spec, splits["train"], reporter, None)
    splits = _with_memory_cache(splits, spec, value_range)
    return Dataset(spec.name, source.classes, **splits, notes=tuple(notes), bad_files=(), value_range=value_range)


def images_by_key(spec: DatasetSpec, value_range: Any = None) -> dict[str, Callable[[], Pixels]]:
    """Return a function per image of a dataset, by its key, that decodes the image. Nothing is downloaded.

    Args:
        value_range: of a run's preprocessing, as run.json has it.

    Raises:
        UsageError, OSError: the dataset cannot be read. The functions raise BadImage, a ValueError, and OSError.
    """
    source: Source = spec.offline().load(Reporter())
    numbers = [value for value in value_range or () if isinstance(value, int | float)]
    value_range = (numbers[0], numbers[1]) if len(numbers) == 2 and numbers[0] < numbers[1] else None
    splits = _with_memory_cache(dict(source.splits), structs.replace(spec, ram_gb=0.0), value_range).values()
    return {s.images.key(i): partial(s.images.read, i) for s in splits for i in s.indices.tolist()}


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
    split = _limit_per_class(source.splits[chosen], source.classes, spec.test_per_class, seed, "test_per_class")
    value_range = _resolve_range(spec, split, reporter, store)
    splits = _with_memory_cache({chosen: split}, spec, value_range)
    splits, bad, _ = _without_bad(splits, spec, value_range, reporter, store)
    if len(splits[chosen]) == 0:
        raise UsageError(f"{spec.name}: no image is left to evaluate on")
    return EvaluationSplit(spec.name, source.classes, chosen, splits[chosen], tuple(bad))


def _load_source(spec: DatasetSpec, reporter: Reporter, store: Store | None, *, for_training: bool) -> Source:
    """Return the source of a dataset, whose digests are remembered in the store."""
    source: Source = spec.load(reporter, for_training=for_training)
    files = [s.images for s in source.splits.values() if isinstance(s.images, ImageFiles)]
    if store is None or not files:
        return source
    record = DigestRecord(store, files[0].root, verify_all=spec.verify is Verify.full)
    new = {id(images): replace(images, digests=record) for images in files}
    return replace(
        source, splits={k: replace(s, images=new.get(id(s.images), s.images)) for k, s in source.splits.items()}
    )


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
    train = _limit_per_class(train, source.classes, spec.train_per_class, seed, "train_per_class")
    test = _limit_per_class(test, source.classes, spec.test_per_class, seed, "test_per_class")
    if val is None:
        stay, held = stratified_split(train.labels, source.classes, spec.val_fraction, seed=seed, purpose="val")
        train, val = train.take(stay), train.take(held)
        notes.append(f"no val split: {100 * spec.val_fraction:g} % of the training images are held out as val")
    return {"train": train, "val": val, "test": test}, notes


def _limit_per_class(split: Split, classes: Sequence[str], limit: int | None, seed: int, purpose: str) -> Split:
    if limit is None:
        return split
    return split.take(limit_per_class(split.labels, classes, limit, seed=seed, purpose=purpose))


def limit_per_class(labels: Ints, classes: Sequence[str], limit: int, *, seed: int, purpose: str) -> Ints:
    """Return positions of at most `limit` images per class, ascending; a smaller choice is part of a larger one."""
    return np.sort(np.concatenate([part[:limit] for part in _shuffled_by_class(labels, classes, seed, purpose)]))


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


def _with_memory_cache(splits: dict[str, Split], spec: DatasetSpec, value_range: ValueRange | None) -> dict[str, Split]:
    """Return the splits with images that stay in memory; splits of the same source share theirs."""
    memory = MemoryBudget(int(spec.ram_gb * 1e9))
    cached: dict[int, ImageSource] = {}
    for split in splits.values():
        images = split.images
        if id(images) not in cached:
            files = replace(images, value_range=value_range) if isinstance(images, ImageFiles) else images
            cached[id(images)] = files if isinstance(files, ImageArrays) else CachedImages(files, memory)
    return {name: replace(s, images=cached[id(s.images)]) for name, s in splits.items()}


@dataclass
class DeepImages:
    """Statistics of images deeper than 8 bits: their number, extreme values, and the gray levels that are left of them.

    `reduced` counts color images of which the decoder keeps the upper 8 bits.
    """

    images: int = 0
    low: float = float("inf")
    high: float = float("-inf")
    levels: set[int] = field(default_factory=set)
    reduced: int = 0

    def add(self, raw: RawImage, gray: np.ndarray[Any, Any]) -> None:
        """Add an image, given its pixels after mapping."""
        self.reduced += raw.is_reduced
        if raw.is_deep:
            finite = raw.values[np.isfinite(raw.values)]
            self.images += 1
            if finite.size:
                self.low, self.high = min(self.low, float(finite.min())), max(self.high, float(finite.max()))
            self.levels.update(np.unique(gray).tolist())

    def notes(self, value_range: ValueRange | None) -> Iterator[str]:
        """Yield lines for the plan."""
        if self.images:
            mapped = "the full range of the type" if value_range is None else "{:g} to {:g}".format(*value_range)
            values = f"values {self.low:g} to {self.high:g}, mapped from {mapped}"
            text = f"{self.images:,} images are deeper than 8 bits: {values}"
            if len(self.levels) < MIN_LEVELS:
                text += f": only {len(self.levels)} gray levels are left; set dataset.range=auto or [low,high]"
            yield text
        if self.reduced:
            yield (
                f"{self.reduced:,} color images are deeper than 8 bits: the decoder keeps the upper 8 bits of each "
                "channel, and dataset.range does not apply to them"
            )


def _resolve_range(spec: DatasetSpec, train: Split, reporter: Reporter, store: Store | None) -> ValueRange | None:
    """Return the values that become 0 and 255; with range=auto percentiles of the deep images in train."""
    if spec.range != "auto":
        return spec.range
    images = train.images
    if not isinstance(images, ImageFiles):
        return None
    indices = train.indices.tolist()
    key = None if store is None else _fingerprint_or_none([(images, indices)], None, reporter)
    known = None if store is None or key is None else store.read_notes(RANGE_NOTES).get(key)
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

    with reporter.track("values", len(indices)) as advance:
        parts = []
        for part in map_in_threads(sample, indices, DECODE_CHUNK):
            parts.append(part.astype(np.float32))
            advance(1)
    values = np.concatenate(parts)
    if not len(values):
        return None
    low, high = (float(v) for v in np.percentile(values, PERCENTILES))
    high = high if high > low else low + 1
    if store is not None and key is not None:
        store.add_note(RANGE_NOTES, key, [low, high])
    return low, high


def _without_bad(
    splits: dict[str, Split], spec: DatasetSpec, value_range: ValueRange | None, reporter: Reporter, store: Store | None
) -> tuple[dict[str, Split], list[tuple[str, str]], DeepImages]:
    """Return the splits without images that do not decode, (file, reason) of those, and statistics of deep images.

    Raise BadImagesError if bad images are errors.
    """
    by_source: dict[int, tuple[ImageSource, list[int]]] = {}
    for split in splits.values():
        by_source.setdefault(id(split.images), (split.images, []))[1].extend(split.indices.tolist())
    used = [(images, sorted(indices)) for images, indices in by_source.values()]
    faults, deep = find_bad_images(used, value_range, reporter, store)
    if not faults:
        return splits, [], deep
    bad = [(images, i) for images, indices in used for i in indices if images.key(i) in faults]
    files = [(images.name(i), faults[images.key(i)]) for images, i in bad]
    if files and spec.on_bad is OnBad.error:
        first = ", ".join(f"{file} ({reason})" for file, reason in files[:5])
        more = f" and {len(bad) - 5} more, all in the run's bad_files.csv" if len(bad) > 5 else ""
        raise BadImagesError(f"{_count_bad(bad)}: {first}{more}; dataset.on_bad=skip leaves them out", files)
    left_out = {(id(images), i) for images, i in bad}
    for name, split in splits.items():
        good = [n for n, i in enumerate(split.indices.tolist()) if (id(split.images), i) not in left_out]
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
    used = [(images, indices) for images, indices in used if not isinstance(images, ImageArrays)]
    deep = DeepImages()
    if not used:
        return {}, deep
    key = None if store is None else _fingerprint_or_none(used, value_range, reporter)
    if store is not None and key is not None:
        known: Any = store.read_notes(DECODE_NOTES).get(key)
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
        if not isinstance(images, CachedImages):
            continue
        missing = [index for index in split.indices.tolist() if index not in images.pixels]
        if missing and images.memory.left > 0:
            with reporter.track("decoding", len(missing)) as advance:
                for index, pixels in _decode(images, missing, DeepImages()):
                    if isinstance(pixels, BadImage):
                        raise unreadable(images, index, pixels)
                    if index not in images.pixels:
                        break  # the memory is full
                    advance(1)


def _decode(images: ImageSource, indices: Sequence[int], deep: DeepImages) -> Iterator[tuple[int, Pixels | BadImage]]:
    """Yield each image or its fault, in order. Images are kept in that order too, while there is memory."""
    source = images.images if isinstance(images, CachedImages) else images

    def read(index: int) -> tuple[RawImage | None, Pixels | BadImage]:
        try:
            if not isinstance(source, ImageFiles):
                return None, source.read(index)
            raw = source.read_raw(index)
            return raw, raw.to_pixels(source.value_range)
        except BadImage as error:
            return None, error

    for index, (raw, pixels) in zip(indices, map_in_threads(read, indices, DECODE_CHUNK), strict=True):
        if not isinstance(pixels, BadImage):
            if raw is not None:
                deep.add(raw, pixels)
            if isinstance(images, CachedImages):
                images.store(index, pixels)
        yield index, pixels


def _fingerprint_or_none(used: ImageSelections, value_range: ValueRange | None, reporter: Reporter) -> str | None:
    """Return a digest of all images, the decoder and the range; None if a file cannot be read."""
    digest = hashlib.sha256(f"{decoder()} {value_range}".encode())
    try:
        for images, indices in used:
            digest.update(fingerprint(images, indices, reporter).encode())
            source = images.images if isinstance(images, CachedImages) else images
            if isinstance(source, ImageFiles) and source.digests is not None:
                source.digests.save()
    except BadImagesError:
        return None
    return digest.hexdigest()
