"""The probe: the layer computes what the regression does, for two classes and for more."""

import pytest
import torch
from torch import nn

from tests.conftest import Compose
from tlcli.models.build import build_model
from tlcli.transfer.contract import fit_probe, linear_head


@pytest.mark.parametrize("n_classes", [2, 3, 7])
def test_probe_separates_what_is_separable(n_classes: int) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n_classes).repeat(30)
    centres = torch.randn(n_classes, 12, generator=generator) * 3
    features = centres[labels] + 0.3 * torch.randn(len(labels), 12, generator=generator)
    features = features * 100 + 5  # of any scale and offset
    features[:, 3] = 7.0  # and one that says nothing
    head = nn.Linear(12, n_classes)
    fit_probe(head, features, labels)
    assert (head(features).argmax(dim=1) == labels).float().mean() > 0.97
    assert head.weight.isfinite().all()


def test_probabilities_are_those_of_the_regression() -> None:
    from sklearn.linear_model import LogisticRegression

    from tlcli.transfer.contract import L2_PER_IMAGE

    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(2).repeat(40)
    features = torch.randn(80, 5, generator=generator) + labels[:, None]
    head = nn.Linear(5, 2)
    fit_probe(head, features, labels)
    scale = features.var(0, correction=0).mean().sqrt()
    standard = ((features - features.mean(0)) / scale).numpy()
    regression = LogisticRegression(C=1 / (L2_PER_IMAGE * 80)).fit(standard, labels.numpy())
    expected = torch.from_numpy(regression.predict_proba(standard)).float()
    assert torch.allclose(torch.softmax(head(features), dim=1), expected, atol=1e-3)


def test_nearly_constant_features_get_no_huge_weights() -> None:
    """A backbone far from its own images has such features; a head that leans on them explodes as soon as they move."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(3).repeat(40)
    features = torch.randn(120, 8, generator=generator) + labels[:, None]
    features[:, 0] = 1e-5 * labels + 1e-6 * torch.randn(120, generator=generator)
    head = nn.Linear(8, 3)
    fit_probe(head, features, labels)
    assert head.weight[:, 0].abs().max() < head.weight[:, 1:].abs().max()


def test_only_a_single_linear_head_can_be_probed(spec: Compose) -> None:
    def head(name: str) -> nn.Linear | None:
        backbone = spec("backbone=timm", f"backbone.name={name}", "backbone.weights=none").backbone
        return linear_head(build_model(backbone, ("a", "b"), size=None, seed=0))

    assert head("resnet10t") is not None
    assert head("deit_tiny_distilled_patch16_224") is None
