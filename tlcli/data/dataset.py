"""A dataset ready for use: classes, and train, val and test splits of images that are known to decode."""

import hashlib
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypedDict, TypeVar

import numpy as np
from msgspec import ValidationError, convert, to_builtins

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
    join_splits,
    map_in_threads,
    positions_by_class,
    tracked_map,
)
from tlcli.errors import BadImagesError, UsageError
from tlcli.reporter import Reporter
from tlcli.specs import VAL_FRACTION, DatasetSpec, OnBad, Verify
from tlcli.store import Store
from tlcli.text import join_limited

T = TypeVar("T")
MIN_VALIDATION_IMAGES = 200  # with fewer, choosing an epoch by them costs more than the overfitting that it prevents
DECODE_CHUNK = 4  # images per task: its cost is small, and large photographs do not fill the memory
PERCENTILES = (0.1, 99.9)
PERCENTILE_SAMPLE = 1 << 24  # pixels of all training images from which the percentiles are computed
ImageSelections = Sequence[tuple[ImageSource, Ints]]
DECODE_NOTES, RANGE_NOTES = "images", "ranges"


@dataclass(frozen=True, eq=False)
class Dataset:
    """Three disjoint splits, lines for the plan, (file, reason) of images left out, and the range of deep images.

    Val is empty for a small dataset, and with `folds`, the fold of each training image.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    val: Split
    test: Split
    notes: tuple[str, ...]
    bad_files: tuple[tuple[str, str], ...]
    value_range: ValueRange | None = None
    folds: Ints | None = None

    def without_fold(self, fold: int) -> "Dataset":
        """Return the dataset that has the images of a fold in val, not in train, and an empty test."""
        assert self.folds is not None
        train, val = (self.train.take(np.flatnonzero(held == (self.folds == fold))) for held in (False, True))
        name = f"{self.name} without fold {fold + 1} (all copies of an image are in one fold)"
        list(_check_counts({"train": train, "val": val}, self.classes, name))
        return replace(self, train=train, val=val, test=self.test.take(np.arange(0)))

    def without_fifth(self, seed: int) -> "Dataset":
        """Return the dataset that has a fifth of each class's training images in val, and an empty test.

        Images stay in train that have a copy there.
        """
        _, held = stratified_split(self.train.labels, self.classes, 0.2, seed=seed, purpose="first fit")
        first = ConcatSplits({"train": self.train}).first_copies(Reporter())
        if (is_alone := ~np.isin(first[held], np.delete(first, held))).any():
            held = held[is_alone]
        return replace(self, folds=np.isin(np.arange(len(self.train)), held).astype(np.int64)).without_fold(1)

    @property
    def splits(self) -> dict[str, Split]:
        return {"train": self.train, "val": self.val, "test": self.test}

    @property
    def can_select(self) -> bool:
        """True if val has enough images to select an epoch by them."""
        return len(self.val) >= MIN_VALIDATION_IMAGES


@dataclass(frozen=True, eq=False)
class EvaluationSplit:
    """One split of a dataset as it is; `split_name` is train, val, test, or all of a dataset without splits."""

    classes: tuple[str, ...]
    split_name: str
    split: Split
    bad_files: tuple[tuple[str, str], ...]


class DecodeResult(TypedDict):
    """The key and the fault of each image that does not decode, and statistics of deep images."""

    bad: dict[str, str]
    deep: DeepImages


def load_dataset(
    spec: DatasetSpec,
    *,
    seed: int,
    reporter: Reporter,
    store: Store | None = None,
    decode: bool = True,
    folds: int | None = None,
) -> Dataset:
    """Load the images of `spec`, split and limited. They stay in memory up to `spec.ram_gb`. Raise TlcliError.

    All are decoded to find damaged ones; with `decode=False` none is read, except for range=auto. Which image is in
    which split is a function of the seed and of the sorted names of each class's files. With `folds`, the source's
    train and val are one pool in that many folds, stratified by class and with exact duplicates in the same one.
    """
    source: Source = spec.load(reporter)
    bad, fold_of = list[tuple[str, str]](), None
    splits, notes = _divide(source, spec, seed) if folds is None else _pool(source, spec, seed)
    value_range = _set_up_images(splits, spec, reporter, store)
    if decode:
        splits, bad, deep = without_bad(splits, spec, reporter, store)
        notes += [f"files that do not decode are left out: {len(bad):,}, see bad_files.csv"] if bad else []
        notes += deep.notes(value_range)
        notes += _check_counts(splits, source.classes, spec.name, bad)
        notes += _duplicate_notes(splits, source.classes, reporter)
    if folds is not None:
        from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

        pool = splits["train"]
        n, smallest = min(zip(pool.class_counts(len(source.classes)), source.classes, strict=True))
        if n < folds:
            remedy = "add some, leave it out, or use fewer folds"
            raise UsageError(f"folds={folds}: class {smallest!r} has only {n} images; {remedy}")
        groups, fold_of = ConcatSplits({"train": pool}).first_copies(reporter), np.empty(len(pool), dtype=np.int64)
        if (n := len(np.unique(groups))) < folds:
            raise UsageError(f"folds={folds}: only {n} of the images differ; add some, or use fewer folds")
        options, parts = {"n_splits": folds, "shuffle": True, "random_state": seed}, (groups, pool.labels)
        if n == len(groups):
            held_out = StratifiedKFold(**options).split(*parts)
        else:  # this takes 0.2 ms per image, and a table of images by classes
            held_out = StratifiedGroupKFold(**options).split(*parts, groups)
        for fold, (_, held) in enumerate(held_out):
            fold_of[held] = fold
        notes.append(f"folds={folds}: each of the {len(pool):,} images is held out once; the last epoch is kept")
    empty = splits["train"].take(np.arange(0))
    dataset = Dataset(
        spec.name,
        source.classes,
        **{name: splits.get(name, empty) for name in ("train", "val", "test")},
        notes=tuple(notes),
        bad_files=tuple(bad),
        value_range=value_range,
        folds=None if folds is None else fold_of,
    )
    for fold in range(folds or 0):
        dataset.without_fold(fold)  # raises UsageError if a class is in this fold alone
    return dataset


def load_evaluation_split(
    spec: DatasetSpec, split_name: str | None, *, seed: int, reporter: Reporter, store: Store | None = None
) -> EvaluationSplit:
    """Load a split as it is, up to `spec.test_per_class`: by its name, else test, val or all images. Raise TlcliError.

    Statistics of images deeper than 8 bits go to the reporter.
    """
    source: Source = spec.load(reporter, for_training=False)
    chosen = split_name or next(name for name in ("test", "val", "all", "train") if name in source.splits)
    if chosen not in source.splits:
        present = "it is not split" if "all" in source.splits else f"it has {' and '.join(source.splits)}"
        raise UsageError(f"split={chosen}: {spec.name} has no such split ({present}); omit split= to evaluate it")
    split = limit_per_class(source.splits[chosen], source.classes, spec.test_per_class, seed, "test_per_class")
    value_range = _set_up_images({chosen: split}, spec, reporter, store)
    splits, bad, deep = without_bad({chosen: split}, spec, reporter, store)
    for note in deep.notes(value_range):
        reporter.note(note)
    if len(splits[chosen]) == 0:
        raise UsageError(f"{spec.name}: no image is left to evaluate on{_bad_files_hint(bad)}")
    return EvaluationSplit(source.classes, chosen, splits[chosen], tuple(bad))


def images_by_key(spec: DatasetSpec, value_range: ValueRange | None) -> dict[str, Callable[[], Pixels]]:
    """Return by key a function per image that decodes it or raises BadImage. Nothing is downloaded.

    Raise UsageError or OSError if the dataset cannot be read.
    """
    splits: Mapping[str, Split] = spec.offline().load(Reporter()).splits
    for split in splits.values():
        if isinstance(split.images, ImageFiles) and value_range and value_range[0] < value_range[1]:
            split.images.value_range = value_range
    return {s.images.key(i): partial(s.images.decode, i) for s in splits.values() for i in s.indices.tolist()}


def _set_up_images(
    splits: Mapping[str, Split], spec: DatasetSpec, reporter: Reporter, store: Store | None
) -> ValueRange | None:
    """Give the images their memory, record of digests and range. Return the range; auto is that of the first split."""
    files = [s.images for s in splits.values() if isinstance(s.images, ImageFiles)]
    memory = MemoryBudget(int(spec.ram_gb * 1e9))
    record = DigestRecord(store, files[0].root, verify_all=spec.verify is Verify.full) if store and files else None
    for split in splits.values():
        if not isinstance(split.images, ImageArrays):
            split.images.memory, split.images.record = memory, record
    value_range = _percentiles(next(iter(splits.values())), reporter, store) if spec.range == "auto" else spec.range
    for images in files:
        images.value_range = value_range
    return value_range


def _bad_files_hint(bad: Sequence[tuple[str, str]]) -> str:
    """Return text about files that do not decode, for an error that they may explain; "" if all do."""
    return f"; {len(bad):,} of the files do not decode, one is {bad[0][0]} ({bad[0][1]})" if bad else ""


def _check_counts(
    splits: Mapping[str, Split], classes: Sequence[str], name: str, bad: Sequence[tuple[str, str]] = ()
) -> Iterator[str]:
    """Yield a note for each split that lacks classes. Raise UsageError if training or evaluation is impossible."""
    for split_name, split in splits.items():
        absent = [c for c, n in zip(classes, split.class_counts(len(classes)), strict=True) if n == 0]
        if absent and split_name == "train":
            remedy = f"add some, or leave it out{_bad_files_hint(bad)}"
            raise UsageError(f"{name}: class {absent[0]!r} has no training image left; {remedy}")
        if len(split) == 0:
            remedy = f"give each class at least three{_bad_files_hint(bad)}"
            raise UsageError(f"{name}: too few images, none is left for {split_name}; {remedy}")
        if absent:
            yield f"{split_name} has no images of {join_limited(absent)}"


def _divide(source: Source, spec: DatasetSpec, seed: int) -> tuple[dict[str, Split], list[str]]:
    """Return train, test and, unless the set is too small, val; and a note for each that the source does not have."""
    train = source.splits["all" if "all" in source.splits else "train"]
    val, test, notes = source.splits.get("val"), source.splits.get("test"), list(source.notes)
    if test is None and val is not None:
        test, val = val, None
        notes.append("no test split: the val split is the test set")
    if test is None:
        stay, held = stratified_split(train.labels, source.classes, spec.test_fraction, seed=seed, purpose="test")
        train, test = train.take(stay), train.take(held)
        share = 100 * len(test) / (len(train) + len(test))
        notes.append(f"no test split: {share:.3g} % of the images are held out as the test set")
    train = limit_per_class(train, source.classes, spec.train_per_class, seed, "train_per_class")
    test = limit_per_class(test, source.classes, spec.test_per_class, seed, "test_per_class")
    if val is not None:
        return {"train": train, "val": val, "test": test}, notes
    fraction = VAL_FRACTION if spec.val_fraction is None else spec.val_fraction
    stay, held = stratified_split(train.labels, source.classes, fraction, seed=seed, purpose="val")
    # of many small classes, one image each is far more than this fraction
    if spec.val_fraction is None and min(len(held), fraction * len(train)) < MIN_VALIDATION_IMAGES:
        remedy = f"dataset.val_fraction={fraction:g} holds images out"
        notes.append(f"no val split: all training images train, and the last epoch is kept ({remedy})")
        return {"train": train, "test": test}, notes
    notes.append(f"no val split: {100 * len(held) / len(train):.3g} % of the training images are held out as val")
    return {"train": train.take(stay), "val": train.take(held), "test": test}, notes


def _pool(source: Source, spec: DatasetSpec, seed: int) -> tuple[dict[str, Split], list[str]]:
    """Return the images of all folds as train, and test if the source has it; and notes."""
    parts = {name: source.splits[name] for name in ("all", "train", "val") if name in source.splits}
    pool = join_splits(ConcatSplits(parts)) if len(parts) > 1 else next(iter(parts.values()))
    splits = {"train": limit_per_class(pool, source.classes, spec.train_per_class, seed, "train_per_class")}
    notes, test = list(source.notes), source.splits.get("test")
    if test is None:
        notes.append("no test split: there is no test result, only that of cross-validation")
    else:
        splits["test"] = limit_per_class(test, source.classes, spec.test_per_class, seed, "test_per_class")
    return splits, notes


def limit_per_class(split: Split, classes: Sequence[str], limit: int | None, seed: int, purpose: str) -> Split:
    """Return at most `limit` images per class, in order; a smaller choice is part of a larger one."""
    if limit is None:
        return split
    parts = _shuffled_by_class(split.labels, classes, seed, purpose)
    return split.take(np.sort(np.concatenate([part[:limit] for part in parts])))


def stratified_split(
    labels: Ints, classes: Sequence[str], fraction: float, *, seed: int, purpose: str
) -> tuple[Ints, Ints]:
    """Return positions that stay and positions that are held out, each ascending: of each class a rounded fraction.

    At least one image is held out, but one always stays. A class's choice does not depend on the others.
    """
    stay, held = [], []
    for part in _shuffled_by_class(labels, classes, seed, purpose):
        n = min(max(1, int(len(part) * fraction + 0.5)), max(0, len(part) - 1))
        held.append(part[:n])
        stay.append(part[n:])
    return np.sort(np.concatenate(stay)), np.sort(np.concatenate(held))


def _shuffled_by_class(labels: Ints, classes: Sequence[str], seed: int, purpose: str) -> Iterator[Ints]:
    for name, part in zip(classes, positions_by_class(labels, len(classes)), strict=True):
        yield np.random.default_rng([seed, zlib.crc32(f"{purpose}/{name}".encode())]).permutation(part)


def _percentiles(train: Split, reporter: Reporter, store: Store | None) -> ValueRange | None:
    """Return PERCENTILES of the values of the deep images in a split; None if there are none."""
    images, indices = train.images, train.indices
    if not isinstance(images, ImageFiles):
        return None
    size, temporary = max(1, PERCENTILE_SAMPLE // max(1, len(indices))), list[BadImage]()

    def sample(index: int) -> np.ndarray[Any, Any]:
        try:
            raw = images.read_raw(index)
            if raw.is_deep:
                values: np.ndarray[Any, Any] = raw.values[np.isfinite(raw.values)]
                return values[:: max(1, -(-len(values) // size))].astype(np.float32)
        except BadImage as error:
            temporary.extend([error] if error.may_pass else [])
        return np.empty(0, dtype=np.float32)

    def compute() -> ValueRange | None:
        values = np.concatenate(list(tracked_map(sample, indices.data, DECODE_CHUNK, reporter, "values")))
        if not len(values):
            return None
        low, high = (float(v) for v in np.percentile(values, PERCENTILES))
        return low, high if high > low else low + max(1.0, abs(low) * 1e-6)

    return _compute_once(compute, ValueRange | None, store, RANGE_NOTES, [(images, indices)], reporter, temporary)


def without_bad(
    splits: dict[str, Split], spec: DatasetSpec, reporter: Reporter, store: Store | None
) -> tuple[dict[str, Split], list[tuple[str, str]], DeepImages]:
    """Return the splits without images that do not decode, (file, reason) of those, and statistics of deep images.

    All images are decoded, unless the store knows the result. Raise BadImagesError if bad images are errors.
    """
    by_source: dict[ImageSource, list[Ints]] = {}
    for split in splits.values():
        if not isinstance(split.images, ImageArrays):
            by_source.setdefault(split.images, []).append(split.indices)
    used = [(images, np.sort(np.concatenate(indices))) for images, indices in by_source.items()]

    temporary = list[BadImage]()

    def decode_all() -> DecodeResult:
        bad, deep = dict[str, str](), DeepImages()
        with reporter.track("decoding", sum(len(indices) for _, indices in used)) as advance:
            for images, indices in used:
                for index, pixels in _decode(images, indices, deep):
                    if isinstance(pixels, BadImage):
                        bad[images.key(index)] = str(pixels)
                        temporary.extend([pixels] if pixels.may_pass else [])
                    advance(1)
        return {"bad": bad, "deep": deep}

    if not used:
        return splits, [], DeepImages()
    result = _compute_once(decode_all, DecodeResult, store, DECODE_NOTES, used, reporter, temporary)
    bad = result["bad"]
    everything = ((images, i) for images, indices in used if bad for i in indices.tolist())
    files = [(images.name(i), bad[images.key(i)]) for images, i in everything if images.key(i) in bad]
    if files and spec.on_bad is OnBad.error:
        count = "1 file does not decode" if len(files) == 1 else f"{len(files):,} files do not decode"
        first = ", ".join(f"{file} ({reason})" for file, reason in files[:5])
        more = f" and {len(files) - 5} more, which `tlcli data check` lists" if len(files) > 5 else ""
        raise BadImagesError(f"{count}: {first}{more}; dataset.on_bad=skip leaves them out", files)
    for name, split in splits.items() if files else ():
        splits[name] = split.take(np.array([i for i in range(len(split)) if split.key(i) not in bad], dtype=np.int64))
    return splits, files, result["deep"]


def _compute_once(
    compute: Callable[[], T],
    kind: Any,
    store: Store | None,
    notes: str,
    used: ImageSelections,
    reporter: Reporter,
    temporary: Sized,
) -> T:
    """Return the stored result for these bytes and names, decoder and range, else what `compute` returns.

    That is stored, unless `compute` adds errors to `temporary`, which may not come again.
    """
    if store is None:
        return compute()
    value_range = next((images.value_range for images, _ in used if isinstance(images, ImageFiles)), None)
    digest = hashlib.sha256(f"{decoder()} {value_range}".encode())
    try:
        for images, indices in used:
            digest.update(images.fingerprint(indices, reporter).encode())
    except BadImagesError:
        return compute()
    with suppress(KeyError, ValidationError):  # unknown, or damaged
        result: T = convert(store.read_notes(notes)[digest.hexdigest()], kind)
        return result
    result = compute()
    if not temporary:
        store.add_note(notes, digest.hexdigest(), to_builtins(result))
    return result


def preload_images(splits: Iterable[Split], reporter: Reporter) -> None:
    """Decode ahead, in threads, as many images as fit in memory, the first split first. Raise BadImagesError.

    What a DataLoader worker decodes is lost to the others; what was in memory before is shared.
    """
    for split in splits:
        images = split.images
        missing = np.setdiff1d(split.indices, list(images.pixels))
        if len(missing) and images.memory is not None and images.memory.left > 0:
            with reporter.track("decoding", len(missing)) as advance:
                for index, pixels in _decode(images, missing, DeepImages()):
                    if isinstance(pixels, BadImage):
                        raise BadImagesError(f"{images.name(index)}: {pixels}")
                    if index not in images.pixels:
                        break  # the memory is full
                    advance(1)


def _decode(images: ImageSource, indices: Ints, deep: DeepImages) -> Iterator[tuple[int, Pixels | BadImage]]:
    """Yield each image or its fault, in order. Images are kept in that order too, while there is memory."""

    def decode(index: int) -> tuple[RawImage | None, Pixels | BadImage]:
        try:
            if not isinstance(images, ImageFiles):
                return None, images.decode(index)
            raw = images.read_raw(index)
            return raw, raw.to_pixels(images.value_range)
        except BadImage as error:
            return None, error

    decoded = map_in_threads(decode, indices.data, DECODE_CHUNK)
    for index, (raw, pixels) in zip(indices.data, decoded, strict=True):
        if not isinstance(pixels, BadImage):
            if raw is not None:
                deep.add(raw, pixels)
            images.store(index, pixels)
        yield index, pixels


def _duplicate_notes(splits: Mapping[str, Split], classes: Sequence[str], reporter: Reporter) -> Iterator[str]:
    """Yield a line for each way in which exact duplicates make a metric of a run wrong."""
    images = ConcatSplits(splits)
    first = images.first_copies(reporter)
    for split, others, metric in (("test", ("train", "val"), "test"), ("val", ("train",), "validation")):
        if len(rows := images.duplicates_across(first, split, others)):
            sources = [o for o in others if len(images.duplicates_across(first, o, (split,)))]
            count = f"{len(rows):,} image{'s' * (len(rows) > 1)} of {split}"
            i = rows[np.argmin(first[rows])]
            copy = np.flatnonzero((first == first[i]) & np.isin(images.split_names, others))[0]
            example = f"e.g. {images.key(i)} = {images.key(copy)}"
            remedy = f"{metric} accuracy is too high; `tlcli data check` lists them"
            yield f"{count} also in {' and '.join(sources)} (exact duplicates), {example}: {remedy}"
    rows = images.label_conflicts(first)
    rows = rows[images.split_names[rows] == "train"]  # the first copy is in train, too
    if n := len(np.unique(first[rows])):
        i = rows[np.argmin(first[rows])]
        example = " = ".join(f"{images.key(i)} ({classes[images.labels[i]]})" for i in (first[i], i))
        remedy = "at most one is right; `tlcli data check` lists them"
        count = f"{n:,} image{'s' * (n > 1)} of train"
        yield f"{count} with several labels (exact duplicates), e.g. {example}: {remedy}"
