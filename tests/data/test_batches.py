"""Order and augmentation are functions of (seed, epoch, index); the number of workers changes nothing."""

import multiprocessing
import os
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.data.samples import save_image
from tlcli.data.augment import CropSpec, TrivialAugmentSpec
from tlcli.data.batches import Batch, ImageBatches, Preprocessing, balanced_order, epoch_order
from tlcli.data.images import ImageArrays, ImageFiles, ImageSource, Split, full_split
from tlcli.errors import BadImagesError
from tlcli.specs import Fit

PREPROCESSING = Preprocessing(8, Fit.squash, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
CROP: dict[str, Any] = {"scale": (0.35, 1), "ratio": (0.75, 1.3), "flip": 0.5}
SPLIT = full_split(
    ImageArrays(np.random.default_rng(0).integers(0, 256, (11, 10, 12, 3), dtype=np.uint8), "noise"), range(11)
)
"""11 images whose class is their position."""


def augmented(workers: int, batch_size: int = 4) -> ImageBatches:
    augmentation = TrivialAugmentSpec(erasing=0.5, mixup=0.0, cutmix=0.0, **CROP).build(PREPROCESSING)
    return ImageBatches(SPLIT, PREPROCESSING, batch_size=batch_size, workers=workers, augmentation=augmentation, seed=7)


def same(one: list[Batch], other: list[Batch]) -> bool:
    pairs = zip(one, other, strict=True)
    return all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in pairs)


@pytest.mark.parametrize("workers", [0, 2])
def test_in_order(workers: int) -> None:
    batches = ImageBatches(SPLIT, PREPROCESSING, batch_size=4, workers=workers)
    found = list(batches.in_order())
    assert [len(y) for _, y in found] == [4, 4, 3]
    assert len(batches) == 3
    assert torch.cat([y for _, y in found]).tolist() == list(range(11))
    x = torch.cat([x for x, _ in found])
    assert (x.dtype, found[0][1].dtype) == (torch.uint8, torch.int64)
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x, _ in found)
    assert all(torch.equal(x[i], PREPROCESSING.apply(SPLIT.read(i))) for i in range(11))


def test_workers_change_nothing() -> None:
    def epochs(workers: int) -> list[Batch]:
        torch.manual_seed(workers)
        state = torch.get_rng_state()
        found = [batch for number in (1, 2) for batch in augmented(workers).epoch(number)]
        assert torch.equal(torch.get_rng_state(), state), "the global generator moved on"
        return found

    assert same(epochs(0), epochs(2))


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no process groups")
def test_a_signal_for_the_process_group_does_not_reach_workers() -> None:
    """Terminals, `timeout` and torchrun send it to the group, and the run then saves its state."""
    batches = augmented(workers=1).epoch(1)
    next(batches)
    (worker,) = multiprocessing.active_children()
    assert worker.pid is not None
    assert os.getpgid(worker.pid) == worker.pid != os.getpgrp()


def test_a_view_is_the_same_in_any_order() -> None:
    batches = augmented(0)
    ordered = {view: torch.cat([x for x, _ in batches.in_order(view)]) for view in (0, 1, 2)}
    assert not torch.equal(ordered[1], ordered[2])
    assert sorted(epoch_order(11, 7, 1)) == list(range(11)) != epoch_order(11, 7, 1).tolist()
    assert epoch_order(11, 7, 1).tolist() != epoch_order(11, 7, 2).tolist()
    for number, view in ((1, None), (5, 1), (1, 2), (3, 0)):
        x, y = (torch.cat(parts) for parts in zip(*batches.epoch(number, view), strict=True))
        assert y.tolist() == epoch_order(11, 7, number).tolist(), "the order is the epoch's"
        assert torch.equal(x, ordered[number if view is None else view][y]), "the augmentation is the view's"
        assert same(list(batches.epoch(number, view, start=1)), list(batches.epoch(number, view))[1:])


def test_a_balanced_epoch_has_each_class_equally_often_and_repeats_an_image_only_after_all_of_its_class() -> None:
    labels = np.array([0] * 7 + [1] * 2 + [2] * 2)
    orders = [balanced_order(labels, 3, epoch) for epoch in (1, 2)]
    assert orders[0].tolist() != orders[1].tolist()
    for order in orders:
        assert len(set(order.tolist())) == len(order) == 11
        assert sorted(np.bincount(labels[order % 11]).tolist()) == [3, 4, 4]
        times = np.bincount(order % 11, minlength=11)
        assert all(times[labels == c].max() - times[labels == c].min() <= 1 for c in range(3))
    split = Split(SPLIT.images, SPLIT.indices, labels)
    batches = ImageBatches(split, PREPROCESSING, batch_size=4, workers=0, balanced=True, seed=3)
    assert torch.cat([y for _, y in batches.epoch(1)]).tolist() == labels[orders[0] % 11].tolist()


def test_a_repeated_image_of_a_balanced_epoch_has_its_view() -> None:
    split = Split(SPLIT.images, SPLIT.indices, np.array([0] * 9 + [1, 1]))
    crop = CropSpec(erasing=0.0, mixup=0.0, cutmix=0.0, **CROP).build(PREPROCESSING)
    batches = ImageBatches(split, PREPROCESSING, batch_size=4, workers=0, balanced=True, seed=3, augmentation=crop)
    stored = torch.cat([x for x, _ in batches.in_order(1)])
    order = balanced_order(split.labels, 3, 5) % 11
    assert torch.equal(torch.cat([x for x, _ in batches.epoch(5, view=1)]), stored[order.tolist()])
    assert not torch.equal(
        torch.cat([x for x, _ in batches.epoch(1)]), stored[(balanced_order(split.labels, 3, 1) % 11).tolist()]
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_large_images_are_decoded_one_at_a_time(workers: int) -> None:
    class Photos(ImageSource):
        alive = 0

        def __len__(self) -> int:
            return 8

        def decode(self, index: int) -> np.ndarray:
            image = np.zeros((700, 600, 3), dtype=np.uint8)
            Photos.alive += 1
            weakref.finalize(image, self.gone)
            assert Photos.alive <= 3
            return image

        def gone(self) -> None:
            Photos.alive -= 1

        def name(self, index: int) -> str:
            return str(index)

    crop = CropSpec(erasing=0.0, mixup=0.0, cutmix=0.0, **CROP).build(PREPROCESSING)
    split = full_split(Photos(), [0] * 8)
    batches = ImageBatches(split, PREPROCESSING, batch_size=8, workers=workers, augmentation=crop)
    assert [len(y) for _, y in (*batches.in_order(), *batches.epoch(0))] == [8, 8]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_is_gone_is_named(tmp_path: Path, workers: int) -> None:
    paths = [save_image(tmp_path / f"{i}.png", seed=i) for i in range(4)]
    split = Split(ImageFiles(tmp_path, [path.name for path in paths]), np.arange(4), np.arange(4))
    batches = ImageBatches(split, PREPROCESSING, batch_size=2, workers=workers)
    assert len(list(batches.in_order())) == 2
    paths[3].unlink()
    with pytest.raises(BadImagesError, match=r"3\.png: no such file or directory$") as caught:
        list(batches.in_order())
    assert "\n" not in str(caught.value)
