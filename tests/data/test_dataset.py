"""Splits are stratified, seeded, disjoint and complete; what does not decode is found; memory has a budget."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.data.samples import digits_spec, folder_spec
from tlcli.data.dataset import Dataset, load_dataset, load_evaluation_split, stratified_split
from tlcli.data.decode import read_image
from tlcli.data.images import ConcatSplits, ImageArrays, Split, full_split, join_splits
from tlcli.errors import BadImagesError, UsageError
from tlcli.reporter import Reporter
from tlcli.specs import DatasetSpec, OnBad
from tlcli.store import Store

MakeFolder = Callable[..., Path]
PARTS = ("train", "val", "test")


def load(spec: DatasetSpec, store: Store | None = None, *, seed: int = 0) -> Dataset:
    return load_dataset(spec, seed=seed, reporter=Reporter(), store=store)


def names(split: Split) -> list[str]:
    return [split.name(i) for i in range(len(split))]


def all_names(data: Dataset) -> list[str]:
    return [name for part in PARTS for name in names(getattr(data, part))]


def counts(data: Dataset) -> list[tuple[int, ...]]:
    return [getattr(data, part).class_counts(len(data.classes)) for part in PARTS]


def test_held_out_is_stratified_disjoint_and_complete_and_one_image_stays() -> None:
    labels = np.array([0] * 40 + [1] * 10 + [2] * 3 + [3] * 2 + [4])
    stay, held = stratified_split(labels, "abcde", 0.2, seed=1, purpose="val")
    assert sorted([*stay, *held]) == list(range(len(labels)))
    assert np.bincount(labels[held], minlength=5).tolist() == [8, 2, 1, 1, 0]
    assert stay.tolist() == sorted(stay)
    assert len(stratified_split(np.array([0, 0, 1]), "ab", 0.99, seed=1, purpose="val")[0]) == 2


def test_not_split(make_folder: MakeFolder) -> None:
    root = make_folder({"a": 16, "b": 8})
    data = load(folder_spec(root))
    assert data.classes == ("a", "b")
    assert counts(data) == [(9, 4), (3, 2), (4, 2)]
    assert sorted(all_names(data)) == sorted(str(path) for path in root.rglob("*.png"))
    assert data.notes == (
        "no test split: 25 % of the images are held out as the test set",
        "no val split: 27.8 % of the training images are held out as val",
    )
    assert all_names(data) == all_names(load(folder_spec(root)))
    assert all_names(data) != all_names(load(folder_spec(root), seed=1))


def test_folds_are_a_stratified_partition_of_train_and_val_with_duplicates_together(make_folder: MakeFolder) -> None:
    root = make_folder({"train/a": 14, "train/b": 7, "val/a": 4, "val/b": 5, "test/a": 2, "test/b": 2})
    copies = [root / "train/a/000.png", root / "train/a/005.png", root / "val/a/003.png"]
    for copy in copies[1:]:
        copy.write_bytes(copies[0].read_bytes())
    load = lambda seed=0: load_dataset(folder_spec(root), seed=seed, reporter=Reporter(), folds=4)  # noqa: E731
    data = load()
    assert counts(data) == [(18, 12), (0, 0), (2, 2)]
    parts = [data.without_fold(fold) for fold in range(4)]
    held = [names(part.val) for part in parts]
    assert sorted(name for part in held for name in part) == sorted(names(data.train))
    assert all(sorted(all_names(part)) == sorted(names(data.train)) for part in parts)  # and no test images
    assert all(part.train.images is part.val.images is data.train.images for part in parts)
    assert {part.val.class_counts(2)[1] for part in parts} == {3}
    assert all(3 <= part.val.class_counts(2)[0] <= 6 for part in parts)
    assert [len(part) for part in held if str(copies[0]) in part and all(str(copy) in part for copy in copies)]
    assert held == [names(load().without_fold(fold).val) for fold in range(4)]
    assert held != [names(load(1).without_fold(fold).val) for fold in range(4)]
    label = data.classes.index("b")
    assert all((data.train.labels[i] == label) == ("/b/" in data.train.key(i)) for i in range(len(data.train)))
    with pytest.raises(UsageError, match="folds=13: class 'b' has only 12 images"):
        load_dataset(folder_spec(root), seed=0, reporter=Reporter(), folds=13)


def test_folds_without_copies_are_stratified(make_folder: MakeFolder) -> None:
    root = make_folder({"train/a": 21, "train/b": 10, "test/a": 1, "test/b": 1})
    data = load_dataset(folder_spec(root), seed=0, reporter=Reporter(), folds=5)
    parts = [data.without_fold(fold).val for fold in range(5)]
    assert sorted(part.class_counts(2) for part in parts) == [(4, 2)] * 4 + [(5, 2)]
    assert sorted(name for part in parts for name in names(part)) == sorted(names(data.train))


def test_folds_need_as_many_different_images(make_folder: MakeFolder) -> None:
    root = make_folder({"train/a": 4, "train/b": 4, "test/a": 1, "test/b": 1})
    for copy in root.glob("train/*/*.png"):
        copy.write_bytes((copy.parent / "000.png").read_bytes())
    with pytest.raises(UsageError, match="folds=3: only 2 of the images differ; add some, or use fewer folds"):
        load_dataset(folder_spec(root), seed=0, reporter=Reporter(), folds=3)


def test_a_fifth_that_is_left_out_has_no_copies_that_train(make_folder: MakeFolder) -> None:
    root = make_folder({"train/a": 20, "train/b": 20, "test/a": 1, "test/b": 1})
    for i in range(10):
        (root / f"train/a/{i + 10:03}.png").write_bytes((root / f"train/a/{i:03}.png").read_bytes())
    whole = load(folder_spec(root))
    part = whole.without_fifth(seed=0)
    train, val = (
        {digest.tobytes() for digest in split.images.digests(split.indices, Reporter())}
        for split in (part.train, part.val)
    )
    assert not train & val
    assert sorted([*part.train.indices, *part.val.indices]) == sorted(whole.train.indices) and len(part.val)


def test_each_fold_leaves_images_of_each_class(make_folder: MakeFolder) -> None:
    root = make_folder({"train/a": 6, "train/b": 3, "test/a": 1, "test/b": 1})
    for copy in root.glob("train/b/*.png"):
        copy.write_bytes((copy.parent / "000.png").read_bytes())
    with pytest.raises(UsageError, match=r"without fold \d \(all copies .* in one fold\): class 'b' has no training"):
        load_dataset(folder_spec(root), seed=0, reporter=Reporter(), folds=3)


@pytest.mark.parametrize(("per_class", "note"), [(3, "all training images train"), (4, "25 % of the training images")])
def test_small_classes_are_held_out_only_if_a_tenth_is_enough(
    per_class: int, note: str, make_folder, monkeypatch
) -> None:
    monkeypatch.setattr("tlcli.data.dataset.MIN_VALIDATION_IMAGES", 20)
    root = make_folder({f"{split}/{i}": n for split, n in (("train", per_class), ("test", 1)) for i in range(60)})
    data = load_dataset(folder_spec(root, val_fraction=None), seed=0, reporter=Reporter(), decode=False)
    assert len(data.val) == (60 if per_class == 4 else 0)
    assert any(note in line for line in data.notes)


def test_images_of_several_sources_keep_their_names_and_pixels_when_joined() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), dtype=np.uint8)
    one = full_split(ImageArrays(pixels[:3], "x/train"), [0, 1, 0])
    other = full_split(ImageArrays(pixels[3:], "x/val"), [1, 0])
    joined = join_splits(ConcatSplits({"train": one.take(np.array([2, 0])), "val": other}))
    assert [joined.key(i) for i in range(4)] == ["x/train/2", "x/train/0", "x/val/0", "x/val/1"] == names(joined)
    assert np.array_equal([joined.read(i) for i in range(4)], pixels[[2, 0, 3, 4]])
    assert joined.labels.tolist() == [0, 0, 1, 0]
    assert joined.images.digest(2) == other.images.digest(0)


def test_pixels_and_labels_are_those_of_the_files(make_folder: MakeFolder) -> None:
    data = load(folder_spec(make_folder({f"{s}/{c}": n for s, n in zip(PARTS, (5, 3, 4), strict=True) for c in "ab"})))
    assert counts(data) == [(5, 5), (3, 3), (4, 4)]
    assert data.notes == ()
    for split in (data.train, data.val, data.test):
        for i in range(len(split)):
            assert Path(split.name(i)).parent.name == data.classes[split.labels[i]]
            assert np.array_equal(split.read(i), read_image(Path(split.name(i))))


def test_train_and_val(make_folder: MakeFolder) -> None:
    data = load(folder_spec(make_folder({"train/a": 8, "train/b": 4, "val/a": 3, "val/b": 2})))
    assert counts(data) == [(6, 3), (2, 1), (3, 2)]
    assert all("/val/" in name for name in names(data.test))
    assert all("/train/" in name for name in names(data.val))
    assert data.notes[0] == "no test split: the val split is the test set"


def test_a_subset_is_a_function_of_the_seed_and_the_files(make_folder: MakeFolder) -> None:
    root = make_folder({f"{split}/{c}": 12 for split in ("train", "test") for c in "abc"})
    few, more = (load(folder_spec(root, train_per_class=n)) for n in (4, 8))
    assert set(names(few.train) + names(few.val)) < set(names(more.train) + names(more.val))
    without_b = load(folder_spec(root, train_per_class=4, test_per_class=2, classes=["a", "c"]))
    assert [n for n in names(few.train) if "/b/" not in n] == names(without_b.train)
    assert names(few.train) != names(load(folder_spec(root, train_per_class=4), seed=5).train)


def test_too_few_images(make_folder: MakeFolder) -> None:
    with pytest.raises(UsageError, match="too few images, none is left for val"):
        load(folder_spec(make_folder({"a": 2, "b": 2})))


def test_a_class_of_one_image_trains(make_folder: MakeFolder) -> None:
    data = load(folder_spec(make_folder({"train/a": 1, "train/b": 8, "test/a": 1, "test/b": 1})))
    assert counts(data) == [(1, 6), (0, 2), (1, 1)]
    assert "val has no images of a" in data.notes


def test_digits() -> None:
    data = load(digits_spec(train_per_class=20))
    assert data.classes == tuple("0123456789")
    assert counts(data)[:2] == [(15,) * 10, (5,) * 10]
    images = np.stack([data.train.read(i) for i in range(len(data.train))])
    assert (images.shape, images.dtype, images.max()) == ((150, 8, 8, 3), np.uint8, 255)
    assert data.train.name(0).startswith("digits/")


def damage(root: Path, *places: str) -> None:
    for place in places:
        (root / place).write_bytes(b"<html>")


def test_bad_files_are_an_error_of_five_names(make_folder: MakeFolder) -> None:
    root = make_folder({"a": 10, "b": 10})
    damage(root, *(f"a/{i:03}.png" for i in range(7)))
    more = "and 2 more, which `tlcli data check` lists"
    with pytest.raises(BadImagesError, match=rf"^7 files do not decode: .* {more}; dataset.on_bad=skip") as caught:
        load(folder_spec(root))
    assert str(caught.value).count("(not an image)") == 5


def test_a_class_that_loses_all_is_an_error_that_names_a_bad_file(make_folder: MakeFolder) -> None:
    root = make_folder({"train/a": 2, "train/b": 4, "test/a": 2, "test/b": 2})
    damage(root, "train/a/000.png", "train/a/001.png")
    words = (
        r"class 'a' has no training image left; .*; 2 of the files do not decode, .*train/a/000\.png \(not an image\)"
    )
    with pytest.raises(UsageError, match=words):
        load(folder_spec(root, on_bad=OnBad.skip))


def test_a_split_that_loses_all_is_an_error_that_names_a_bad_file(make_folder: MakeFolder) -> None:
    root = make_folder({"train/a": 4, "train/b": 4, "test/a": 1, "test/b": 1})
    damage(root, "test/a/000.png", "test/b/000.png")
    spec, found = (
        folder_spec(root, on_bad=OnBad.skip),
        r".*; 2 of the files do not decode, .*test/a/000\.png \(not an image\)",
    )
    with pytest.raises(UsageError, match=f"none is left for test{found}"):
        load(spec)
    with pytest.raises(UsageError, match=f"no image is left to evaluate on{found}"):
        load_evaluation_split(spec, "test", seed=0, reporter=Reporter())
