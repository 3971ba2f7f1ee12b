"""The study of a search: its first recipes, the values that it tries, and which trials it stops."""

from pathlib import Path

import pytest

from tlcli.errors import UsageError
from tlcli.tune import STARTUP_TRIALS, WARMUP_PERCENT, Bounds, Study, TuneSpec

SPEC = TuneSpec(
    overrides=(),
    val_fraction=0.2,
    average=2,
    trials=None,
    sampler="random",
    first=({}, {"augment": "none"}),
    sizes=(),
    space={"optimizer.lr": Bounds(1e-4, 1e-2, log=True), "augment": ("basic", "none")},
)
DEFAULTS = {"optimizer.lr": 0.05, "augment": "trivial"}


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return Study(tmp_path / "study.jsonl", SPEC, DEFAULTS, 0, minimize=False)


def test_the_first_recipes_are_the_defaults_and_those_given(study: Study) -> None:
    recipes = [study.recipe(study.study.ask()) for _ in range(12)]
    assert recipes[:2] == [DEFAULTS, {**DEFAULTS, "augment": "none"}]
    assert {recipe["augment"] for recipe in recipes[2:]} == {"basic", "none", "trivial"}
    assert all(1e-4 <= recipe["optimizer.lr"] <= 0.05 for recipe in recipes[2:])


def test_a_study_is_opened_again_with_the_trial_that_was_interrupted(study: Study, tmp_path: Path) -> None:
    done, interrupted = study.next_trial(), None
    study.recipe(done)
    study.tell(done, 0.5)
    interrupted = study.next_trial()
    recipe = study.recipe(interrupted)
    again = Study(tmp_path / "study.jsonl", SPEC, DEFAULTS, 0, minimize=False)
    trial = again.next_trial()
    assert (trial.number, again.recipe(trial)) == (interrupted.number, recipe)
    again.tell(trial, 0.6)
    assert again.next_trial().number == 2


@pytest.mark.parametrize("minimize", [False, True])
def test_a_trial_is_stopped_if_it_is_worse_than_the_median_but_not_early(tmp_path: Path, minimize: bool) -> None:
    study = Study(tmp_path / "study.jsonl", SPEC, DEFAULTS, 0, minimize=minimize)
    sign = -1 if minimize else 1
    for i in range(STARTUP_TRIALS + 1):
        trial = study.next_trial()
        study.recipe(trial)
        is_last = i == STARTUP_TRIALS
        for percent in range(10, 100, 10):
            trial.report(sign * (0.1 if is_last else 0.5 + 0.1 * i), percent)
            assert trial.should_prune() == (is_last and percent >= WARMUP_PERCENT), percent
            if trial.should_prune():
                break
        study.tell(trial, None if is_last else sign * 0.5, stopped=is_last)


def test_importances_need_some_trials(study: Study) -> None:
    assert study.importances() == {}
    for _ in range(12):
        trial = study.next_trial()
        recipe = study.recipe(trial)
        study.tell(trial, 0.9 if recipe["augment"] == "basic" else 0.1)
    shares = study.importances()
    assert list(shares) == ["augment", "optimizer.lr"] and sum(shares.values()) == pytest.approx(1)


def test_bounds_need_a_number(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no number"):
        Study(tmp_path / "study.jsonl", SPEC, {**DEFAULTS, "optimizer.lr": None}, 0, minimize=False)
    with pytest.raises(ValueError, match="low=0 must be below high=1, and above 0"):
        Bounds(0, 1, log=True)
