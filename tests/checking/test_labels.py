"""Labels that are likely wrong: changed ones are named first, and a copy does not vouch for its copy."""

import numpy as np
import pytest
import torch

from tlcli.checking.labels import (
    FOLDS,
    check_labels,
    class_thresholds,
    out_of_fold,
    stratified_folds,
    suspects,
)


def clouds(n: int, n_classes: int, seed: int = 0) -> tuple[torch.Tensor, np.ndarray]:
    """Features (n, 16) in a cloud a class, and the classes."""
    random = np.random.default_rng(seed)
    labels = np.arange(n) % n_classes
    centres = random.normal(0, 2, (n_classes, 16))
    return torch.from_numpy((centres[labels] + random.normal(0, 1, (n, 16))).astype(np.float32)), labels


@pytest.mark.parametrize("n_classes", [2, 5])
def test_changed_labels_are_named_first(n_classes: int) -> None:
    features, labels = clouds(200, n_classes)
    changed = np.random.default_rng(1).choice(200, 10, replace=False)
    given = labels.copy()
    given[changed] = (given[changed] + 1) % n_classes
    found = check_labels(features, given, n_classes, [], seed=0)
    assert set(found.suspects[:10].tolist()) == set(changed.tolist())
    assert (found.suggested[changed] == labels[changed]).all()
    assert found.likely[changed].sum() >= 6
    assert not np.delete(found.likely, changed).any()
    assert found.agreement(given) == pytest.approx(0.95, abs=0.01)
    assert np.allclose(found.probabilities.sum(axis=1), 1, atol=1e-5)


def test_right_labels_are_left_alone() -> None:
    features, labels = clouds(200, 4)
    assert len(check_labels(features, labels, 4, [], seed=0).suspects) == 0


def test_copies_are_in_one_fold() -> None:
    labels = np.arange(100) % 2
    folds = stratified_folds(labels, [[0, 1, 50], [7, 9]], seed=0)
    assert folds[0] == folds[1] == folds[50]
    assert folds[7] == folds[9]


def test_a_copy_with_the_same_wrong_label_does_not_vouch_for_it() -> None:
    features, labels = clouds(100, 2)
    features = torch.cat([features, features[:1].expand(20, -1)])
    given = np.concatenate([labels, np.full(20, 1 - labels[0])])
    given[0] = 1 - labels[0]
    copies = [0, *range(100, 120)]
    assert set(copies) <= set(check_labels(features, given, 2, [copies], seed=0).suspects.tolist())
    assert not set(copies) & set(check_labels(features, given, 2, [], seed=0).suspects.tolist())


def test_folds_spread_each_class() -> None:
    labels = np.repeat([0, 1, 2], [50, 10, 5])
    folds = stratified_folds(labels, [], seed=3)
    for label, n in ((0, 50), (1, 10), (2, 5)):
        assert np.bincount(folds[labels == label], minlength=FOLDS).tolist() == [n // FOLDS] * FOLDS
    assert (folds == stratified_folds(labels, [], seed=3)).all()
    assert (folds != stratified_folds(labels, [], seed=4)).any()


def test_a_class_of_one_image() -> None:
    features, labels = clouds(60, 2)
    given = labels.copy()
    given[5] = 2
    probabilities = out_of_fold(features, given, 3, stratified_folds(given, [], seed=0))
    assert probabilities[5, 2] == 0
    assert np.allclose(probabilities.sum(axis=1), 1, atol=1e-5)


def test_thresholds_and_ranks() -> None:
    probabilities = np.array([[0.9, 0.1], [0.7, 0.3], [0.2, 0.8], [0.45, 0.55], [0.1, 0.9]], dtype=np.float32)
    labels = np.array([0, 0, 0, 0, 1])
    thresholds = class_thresholds(probabilities, labels)
    assert thresholds.tolist() == pytest.approx([0.5625, 0.9])
    ranked, suggested, likely = suspects(probabilities, labels, np.array([0.56, 0.75], dtype=np.float32))
    assert ranked.tolist() == [2, 3]
    assert suggested.tolist() == [1, 1, 1, 1, 0]
    assert likely.tolist() == [False, False, True, False, False]
