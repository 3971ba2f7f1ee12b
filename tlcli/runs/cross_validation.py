"""Cross-validation: the predictions of the folds, in directories next to that of the refit, as those of one run."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import fmean, stdev
from typing import Any

import torch

from tlcli.data.dataset import Dataset
from tlcli.engine.metrics import Predictions, compute_report
from tlcli.errors import TlcliError
from tlcli.models.tensorfile import read_tensors
from tlcli.runs.run_dir import FOLD, RunDir, read_predictions, stored_confusion, total_seconds


def cross_validate(
    refit: RunDir, folds: int, data: Dataset, choose: Callable[[Sequence[Predictions]], int]
) -> tuple[Predictions, dict[str, Any]]:
    """Return the out-of-fold prediction of each training image, in order, and `cross_validation` of run.json.

    `choose` returns the position of the share to take, given the predictions at each, if the folds have several. The
    interval is Wilson's, as if the images were predicted independently: approximate, since the models of two folds
    share most training images. Raise TlcliError if predictions of a fold are missing, or of other images.
    """
    runs = [RunDir(refit.path.with_name(FOLD.format(i))) for i in range(folds)]
    parts = [read_predictions(run.val_predictions) for run in runs]
    position = {key: i for i, key in enumerate(key for part in parts for key in part.keys)}
    keys = [data.train.key(i) for i in range(len(data.train))]
    if position.keys() != set(keys) or any(part.classes != data.classes for part in parts):
        raise TlcliError(f"{refit.path.parent}: the folds were trained on other images than these; start a new run")
    order = [position[key] for key in keys]
    files = [run.val_shares for run in runs]
    logits = [read_tensors(file)[0]["logits"] for file in files] if all(file.is_file() for file in files) else None
    by_share = logits or [part.logits[None] for part in parts]  # (shares, N, C) of each fold
    labels = torch.cat([part.labels for part in parts])[order]
    if labels.tolist() != data.train.labels.tolist():
        raise TlcliError(f"{refit.path.parent}: labels have changed since the folds were trained; start a new run")
    pools = [Predictions(torch.cat(pool)[order], labels) for pool in zip(*by_share, strict=True)]
    chosen = choose(pools) if len(pools) > 1 else 0
    scores = [part.unknown for part in parts if part.unknown is not None]
    pooled = replace(pools[chosen], unknown=torch.cat(scores)[order] if len(scores) == len(parts) else None)
    report = compute_report(pooled, data.classes)
    rights = [fold[chosen].argmax(dim=1) == part.labels for fold, part in zip(by_share, parts, strict=True)]
    accuracies = [right.double().mean().item() for right in rights]
    return pooled, {
        "folds": folds,
        **{key: report[key] for key in ("n", "accuracy", "accuracy_ci95")},
        "fold_accuracies": accuracies,
        "mean": fmean(accuracies),
        "standard_deviation": stdev(accuracies),
        "confusion": stored_confusion(report["confusion"]),
        "seconds": sum(total_seconds(run.info) or 0.0 for run in runs),
    }
