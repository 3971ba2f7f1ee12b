"""The square that the network sees, by geometry and by value."""

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from tlcli.data.batches import Preprocessing
from tlcli.specs import Fit

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def preprocessing(size: int, fit: Fit = Fit.squash) -> Preprocessing:
    return Preprocessing(size, fit, MEAN, STD)


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


SHAPES = [(32, 32)] * 9 + [(40, 30), (32, 32), (1, 7), (7, 1), (24, 24), (24, 24), (31, 18), (31, 18), (3, 500)]
SHAPES += [(1, 1), (1, 20_000), (20_000, 1)]


@pytest.mark.parametrize("fit", Fit)
@pytest.mark.parametrize("size", [24, 37])
def test_a_batch_is_its_images(fit: Fit, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    images = [rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in SHAPES]
    one = preprocessing(size, fit)
    want = torch.stack([one.apply(image) for image in images])
    assert (want.shape, want.dtype) == ((len(images), 3, size, size), torch.uint8)
    assert torch.equal(want, torch.stack([plainly(image, one) for image in images]))
    for together in (1, 4 * 32 * 32 * 3, 2**20):
        monkeypatch.setattr("tlcli.data.batches.RESIZE_BATCH_BYTES", together)
        got = one.apply_batch(iter(images))
        assert torch.equal(got, want)
        assert got.is_contiguous(memory_format=torch.channels_last)


def plainly(image: np.ndarray, one: Preprocessing) -> torch.Tensor:
    """Return the same pixels by torchvision's functions, one image at a time, colors first."""
    pixels = torch.from_numpy(image).permute(2, 0, 1).contiguous()
    height, width = image.shape[:2]
    if one.fit is Fit.crop:
        pixels = v2.functional.center_crop(pixels, [min(height, width)] * 2)
    if one.fit is not Fit.pad:
        return v2.functional.resize(pixels, [one.size, one.size], antialias=True)
    scale = one.size / max(height, width)
    h, w = (max(1, round(side * scale)) for side in (height, width))
    left, top = (one.size - w) // 2, (one.size - h) // 2
    pixels = v2.functional.resize(pixels, [h, w], antialias=True)
    return v2.functional.pad(pixels, [left, top, one.size - w - left, one.size - h - top])


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_normalize_is_torchvisions(memory_format: torch.memory_format) -> None:
    batch = torch.from_numpy(noise(4 * 16, 16)).reshape(4, 16, 16, 3).permute(0, 3, 1, 2)
    batch = batch.contiguous(memory_format=memory_format)
    before, got = batch.clone(), preprocessing(16).normalize(batch)
    torch.testing.assert_close(got, v2.functional.normalize(batch.float() / 255, MEAN, STD))
    assert got.is_contiguous(memory_format=memory_format)
    assert torch.equal(batch, before)


def test_the_same_size_is_unchanged_and_not_shared() -> None:
    image = noise(16, 16)
    for fit in Fit:
        out = preprocessing(16, fit).apply(image)
        assert np.array_equal(out.permute(1, 2, 0).numpy(), image)
        out.zero_()
        assert image.any()
