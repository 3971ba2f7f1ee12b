"""Cross-validation: the predictions of the folds, in directories next to that of the refit, as those of one run."""

from statistics import fmean, stdev
from typing import Any

import torch

from tlcli.data.dataset import Dataset
from tlcli.engine.metrics import Predictions, test_report
from tlcli.errors import TlcliError
from tlcli.runs.run_dir import FOLD, RunDir, mapping, number, read_predictions, stored_confusion


def cross_validate(refit: RunDir, folds: int, data: Dataset) -> tuple[Predictions, dict[str, Any]]:
    """Return the out-of-fold prediction of each training image, in order, and `cross_validation` of run.json.

    The interval is Wilson's, as if the images were predicted independently: approximate, since the models of two folds
    share most training images. Raise TlcliError if predictions of a fold are missing, or of other images.
    """
    runs = [RunDir(refit.path.with_name(FOLD.format(i))) for i in range(folds)]
    parts = [read_predictions(run.val_predictions) for run in runs]
    position = {key: i for i, key in enumerate(key for part in parts for key in part.keys)}
    keys = [data.train.key(i) for i in range(len(data.train))]
    if position.keys() != set(keys) or any(part.classes != data.classes for part in parts):
        raise TlcliError(f"{refit.path.parent}: the folds were trained on other images than these; start a new run")
    order = [position[key] for key in keys]
    logits, labels = (torch.cat([getattr(part, name) for part in parts])[order] for name in ("logits", "labels"))
    pooled = Predictions(logits, labels)
    report = test_report(pooled, data.classes)
    accuracies = [(part.logits.argmax(dim=1) == part.labels).double().mean().item() for part in parts]
    return pooled, {
        "folds": folds,
        **{key: report[key] for key in ("n", "accuracy", "accuracy_ci95")},
        "fold_accuracies": accuracies,
        "mean": fmean(accuracies),
        "standard_deviation": stdev(accuracies),
        "confusion": stored_confusion(report["confusion"]),
        "seconds": sum(number(mapping(run.info.get("seconds")).get("total")) or 0.0 for run in runs),
    }
