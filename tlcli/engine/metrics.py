"""Predictions of a split, their metrics, the epoch that is best by them, and the temperature that calibrates them."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import brentq, minimize_scalar
from scipy.stats import binomtest
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support
from torch import Tensor, nn
from torch.nn import functional as F

from tlcli.device import Device, autocast, limit_threads
from tlcli.engine.inputs import Inputs
from tlcli.engine.loaders import BatchLoader
from tlcli.errors import TlcliError
from tlcli.models.classifier import eval_mode
from tlcli.reporter import Reporter
from tlcli.specs import KeepBest
from tlcli.transfer.contract import linear_head

BINS = 15  # of the confidence, for calibration errors
POINTS = 200  # of a risk-coverage curve
MIN_KNOWN, ACCEPTED = 100, 0.95  # images of known classes, and the share of them below the threshold
ENERGY, ENERGY_AND_DISTANCE = "energy", "energy and distance"  # names of unknown scores
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.05, 20.0
PRIOR_STD = 0.5  # of log T in its normal prior about T = 1, which weighs as much as a handful of images
MIN_GAIN = 1e-9  # smallest decrease of the loss that is not rounding


@dataclass(frozen=True)
class Predictions:
    """Logits (N, classes) float32, labels (N) int64 and unknown scores (N) of a split, in its order, on the CPU."""

    logits: Tensor
    labels: Tensor
    unknown: Tensor | None = None

    @property
    def predicted(self) -> Tensor:
        return self.logits.argmax(dim=1)


def evaluate(network: nn.Module, loader: BatchLoader, device: Device, reporter: Reporter, label: str) -> Predictions:
    """Return the logits of every image of a split, in order, on all ranks; `network` is the whole one.

    If the loader mirrors, they are the mean of those of the image and of its mirror image. Raise TlcliError if their
    loss is not finite: after its last step a network has no training loss that would show it.
    """
    positions, n, ranks = loader.positions, len(loader), device.ranks
    logits, labels, track = [], [], reporter.track(label, len(positions))
    with eval_mode(network), torch.inference_mode(), limit_threads(loader.threads), track as advance:
        for x, y in loader.in_order():
            with autocast(device.accelerator, loader.dtype):
                batch = loader.network(*x)
                logits.append((batch + loader.network(x[0].flip(3))) / 2 if loader.mirrors else batch)
            labels.append(y)
            advance(len(y))
    found = Predictions(ranks.gather(logits, positions, n).float(), ranks.gather(labels, positions, n))
    if not F.cross_entropy(found.logits, found.labels).isfinite():
        advice = "try a smaller optimizer.lr, clip_grad=1.0 or device.precision=fp32"
        raise TlcliError(f"the outputs of the network are not finite ({label}): {advice}")
    return found


def features(
    inputs: Inputs, loader: BatchLoader, reporter: Reporter, label: str, layer: nn.Module | None = None
) -> tuple[Tensor, Predictions]:
    """Return the input of a layer for every image (not mirrored), (N, D) float32 on the CPU; predictions.

    The layer is the linear head unless given. Maps are averaged over their positions.
    """
    classifier, device = inputs.workload.classifier, inputs.device
    layer = layer or linear_head(classifier)
    assert layer is not None
    batches: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda module, args: batches.append(without_positions(args[0]).cpu()))
    with hook, torch.compiler.set_stance("force_eager"):  # a compiled network would not call the hook
        predictions = evaluate(classifier.network, loader, device, reporter, label)
    batches = batches[:: 2 if loader.mirrors else 1]
    return device.ranks.gather(batches, loader.positions, len(loader)), predictions


def without_positions(x: Tensor) -> Tensor:
    """Return vectors (N, D) as they are, and maps (N, D, H, W) averaged over their positions, float32."""
    return x.float().mean(dim=(2, 3)) if x.ndim == 4 else x.float()


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
    return float(interval.low), float(interval.high)


def compute_report(predictions: Predictions, classes: Sequence[str], temperature: float = 1.0) -> dict[str, Any]:
    """Return what test.json has about predictions: metrics, confusion, and the effect of a temperature."""
    labels, predicted, n = predictions.labels, predictions.predicted, len(predictions.labels)
    top5 = None
    if len(classes) > 5:
        top5 = (predictions.logits.topk(5, dim=1).indices == labels[:, None]).any(dim=1).double().mean().item()
    per_class = {
        name: {"precision": float(precision), "recall": float(recall), "f1": float(f1), "support": int(support)}
        for name, precision, recall, f1, support in zip(classes, *_per_class(predictions), strict=True)
    }
    before, after = (expected_calibration_error(predictions.logits, labels, t) for t in (1.0, temperature))
    return {
        **asdict(scores(predictions)),
        "accuracy_ci95": list(wilson(int((predicted == labels).sum()), n)),
        "top5": top5,
        "n": n,
        "per_class": per_class,
        "confusion": confusion_matrix(labels, predicted, labels=range(len(classes))).tolist(),
        "classes": list(classes),
        "calibration": {"temperature": temperature, "ece_before": before, "ece_after": after, "bins": BINS},
        "risk_coverage": risk_coverage(predictions.logits, labels, temperature),
    }


def most_confused(report: dict[str, Any]) -> tuple[tuple[str, str, int], ...]:
    """Return (true class, predicted class, count) of the three largest off-diagonal entries, largest first."""
    confusion, names = np.array(report["confusion"]), report["classes"]
    np.fill_diagonal(confusion, 0)
    largest = np.argsort(-confusion, axis=None, kind="stable")[:3]
    pairs = [divmod(int(index), len(names)) for index in largest]
    return tuple((names[t], names[p], int(confusion[t, p])) for t, p in pairs if confusion[t, p] > 0)


def _per_class(predictions: Predictions) -> tuple[np.ndarray, ...]:
    """Return precision, recall, F1 and support per class; 0 for a class never predicted or without images."""
    true, predicted, labels = predictions.labels, predictions.predicted, range(predictions.logits.shape[1])
    table: tuple[np.ndarray, ...] = precision_recall_fscore_support(true, predicted, labels=labels, zero_division=0.0)
    return table


@dataclass
class BestEpochTracker:
    """The best epoch so far by one validation metric; the lower loss decides between equal accuracies or F1 scores."""

    by: KeepBest
    epoch: int | None = None
    scores: Scores | None = None
    selects: bool = True  # False: the last epoch is kept

    def update(self, epoch: int, scores: Scores | None) -> bool:
        """Record an epoch with its validation scores, if there are any; return True if it is the best so far."""
        last, selects = self.scores, self.selects
        is_best = not selects or last is None or scores is None or self.rank(scores) > self.rank(last)
        if is_best:
            self.epoch, self.scores = epoch, scores
        return is_best

    @property
    def value(self) -> float | None:
        return None if self.scores is None else float(getattr(self.scores, self.by.value))

    def rank(self, scores: Scores) -> tuple[float, float]:
        """Return what is higher for better scores."""
        return 0.0 if self.by is KeepBest.loss else getattr(scores, self.by.value), -scores.loss


def likely_temperature(logits: Tensor, labels: Tensor) -> float:
    """Return the T that is most probable by the loss of labels (N) under softmax(logits / T) (Guo et al. 2017).

    With few images the likelihood follows the one that is wrong, and if all are right it has no optimum. So log T has a
    normal prior about 0 (maximum a posteriori).
    """

    def cost(log_t: float) -> float:
        loss = F.cross_entropy(logits.double() / math.exp(log_t), labels, reduction="sum")
        return loss.item() + 0.5 * (log_t / PRIOR_STD) ** 2

    bounds = math.log(MIN_TEMPERATURE), math.log(MAX_TEMPERATURE)
    return math.exp(minimize_scalar(cost, bounds=bounds, method="bounded", options={"xatol": 1e-4}).x)


def calibrate(logits: Tensor, labels: Tensor) -> dict[str, Any]:
    """Return `calibration` of run.json: the likely T of labels (N) under softmax(logits / T), or one closer to 1.

    A T below 1 may not raise the mean confidence above (right + 1) / (N + 2), the accuracy that N images support by
    Laplace's rule of succession. T is 1 if the loss would not decrease, or the calibration error of the same images
    would increase to gain on a few that are far off.
    """
    n, exact = len(labels), logits.double()
    max_confidence = (int((logits.argmax(dim=1) == labels).sum()) + 1) / (n + 2)

    def loss(t: float) -> float:
        return F.cross_entropy(exact / t, labels).item()

    def excess(log_t: float) -> float:
        return torch.softmax(exact / math.exp(log_t), dim=1).amax(dim=1).mean().item() - max_confidence

    log_t = math.log(likely_temperature(logits, labels))
    if log_t < 0 and excess(log_t) > 0:
        log_t = 0.0 if excess(0.0) >= 0 else float(brentq(excess, log_t, 0.0, xtol=1e-4))
    t = math.exp(log_t)
    before, after = (expected_calibration_error(logits, labels, temperature) for temperature in (1.0, t))
    if loss(t) >= loss(1.0) - MIN_GAIN or after > before:
        t, after = 1.0, before
    losses = {"loss_before": loss(1.0), "loss_after": loss(t)}
    return {"temperature": t, "n": n, "ece_before": before, "ece_after": after, **losses}


def expected_calibration_error(logits: Tensor, labels: Tensor, temperature: float) -> float:
    """Return the mean distance of confidence and accuracy over bins of equal width, weighted by their images."""
    table = reliability(logits, labels, temperature)
    return sum(n * abs(accuracy - confidence) for confidence, accuracy, n in table) / max(1, len(labels))


def calibrated(logits: Tensor, temperature: float) -> Tensor:
    """Return softmax(logits / temperature) of logits (N, classes), float64."""
    return torch.softmax(logits.double() / temperature, dim=1)


def risk_coverage(logits: Tensor, labels: Tensor, temperature: float) -> dict[str, Any]:
    """Return `area`, the mean risk over the k images with the most probable predictions, for each k, and `points`.

    A point is (coverage, risk, probability): the share of the images, the share of errors among them, and the
    probability of the least probable prediction (Geifman and El-Yaniv 2017). There is one at each POINTS-th of them.
    """
    confidence, predicted = calibrated(logits, temperature).max(dim=1)
    order, n = torch.argsort(confidence, descending=True, stable=True), len(labels)
    counts = torch.arange(1, n + 1, dtype=torch.float64)
    risk = (predicted != labels)[order].double().cumsum(0) / counts
    chosen = sorted({-(-n * k // POINTS) - 1 for k in range(1, POINTS + 1)} if n else ())
    points = torch.stack([counts / max(1, n), risk, confidence[order]], dim=1)[chosen]
    return {"area": risk.sum().item() / max(1, n), "points": list(map(tuple, points.tolist()))}


def reliability(logits: Tensor, labels: Tensor, temperature: float) -> list[tuple[float, float, int]]:
    """Return (mean confidence, accuracy, images) of each of the bins (0, 1/15], (1/15, 2/15], ... that has images."""
    confidence, predicted = calibrated(logits, temperature).max(dim=1)
    index, right = (confidence * BINS).ceil().long().clamp(1, BINS), (predicted == labels).double()
    members = [index == i for i in range(1, BINS + 1) if i in index]
    return [(confidence[m].mean().item(), right[m].mean().item(), int(m.sum())) for m in members]


def energy(logits: Tensor) -> Tensor:
    """Return the energy (N), float64, of logits (N, classes): higher for images of no class (Liu et al. 2020)."""
    return -logits.double().logsumexp(dim=1)


def unknown_threshold(predictions: Predictions) -> dict[str, Any] | None:
    """Return `unknown` of run.json: the score (or the energy) below which 95 % of the images are; None if too few."""
    if len(predictions.labels) < MIN_KNOWN:
        return None
    name, scores = ENERGY_AND_DISTANCE, predictions.unknown
    if scores is None:
        name, scores = ENERGY, energy(predictions.logits)
    threshold = scores.double().quantile(ACCEPTED).item()
    return {"score": name, "threshold": threshold, "accepted": ACCEPTED, "n": len(scores)}
