"""Temperature scaling (Guo et al. 2017): one number that logits are divided by, for probabilities that hold.

It never changes which class is the likeliest. It is fitted on validation alone, and judged on the test set.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from scipy.optimize import brentq, minimize_scalar
from torch import Tensor

BINS = 15
LIMITS = (0.05, 20.0)
"""The lowest and the highest temperature."""
SPREAD = 0.5
"""Of log T in the prior, which is normal about T = 1. It is worth about as much as a handful of images: a few dozen of
them cannot drive the temperature far, a few hundred hardly feel it."""

ROUNDING = 1e-9
"""Of the loss: what is gained by less is nothing."""


@dataclass(frozen=True)
class Calibration:
    """A temperature and what it does to the n images that it was fitted on: expected calibration error, and loss."""

    temperature: float
    n: int
    ece_before: float
    ece_after: float
    loss_before: float
    loss_after: float

    def to_json(self) -> dict[str, Any]:
        """As a plain dict."""
        return asdict(self)


def calibrate(logits: Tensor, labels: Tensor) -> Calibration:
    """The temperature for these validation logits (N, C) and labels (N).

    It is 1 where the fitted one would raise the expected calibration error of the same images: the loss gains most from
    a few images that are far off, and may do so at the cost of all others.
    """
    fitted = fit_temperature(logits, labels)
    before = expected_calibration_error(logits, labels, 1.0)
    after = expected_calibration_error(logits, labels, fitted)
    if after > before:
        fitted, after = 1.0, before
    nll = _Nll(logits, labels)
    return Calibration(fitted, len(labels), before, after, nll(1.0), nll(fitted))


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature that minimises the negative log-likelihood of labels (N) under softmax(logits / T), in float64.

    The likelihood alone would be wrong where it has little to go by. With a few images it follows the one that is
    wrong; where all are right it has no optimum at all, T -> 0 makes every answer certain. So, first, log T has a
    normal prior about 0 (maximum a posteriori). Second, T below 1 may not raise the mean confidence above
    (right + 1) / (N + 2), which is what N images can say of the accuracy by Laplace's rule of succession: 24 of 24
    right are no ground for more than 0.96. The loss is never above that of T = 1, as T = 1 satisfies both.
    """
    if len(labels) == 0 or logits.shape[1] < 2:
        return 1.0
    nll, n = _Nll(logits, labels), len(labels)

    def cost(log_t: float) -> float:
        return n * nll(math.exp(log_t)) + 0.5 * (log_t / SPREAD) ** 2

    low, high = map(math.log, LIMITS)
    log_t = float(minimize_scalar(cost, bounds=(low, high), method="bounded", options={"xatol": 1e-4}).x)
    right = int((logits.argmax(dim=1) == labels).sum())
    log_t = _not_surer_than((right + 1) / (n + 2), logits, log_t)
    temperature = math.exp(log_t)
    return temperature if nll(temperature) < nll(1.0) - ROUNDING else 1.0


def expected_calibration_error(logits: Tensor, labels: Tensor, temperature: float, bins: int = BINS) -> float:
    """The mean distance of confidence and accuracy, over equally wide bins of confidence weighted by their images."""
    found = reliability(logits, labels, temperature, bins)
    return sum(n * abs(accuracy - confidence) for confidence, accuracy, n in found) / max(1, len(labels))


def calibration_report(logits: Tensor, labels: Tensor, temperature: float) -> dict[str, Any]:
    """What a temperature does to the calibration of a test: `calibration` of test.json and eval.json."""
    before, after = (expected_calibration_error(logits, labels, t) for t in (1.0, temperature))
    return {"temperature": temperature, "ece_before": before, "ece_after": after, "bins": BINS}


def reliability(logits: Tensor, labels: Tensor, temperature: float, bins: int = BINS) -> list[tuple[float, float, int]]:
    """(mean confidence, accuracy, images) of each bin of confidence ((0, 1/bins], ...), the lowest first.

    A bin without images has its middle as confidence, and accuracy 0.
    """
    confidence, predicted = torch.softmax(logits.double() / temperature, dim=1).max(dim=1)
    place = (confidence * bins).ceil().long().clamp(1, bins) - 1
    counts = torch.bincount(place, minlength=bins)
    sure = torch.bincount(place, weights=confidence, minlength=bins)
    right = torch.bincount(place, weights=(predicted == labels).double(), minlength=bins)
    return [
        (s / n, r / n, n) if n else ((i + 0.5) / bins, 0.0, 0)
        for i, (s, r, n) in enumerate(zip(sure.tolist(), right.tolist(), counts.tolist(), strict=True))
    ]


class _Nll:
    """The mean negative log-likelihood of labels as a function of the temperature."""

    def __init__(self, logits: Tensor, labels: Tensor) -> None:
        self._logits = logits.double()
        self._own = self._logits.gather(1, labels[:, None])[:, 0].mean().item()

    def __call__(self, temperature: float) -> float:
        return torch.logsumexp(self._logits / temperature, dim=1).mean().item() - self._own / temperature


def _not_surer_than(most: float, logits: Tensor, log_t: float) -> float:
    """This log T, or the next higher one up to 0 whose mean confidence is not above `most`."""

    def excess(log_t: float) -> float:
        confidence = torch.softmax(logits.double() / math.exp(log_t), dim=1).amax(dim=1)
        return confidence.mean().item() - most

    if log_t >= 0 or excess(log_t) <= 0:
        return log_t
    return 0.0 if excess(0.0) >= 0 else float(brentq(excess, log_t, 0.0, xtol=1e-4))
