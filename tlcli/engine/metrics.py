"""Metrics of predictions, as functions of logits (N, classes) and labels (N), and the epoch that is best by them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import binomtest
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support
from torch import Tensor
from torch.nn import functional as F

from tlcli.specs import KeepBest


@dataclass(frozen=True)
class Predictions:
    """Logits (N, classes) float32 and labels (N) int64 of a split, in its order, on the CPU."""

    logits: Tensor
    labels: Tensor

    @property
    def predicted(self) -> Tensor:
        """The index of the highest logit of each image (N)."""
        return self.logits.argmax(dim=1)


@dataclass(frozen=True)
class Scores:
    """The metrics that can select an epoch."""

    accuracy: float
    macro_f1: float
    loss: float


def scores(predictions: Predictions) -> Scores:
    """Return top-1 accuracy, the mean F1 over classes that have images, and the mean cross-entropy."""
    accuracy = (predictions.predicted == predictions.labels).double().mean().item()
    _, _, f1, support = _per_class(predictions)
    loss = F.cross_entropy(predictions.logits, predictions.labels).item()
    return Scores(accuracy, float(f1[support > 0].mean()), loss)


def wilson(n_correct: int, n: int) -> tuple[float, float]:
    """Return the 95 % score interval of a proportion (Wilson 1927)."""
    interval = binomtest(n_correct, n).proportion_ci(confidence_level=0.95, method="wilson")
    # at the ends the exact bounds are 0 and 1; rounding may miss them
    low = 0.0 if n_correct == 0 else float(interval.low)
    return low, 1.0 if n_correct == n else float(interval.high)


def test_report(predictions: Predictions, classes: Sequence[str]) -> dict[str, Any]:
    """Return what test.json has about predictions: accuracy with its interval, metrics per class, and confusion."""
    labels, predicted, n = predictions.labels, predictions.predicted, len(predictions.labels)
    n_correct = int((predicted == labels).sum())
    top5 = None
    if len(classes) > 5:
        top5 = (predictions.logits.topk(5, dim=1).indices == labels[:, None]).any(dim=1).double().mean().item()
    per_class = {
        name: {"precision": float(precision), "recall": float(recall), "f1": float(f1), "support": int(support)}
        for name, precision, recall, f1, support in zip(classes, *_per_class(predictions), strict=True)
    }
    overall = scores(predictions)
    return {
        "accuracy": n_correct / n,
        "accuracy_ci95": list(wilson(n_correct, n)),
        "top5": top5,
        "loss": overall.loss,
        "macro_f1": overall.macro_f1,
        "n": n,
        "per_class": per_class,
        "confusion": confusion_matrix(labels, predicted, labels=range(len(classes))).tolist(),
        "classes": list(classes),
    }


def most_confused(report: dict[str, Any], limit: int = 3) -> tuple[tuple[str, str, int], ...]:
    """Return (true class, predicted class, count) of the largest off-diagonal entries, largest first."""
    confusion, names = np.array(report["confusion"]), report["classes"]
    np.fill_diagonal(confusion, 0)
    largest = np.argsort(-confusion, axis=None, kind="stable")[:limit]
    pairs = [divmod(int(index), len(names)) for index in largest]
    return tuple((names[t], names[p], int(confusion[t, p])) for t, p in pairs if confusion[t, p] > 0)


def _per_class(predictions: Predictions) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return precision, recall, F1 and support per class; 0 for a class never predicted or without images."""
    table: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray] = precision_recall_fscore_support(
        predictions.labels.numpy(),
        predictions.predicted.numpy(),
        labels=range(predictions.logits.shape[1]),
        zero_division=0.0,
    )
    return table


@dataclass
class BestEpochTracker:
    """The best epoch so far by one validation metric.

    The lower loss decides between equal accuracies or F1 scores: on a small validation set many epochs are equal.
    `early_stop` is the number of epochs without a better one after which training should stop; None: never.
    """

    by: KeepBest
    early_stop: int | None
    epoch: int | None = None
    scores: Scores | None = None
    last_epoch: int = 0

    def update(self, epoch: int, scores: Scores) -> bool:
        """Record the validation scores of an epoch; return True if it is the best so far."""
        self.last_epoch = epoch
        is_best = self.scores is None or self._rank(scores) > self._rank(self.scores)
        if is_best:
            self.epoch, self.scores = epoch, scores
        return is_best

    @property
    def should_stop(self) -> bool:
        """Whether `early_stop` epochs in a row were not better."""
        if self.early_stop is None or self.epoch is None:
            return False
        return self.last_epoch - self.epoch >= self.early_stop

    @property
    def value(self) -> float | None:
        """The selecting metric of the best epoch."""
        return None if self.scores is None else float(getattr(self.scores, self.by.value))

    def _rank(self, scores: Scores) -> tuple[float, float]:
        by_loss = self.by is KeepBest.loss
        return (-scores.loss, 0.0) if by_loss else (getattr(scores, self.by.value), -scores.loss)
