"""Figures from predictions, against what can be worked out by hand."""

import pytest
import torch

from tlcli.engine.metrics import BestEpochTracker, Predictions, Scores, most_confused, scores, test_report, wilson
from tlcli.specs import KeepBest

test_report.__test__ = False  # type: ignore[attr-defined]  # a report on the test set, not a test


def predictions(labels: list[int], predicted: list[int], n_classes: int) -> Predictions:
    return Predictions(torch.eye(n_classes)[predicted] * 4, torch.tensor(labels))


def test_wilson_against_published_values() -> None:
    assert wilson(15, 20) == pytest.approx((0.5313, 0.8881), abs=1e-4)  # Newcombe 1998 gives intervals of this method
    assert wilson(0, 10)[0] == 0.0
    assert wilson(10, 10)[1] == 1.0
    low, high = wilson(81, 263)
    assert (low, high) == pytest.approx((0.2553, 0.3662), abs=1e-4)


def test_report_counts_every_image() -> None:
    report = test_report(predictions([0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 1, 0], 3), ["a", "b", "c"])
    assert report["accuracy"] == pytest.approx(4 / 6)
    assert report["confusion"] == [[2, 1, 0], [0, 2, 0], [1, 0, 0]]
    assert report["per_class"]["a"] == {
        "precision": pytest.approx(2 / 3),
        "recall": pytest.approx(2 / 3),
        "f1": pytest.approx(2 / 3),
        "support": 3,
    }
    assert report["per_class"]["c"]["f1"] == 0.0
    assert report["top5"] is None
    assert report["n"] == 6
    assert most_confused(report) == (("a", "b", 1), ("c", "a", 1))


def test_top5_counts_the_five_highest() -> None:
    logits = torch.tensor([[6.0, 5, 4, 3, 2, 1], [6.0, 5, 4, 3, 2, 1]])
    report = test_report(Predictions(logits, torch.tensor([4, 5])), list("abcdef"))
    assert report["top5"] == 0.5
    assert report["accuracy"] == 0.0


def test_scores_leave_out_classes_without_images() -> None:
    found = scores(predictions([0, 0, 1], [0, 0, 1], 3))
    assert (found.accuracy, found.macro_f1) == (1.0, 1.0)


@pytest.mark.parametrize(("by", "kept"), [("accuracy", 2), ("loss", 1), ("macro_f1", 3)])
def test_selection_by_each_figure(by: str, kept: int) -> None:
    selection = BestEpochTracker(KeepBest(by), None)
    for epoch, (accuracy, f1, loss) in enumerate([(0.5, 0.5, 0.9), (0.6, 0.6, 0.4), (0.8, 0.6, 0.5), (0.7, 0.7, 0.8)]):
        selection.update(epoch, Scores(accuracy, f1, loss))
    assert selection.epoch == kept
    assert not selection.should_stop


def test_equal_accuracy_is_decided_by_the_loss() -> None:
    selection = BestEpochTracker(KeepBest.accuracy, None)
    assert selection.update(1, Scores(0.9, 0.9, 0.5))
    assert not selection.update(2, Scores(0.9, 0.9, 0.6))
    assert selection.update(3, Scores(0.9, 0.9, 0.4))


def test_early_stop_counts_epochs_without_a_better_one() -> None:
    selection = BestEpochTracker(KeepBest.accuracy, early_stop=2)
    should_stop = []
    for epoch, accuracy in enumerate([0.5, 0.6, 0.6, 0.55]):
        selection.update(epoch, Scores(accuracy, 0.0, 1.0))
        should_stop.append(selection.should_stop)
    assert should_stop == [False, False, False, True]
