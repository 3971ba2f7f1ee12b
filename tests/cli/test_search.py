"""Workers of one search: they share numbers, trials and time, and one takes over what another one left."""

import errno
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
from msgspec import structs

from tlcli import locks, tune
from tlcli.cli import search
from tlcli.cli.compose import compose_spec
from tlcli.cli.search import LOST, MAX_FAILURES, MIRRORS, STATE_FILE, Search, TrialReporter
from tlcli.cli.view import TerminalReporter
from tlcli.errors import TlcliError, UsageError
from tlcli.reporter import EpochRow
from tlcli.runs.run_dir import RunDir, read_json, write_json
from tlcli.specs import Fit, ImageSpec, Tta

N_TRIALS = 7
SPACE = {
    "overrides": [],
    "val_fraction": 0.2,
    "average": 2,
    "trials": N_TRIALS,
    "sampler": "random",
    "first": [{}, {"augment": "none"}],
    "sizes": [],
    "space": {"optimizer.lr": {"low": 1e-4, "high": 1e-2, "log": True}, "augment": ["basic", "none"]},
}
STATE = {
    "command": "tlcli tune budget=1h",
    "budget": 3600.0,
    "seconds": 0.0,
    "words": ["dataset=digits", "backbone=resnet18"],
    "val_fraction": 0.2,
    "images_per_second": 50.0,
    "space": SPACE,
    "defaults": {"optimizer.lr": 0.001, "augment": "basic"},
    "image": [],
    "trials": [],
    "fits": 1,
    "members": None,
    "importances": {},
    "best": None,
}


class Worker(Search):
    """A worker whose trainings take no time, and whose search ends with the first trial as the best."""

    trained: list[tuple[int, str]]

    def _train(self, name: str, recipe: Any, words: list[str], reporter: Any) -> RunDir:
        self.trained.append((id(self), name))
        return job(self.folder / name, "done")

    def _refit_seconds(self, run: RunDir) -> tuple[float, float]:
        return 0.0, 10.0

    def _reserve(self, n_fits: int) -> float:
        return 10.0 * n_fits

    def _finish(self) -> RunDir:
        self.trained.append((id(self), "test"))
        return RunDir(self.folder / "0")

    def _show(self, final: RunDir, board: Any) -> None:
        pass


def job(path: Path, status: str) -> RunDir:
    run = RunDir(path)
    run.start(command="tlcli train", overrides=[], config="")
    run.update(status=status, keep_best="accuracy", best={"accuracy": 0.5, "epoch": 1}, n_train=1, n_val=1, epochs=1)
    run.update(n_test=0, decisions={"views": 0, "interpolate": 0.7})
    return run


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Worker]:
    """worker(): another worker of one search."""
    monkeypatch.setattr(search, "WAIT_SECONDS", 0.001)
    monkeypatch.setattr(tune, "choose_members", lambda ranked, limit, *args: ranked[:limit])
    config, spec = None, compose_spec(STATE["words"])
    monkeypatch.setattr(search, "load_spec", lambda run: spec)
    monkeypatch.setattr(Search, "_compose", lambda self, words: (config, spec))
    write_json(tmp_path / STATE_FILE, STATE)
    Worker.trained = []
    state, start = tmp_path / STATE_FILE, search.time.monotonic
    return lambda: Worker(tmp_path, read_json(state), start(), TerminalReporter(), None)


def trials(folder: Path) -> list[tuple[str, str]]:
    return [(trial["name"], trial["status"]) for trial in read_json(folder / STATE_FILE)["trials"]]


def test_workers_share_numbers_and_the_number_of_trials(worker: Callable[[], Worker], tmp_path, capsys) -> None:
    workers = [worker() for _ in range(3)]
    threads = [Thread(target=one.run) for one in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(name for _, name in Worker.trained) == [*(str(i) for i in range(N_TRIALS)), "test"]
    assert trials(tmp_path) == [(str(i), "done") for i in range(N_TRIALS)]
    state = read_json(tmp_path / STATE_FILE)
    assert (state["status"], state["best"], len(state["members"])) == ("done", "0", 2)
    assert not list(tmp_path.glob(".*")), "no lock and no file of a worker remains"
    lines = [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("trial ")]
    assert {lines.count(str(i)) for i in range(N_TRIALS)} <= {1, 2, 3}, "each worker shows a trial once"


def begin(one: Worker) -> None:
    """Start the first trial of a worker, which then does nothing more."""
    one._write_worker_file()
    with one._lock.held():
        one._open()
        one._catch_up()
        one._start_next()
    assert one.trial is not None


def test_the_time_is_that_of_the_worker_that_knows_most(worker: Callable[[], Worker]) -> None:
    first, second = worker(), worker()
    begin(first)
    first._spent, first._saved = 3500.0, -10.0
    first.tick()
    begin(second)
    assert second.left < 110
    assert second._has_time()
    first._spent, first._saved = 3595.0, -10.0
    first.tick()
    with second._lock.held():
        second._catch_up()
    assert 0 < second.left < 10 and not second._has_time()


@pytest.mark.parametrize(("n_members", "left", "fits"), [(1, 60.0, 2), (1, 24.0, 1), (1, 3.0, 1), (2, 60.0, 1)])
def test_few_recipes_are_trained_several_times_if_there_is_time(worker, monkeypatch, n_members, left, fits) -> None:
    monkeypatch.setattr(tune, "choose_members", lambda ranked, *args: ranked[:n_members])
    one = worker()
    one.run()
    one._spent += one.left - left
    one._choose_members()
    assert (len(one._state["members"]), one._state["fits"]) == (n_members, fits)


@pytest.mark.parametrize(
    ("status", "told"), [(None, "lost"), ("damaged", "lost"), ("running", "lost"), ("done", "done")]
)
def test_the_trial_of_a_dead_worker_is_queued_again_unless_it_is_done(
    worker: Callable[[], Worker], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: str | None, told: str
) -> None:
    dead, other = worker(), worker()
    begin(dead)
    run = job(tmp_path / "0", status) if status else None
    if status == "damaged":
        RunDir(tmp_path / "0").info_file.write_bytes(b"")
    now = [0.0]
    monkeypatch.setattr(search, "observer", locks.Observer(lambda: now[0]))
    monkeypatch.setattr(locks, "runs_on_this_machine", lambda owner: None)  # it is of another one
    begin(other)
    assert trials(tmp_path) == []
    now[0] = locks.STALE_SECONDS
    other.trial = None
    other._study.put_back(1)
    other.run()
    again = [] if told == "done" else [(str(N_TRIALS), "done")]
    assert trials(tmp_path) == [("0", told), *((str(i), "done") for i in range(1, N_TRIALS)), *again]
    recipes = [trial["recipe"] for trial in read_json(tmp_path / STATE_FILE)["trials"]]
    assert (recipes[0] in recipes[1:]) == (told == "lost")
    if status == "damaged":
        return
    if run:
        info = RunDir(run.path).info
        assert (info["status"], info.get("error")) == (("failed", LOST) if told == "lost" else ("done", None))
    # it was only suspended
    dead._run_trial(dead.trial)  # type: ignore[arg-type]
    dead.run()
    assert RunDir(tmp_path / "0").info["status"] == ("failed" if told == "lost" else "done")
    assert trials(tmp_path)[0] == ("0", told)


def test_a_worker_that_leaves_puts_its_trial_back(worker: Callable[[], Worker], tmp_path: Path) -> None:
    first, second = worker(), worker()
    begin(first)
    begin(second)
    assert first.leave("interrupted")
    assert not second.leave("interrupted")
    assert read_json(tmp_path / STATE_FILE)["status"] == "interrupted"
    worker().run()
    assert trials(tmp_path) == [(str(i), "done") for i in range(N_TRIALS)]


def test_what_a_killed_worker_was_writing_is_no_worker(worker: Callable[[], Worker], tmp_path: Path) -> None:
    leaving = worker()
    (tmp_path / ".workers").mkdir(exist_ok=True)
    (tmp_path / ".workers/.0123abcd.json.7").touch()
    assert not leaving.sign_off()


def test_a_full_disk_does_not_hide_the_error_that_ends_a_worker(worker: Callable[[], Worker], monkeypatch) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    one = worker()
    begin(one)
    monkeypatch.setattr(one._study, "put_back", full)
    monkeypatch.setattr(search.leaderboard, "write", full)
    assert not one.leave("failed")


def too_large(*args: object) -> RunDir:
    raise TlcliError("too large")


def test_recipes_that_keep_failing_end_the_trials(worker: Callable[[], Worker], tmp_path, monkeypatch) -> None:
    one = worker()
    train = one._train
    monkeypatch.setattr(one, "_train", lambda name, *args: train(name, *args) if name == "0" else too_large())
    one.run()
    assert trials(tmp_path) == [("0", "done"), *((str(1 + i), "failed") for i in range(MAX_FAILURES))]
    assert read_json(tmp_path / STATE_FILE)["status"] == "done"


def test_the_first_recipe_that_fails_ends_the_search_unless_another_one_runs(worker, tmp_path, monkeypatch) -> None:
    other = worker()
    begin(other)
    one = worker()
    monkeypatch.setattr(one, "_train", too_large)
    begin(one)
    one._run_trial(one.trial)
    assert [(trial["name"], trial["error"]) for trial in one._study.ended()] == [("1", "too large")]
    other._run_trial(other.trial)
    assert [(trial["name"], trial["status"]) for trial in one._study.ended()] == [("0", "done"), ("1", "failed")]


def test_a_search_without_a_recipe_that_works_says_why(worker, tmp_path: Path, monkeypatch) -> None:
    others = [worker() for _ in range(MAX_FAILURES)]
    for one in others:
        begin(one)
        monkeypatch.setattr(one, "_train", too_large)
    for one in others:
        one._run_trial(one.trial)
    with pytest.raises(TlcliError, match="no recipe could be trained: too large"):
        worker().run()


def test_a_full_disk_is_no_fault_of_a_recipe(worker: Callable[[], Worker], tmp_path, monkeypatch) -> None:
    one = worker()
    train = one._train

    def full(*args: Any) -> RunDir:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(one, "_train", lambda name, *args: train(name, *args) if name == "0" else full())
    with pytest.raises(OSError, match="no space left"):
        one.run()
    one.leave("failed")
    worker().run()
    assert trials(tmp_path) == [(str(i), "done") for i in range(N_TRIALS)]


def test_a_worker_that_wakes_gives_up_the_first_trial(worker: Callable[[], Worker], tmp_path, monkeypatch) -> None:
    suspended = worker()
    begin(suspended)
    assert suspended._study.tell(0, None, "lost", error=LOST) == "lost", "by another worker"
    train = suspended._train

    def wake(name: str, recipe: Any, words: list[str], reporter: TrialReporter) -> RunDir:
        reporter.epoch(EpochRow(3, 7, *[0.5] * 8, best=False))
        return train(name, recipe, words, reporter)

    monkeypatch.setattr(suspended, "_train", wake)
    suspended._run_trial(suspended.trial)  # type: ignore[arg-type]
    assert (suspended.trial, trials(tmp_path)) == (None, [])
    worker().run()
    assert trials(tmp_path) == [("0", "lost"), *((str(1 + i), "done") for i in range(N_TRIALS))]


@pytest.mark.parametrize("n", [1, 2])
def test_only_the_best_of_several_trials_is_called_optimistic(worker, tmp_path, capsys, n: int) -> None:
    write_json(tmp_path / STATE_FILE, {**STATE, "space": {**SPACE, "trials": n}})
    one = worker()
    one.run()
    capsys.readouterr()
    Search._show(one, RunDir(tmp_path / "0"), search.leaderboard.read(tmp_path))
    assert ("so it is optimistic" in capsys.readouterr().out) == (n > 1)


def test_a_key_whose_default_is_a_list_can_be_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    space = {**SPACE, "first": [{}], "space": {"freeze.train": ["[layer3]"]}}
    state = {**STATE, "space": space, "words": ["dataset=digits", "backbone=resnet18", "freeze=pattern", "fits=1"]}
    write_json(tmp_path / STATE_FILE, {**state, "defaults": None, "image": []})
    monkeypatch.setattr(search.ranking, "new_workload", lambda *args: SimpleNamespace(augments=False))
    image = ImageSpec(32, Fit.crop, None, None, None)
    monkeypatch.setattr(search.ranking, "choose_image", lambda *args: (image, None))
    one = Search(tmp_path, read_json(tmp_path / STATE_FILE), 0.0, TerminalReporter(), None)
    one._open()
    default = one._state["defaults"]["freeze.train"]
    specs = [one._compose([f"freeze.train={value}"])[1].freeze.train for value in (default, "[layer3]")]
    assert specs == [one.base.freeze.train, ("layer3",)]


@pytest.mark.parametrize(
    ("errors", "seconds", "has_begun", "averaged"),
    [
        ({"refit-0": TlcliError("damaged")}, 10.0, False, ["refit-1"]),
        ({"refit-0": TlcliError("damaged"), "refit-1": RuntimeError("out of memory")}, 10.0, False, ["0", "1"]),
        ({}, 3900.0, False, ["refit-0"]),  # of a budget of an hour, which may be exceeded by a tenth
        ({}, 4000.0, False, ["0", "1"]),
        ({}, 4000.0, True, ["refit-0"]),
    ],
)
def test_a_refit_that_fails_or_does_not_fit_is_left_out(
    worker, monkeypatch, errors, seconds, has_begun, averaged
) -> None:
    def train(name: str, recipe: object, words: list[str], reporter: object) -> RunDir:
        assert "interpolate=0.7" in words, "as its trial chose"
        if name in errors:
            raise errors[name]
        return RunDir(one.folder / name)

    one, names = worker(), []
    one.run()
    monkeypatch.setattr(search, "load_spec", lambda run: one.base)
    monkeypatch.setattr(tune, "predict_mean", lambda *args: None)
    monkeypatch.setattr(tune, "average_runs", lambda runs, *args: names.extend(run.path.name for run in runs))
    monkeypatch.setattr(one, "_train", train)
    monkeypatch.setattr(one, "_refit_seconds", lambda run: (seconds, 0.0))
    if has_begun:  # before an interruption
        (one.folder / "refit-0").mkdir()
    monkeypatch.setattr(one, "_session", SimpleNamespace(dataset=lambda *args: SimpleNamespace(test=())))
    with one._lock.held():
        Search._finish(one)
    assert names == averaged


@pytest.mark.parametrize(
    ("flips", "own", "chosen", "used"),
    [
        ((0.5, 0.5), Tta.none, [MIRRORS], Tta.flip),
        ((0.5, 0.0), Tta.none, [], Tta.none),  # in the mirror, the images of a member are others
        ((0.5, 0.0), Tta.flip, [], Tta.flip),  # the best trial has it
    ],
)
def test_the_end_uses_mirrors_that_another_worker_chose_or_that_the_best_trial_has(
    worker, tmp_path: Path, monkeypatch, flips, own: Tta, chosen: list[str], used: Tta
) -> None:
    base, specs, averaged = compose_spec([*STATE["words"], "dataset.flip=0.5"]), {}, []
    monkeypatch.setattr(Search, "_compose", lambda self, words: (None, base))
    for name, flip in zip("01", flips, strict=True):
        dataset = structs.replace(base.dataset, flip=flip)
        specs[name] = structs.replace(base, dataset=dataset, tta=own if flip else Tta.none)
    monkeypatch.setattr(search, "load_spec", lambda run: specs.get(run.path.name, base))
    monkeypatch.setattr(tune, "prefers_mirrors", lambda *args: True)
    monkeypatch.setattr(tune, "predict_mean", lambda runs, spec, *args: spec.tta)
    monkeypatch.setattr(tune, "average_runs", lambda runs, final, *args: averaged.append(args))
    write_json(tmp_path / STATE_FILE, {**STATE, "space": {**SPACE, "mirrors": True}})
    first, second = worker(), worker()
    monkeypatch.setattr(second, "_session", SimpleNamespace(dataset=lambda *args: SimpleNamespace(test=())))
    with second._lock.held():
        second._open()
    first.run()
    with second._lock.held():
        second._catch_up()
        Search._finish(second)
    assert second._state["image"] == chosen and averaged == [(used, used, STATE["command"])]


def test_time_is_kept_for_a_comparison_with_mirrors_and_a_test_with_them(worker, tmp_path: Path) -> None:
    one = worker()
    one.run()
    RunDir(tmp_path / "0").update(n_val=25, n_test=100)
    n_seen = []
    for mirrors, image in ((False, []), (True, []), (True, [MIRRORS])):
        one._spec, one._state["image"] = structs.replace(one._spec, mirrors=mirrors), image
        seconds = Search._reserve(one, 1) - 10 - search.FINAL_SECONDS, one._test_seconds() - search.FINAL_SECONDS
        n_seen.append([pytest.approx(STATE["images_per_second"] * s) for s in seconds])
    assert n_seen == [[3 * 25 + 100, 100], [7 * 25 + 200, 100], [7 * 25 + 300, 200]]


def test_values_are_compared_at_multiples_of_ten_percent(worker: Callable[[], Worker]) -> None:
    percents: list[int] = []
    reporter = TrialReporter(worker(), "trial 0", lambda percent, value: percents.append(percent) is not None)
    for epoch in range(8):
        reporter.epoch(EpochRow(epoch, 7, *[0.5] * 8, best=False))
    assert percents == [10, 20, 40, 50, 70, 80]


@pytest.mark.parametrize(("norms", "fits"), [({}, None), ({"bn1": "its module"}, 1)])
def test_batch_norms_whose_statistics_are_updated_have_one_fit(tmp_path, monkeypatch, norms, fits: int | None) -> None:
    workload = SimpleNamespace(contract=SimpleNamespace(updated_norms=lambda: norms))
    image = SimpleNamespace(size=32, fit="crop", train_size=None)
    monkeypatch.setattr("tlcli.engine.ranking.new_workload", lambda *args: workload)
    monkeypatch.setattr("tlcli.engine.ranking.choose_image", lambda *args: (image, None))
    one = Search(tmp_path, {**STATE, "defaults": None}, search.time.monotonic(), TerminalReporter(), None)
    one._set_defaults()
    assert one.base.fits == fits


@pytest.mark.parametrize("augments", [True, False])
def test_the_size_of_training_is_searched_if_images_are_augmented(tmp_path, monkeypatch, augments: bool) -> None:
    workload = SimpleNamespace(contract=SimpleNamespace(updated_norms=dict), augments=augments)
    image = SimpleNamespace(size=64, fit="crop", train_size=None)
    monkeypatch.setattr("tlcli.engine.ranking.new_workload", lambda *args: workload)
    monkeypatch.setattr("tlcli.engine.ranking.choose_image", lambda *args: (image, None))
    monkeypatch.setattr(search, "takes_size", lambda *args: True)
    state = {**STATE, "space": {**SPACE, "sizes": [1.0, 1.5]}, "defaults": None}
    one = Search(tmp_path, state, search.time.monotonic(), TerminalReporter(), None)
    one._set_defaults()
    assert one._spec.space.get(tune.SIZE_KEY) == ((64, 96) if augments else None)


def test_one_trial_is_compared_with_none(worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "choose_members", lambda *args: pytest.fail("it was compared"))
    write_json(tmp_path / STATE_FILE, {**STATE, "space": {**SPACE, "trials": 1}})
    worker().run()
    assert read_json(tmp_path / STATE_FILE)["members"] == ["0"]


def test_one_that_lost_the_lock_stops(worker: Callable[[], Worker]) -> None:
    first = worker()
    begin(first)
    first.trial, first._saved = None, -10.0  # after the trials
    with first._lock.held():
        first.tick()
        first._saved = -10.0
        first._lock.path.write_text("another one")
        with pytest.raises(TlcliError, match="this worker was suspended"):
            first.tick()


def test_words_of_a_file_cannot_set_what_only_the_command_line_may(tmp_path: Path) -> None:
    """Another worker may change the file after it was read, and the study has recipes, too."""
    bad = "+hydra.job.env_set.PATH=/evil"
    state = {**STATE, "words": [*STATE["words"], bad]}
    with pytest.raises(UsageError, match=r"give on the command line: .hydra\.job"):
        Search(tmp_path, state, 0.0, TerminalReporter(), None)
    Search(tmp_path, state, 0.0, TerminalReporter(), None, [bad])
    one = Search(tmp_path, {**STATE}, 0.0, TerminalReporter(), None)
    for recipe in ({"augment": "../evil"}, {"name": "${oc.env:HOME}"}):
        with pytest.raises(UsageError, match="give on the command line: "):
            one._train("0", recipe, [], None)  # type: ignore[arg-type]
    one._state = state
    with pytest.raises(UsageError, match=r"give on the command line: .hydra\.job"):
        one._train("0", {}, [], None)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
