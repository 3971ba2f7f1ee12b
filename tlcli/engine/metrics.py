"""Figures from predictions. All are functions of logits (N, classes) and labels (N)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support
from torch import Tensor
from torch.nn import functional as F


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
    """The figures that can select an epoch."""

    accuracy: float
    macro_f1: float
    loss: float


def scores(predictions: Predictions) -> Scores:
    """Top-1 accuracy, the mean of the classes' F1, and the mean cross-entropy without smoothing."""
    right = (predictions.predicted == predictions.labels).double().mean().item()
    f1 = _per_class(predictions)[2]
    present = np.bincount(predictions.labels.numpy(), minlength=len(f1)) > 0
    return Scores(right, float(f1[present].mean()), F.cross_entropy(predictions.logits, predictions.labels).item())


def wilson(right: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's 95 % score interval for a proportion (Wilson 1927)."""
    share = right / n
    middle = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # at the ends the formula gives 0 and 1, and rounding does not
    low = 0.0 if right == 0 else (middle - half) / scale
    high = 1.0 if right == n else (middle + half) / scale
    return low, high


def test_report(predictions: Predictions, classes: Sequence[str]) -> dict[str, Any]:
    """The contents of test.json but for the checkpoint: accuracy with its interval, figures a class, confusion."""
    labels, predicted = predictions.labels, predictions.predicted
    n, right = len(labels), int((predicted == labels).sum())
    precision, recall, f1, support = _per_class(predictions)
    top5 = None
    if len(classes) > 5:
        top5 = (predictions.logits.topk(5, dim=1).indices == labels[:, None]).any(dim=1).double().mean().item()
    return {
        "accuracy": right / n,
        "accuracy_ci95": list(wilson(right, n)),
        "top5": top5,
        "loss": F.cross_entropy(predictions.logits, labels).item(),
        "macro_f1": scores(predictions).macro_f1,
        "n": n,
        "per_class": {
            name: {
                "precision": float(precision[i]),
                "recall": float(recall[i]),
                "f1": float(f1[i]),
                "support": int(support[i]),
            }
            for i, name in enumerate(classes)
        },
        "confusion": confusion_matrix(labels, predicted, labels=range(len(classes))).tolist(),
        "classes": list(classes),
    }


def most_confused(report: dict[str, Any], limit: int = 3) -> tuple[tuple[str, str, int], ...]:
    """(true class, predicted class, count) of the largest off-diagonal entries, largest first."""
    confusion = np.array(report["confusion"])
    np.fill_diagonal(confusion, 0)
    names = report["classes"]
    order = np.argsort(-confusion, axis=None, kind="stable")[:limit]
    pairs = [divmod(int(flat), len(names)) for flat in order]
    return tuple((names[t], names[p], int(confusion[t, p])) for t, p in pairs if confusion[t, p] > 0)


def _per_class(predictions: Predictions) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Precision, recall, F1 and support of each class; 0 where a class was never predicted or has no image."""
    n_classes = predictions.logits.shape[1]
    found: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray] = precision_recall_fscore_support(
        predictions.labels.numpy(), predictions.predicted.numpy(), labels=range(n_classes), zero_division=0.0
    )
    return found


def predictions_of(logits: list[Tensor], labels: list[Tensor]) -> Predictions:
    """Predictions from batches, moved to the CPU."""
    return Predictions(torch.cat(logits).float().cpu(), torch.cat(labels).cpu())
