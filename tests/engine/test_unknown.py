from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn

from tlcli.engine.metrics import Predictions
from tlcli.engine.unknown import UnknownScore
from tlcli.errors import TlcliError
from tlcli.models.tensorfile import read_tensors, write_tensors

N, D, CLASSES = 400, 12, 3


def images(centers: Tensor, seed: int, n: int = N) -> tuple[Tensor, Predictions]:
    """Return features around the centers, which differ in the first dimensions, and the logits of their nearest one."""
    labels = torch.arange(n) % len(centers)
    noise = torch.randn(n, centers.shape[1], generator=torch.Generator().manual_seed(seed))
    x = centers[labels] + noise * torch.linspace(0.2, 2.0, centers.shape[1])
    return x, Predictions(-torch.cdist(x, centers), labels)


CENTERS = torch.eye(CLASSES, D) * 6


@pytest.fixture(scope="module")
def score() -> UnknownScore:
    found = UnknownScore.fit("head", *images(CENTERS, seed=0))
    assert found is not None
    return found


def test_other_images_of_the_classes_score_as_the_training_images_do(score: UnknownScore) -> None:
    x, predictions = images(CENTERS, seed=1)
    scores = score(x, predictions.logits)
    assert scores.mean().abs() < 0.4 and 0.5 < scores.std() < 3


def test_images_far_from_the_classes_score_higher(score: UnknownScore) -> None:
    """Features that are off where the classes hardly vary count more than those that are off where they do."""
    x, predictions = images(CENTERS, seed=1)
    bound = score(x, predictions.logits).quantile(0.95)
    narrow, wide = x.clone(), x.clone()
    narrow[:, 3] += 5  # the logits stay those of a known image
    wide[:, -1] += 5
    assert (score(narrow, predictions.logits) > bound).double().mean() > 0.9
    assert (score(wide, predictions.logits) > bound).double().mean() < 0.4


def test_images_without_evidence_for_a_class_score_higher(score: UnknownScore) -> None:
    x, predictions = images(CENTERS, seed=1)
    plain = score(x, predictions.logits)
    assert (score(x, predictions.logits - 9) > plain.quantile(0.95)).double().mean() > 0.9


def test_a_score_does_not_depend_on_the_batch(score: UnknownScore) -> None:
    x, predictions = images(CENTERS, seed=1)
    alone = torch.cat([score(x[i : i + 1], predictions.logits[i : i + 1]) for i in range(9)])
    torch.testing.assert_close(alone, score(x, predictions.logits)[:9], rtol=0, atol=1e-5)


def classifier(n_features: int) -> Any:
    network = nn.ModuleDict({"head": nn.Linear(n_features, CLASSES), "other": nn.Linear(n_features, CLASSES)})
    return Mock(network=network, head=("head",))


def test_too_few_images_give_no_score() -> None:
    x, predictions = images(CENTERS, seed=0, n=3 * CLASSES)
    assert UnknownScore.fit("head", x, predictions) is None
    same = torch.ones(N, D), Predictions(torch.zeros(N, CLASSES), torch.arange(N) % CLASSES)
    assert UnknownScore.fit("head", *same) is None, "no covariance"


def test_a_file_has_the_score(score: UnknownScore, tmp_path: Path) -> None:
    score.write(file := tmp_path / "unknown.safetensors")
    x, predictions = images(CENTERS, seed=2)
    assert torch.equal(UnknownScore.read(file, classifier(D))(x, predictions.logits), score(x, predictions.logits))
    with pytest.raises(TlcliError, match=r"unknown.safetensors: damaged, .* for a layer head with 13 inputs"):
        UnknownScore.read(file, classifier(D + 1))
    write_tensors(file, read_tensors(file)[0], {})
    assert UnknownScore.read(file, classifier(D)).layer == "head", "of a run of an earlier version"
    write_tensors(file, read_tensors(file)[0], {"layer": "other"})
    with pytest.raises(TlcliError, match=r"unknown.safetensors: damaged"):
        UnknownScore.read(file, classifier(D))
