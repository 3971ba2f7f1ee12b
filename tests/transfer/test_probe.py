"""The linear probe: the layer is the regression, and its penalty is the one that is best on images held out."""

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn

from tlcli.transfer import probe
from tlcli.transfer.probe import PENALTIES, choose_penalty, fit_probe


@pytest.mark.parametrize("n_classes", [2, 3])
def test_the_head_gives_the_probabilities_of_the_regression(n_classes: int) -> None:
    """Features of any scale and offset, of which one says nothing and one is nearly constant."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(n_classes).repeat(40)
    features = 100 * torch.randn(len(labels), 6, generator=generator) + 50 * labels[:, None] + 5
    features[:, 3] = 7.0
    features[:, 4] = 1e-3 * labels
    head = nn.Linear(6, n_classes)
    state = fit_probe(head, features, labels, penalty=0.3)
    assert all(torch.equal(state[name], tensor) for name, tensor in head.state_dict().items())
    scale = features.var(0, correction=0).mean().sqrt()
    standard = ((features - features.mean(0)) / scale).numpy()
    regression = LogisticRegression(C=1 / (0.3 * len(labels))).fit(standard, labels.numpy())
    expected = torch.from_numpy(regression.predict_proba(standard)).float()
    assert torch.allclose(torch.softmax(head(features), dim=1), expected, atol=1e-3)
    assert head.weight[:, 4].abs().max() < head.weight[:, :3].abs().max()  # no feature gets a huge weight


def test_noise_needs_the_highest_penalty_and_a_clean_signal_the_lowest() -> None:
    generator = torch.Generator().manual_seed(0)
    labels, noise = torch.arange(3).repeat(30), torch.randn(90, 40, generator=generator)
    signal = nn.functional.one_hot(labels).float() @ torch.randn(3, 40, generator=generator)
    chosen = [choose_penalty(features, labels, 0) for features in (noise, signal + 0.1 * noise)]
    assert [result.penalty for result in chosen if result] == [max(PENALTIES), min(PENALTIES)]
    assert chosen[0].accuracy < 0.5 and chosen[1].accuracy == 1.0  # on images that were held out


def test_penalty_is_chosen_on_a_sample_and_not_from_single_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "MAX_IMAGES", 30)
    features, labels = torch.randn(90, 5), torch.arange(3).repeat(30)
    assert len(choose_penalty(features, labels, 0).correct) == 30
    assert choose_penalty(features[:4], torch.tensor([0, 0, 0, 1]), 0) is None


def test_a_rare_class_does_not_end_cross_validation() -> None:
    features, labels = torch.randn(43, 5), torch.arange(2).repeat(20)
    found = choose_penalty(features, torch.cat([labels, torch.tensor([2, 3, 3])]), 0)
    assert found and (found.folds, len(found.correct)) == (5, 40)
