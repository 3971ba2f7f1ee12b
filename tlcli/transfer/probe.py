"""The linear probe: logistic regression on the input of the head, with a penalty chosen by cross-validation."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

PENALTIES = (1.0, 0.1, 0.01, 0.001)  # L2 per image: the best ones of two sets of images differ by a factor of 100
DEFAULT_PENALTY = 0.1  # if a class has too few images for cross-validation
FOLDS = 5
MAX_IMAGES = 500  # of a sample, which tells the penalties apart in a few seconds
Floats = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True, eq=False)
class CrossValidation:
    """The penalty whose probes have the lowest loss on images held out, and what they make of each of these images."""

    penalty: float
    folds: int
    correct: np.ndarray[Any, np.dtype[np.bool_]]  # (N)
    losses: np.ndarray[Any, np.dtype[np.floating]]  # (N)

    @property
    def accuracy(self) -> float:
        return float(self.correct.mean())

    def beats(self, other: "CrossValidation") -> bool:
        """Return True if the images that only this one classifies right are more by over one standard error."""
        gains, losses = (self.correct & ~other.correct).sum(), (other.correct & ~self.correct).sum()
        return bool(gains - losses > np.sqrt(gains + losses))

    def has_lower_loss(self, other: "CrossValidation") -> bool:
        """Return True if the mean loss is lower by over two standard errors of the paired difference.

        Of few images, losses tell more than the numbers of right ones.
        """
        gains = other.losses - self.losses
        return bool(gains.mean() > 2 * gains.std() / np.sqrt(len(gains)))


def choose_penalty(
    features: Tensor, labels: Tensor, seed: int, max_images: int | None = None
) -> CrossValidation | None:
    """Return the best of PENALTIES for features (N, D) and labels (N), by a sample of some of them.

    Classes with fewer images than there are folds are left out. Return None if fewer than two are left. Standardizing
    each feature was no better on average: it gained up to 2 points on some data and lost as many on others.
    """
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    order = np.random.default_rng(seed).permutation(len(labels))
    y, classes = labels.numpy()[order], np.unique(labels)
    members = [order[y == c][: (max_images or MAX_IMAGES) // len(classes)] for c in classes]
    folds = min(FOLDS, max(map(len, members)))
    members = [rows for rows in members if len(rows) >= max(folds, 2)]
    if len(members) < 2:
        return None
    chosen = np.sort(np.concatenate(members))
    x, y = _scaled(features.numpy()[chosen])[0], np.unique(labels.numpy()[chosen], return_inverse=True)[1]
    splits = StratifiedKFold(folds, shuffle=True, random_state=seed)
    found: list[CrossValidation] = []
    with _quiet():
        for penalty in PENALTIES:
            probe = _regression(penalty, len(y) * (folds - 1) / folds)
            p = cross_val_predict(probe, x, y, cv=splits, method="predict_proba")
            losses = -np.log(np.maximum(p[np.arange(len(y)), y], 1e-12))
            found.append(CrossValidation(penalty, folds, p.argmax(axis=1) == y, losses))
    return min(found, key=lambda cross_validation: cross_validation.losses.mean())


def fit_probe(head: nn.Linear, features: Tensor, labels: Tensor, penalty: float = DEFAULT_PENALTY) -> dict[str, Tensor]:
    """Fill a linear layer with the logistic regression on features (N, D) and labels (N); return a copy of its state.

    A random head would distort good features (LP-FT, Kumar et al. 2022). The layer gets the weights that are equivalent
    on features that are neither centered nor scaled.
    """
    x, mean, scale = _scaled(features.numpy())
    regression = _regression(penalty, len(x))
    with _quiet():
        regression.fit(x, labels.numpy())
    coefficients, intercept = regression.coef_, regression.intercept_
    if len(regression.classes_) == 2:  # scikit-learn gives one row, the log-odds of the second class
        coefficients, intercept = np.vstack([-coefficients, coefficients]) / 2, np.hstack([-intercept, intercept]) / 2
    weight = coefficients / scale
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(weight))
        if head.bias is not None:
            head.bias.copy_(torch.from_numpy(intercept - weight @ mean))
    return {name: tensor.detach().clone() for name, tensor in head.state_dict().items()}


def _scaled(features: Any) -> tuple[Floats, Floats, float]:
    """Return features centered and divided by one number, so that one penalty suits every backbone; mean and number."""
    x = features.astype(np.float32)
    mean, scale = x.mean(axis=0), float(np.sqrt(x.var(axis=0).mean())) or 1.0
    x -= mean
    x /= scale
    return x, mean, scale


def _regression(penalty: float, n: float) -> Any:
    from sklearn.linear_model import LogisticRegression  # here, because it takes a second

    return LogisticRegression(C=1 / (penalty * n), max_iter=200)


@contextmanager
def _quiet() -> Iterator[None]:
    """Run on one thread (more help little, and harm if other processes run), without warnings about convergence."""
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    with warnings.catch_warnings(action="ignore", category=ConvergenceWarning), threadpool_limits(1):
        yield  # the probe is a starting point
