"""Augmentation is a function of image and seed, and is distributed as torchvision's."""

import pickle
import random

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2

from tests.data.test_preprocess import noise
from tlcli.data.augment import AugmentNoneSpec, CropSpec, RandAugmentSpec, TrivialAugmentSpec
from tlcli.data.batches import Augmentation, Preprocessing
from tlcli.specs import AugmentSpec, Fit

SCALE, RATIO = (0.35, 1.0), (0.75, 4 / 3)
SPECS: list[AugmentSpec] = [
    AugmentNoneSpec(erasing=1.0, mixup=0.0, cutmix=0.0),
    CropSpec(erasing=0.0, mixup=0.0, cutmix=0.0, scale=SCALE, ratio=RATIO, flip=0.5),
    TrivialAugmentSpec(erasing=0.5, mixup=0.0, cutmix=0.0, scale=SCALE, ratio=RATIO, flip=0.5),
    RandAugmentSpec(erasing=0.5, mixup=0.0, cutmix=0.0, scale=SCALE, ratio=RATIO, flip=0.5, n=2, magnitude=9),
]


def preprocessing(fit: Fit = Fit.squash, size: int = 16) -> Preprocessing:
    return Preprocessing(size, fit, (0.5, 0.2, 0.4), (0.5, 0.5, 0.5))


def apply(augment: Augmentation, image: np.ndarray, seed: int = 0) -> Tensor:
    return augment.apply_batch([image], [seed])[0]


def crop(scale: tuple[float, float], ratio: tuple[float, float] = RATIO, flip: float = 0.0) -> CropSpec:
    return CropSpec(erasing=0.0, mixup=0.0, cutmix=0.0, scale=scale, ratio=ratio, flip=flip)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.kind)
@pytest.mark.parametrize("fit", Fit)
def test_it_is_a_function_of_image_and_seed(spec: AugmentSpec, fit: Fit) -> None:
    augment = spec.build(preprocessing(fit))
    images = [noise(*shape) for shape in ((32, 32), (32, 32), (40, 30), (200, 3), (1, 1), (1, 20_000), (20_000, 1))]
    torch.manual_seed(3)
    state = torch.get_rng_state()
    batch = augment.apply_batch(iter(images), range(7))
    assert torch.equal(torch.get_rng_state(), state), "the global generator moved on"
    assert (batch.shape, batch.dtype) == ((7, 3, 16, 16), torch.uint8)
    assert batch.is_contiguous(memory_format=torch.channels_last)
    copy = pickle.loads(pickle.dumps(augment))  # as it is sent to other processes
    assert all(torch.equal(batch[i], apply(copy, image, i)) for i, image in enumerate(images))
    assert not torch.equal(batch[0], batch[1]), "the images are equal, the seeds are not"
    assert np.array_equal(images[0], noise(32, 32))


def test_erasing_fills_with_the_mean_color() -> None:
    out = apply(
        AugmentNoneSpec(erasing=1.0, mixup=0.0, cutmix=0.0).build(preprocessing()),
        np.full((16, 16, 3), 255, dtype=np.uint8),
    )
    erased = (out != 255).all(0)
    assert 0 < erased.sum() < 256
    assert out[:, erased].unique(dim=1).flatten().tolist() == [128, 51, 102]


def test_pad_augments_the_padded_square() -> None:
    image, padded = np.full((10, 30, 3), 255, dtype=np.uint8), preprocessing(Fit.pad, size=30)
    assert torch.equal(apply(crop((1.0, 1.0), (1.0, 1.0)).build(padded), image), padded.apply(image))


@pytest.mark.parametrize(
    ("height", "width", "scale"), [(32, 32, (0.35, 1.0)), (300, 400, (0.08, 1.0)), (100, 700, (0.05, 0.2))]
)
def test_crops_are_distributed_as_torchvisions(height: int, width: int, scale: tuple[float, float]) -> None:
    def metrics(boxes: np.ndarray) -> list[np.ndarray]:
        """Return area as a fraction, logarithm of the aspect ratio, center from 0 to 1."""
        top, left, h, w = boxes.T
        return [h * w / (height * width), np.log(w / h), (top + h / 2) / height, (left + w / 2) / width]

    image = torch.empty(3, height, width, dtype=torch.uint8)
    torch.manual_seed(0)
    transform = v2.RandomResizedCrop(8, scale=scale, ratio=RATIO)
    theirs = [transform.make_params([image]) for _ in range(4000)]
    ours = np.array([crop(scale).draw_box(height, width, random.Random(seed)) for seed in range(4000)])
    boxes = np.array([[p[k] for k in ("top", "left", "height", "width")] for p in theirs])
    for name, one, other in zip(("area", "aspect", "y", "x"), metrics(ours), metrics(boxes), strict=True):
        assert abs(one.mean() - other.mean()) < 0.02, name
        quantiles = [np.quantile(values, [0.05, 0.25, 0.5, 0.75, 0.95]) for values in (one, other)]
        assert np.abs(quantiles[0] - quantiles[1]).max() < 0.06, name


@pytest.mark.parametrize(("height", "width"), [(10, 1000), (1000, 10), (1, 1), (90, 100)])
def test_an_image_that_fits_no_box_gets_the_middle_as_in_torchvision(height: int, width: int) -> None:
    theirs = v2.RandomResizedCrop(8, scale=(1.5, 2.0), ratio=RATIO).make_params([torch.empty(3, height, width)])
    want = tuple(theirs[k] for k in ("top", "left", "height", "width"))
    assert crop((1.5, 2.0)).draw_box(height, width, random.Random(0)) == want  # no box is larger than the image


def test_a_box_is_never_empty() -> None:
    assert crop((1.0, 1.0), (0.1, 0.2)).draw_box(2, 10, random.Random(0)) == (0, 4, 2, 1)


def test_flips_are_as_often_as_asked() -> None:
    spec = crop((0.1, 1.0), (0.5, 2.0), flip=0.3)
    image = np.repeat(np.arange(40, dtype=np.uint8)[None, :, None], 30, 0).repeat(3, 2)
    parts = spec.build(preprocessing()).apply_batch([image] * 3000, range(3000))
    assert (parts[:, 0, 0, 0] > parts[:, 0, 0, -1]).float().mean() == pytest.approx(0.3, abs=0.03)


def test_boxes_are_the_same_in_every_release() -> None:
    """A run that is resumed under another Python or NumPy continues with the same images."""
    boxes = [crop(SCALE).draw_box(300, 400, random.Random(seed)) for seed in range(3)]
    assert boxes == [(4, 59, 293, 255), (71, 37, 207, 253), (0, 1, 300, 388)]
