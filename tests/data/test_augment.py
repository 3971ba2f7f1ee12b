"""Augmentation is a function of image and seed, and does what its names say."""

import pickle

import numpy as np
import pytest
import torch

from tlcli.data.augment import make_augmentation
from tlcli.data.preprocess import Preprocessing
from tlcli.specs import AugmentNone, AugmentSpec, Crop, Fit, Rand, Trivial

SCALE, RATIO = (0.35, 1.0), (0.75, 4 / 3)
SPECS: list[AugmentSpec] = [
    AugmentNone(erasing=1.0),
    Crop(erasing=0.0, scale=SCALE, ratio=RATIO, flip=0.5),
    Trivial(erasing=0.5, scale=SCALE, ratio=RATIO, flip=0.5),
    Rand(erasing=0.5, scale=SCALE, ratio=RATIO, flip=0.5, n=2, magnitude=9),
]


def preprocessing(fit: Fit = Fit.squash, size: int = 16) -> Preprocessing:
    return Preprocessing(size, fit, (0.5, 0.2, 0.4), (0.5, 0.5, 0.5))


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.kind)
@pytest.mark.parametrize("fit", Fit)
def test_a_function_of_image_and_seed(spec: AugmentSpec, fit: Fit) -> None:
    augment = make_augmentation(spec, preprocessing(fit))
    assert augment is not None
    image = noise(40, 30)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = [augment(image, seed) for seed in range(6)]
    assert torch.equal(torch.get_rng_state(), state), "the global generator moved on"
    torch.rand(5)
    assert all(torch.equal(a, augment(image, seed)) for seed, a in enumerate(first))
    assert all((a.shape, a.dtype) == ((3, 16, 16), torch.uint8) and a.is_contiguous() for a in first)
    assert not torch.equal(first[0], first[1])
    assert np.array_equal(image, noise(40, 30))


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.kind)
@pytest.mark.parametrize("shape", [(1, 1), (1, 20_000), (20_000, 1)])
@pytest.mark.parametrize("fit", Fit)
def test_any_shape(spec: AugmentSpec, shape: tuple[int, int], fit: Fit) -> None:
    augment = make_augmentation(spec, preprocessing(fit))
    assert augment is not None
    assert augment(noise(*shape), 0).shape == (3, 16, 16)


def test_none_is_evaluation() -> None:
    assert make_augmentation(AugmentNone(erasing=0.0), preprocessing()) is None


def test_flip() -> None:
    image = noise(16, 16)
    whole, ratio = (1.0, 1.0), (1.0, 1.0)
    for flip, want in ((0.0, image), (1.0, image[:, ::-1])):
        augment = make_augmentation(Crop(erasing=0.0, scale=whole, ratio=ratio, flip=flip), preprocessing())
        assert augment is not None
        assert np.array_equal(augment(image, 5).permute(1, 2, 0).numpy(), want)


def test_erasing_fills_with_the_mean_colour() -> None:
    augment = make_augmentation(AugmentNone(erasing=1.0), preprocessing())
    assert augment is not None
    image = np.full((16, 16, 3), 255, dtype=np.uint8)
    out = augment(image, 0)
    erased = (out != 255).all(0)
    assert 0 < erased.sum() < 256
    assert out[:, erased].unique(dim=1).flatten().tolist() == [128, 51, 102]


def test_pad_augments_the_padded_square() -> None:
    whole = Crop(erasing=0.0, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0)
    augment = make_augmentation(whole, preprocessing(Fit.pad, size=30))
    assert augment is not None
    image = np.full((10, 30, 3), 255, dtype=np.uint8)
    assert torch.equal(augment(image, 0), preprocessing(Fit.pad, size=30).apply(image))


def test_it_travels_to_other_processes() -> None:
    augment = make_augmentation(SPECS[2], preprocessing())
    assert augment is not None
    assert torch.equal(pickle.loads(pickle.dumps(augment))(noise(20, 20), 1), augment(noise(20, 20), 1))
