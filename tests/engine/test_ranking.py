"""A ranking scores each backbone by a probe, and chooses the fastest of those that the images cannot tell apart."""

from types import SimpleNamespace

import numpy as np
import pytest

from tlcli.engine.ranking import Score, choose
from tlcli.transfer.probe import CrossValidation


def scored(n_right: int, seconds: float, n: int = 100) -> Score:
    probe = CrossValidation(0.1, 5, np.arange(n) < n_right)
    return Score("name", 224, 160, probe, 1000, 50.0, seconds)


def test_the_error_is_that_of_a_share() -> None:
    assert scored(80, 1).standard_error == pytest.approx(0.04)


def test_scores_tie_if_the_images_that_differ_are_within_a_standard_error() -> None:
    best = scored(90, 100)
    assert scored(89, 10).ties_with(best)
    assert not scored(88, 10).ties_with(best), "two images, of which none the other way"
    mixed = scored(90, 10)
    mixed.probe.correct[:4] = False  # four worse, against 2 better
    mixed.probe.correct[90:92] = True
    assert mixed.ties_with(best)
    assert best.ties_with(scored(50, 1)), "a better one ties with any"


def test_the_fastest_of_those_that_tie_is_chosen() -> None:
    slow, fast, worse = scored(90, 100), scored(89, 10), scored(80, 1)
    assert choose([slow, fast, worse]) is fast
    assert choose([slow, worse]) is slow
    unknown = SimpleNamespace(**{**vars(fast), "seconds": None}, ties_with=fast.ties_with)
    assert choose([slow, unknown]) is unknown  # type: ignore[list-item]
