"""Labels that are likely wrong, and near duplicates: planted ones are found, others are not."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tlcli.check import Suspect, check_labels, near_duplicates
from tlcli.data.images import ConcatSplits, ImageFiles, full_split
from tlcli.reporter import Reporter


def clouds(n: int, n_classes: int, seed: int = 0) -> tuple[torch.Tensor, np.ndarray]:
    """Features (n, 16) in one cloud per class, and the classes."""
    random = np.random.default_rng(seed)
    labels = np.arange(n) % n_classes
    centers = random.normal(0, 2, (n_classes, 16))
    return torch.from_numpy((centers[labels] + random.normal(0, 1, (n, 16))).astype(np.float32)), labels


def suspects_of(
    features: torch.Tensor, labels: np.ndarray, n_classes: int, group_of: np.ndarray | None = None
) -> tuple[list[Suspect], dict[str, Any]]:
    groups = np.arange(len(labels)) if group_of is None else group_of
    return check_labels(features, labels, [str(c) for c in range(n_classes)], groups, 0, Reporter())


@pytest.mark.parametrize("n_classes", [2, 5])
def test_changed_labels_are_ranked_first(n_classes: int) -> None:
    features, labels = clouds(200, n_classes)
    changed = np.random.default_rng(1).choice(200, 10, replace=False)
    given = labels.copy()
    given[changed] = (given[changed] + 1) % n_classes
    suspects, metrics = suspects_of(features, given, n_classes)
    first = {i: (suggested, likely) for i, suggested, _, _, likely in suspects[:10]}
    assert {i: suggested for i, (suggested, _) in first.items()} == {i: labels[i] for i in changed}
    assert sum(likely for _, likely in first.values()) >= 6
    assert not any(likely for *_, likely in suspects[10:])
    assert [p for _, _, p, _, _ in suspects] == sorted(p for _, _, p, _, _ in suspects)
    assert all(p < other for _, _, p, other, _ in suspects)
    assert (metrics["suspects"], metrics["likely_wrong"]) == (len(suspects), sum(s[-1] for s in suspects))
    assert metrics["agreement"] == pytest.approx(1 - len(suspects) / 200)
    assert all(0.5 < threshold < 1 for threshold in metrics["thresholds"].values())


def test_a_copy_with_the_same_wrong_label_does_not_confirm_it() -> None:
    features, labels = clouds(100, 2)
    features = torch.cat([features, features[:1].expand(20, -1)])
    given = np.concatenate([labels, np.full(20, 1 - labels[0])])
    given[0] = 1 - labels[0]
    copies = {0, *range(100, 120)}
    grouped = np.concatenate([np.arange(100), np.zeros(20, dtype=int)])
    assert copies <= {i for i, *_ in suspects_of(features, given, 2, grouped)[0]}
    assert not copies & {i for i, *_ in suspects_of(features, given, 2)[0]}


def test_a_class_of_one_image_is_no_suspect_and_makes_no_other_image_likely() -> None:
    """No other image says how its class looks. Images between two classes are suspects, but not clearly wrong."""
    features, labels = clouds(150, 3)
    kept = (labels < 2) | (np.arange(150) == 2)
    between = (features[labels == 0].mean(0) + features[labels == 1].mean(0)) / 2
    given = np.concatenate([labels[kept], np.arange(10) % 2])
    suspects, metrics = suspects_of(torch.cat([features[kept], between.expand(10, -1)]), given, 3)
    assert suspects and {i for i, *_ in suspects} <= set(range(101, 111))
    assert not any(likely for *_, likely in suspects)
    assert metrics["thresholds"]["2"] == 1


def scene(seed: int, size: int = 96) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((size, size), Image.Resampling.BICUBIC)


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality)
    return Image.open(stream).convert("RGB")


def found(folder: Path, images: list[Image.Image], exact: tuple[list[int], ...] = ()) -> list[list[int]]:
    """Return the groups of near duplicates. Features are random: with few images all are neighbors."""
    for i, image in enumerate(images):
        image.save(folder / f"{i}.png")
    files = ImageFiles(folder, [f"{i}.png" for i in range(len(images))])
    features = np.random.default_rng(0).normal(size=(len(images), 4)).astype(np.float32)
    splits = ConcatSplits({"train": full_split(files, [0] * len(images))})
    first = np.arange(len(images))
    for group in exact:
        first[group] = group[0]
    return [group for _, group in near_duplicates(splits, first, features, Reporter())[0]]


@pytest.mark.parametrize(
    "change",
    [
        lambda image: image.resize((48, 48)),
        lambda image: image.resize((144, 144), Image.Resampling.LANCZOS),
        lambda image: jpeg(image, 25),
        lambda image: jpeg(image.resize((64, 64)), 60),
        lambda image: image.convert("L").convert("RGB"),
        lambda image: image.point(lambda v: round(40 + v * 0.7)),
    ],
    ids=["half", "larger", "quality", "smaller and quality", "gray", "contrast"],
)
def test_copies_are_found(tmp_path: Path, change) -> None:
    images = [scene(0), scene(1), change(scene(0)), scene(2)]
    assert found(tmp_path, images) == [[0, 2]]


def test_images_that_differ_in_a_part_are_not_duplicates(tmp_path: Path) -> None:
    """As neighboring slices of a scan do."""
    other = scene(0)
    other.paste(scene(7).resize((40, 40)), (28, 28))
    assert found(tmp_path, [scene(0), other]) == []


def test_plain_images_are_not_duplicates(tmp_path: Path) -> None:
    noise = [np.random.default_rng(i).integers(99, 102, (64, 64, 3), dtype=np.uint8) for i in range(3)]
    assert found(tmp_path, [Image.fromarray(pixels) for pixels in noise]) == []


def test_copies_are_one_group_with_their_exact_copies(tmp_path: Path) -> None:
    images = [jpeg(scene(0), 30 + 4 * i) for i in range(14)] + [scene(1), scene(1), jpeg(scene(0), 30)]
    assert found(tmp_path, images, ([14, 15], [0, 16])) == [[*range(14), 16]]
