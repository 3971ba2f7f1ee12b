"""The study of a search: its first recipes, the values that it tries, and which trials it stops."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from msgspec import structs

from tests.conftest import Compose
from tlcli import tune
from tlcli.engine.session import Session
from tlcli.errors import UsageError
from tlcli.models.tensorfile import read_tensors, write_tensors
from tlcli.reporter import Reporter
from tlcli.runs.run_dir import RunDir, SplitPredictions
from tlcli.specs import Tta
from tlcli.store import Store
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
def study_of(tmp_path: Path) -> Callable[..., Study]:
    """study_of(): the study in one file, as each worker opens it."""
    return lambda minimize=False: Study(SPEC, DEFAULTS, tmp_path / "study.journal", seed=0, minimize=minimize)


def recipe_of(trial: Any) -> dict[str, Any]:
    return trial.user_attrs["recipe"]


def test_the_first_recipes_are_the_defaults_and_those_given(study_of: Callable[..., Study]) -> None:
    study = study_of()
    recipes = [recipe_of(study.next_trial("a")) for _ in range(12)]
    assert recipes[:2] == [DEFAULTS, {**DEFAULTS, "augment": "none"}]
    assert {recipe["augment"] for recipe in recipes[2:]} == {"basic", "none", "trivial"}
    assert all(1e-4 <= recipe["optimizer.lr"] <= 0.05 for recipe in recipes[2:])


def test_first_recipes_that_are_alike_without_the_keys_that_were_given_are_tried_once(tmp_path: Path) -> None:
    spec, defaults = SPEC.without(["augment"]), {"optimizer.lr": 0.05}
    for number in range(2):
        study = Study(spec, defaults, tmp_path / "study.journal", seed=0, minimize=False)
        assert (recipe_of(study.next_trial("a")) == defaults) == (number == 0)


def test_a_first_recipe_may_have_a_value_that_the_list_lacks(tmp_path: Path) -> None:
    spec = structs.replace(SPEC, first=({"augment": "heavy"},))
    study = Study(spec, DEFAULTS, tmp_path / "study.journal", seed=0, minimize=False)
    assert recipe_of(study.next_trial("a")) == {**DEFAULTS, "augment": "heavy"}


def test_workers_share_numbers_and_draw_different_recipes(study_of: Callable[..., Study]) -> None:
    workers = [study_of(), study_of(), study_of()]
    trials = [worker.next_trial(str(i)) for _ in range(4) for i, worker in enumerate(workers)]
    assert [trial.number for trial in trials] == list(range(12))
    assert len({recipe_of(trial)["optimizer.lr"] for trial in trials[2:]}) == 10
    assert all(study.running() == {i: str(i % 3) for i in range(12)} for study in workers)


def test_it_continues_with_the_trial_that_was_interrupted(study_of: Callable[..., Study]) -> None:
    study = study_of()
    for status, value in (("done", 0.5), ("stopped", None), ("failed", None)):
        assert study.tell(study.next_trial("a").number, value, status, seconds=2.0, error="why") == status
    trial = study.next_trial("a")
    study.put_back(trial.number)
    study = study_of()
    again = study.next_trial("b")
    assert (again.number, recipe_of(again)) == (3, recipe_of(trial))
    assert study.running() == {3: "b"}
    trials = study.ended()
    assert [(t["name"], t["status"], t["value"]) for t in trials] == [
        ("0", "done", 0.5),
        ("1", "stopped", None),
        ("2", "failed", None),
    ]
    assert trials[0]["recipe"] == DEFAULTS and trials[0]["seconds"] == 2.0 and trials[2]["error"] == "why"


@pytest.mark.parametrize("n_before", [0, 5])
def test_a_lost_trial_is_queued_again_under_another_number(study_of: Callable[..., Study], n_before: int) -> None:
    study, other = study_of(), study_of()
    for _ in range(n_before):
        study.tell(study.next_trial("a").number, 0.5, "done")
    lost = study.next_trial("a")
    assert other.tell(lost.number, None, "lost") == "lost"
    assert study.tell(lost.number, 0.9, "done") == "lost", "its worker was only suspended"
    study.put_back(lost.number)
    trials = [other.next_trial("b") for _ in range(2)]
    again = [trial for trial in trials if recipe_of(trial) == recipe_of(lost)]
    assert len(again) == 1 and again[0].number > lost.number
    assert other.ended()[n_before]["status"] == "lost" and other.ended()[n_before]["value"] is None
    assert lost.number not in study.running()


def test_half_a_line_at_the_end_of_the_journal_is_cut(study_of: Callable[..., Study], tmp_path: Path) -> None:
    study_of().next_trial("a")
    with (tmp_path / "study.journal").open("ab") as file:
        file.write(b'{"op_code":4,"worker_id":"')
    assert study_of().next_trial("b").number == 1
    assert study_of().running() == {0: "a", 1: "b"}


def test_a_damaged_journal_is_named(study_of: Callable[..., Study], tmp_path: Path) -> None:
    study_of().next_trial("a")
    file = tmp_path / "study.journal"
    file.write_text("{]\n" + file.read_text())
    with pytest.raises(UsageError, match=r"study\.journal: damaged"):
        study_of()


@pytest.mark.parametrize("minimize", [False, True])
def test_a_trial_is_stopped_if_it_is_worse_than_the_median_but_not_early(study_of, minimize) -> None:
    study, sign = study_of(minimize=minimize), -1 if minimize else 1
    for i in range(STARTUP_TRIALS + 1):
        trial = study.next_trial("a")
        is_last = i == STARTUP_TRIALS
        for percent in range(10, 100, 10):
            trial.report(sign * (0.1 if is_last else 0.5 + 0.1 * i), percent)
            assert trial.should_prune() == (is_last and percent >= WARMUP_PERCENT), percent
            if trial.should_prune():
                break
        study.tell(trial.number, None if is_last else sign * 0.5, "stopped" if is_last else "done")


@pytest.mark.parametrize(
    ("gains", "prefers"), [((0.5, 0.4, 0.6), True), ((0.5, -0.6, 0.2), False), ((-0.1,) * 3, False)]
)
def test_mirrors_must_lower_the_loss_by_more_than_one_standard_error(
    spec: Compose, monkeypatch, gains, prefers: bool
) -> None:
    losses = {Tta.none: torch.ones(3), Tta.flip: torch.ones(3) - torch.tensor(gains)}
    monkeypatch.setattr(tune, "predict_mean", lambda runs, spec, *args: spec.tta)
    monkeypatch.setattr(tune, "_losses", losses.__getitem__)
    assert tune.prefers_mirrors([], spec("dataset=cifar10"), Session(Store(Path()), 0), Reporter()) is prefers


def test_mirrors_are_not_compared_if_the_user_has_chosen() -> None:
    own = structs.replace(SPEC, mirrors=True)
    assert own.without(["image.fit"]).mirrors and not own.without(["tta"]).mirrors


def test_a_mean_of_runs_has_the_command_of_the_search_its_own_images_and_no_time_of_training(tmp_path: Path) -> None:
    runs, final = [RunDir(tmp_path / name) for name in "01"], RunDir(tmp_path / "mean")
    for weight, run in enumerate(runs):
        run.start(command="tlcli train", overrides=["seed=1"], config="tta: none\n")
        run.update(n_val=0, seconds={"train": 4.0, "total": 5.0})
        run.best_checkpoint.parent.mkdir()
        write_tensors(run.best_checkpoint, {"w": torch.full((2,), float(weight))}, {"epoch": 1})
    validation = SplitPredictions(torch.eye(2), torch.arange(2), ("a", "b"), ("a/0", "b/0"))
    tune.average_runs(runs, final, validation, Tta.flip, "tlcli tune budget=1h")
    assert read_tensors(final.best_checkpoint)[0]["w"].tolist() == [0.5, 0.5]
    assert (final.info["command"], final.info["averaged"]) == ("tlcli tune budget=1h", ["0", "1"])
    assert (final.info["n_val"], final.info["seconds"]) == (2, {"total": 0.0})
    assert final.info["tta"] == final.config()["tta"] == "flip"


def test_importances_need_some_trials(study_of: Callable[..., Study]) -> None:
    study = study_of()
    assert study.importances() == {}
    for _ in range(12):
        trial = study.next_trial("a")
        study.tell(trial.number, 0.9 if recipe_of(trial)["augment"] == "basic" else 0.1, "done")
    shares = study.importances()
    assert list(shares) == ["augment", "optimizer.lr"] and sum(shares.values()) == pytest.approx(1)


@pytest.mark.parametrize(("key", "kind"), [("batch_size", int), ("optimizer.weight_decay", float)])
def test_bounds_of_a_key_with_whole_numbers_draw_whole_numbers(tmp_path: Path, key: str, kind: type) -> None:
    spec = structs.replace(SPEC, first=({},), space={key: Bounds(4, 64, log=True)})
    study = Study(spec, {key: 8}, tmp_path / "study.journal", seed=0, minimize=False)
    values = [recipe_of(study.next_trial("a"))[key] for _ in range(9)]
    assert values[0] == 8 and {type(value) for value in values[1:]} == {kind}
    assert all(4 <= value <= 64 for value in values) and len(set(values)) > 3


def test_bounds_need_a_number(tmp_path: Path) -> None:
    for value, rule in ((None, "must be above 0"), (0.0, "must be above 0")):  # its bounds are logarithmic
        with pytest.raises(UsageError, match=f"optimizer.lr={value} {rule}"):
            Study(SPEC, {**DEFAULTS, "optimizer.lr": value}, tmp_path / "study.journal", seed=0, minimize=False)
    with pytest.raises(ValueError, match="low=0 must be below high=1, and above 0"):
        Bounds(0, 1, log=True)


def test_a_search_that_would_hold_out_all_images_is_refused() -> None:
    values = msgspec.to_builtins(SPEC)
    assert msgspec.convert(values, TuneSpec).val_fraction == 0.2
    with pytest.raises(msgspec.ValidationError, match="val_fraction"):
        msgspec.convert({**values, "val_fraction": 1.0}, TuneSpec)
