"""Metrics against what can be worked out by hand; the temperature is never worse in loss, and not surer than the
number of images allows."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tlcli.engine.metrics import (
    MAX_TEMPERATURE,
    MIN_TEMPERATURE,
    BestEpochTracker,
    Predictions,
    Scores,
    calibrate,
    compute_report,
    energy,
    expected_calibration_error,
    most_confused,
    reliability,
    risk_coverage,
    scores,
    unknown_threshold,
    wilson,
)
from tlcli.specs import KeepBest


def predictions(labels: list[int], predicted: list[int], n_classes: int) -> Predictions:
    return Predictions(torch.eye(n_classes)[predicted] * 4, torch.tensor(labels))


def test_wilson_against_published_values() -> None:
    assert wilson(15, 20) == pytest.approx((0.5313, 0.8881), abs=1e-4)  # Newcombe 1998 gives intervals of this method
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert (wilson(0, 10)[0], wilson(10, 10)[1]) == (0.0, 1.0)


def test_report_counts_every_image() -> None:
    report = compute_report(predictions([0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 1, 0], 3), ["a", "b", "c"])
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
    report = compute_report(Predictions(logits, torch.tensor([4, 5])), list("abcdef"))
    assert report["top5"] == 0.5
    assert report["accuracy"] == 0.0


def test_scores_leave_out_classes_without_images() -> None:
    found = scores(predictions([0, 0, 1], [0, 0, 1], 3))
    assert (found.accuracy, found.macro_f1) == (1.0, 1.0)


@pytest.mark.parametrize(("by", "kept"), [("accuracy", 2), ("loss", 1), ("macro_f1", 3)])
def test_selection_by_each_figure(by: str, kept: int) -> None:
    selection = BestEpochTracker(KeepBest(by))
    for epoch, (accuracy, f1, loss) in enumerate([(0.5, 0.5, 0.9), (0.6, 0.6, 0.4), (0.8, 0.6, 0.5), (0.7, 0.7, 0.8)]):
        selection.update(epoch, Scores(accuracy, f1, loss))
    assert selection.epoch == kept


def test_the_loss_decides_between_equal_accuracies() -> None:
    selection = BestEpochTracker(KeepBest.accuracy)
    seen = []
    for epoch, (accuracy, loss) in enumerate([(0.5, 1.0), (0.6, 0.5), (0.6, 0.6), (0.6, 0.4), (0.6, 0.4), (0.5, 0.1)]):
        seen.append(selection.update(epoch, Scores(accuracy, 0.0, loss)))
    assert seen == [True, True, False, True, False, False]


# -- calibration


def drawn(n: int, classes: int, temperature: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits whose labels are drawn from softmax(logits / temperature): it is the right one for them."""
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(n, classes, generator=generator)
    labels = torch.multinomial(torch.softmax(logits / temperature, dim=1), 1, generator=generator)[:, 0]
    return logits, labels


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_it_finds_the_temperature_that_labels_were_drawn_with(temperature: float) -> None:
    assert calibrate(*drawn(5000, 6, temperature))["temperature"] == pytest.approx(temperature, rel=0.05)


@pytest.mark.parametrize("seed", range(0, 20, 3))
@pytest.mark.parametrize("n", [1, 5, 40, 300])
def test_neither_loss_nor_calibration_error_is_above_that_of_one(n: int, seed: int) -> None:
    logits, labels = drawn(n, 4, math.exp((seed - 10) / 5), seed)
    found = calibrate(logits, labels)
    assert MIN_TEMPERATURE <= found["temperature"] <= MAX_TEMPERATURE
    loss = F.cross_entropy(logits.double() / found["temperature"], labels).item()
    assert found["loss_after"] == pytest.approx(loss)
    assert found["loss_after"] <= found["loss_before"]
    assert found["ece_after"] <= found["ece_before"]


@pytest.mark.parametrize("n", [4, 24, 400])
@pytest.mark.parametrize("gap", [0.4, 3.0, 30.0])
def test_all_right_is_no_ground_for_certainty(n: int, gap: float) -> None:
    labels = torch.arange(n) % 2
    logits = gap * F.one_hot(labels).float()
    fitted = calibrate(logits, labels)["temperature"]
    sure = torch.softmax(logits / fitted, dim=1).amax(dim=1).mean().item()
    own = torch.softmax(logits, dim=1).amax(dim=1).mean().item()
    assert sure <= max(own, (n + 1) / (n + 2)) + 1e-4
    assert fitted <= 1.0  # and what is right is not doubted


def test_a_few_images_do_not_drive_it_far() -> None:
    logits, labels = torch.tensor([[9.0, 0.0], [9.0, 0.0], [0.0, 9.0]]), torch.tensor([1, 0, 1])
    assert 1 < calibrate(logits, labels)["temperature"] < 6  # the likelihood alone asks for 13
    assert calibrate(logits.repeat(500, 1), labels.repeat(500))["temperature"] > 10


def test_the_error_is_the_weighted_distance_of_the_bins() -> None:
    logits = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.65, 0.35], [0.55, 0.45]]).log()
    labels = torch.tensor([0, 1, 0, 1])
    assert expected_calibration_error(logits, labels, 1.0) == pytest.approx(
        (abs(0.5 - 0.9) * 2 + abs(1 - 0.65) + abs(0 - 0.55)) / 4, abs=1e-6
    )
    assert reliability(logits, labels, 1.0) == [pytest.approx(b) for b in [(0.55, 0, 1), (0.65, 1, 1), (0.9, 0.5, 2)]]


def test_risk_is_that_of_the_most_probable_predictions() -> None:
    p = torch.tensor([0.6, 0.9, 0.7, 0.8])
    logits, labels = torch.stack([p, 1 - p], dim=1).log(), torch.tensor([1, 0, 0, 0])  # the least probable is wrong
    curve = risk_coverage(logits, labels, 1.0)["points"]
    assert [risk for _, risk, _ in curve] == [0, 0, 0, 0.25]
    assert [coverage for coverage, _, _ in curve] == [0.25, 0.5, 0.75, 1]
    assert [probability for *_, probability in curve] == pytest.approx([0.9, 0.8, 0.7, 0.6])
    report = compute_report(Predictions(logits, labels), ["a", "b"], 2.0)["risk_coverage"]
    assert report["area"] == 0.0625 and report == risk_coverage(logits, labels, 2.0)
    wrong = risk_coverage(-logits.repeat(500, 1), labels.repeat(500), 1.0)
    assert len(wrong["points"]) == 200 and wrong["points"][-1][:2] == (1, 0.75) and wrong["area"] > 0.75


def test_the_threshold_accepts_what_looks_known() -> None:
    generator = torch.Generator().manual_seed(0)
    known = Predictions(3 * torch.randn(400, 5, generator=generator), torch.zeros(400, dtype=torch.int64))
    found, scores = unknown_threshold(known), energy(known.logits)
    assert found is not None and (found["n"], found["score"]) == (400, "energy")
    assert (scores <= found["threshold"]).double().mean() == pytest.approx(0.95, abs=1 / 400)
    assert (energy(torch.zeros(1, 5)) > scores).double().mean() > 0.9, "no class has evidence"
    scored = replace(known, unknown=-scores)
    assert (found := unknown_threshold(scored)) is not None and found["score"] == "energy and distance"
    assert (-scores <= found["threshold"]).double().mean() == pytest.approx(0.95, abs=1 / 400)
    assert unknown_threshold(Predictions(known.logits[:99], known.labels[:99])) is None
