"""Temperature scaling: never worse in loss, and not surer than the number of images allows."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tlcli.engine.metrics import (
    BINS,
    MAX_TEMPERATURE,
    MIN_TEMPERATURE,
    calibrate,
    expected_calibration_error,
    fit_temperature,
    reliability,
)


def drawn(n: int, classes: int, temperature: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits whose labels are drawn from softmax(logits / temperature): it is the right one for them."""
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(n, classes, generator=generator)
    labels = torch.multinomial(torch.softmax(logits / temperature, dim=1), 1, generator=generator)[:, 0]
    return logits, labels


def loss(logits: Tensor, labels: Tensor, temperature: float) -> float:
    return F.cross_entropy(logits.double() / temperature, labels).item()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_it_finds_the_temperature_that_labels_were_drawn_with(temperature: float) -> None:
    assert fit_temperature(*drawn(5000, 6, temperature)) == pytest.approx(temperature, rel=0.05)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("n", [1, 5, 30, 300])
def test_the_loss_is_never_above_that_of_one(n: int, seed: int) -> None:
    logits, labels = drawn(n, 4, math.exp((seed - 10) / 5), seed)
    fitted = fit_temperature(logits, labels)
    assert MIN_TEMPERATURE <= fitted <= MAX_TEMPERATURE
    assert loss(logits, labels, fitted) <= loss(logits, labels, 1.0)
    assert calibrate(logits, labels).loss_after <= calibrate(logits, labels).loss_before


@pytest.mark.parametrize("seed", range(20))
def test_the_calibration_error_of_the_same_images_is_never_above_that_of_one(seed: int) -> None:
    found = calibrate(*drawn(40, 3, 2.0, seed))
    assert found.ece_after <= found.ece_before


@pytest.mark.parametrize("n", [4, 24, 400])
@pytest.mark.parametrize("gap", [0.4, 3.0, 30.0])
def test_all_right_is_no_ground_for_certainty(n: int, gap: float) -> None:
    labels = torch.arange(n) % 2
    logits = gap * F.one_hot(labels).float()
    fitted = fit_temperature(logits, labels)
    sure = torch.softmax(logits / fitted, dim=1).amax(dim=1).mean().item()
    own = torch.softmax(logits, dim=1).amax(dim=1).mean().item()
    assert sure <= max(own, (n + 1) / (n + 2)) + 1e-4
    assert fitted <= 1.0  # and what is right is not doubted


def test_a_few_images_do_not_drive_it_far() -> None:
    logits, labels = torch.tensor([[9.0, 0.0], [9.0, 0.0], [0.0, 9.0]]), torch.tensor([1, 0, 1])
    assert 1 < fit_temperature(logits, labels) < 6  # the likelihood alone asks for 13
    many = logits.repeat(500, 1), labels.repeat(500)
    assert fit_temperature(*many) > 10


@pytest.mark.parametrize("logits", [torch.zeros(8, 3), torch.full((8, 3), 1e4), torch.eye(3)[[0] * 8] * 1e4])
def test_extremes_are_finite(logits: Tensor) -> None:
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    found = calibrate(logits, labels)
    assert all(map(math.isfinite, vars(found).values()))
    assert found.n == 8


def test_no_images_have_no_temperature_but_one() -> None:
    assert fit_temperature(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)) == 1.0


def test_the_error_is_the_weighted_distance_of_the_bins() -> None:
    logits = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.65, 0.35], [0.55, 0.45]]).log()
    labels = torch.tensor([0, 1, 0, 1])
    assert expected_calibration_error(logits, labels, 1.0) == pytest.approx(
        (abs(0.5 - 0.9) * 2 + abs(1 - 0.65) + abs(0 - 0.55)) / 4, abs=1e-6
    )
    assert reliability(logits, labels, 1.0) == [pytest.approx(b) for b in [(0.55, 0, 1), (0.65, 1, 1), (0.9, 0.5, 2)]]


def test_every_image_is_in_one_bin() -> None:
    logits, labels = drawn(500, 4, 1.0)
    found = reliability(logits, labels, 1.0)
    assert sum(n for _, _, n in found) == 500
    bins = [math.ceil(confidence * BINS - 1e-9) for confidence, _, _ in found]
    assert bins == sorted(set(bins))
    assert sum(accuracy * n for _, accuracy, n in found) == pytest.approx((logits.argmax(1) == labels).sum().item())
