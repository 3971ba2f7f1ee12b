"""Temperature scaling (Guo et al. 2017): one number that divides the logits, so that probabilities can be trusted.

It never changes the most likely class. It is fitted on the validation split and judged on the test split.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from scipy.optimize import brentq, minimize_scalar
from torch import Tensor

BINS = 15
LIMITS = (0.05, 20.0)
"""The lowest and the highest temperature."""
PRIOR_STD = 0.5
"""Of log T in its normal prior about T = 1. The prior weighs as much as a handful of images."""
MIN_GAIN = 1e-9
"""Smallest decrease of the loss that is not rounding."""


@dataclass(frozen=True)
class Calibration:
    """A temperature, with the expected calibration error and the loss of the n images that it was fitted on."""

    temperature: float
    n: int
    ece_before: float
    ece_after: float
    loss_before: float
    loss_after: float

    def to_json(self) -> dict[str, Any]:
        """Return the fields as a dict."""
        return asdict(self)


def calibrate(logits: Tensor, labels: Tensor) -> Calibration:
    """Return the temperature for these validation logits (N, C) and labels (N).

    It is 1 if the fitted one would raise the expected calibration error of the same images: the loss gains most from a
    few images that are far off, and may do so at the cost of all others.
    """
    fitted = fit_temperature(logits, labels)
    before = expected_calibration_error(logits, labels, 1.0)
    after = expected_calibration_error(logits, labels, fitted)
    if after > before:
        fitted, after = 1.0, before
    loss = _loss(logits, labels)
    return Calibration(fitted, len(labels), before, after, loss(1.0), loss(fitted))


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Return the temperature that minimizes the loss of labels (N) under softmax(logits / T), within two bounds.

    With few images the likelihood follows the one that is wrong, and if all are right it has no optimum: T -> 0 makes
    every answer certain. So log T has a normal prior about 0 (maximum a posteriori), and a T below 1 may not raise the
    mean confidence above (right + 1) / (N + 2), which is the accuracy that N images support by Laplace's rule of
    succession: 24 of 24 right support 0.96. The loss is never above that of T = 1, which satisfies both.
    """
    n = len(labels)
    if n == 0 or logits.shape[1] < 2:
        return 1.0
    loss, exact = _loss(logits, labels), logits.double()
    max_confidence = (int((logits.argmax(dim=1) == labels).sum()) + 1) / (n + 2)

    def cost(log_t: float) -> float:
        return n * loss(math.exp(log_t)) + 0.5 * (log_t / PRIOR_STD) ** 2

    def excess(log_t: float) -> float:
        confidence = torch.softmax(exact / math.exp(log_t), dim=1).amax(dim=1)
        return confidence.mean().item() - max_confidence

    low, high = map(math.log, LIMITS)
    log_t = float(minimize_scalar(cost, bounds=(low, high), method="bounded", options={"xatol": 1e-4}).x)
    if log_t < 0 and excess(log_t) > 0:
        log_t = 0.0 if excess(0.0) >= 0 else float(brentq(excess, log_t, 0.0, xtol=1e-4))
    temperature = math.exp(log_t)
    return temperature if loss(temperature) < loss(1.0) - MIN_GAIN else 1.0


def expected_calibration_error(logits: Tensor, labels: Tensor, temperature: float, bins: int = BINS) -> float:
    """Return the mean distance of confidence and accuracy over bins of equal width, weighted by their images."""
    table = reliability(logits, labels, temperature, bins)
    return sum(n * abs(accuracy - confidence) for confidence, accuracy, n in table) / max(1, len(labels))


def calibration_report(logits: Tensor, labels: Tensor, temperature: float) -> dict[str, Any]:
    """Return `calibration` of test.json and eval.json: the effect of a temperature on these images."""
    before, after = (expected_calibration_error(logits, labels, t) for t in (1.0, temperature))
    return {"temperature": temperature, "ece_before": before, "ece_after": after, "bins": BINS}


def reliability(logits: Tensor, labels: Tensor, temperature: float, bins: int = BINS) -> list[tuple[float, float, int]]:
    """Return (mean confidence, accuracy, images) of each bin of confidence ((0, 1/bins], ...), the lowest first.

    An empty bin has its middle as confidence, and accuracy 0.
    """
    confidence, predicted = torch.softmax(logits.double() / temperature, dim=1).max(dim=1)
    index = (confidence * bins).ceil().long().clamp(1, bins) - 1
    counts = torch.bincount(index, minlength=bins)
    total_confidence = torch.bincount(index, weights=confidence, minlength=bins)
    n_correct = torch.bincount(index, weights=(predicted == labels).double(), minlength=bins)
    return [
        (total / n, correct / n, n) if n else ((i + 0.5) / bins, 0.0, 0)
        for i, (total, correct, n) in enumerate(
            zip(total_confidence.tolist(), n_correct.tolist(), counts.tolist(), strict=True)
        )
    ]


def _loss(logits: Tensor, labels: Tensor) -> Callable[[float], float]:
    """Return the mean negative log-likelihood of labels as a function of the temperature, in float64."""
    exact = logits.double()
    mean_of_labels = exact.gather(1, labels[:, None])[:, 0].mean().item()
    return lambda t: torch.logsumexp(exact / t, dim=1).mean().item() - mean_of_labels / t
