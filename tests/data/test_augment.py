"""Augmentation is a function of image and seed, and does what its names say."""

import pickle
import random

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from tlcli.data.augment import AugmentNoneSpec, CropSpec, RandAugmentSpec, TrivialAugmentSpec
from tlcli.data.batches import Preprocessing, RandomCrop
from tlcli.specs import AugmentSpec, Fit

SCALE, RATIO = (0.35, 1.0), (0.75, 4 / 3)
SPECS: list[AugmentSpec] = [
    AugmentNoneSpec(erasing=1.0),
    CropSpec(erasing=0.0, scale=SCALE, ratio=RATIO, flip=0.5),
    TrivialAugmentSpec(erasing=0.5, scale=SCALE, ratio=RATIO, flip=0.5),
    RandAugmentSpec(erasing=0.5, scale=SCALE, ratio=RATIO, flip=0.5, n=2, magnitude=9),
]


def preprocessing(fit: Fit = Fit.squash, size: int = 16) -> Preprocessing:
    return Preprocessing(size, fit, (0.5, 0.2, 0.4), (0.5, 0.5, 0.5))


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.kind)
@pytest.mark.parametrize("fit", Fit)
def test_a_function_of_image_and_seed(spec: AugmentSpec, fit: Fit) -> None:
    augment = spec.build(preprocessing(fit))
    assert augment is not None
    image = noise(40, 30)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = [augment.apply(image, seed) for seed in range(6)]
    assert torch.equal(torch.get_rng_state(), state), "the global generator moved on"
    torch.rand(5)
    assert all(torch.equal(a, augment.apply(image, seed)) for seed, a in enumerate(first))
    assert all((a.shape, a.dtype) == ((3, 16, 16), torch.uint8) and a.is_contiguous() for a in first)
    assert not torch.equal(first[0], first[1])
    assert np.array_equal(image, noise(40, 30))


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.kind)
@pytest.mark.parametrize("shape", [(1, 1), (1, 20_000), (20_000, 1)])
@pytest.mark.parametrize("fit", Fit)
def test_any_shape(spec: AugmentSpec, shape: tuple[int, int], fit: Fit) -> None:
    augment = spec.build(preprocessing(fit))
    assert augment is not None
    assert augment.apply(noise(*shape), 0).shape == (3, 16, 16)


def test_erasing_fills_with_the_mean_colour() -> None:
    augment = AugmentNoneSpec(erasing=1.0).build(preprocessing())
    assert augment is not None
    image = np.full((16, 16, 3), 255, dtype=np.uint8)
    out = augment.apply(image, 0)
    erased = (out != 255).all(0)
    assert 0 < erased.sum() < 256
    assert out[:, erased].unique(dim=1).flatten().tolist() == [128, 51, 102]


def test_pad_augments_the_padded_square() -> None:
    whole = CropSpec(erasing=0.0, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0)
    augment = whole.build(preprocessing(Fit.pad, size=30))
    assert augment is not None
    image = np.full((10, 30, 3), 255, dtype=np.uint8)
    assert torch.equal(augment.apply(image, 0), preprocessing(Fit.pad, size=30).apply(image))


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.kind)
@pytest.mark.parametrize("fit", Fit)
def test_a_batch_is_its_images(spec: AugmentSpec, fit: Fit) -> None:
    augment = spec.build(preprocessing(fit))
    assert augment is not None
    images = [noise(*shape) for shape in ((32, 32), (32, 32), (40, 30), (200, 3), (16, 16))]
    got = augment.apply_batch(iter(images), range(5))
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(got[i], augment.apply(image, i)) for i, image in enumerate(images))


@pytest.mark.parametrize(
    ("height", "width", "scale"), [(32, 32, (0.35, 1.0)), (300, 400, (0.08, 1.0)), (100, 700, (0.05, 0.2))]
)
def test_crops_are_distributed_as_torchvisions(height: int, width: int, scale: tuple[float, float]) -> None:
    crop, image = RandomCrop(scale, RATIO, flip=0.0), torch.empty(3, height, width, dtype=torch.uint8)
    torch.manual_seed(0)
    transform = v2.RandomResizedCrop(8, scale=scale, ratio=RATIO)
    theirs = [transform.make_params([image]) for _ in range(4000)]
    ours = np.array([crop.box(height, width, random.Random(seed)) for seed in range(4000)])
    boxes = np.array([[p[k] for k in ("top", "left", "height", "width")] for p in theirs])
    names = ("area", "aspect", "y", "x")
    for name, one, other in zip(names, figures(ours, height, width), figures(boxes, height, width), strict=True):
        assert abs(one.mean() - other.mean()) < 0.02, name
        quantiles = [np.quantile(values, [0.05, 0.25, 0.5, 0.75, 0.95]) for values in (one, other)]
        assert np.abs(quantiles[0] - quantiles[1]).max() < 0.06, name


def figures(boxes: np.ndarray, height: int, width: int) -> list[np.ndarray]:
    """Area as a fraction, logarithm of the aspect ratio, centre from 0 to 1."""
    top, left, h, w = boxes.T
    return [h * w / (height * width), np.log(w / h), (top + h / 2) / height, (left + w / 2) / width]


@pytest.mark.parametrize(
    ("height", "width", "want"),
    [(10, 1000, (0, 493, 10, 13)), (1000, 10, (493, 0, 13, 10)), (1, 1, (0, 0, 1, 1)), (90, 100, (0, 0, 90, 100))],
)
def test_what_fits_no_box_gets_the_middle(height: int, width: int, want: tuple[int, ...]) -> None:
    crop = RandomCrop((1.5, 2.0), RATIO, flip=0.0)  # no box is larger than the image
    assert crop.box(height, width, random.Random(0)) == want
    transform = v2.RandomResizedCrop(8, scale=(1.5, 2.0), ratio=RATIO)
    theirs = transform.make_params([torch.empty(3, height, width)])
    assert tuple(theirs[k] for k in ("top", "left", "height", "width")) == want


def test_boxes_lie_inside_and_flips_are_as_often_as_asked() -> None:
    crop = RandomCrop((0.1, 1.0), (0.5, 2.0), flip=0.3)
    image = np.repeat(np.arange(40, dtype=np.uint8)[None, :, None], 30, 0).repeat(3, 2)
    parts = [crop(image, seed) for seed in range(3000)]
    boxes = [crop.box(30, 40, random.Random(seed)) for seed in range(3000)]
    assert all(y >= 0 and x >= 0 and h > 0 and w > 0 and y + h <= 30 and x + w <= 40 for y, x, h, w in boxes)
    assert [part.shape[1:3] for part in parts] == [(h, w) for _, _, h, w in boxes]
    mirrored = [bool(part[0, 0, 0, 0] > part[0, 0, -1, 0]) for part in parts]
    assert abs(np.mean(mirrored) - 0.3) < 0.03
    assert min(t for t, *_ in boxes) == 0
    assert max(t + h for t, _, h, _ in boxes) == 30


def test_the_same_image_in_every_release() -> None:
    """A run that is resumed under another Python or NumPy goes on with the same images."""
    boxes = [RandomCrop(SCALE, RATIO, 0.5).box(300, 400, random.Random(seed)) for seed in range(3)]
    assert boxes == [(4, 59, 293, 255), (71, 37, 207, 253), (0, 1, 300, 388)]


def test_it_travels_to_other_processes() -> None:
    augment = SPECS[2].build(preprocessing())
    assert augment is not None
    assert torch.equal(pickle.loads(pickle.dumps(augment)).apply(noise(20, 20), 1), augment.apply(noise(20, 20), 1))
