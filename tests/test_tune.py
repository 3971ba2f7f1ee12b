"""The study of a search: its first recipes, the values that it tries, and which trials it stops."""

from typing import Any

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


def study_of(*trials: dict[str, Any], current: dict[str, Any] | None = None, minimize: bool = False) -> Study:
    return Study(SPEC, DEFAULTS, trials, current, seed=0, minimize=minimize)


def test_the_first_recipes_are_the_defaults_and_those_given() -> None:
    study = study_of()
    recipes = [study.recipe(study.next_trial()) for _ in range(12)]
    assert recipes[:2] == [DEFAULTS, {**DEFAULTS, "augment": "none"}]
    assert {recipe["augment"] for recipe in recipes[2:]} == {"basic", "none", "trivial"}
    assert all(1e-4 <= recipe["optimizer.lr"] <= 0.05 for recipe in recipes[2:])


def test_it_continues_with_the_trial_that_was_interrupted() -> None:
    done = {"status": "done", "value": 0.5, "recipe": DEFAULTS, "reports": {"50": 0.4}}
    stopped = {"status": "stopped", "value": None, "recipe": DEFAULTS, "reports": {"50": 0.1}}
    failed = {"status": "failed", "value": None, "recipe": DEFAULTS, "reports": {}}
    current = {"optimizer.lr": 0.001, "augment": "basic"}
    study = study_of(done, stopped, failed, current=current)
    trial = study.next_trial()
    assert (trial.number, study.recipe(trial)) == (3, current)
    study = study_of(done)
    trial = study.next_trial()
    assert (trial.number, study.recipe(trial)) == (1, {**DEFAULTS, "augment": "none"})


@pytest.mark.parametrize("minimize", [False, True])
def test_a_trial_is_stopped_if_it_is_worse_than_the_median_but_not_early(minimize: bool) -> None:
    study, sign = study_of(minimize=minimize), -1 if minimize else 1
    for i in range(STARTUP_TRIALS + 1):
        trial = study.next_trial()
        study.recipe(trial)
        is_last = i == STARTUP_TRIALS
        for percent in range(10, 100, 10):
            trial.report(sign * (0.1 if is_last else 0.5 + 0.1 * i), percent)
            assert trial.should_prune() == (is_last and percent >= WARMUP_PERCENT), percent
            if trial.should_prune():
                break
        study.tell(trial, None if is_last else sign * 0.5, "stopped" if is_last else "done")


def test_importances_need_some_trials() -> None:
    study = study_of()
    assert study.importances() == {}
    for _ in range(12):
        trial = study.next_trial()
        study.tell(trial, 0.9 if study.recipe(trial)["augment"] == "basic" else 0.1, "done")
    shares = study.importances()
    assert list(shares) == ["augment", "optimizer.lr"] and sum(shares.values()) == pytest.approx(1)


def test_bounds_need_a_number() -> None:
    with pytest.raises(UsageError, match="is no number"):
        Study(SPEC, {**DEFAULTS, "optimizer.lr": None}, [], None, seed=0, minimize=False)
    with pytest.raises(ValueError, match="low=0 must be below high=1, and above 0"):
        Bounds(0, 1, log=True)
