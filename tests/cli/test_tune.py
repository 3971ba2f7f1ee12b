"""`tlcli tune`: a folder like a sweep's, the mean of the best recipes, tested once, and how it resumes."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.cli.conftest import Tlcli
from tests.cli.test_search import STATE
from tests.conftest import Notes
from tests.engine.test_ranking import scored
from tlcli import __version__, evaluate, tune
from tlcli.cli.conf_files import ConfFiles
from tlcli.cli.tune import _choose_backbone, read_tune_spec
from tlcli.errors import TlcliError, UsageError
from tlcli.models.tensorfile import read_tensors
from tlcli.runs.load import load_run
from tlcli.runs.run_dir import RunDir, read_json, read_predictions, write_json

SPACE = """\
# Two keys
overrides: []
val_fraction: 0.25
average: 2
trials: 3
sampler: tpe
first: [{}, {augment: none}]
sizes: [1.0, 1.5]
space:
  optimizer.lr: {low: 1e-4, high: 1e-2, log: true}
  augment: [basic, none]
  label_smoothing: [0.0, 0.1]
"""


@pytest.fixture(autouse=True)
def no_own_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hold out no images of a small set, as outside of tests."""
    monkeypatch.setattr("tlcli.data.dataset.MIN_VALIDATION_IMAGES", 200)


@pytest.fixture
def space(tmp_path: Path) -> list[str]:
    """Words that choose a small search space of one's own."""
    (tmp_path / "own/tune").mkdir(parents=True)
    (tmp_path / "own/tune/small.yaml").write_text(SPACE)
    return [f"--config-dir={tmp_path / 'own'}", "tune=small", "min_steps=4", "min_epochs=1", "image.size=32"]


@pytest.fixture
def words(shapes: Path, space: list[str]) -> list[str]:
    data = ["dataset=imagefolder", f"dataset.root={shapes}"]
    return [*space, *data, "backbone=efficientnet_lite0", "device.precision=fp32"]


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Take 100 s as the time of a run, and end a search before it starts. Return what stands for the workload."""
    workload = SimpleNamespace(data=SimpleNamespace(val=()), first_fit=None)

    def end(*args: Any) -> None:
        raise UsageError("the search would start now")

    monkeypatch.setattr("tlcli.engine.ranking.new_workload", lambda *args: workload)
    monkeypatch.setattr("tlcli.engine.ranking.image_sizes", lambda workload: (32, 32))
    monkeypatch.setattr("tlcli.engine.ranking.expected_seconds", lambda *args: (100.0, 50.0, None))
    monkeypatch.setattr("tlcli.cli.search.Search", end)
    return workload


def wait_for(file: Path, process: subprocess.Popen[str]) -> None:
    """Wait until a file exists, or the process has ended."""
    while not file.exists() and process.poll() is None:
        time.sleep(0.02)


def jobs(folder: Path) -> dict[str, dict]:
    return {job["name"]: job for job in json.loads((folder / "sweep.json").read_text())["jobs"]}


@pytest.mark.slow
def test_a_search_is_a_sweep_whose_best_is_a_mean_that_was_tested_once(tlcli, words, tmp_path, monkeypatch) -> None:
    folder = tmp_path / "search"
    ended = tlcli("tune", *words, "budget=1h", f"hydra.sweep.dir={folder}")
    assert ended.code == 0, ended.err
    state = json.loads((folder / "tune.json").read_text())
    assert [trial["status"] for trial in state["trials"]] == ["done"] * 3
    assert [trial["recipe"]["augment"] for trial in state["trials"][:2]] == ["basic", "none"]  # the first recipes
    final = RunDir(folder / state["best"])
    assert (folder / "best").resolve() == final.path.resolve()

    values = {trial["name"]: trial["value"] for trial in state["trials"]}
    assert values == {name: job["validation"] for name, job in jobs(folder).items() if name in values}
    assert max(values.values()) == values[state["members"][0]], "the best trial is the first member"
    tested = [file.parent.name for file in folder.glob("*/test.json") if not file.parent.is_symlink()]
    assert tested == [final.path.name]
    assert not list(folder.glob("*/unknown.safetensors")), "the mean of weights has other features"
    assert "not tested" in ended.out and "best of 3 trials" in ended.out

    refits = [RunDir(folder / name) for name in final.info["averaged"]]
    assert len(refits) == len(state["members"])
    states = [read_tensors(run.best_checkpoint)[0] for run in refits]
    for name, tensor in read_tensors(final.best_checkpoint)[0].items():
        assert torch.allclose(tensor.double(), torch.stack([s[name].double() for s in states]).mean(0), atol=1e-6), name
    n_all = RunDir(folder / "0").info["n_train"] + RunDir(folder / "0").info["n_val"]
    assert {run.info["n_train"] for run in refits} == {n_all}
    assert len(read_predictions(final.val_predictions).labels) == RunDir(folder / "0").info["n_val"]
    # the test is that of the averaged weights, not of a network that the session still held
    stored, run = read_predictions(final.test_predictions), load_run(final.path)
    with torch.inference_mode():
        logits = torch.cat([run.model(run.preprocess(Path(name))) for name in stored.names])
    assert torch.allclose(logits, stored.logits, atol=1e-3)

    for command in (("report", str(folder)), ("report", str(folder / "best")), ("list", str(tmp_path), "--jobs")):
        ended = tlcli(*command)
        assert ended.code == 0, ended.err
    assert "not tested" in ended.out
    page = (folder / "report.html").read_text()
    assert "not tested" in page and "History" in page
    ended = tlcli("eval", str(folder / "0"))
    assert ended.code == 0 and (folder / "0/test.json").exists(), ended.err
    assert jobs(folder)["0"]["test_accuracy"] is not None


@pytest.mark.slow
@pytest.mark.parametrize("extra", [(), ("dataset.val_fraction=0.2",)], ids=["refits", "trials"])
def test_mirrors_that_lower_the_loss_are_used_in_the_test(tlcli, words, tmp_path, monkeypatch, extra) -> None:
    (tmp_path / "own/tune/small.yaml").write_text(SPACE.replace("trials: 3", "trials: 1\nmirrors: true"))
    monkeypatch.setattr("tlcli.tune.prefers_mirrors", lambda *args: True)
    ended = tlcli("tune", *words, *extra, "budget=1h", f"hydra.sweep.dir={tmp_path / 'search'}")
    assert ended.code == 0, ended.err
    final = RunDir(tmp_path / "search/best")
    assert (final.config()["tta"], final.info["tta"]) == ("flip", "flip")
    assert final.info["averaged"] == (["0"] if extra else ["refit-0"])
    stored, run = read_predictions(final.test_predictions), load_run(final.path)
    with torch.inference_mode():
        images = torch.cat([run.preprocess(Path(name)) for name in stored.names])
        logits = (run.model(images) + run.model(images.flip(3))) / 2
    assert torch.allclose(logits, stored.logits, atol=1e-3)


@pytest.mark.slow
def test_quick_is_judged_by_cross_validation(tlcli: Tlcli, words: list[str], tmp_path: Path) -> None:
    (tmp_path / "own/tune/small.yaml").write_text(
        SPACE.replace("overrides: []", "overrides: [freeze=head, folds=2]").replace("trials: 3", "trials: 2")
    )
    folder = tmp_path / "search"
    ended = tlcli("tune", *words, "budget=1h", f"hydra.sweep.dir={folder}")
    assert ended.code == 0, ended.err
    best = RunDir(folder / "best")
    assert best.path.resolve() == (folder / json.loads((folder / "tune.json").read_text())["best"]).resolve()
    assert best.info["cross_validation"]["folds"] == 2 and best.test()
    assert len(list(folder.glob("*/best/test.json"))) == 1
    assert "folds      accuracy" in ended.out


@pytest.mark.slow
def test_a_killed_search_is_resumed(tlcli: Tlcli, words: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "search"
    command = [sys.executable, "-m", "tlcli", "tune", *words, "budget=1h", f"hydra.sweep.dir={folder}"]
    ended = tlcli("tune", "--resume", str(folder))
    assert ended.code == 2, "there is nothing yet"
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        next(line for line in process.stdout if line.startswith("trial 0"))
        wait_for(folder / "1/run.json", process)
        os.kill(process.pid, signal.SIGSTOP)
        ended = tlcli("tune", "--resume", str(folder))
        assert ended.code == 2 and "is still running it" in ended.err
        os.kill(process.pid, signal.SIGKILL)
    spent = json.loads((folder / "tune.json").read_text())["seconds"]
    ended = tlcli("train", "--resume", str(folder))
    assert ended.code == 2 and f"tlcli tune --resume {folder}" in ended.err
    ended = tlcli("tune", "--resume", str(folder))
    assert ended.code == 0, ended.err
    state = json.loads((folder / "tune.json").read_text())
    statuses = [(trial["name"], trial["status"]) for trial in state["trials"]]
    assert statuses == [("0", "done"), ("1", "lost"), ("2", "done"), ("3", "done")]
    assert state["seconds"] > spent
    ended = tlcli("tune", "--resume", str(folder))
    assert ended.code == 0 and "best of" in ended.out, "it shows the result"
    assert json.loads((folder / "tune.json").read_text()) == state


def running_job(folder: Path, process: subprocess.Popen[str], *, is_its: bool) -> tuple[RunDir, int]:
    """Wait for a trial of a process, or of another one; stop it there. Return its run, and the process that runs it."""
    while process.poll() is None:
        for file in folder.glob("[0-9]*/run.json"):
            info = json.loads(file.read_text())
            if info["status"] == "running" and (info["pid"] == process.pid) == is_its:
                os.kill(info["pid"], signal.SIGSTOP)
                if json.loads(file.read_text())["status"] == "running":
                    return RunDir(file.parent), info["pid"]
                os.kill(info["pid"], signal.SIGCONT)
        time.sleep(0.02)
    raise AssertionError("the search has ended")


def check_whole(tlcli: Tlcli, folder: Path, n_lost: int = 0) -> list[dict]:
    """Assert that a search has its trials, leaderboard, report and one test; return the trials."""
    state = json.loads((folder / "tune.json").read_text())
    names = {trial["name"] for trial in state["trials"]}
    assert state["status"] == "done" and len(names) == len(state["trials"])
    statuses = {job["name"]: job["status"] for job in jobs(folder).values() if job["name"] in names}
    assert statuses == {t["name"]: t["status"].replace("lost", "failed") for t in state["trials"]}
    rows = (folder / "leaderboard.csv").read_text().splitlines()[1:]
    assert {row.split(",")[1] for row in rows} == {*jobs(folder)} >= names
    tested = [file.parent.name for file in folder.glob("*/test.json") if not file.parent.is_symlink()]
    assert tested == [state["best"]]
    ended = tlcli("report", str(folder))
    assert ended.code == 0 and "History" in (folder / "report.html").read_text(), ended.err
    assert sum(t["status"] == "lost" for t in state["trials"]) == n_lost
    assert not list(folder.glob(".*")), "no lock remains"
    return state["trials"]


@pytest.mark.slow
def test_the_trial_of_a_killed_worker_runs_again(tlcli: Tlcli, words: list[str], tmp_path: Path) -> None:
    (tmp_path / "own/tune/small.yaml").write_text(SPACE.replace("trials: 3", "trials: 7"))
    folder = tmp_path / "search"
    command = [sys.executable, "-m", "tlcli", "tune", *words, "budget=1h", f"hydra.sweep.dir={folder}", "--workers=2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        run, pid = running_job(folder, process, is_its=False)
        os.kill(pid, signal.SIGKILL)
        out, err = process.communicate()
    assert process.returncode == 0 and err.count("\n") == 1, err
    assert f"worker {pid} ended with exit code -9" in err
    trials = check_whole(tlcli, folder, n_lost=1)
    assert len(trials) == 8, "the lost one does not count"
    lost = next(trial for trial in trials if trial["status"] == "lost")
    assert lost["name"] == run.path.name and RunDir(run.path).info["status"] == "failed"
    again = [t["name"] for t in trials if t["recipe"] == lost["recipe"] and t["status"] != "lost"]
    assert len(again) == 1 and int(again[0]) > int(lost["name"])
    assert [line.split()[1] for line in out.splitlines() if line.startswith("trial ")].count(again[0]) == 1
    assert sum(line.startswith("trial ") for line in out.splitlines()) == 8


@pytest.mark.slow
def test_workers_join_a_search_and_share_its_budget(tlcli: Tlcli, words: list[str], tmp_path: Path) -> None:
    (tmp_path / "own/tune/small.yaml").write_text(SPACE.replace("trials: 3", "trials: 5"))
    folder = tmp_path / "search"
    tune = [sys.executable, "-m", "tlcli", "tune"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with ExitStack() as ended:
        first = ended.enter_context(
            subprocess.Popen([*tune, *words, "budget=1h", f"hydra.sweep.dir={folder}"], **pipes)
        )
        wait_for(folder / "tune.json", first)
        joiners = [ended.enter_context(subprocess.Popen([*tune, "--join", str(folder)], **pipes)) for _ in range(2)]
        run, pid = running_job(folder, first, is_its=True)
        while len(list(folder.glob(".workers/*.json"))) < 3 and all(joiner.poll() is None for joiner in joiners):
            time.sleep(0.02)
        os.kill(pid, signal.SIGTERM)
        os.kill(pid, signal.SIGCONT)
        _, err = first.communicate()
        assert (first.returncode, err.count("\n")) == (143, 1), err
        assert "other workers continue; join them with: tlcli tune --join" in err
        outs = [joiner.communicate() for joiner in joiners]
    assert [joiner.returncode for joiner in joiners] == [0, 0], outs
    trials = check_whole(tlcli, folder)
    assert [trial["name"] for trial in trials] == ["0", "1", "2", "3", "4"]
    assert all(RunDir(folder / t["name"]).info["pid"] in {j.pid for j in joiners} | {first.pid} for t in trials)
    assert RunDir(run.path).info["pid"] != first.pid, "another worker continued the trial that was interrupted"
    for out, _ in outs:
        shown = [line.split()[1] for line in out.splitlines() if line.startswith("trial ")]
        assert len(shown) == len(set(shown)) and "best of" in out
    result = tlcli("tune", "--join", str(folder))
    assert result.code == 0 and "best of" in result.out, "it shows the result"


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("--workers", "0"), "--workers: must be a whole number from 1, not '0'"),
        (("--join", "{folder}", "--resume", "{folder}"), "not allowed with"),
        (("--join", "{folder}/none"), "not the file of a search, or damaged (No such file or directory)"),
        (("--join", "{folder}", "seed=1"), "seed=1: a search continues as it was started; leave it out"),
        (
            ("--join", "{folder}", "budget=1h"),
            "tune.json: refused in a file; give on the command line: +hydra.job.env_set.A=b",
        ),
        (("--join", "{folder}", "-cd", "own"), "/own: a search continues as it was started; leave it out"),
        (("--join", "{folder}", "-cd", "nowhere"), "--config-dir=nowhere: no such folder"),
    ],
)
def test_usage_errors_of_workers(tlcli: Tlcli, tmp_path: Path, words: tuple[str, ...], error: str) -> None:
    (tmp_path / "own").mkdir()
    stored = ["+hydra.job.env_set.A=b", "hydra.sweep.dir=x"]
    state = {**STATE, "tlcli": __version__, "cwd": str(tmp_path), "words": [*STATE["words"], *stored]}
    write_json(
        tmp_path / "tune.json", {**state, "command": shlex.join(["tlcli", "tune", "budget=1h", *stored]), "best": None}
    )
    ended = tlcli("tune", *(word.format(folder=tmp_path) for word in words))
    assert (ended.code, error in ended.err, ended.err.count("\n")) == (2, True, 1), ended.err


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["predict_mean", "add_test"])
def test_a_search_that_was_interrupted_at_its_end_is_resumed(tlcli: Tlcli, words, tmp_path, monkeypatch, stage) -> None:
    (tmp_path / "own/tune/small.yaml").write_text(SPACE.replace("trials: 3", "trials: 1"))
    folder, module = tmp_path / "search", evaluate if stage == "add_test" else tune
    function = getattr(module, stage)

    def interrupt(*args: Any, **options: Any) -> None:
        if stage != "predict_mean":
            function(*args, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, stage, interrupt)
        ended = tlcli("tune", *words, "budget=1h", f"hydra.sweep.dir={folder}")
    assert ended.code == 130 and "resume with: tlcli tune --resume search" in ended.err
    before = {file: file.read_bytes() for file in folder.glob("refit-*/checkpoints/best.safetensors")}
    assert bool(before) == (stage != "predict_mean")
    ended = tlcli("tune", "--resume", str(folder))
    assert ended.code == 0, ended.err
    assert all(file.read_bytes() == content for file, content in before.items())
    assert (folder / "best").resolve() == folder / "mean" and (folder / "mean/test.json").exists()


@pytest.mark.parametrize(
    ("extra", "error"),
    [
        ((), "budget is missing: give budget=90s, budget=10m or budget=2h"),
        (("budget=soon",), "budget=soon: must be a duration: 90s, 10m or 2h"),
        (("budget=0s",), "budget=0s: must be a duration: 90s, 10m or 2h"),
        (("budget=1h", "tune=quik"), "tune=quik: there is no such search space. Did you mean 'quick'?"),
        (("budget=0.1s",), "on this machine; give a longer budget"),
        (("budget=1h", "optimizer.lr=-1"), "optimizer.lr=-1: expected a number > 0.0"),
        (("budget=1h", "dataset.val_fraction=null"), "a search needs validation images"),
        (("budget=1h", "folds=2", "fold=0"), "fold=0: a search compares recipes by all folds; leave it out"),
    ],
)
def test_usage_errors(tlcli: Tlcli, words: list[str], tmp_path: Path, extra: tuple[str, ...], error: str) -> None:
    ended = tlcli("tune", *words, *extra, f"hydra.sweep.dir={tmp_path / 'search'}")
    assert (ended.code, error in ended.err, ended.err.count("\n")) == (2, True, 1), ended.err
    assert not (tmp_path / "search").exists()


def test_a_search_that_cannot_begin_leaves_nothing_in_its_folder(tlcli, words: list[str], tmp_path: Path) -> None:
    folder, space = tmp_path / "search", SPACE.replace("label_smoothing: [0.0, 0.1]", "ema: {low: 0.9, high: 0.99}")
    folder.mkdir()
    (tmp_path / "own/tune/small.yaml").write_text(space)
    ended = tlcli("tune", *words, "budget=1h", f"hydra.sweep.dir={folder}")
    assert ended.code == 2 and "space: ema=None must be a number, as bounds need it" in ended.err, ended.err
    assert not list(folder.rglob("*"))


def test_a_damaged_space_is_named(tlcli: Tlcli, words: list[str], tmp_path: Path) -> None:
    file = tmp_path / "own/tune/small.yaml"
    changes = (("low: 1e-4", "low: 1"), ("trials: 3", "trails: 3"))
    for text in (*(SPACE.replace(*change) for change in changes), "a: [", SPACE + "  - x"):
        file.write_text(text)
        ended = tlcli("tune", *words, "budget=1h")
        assert ended.code == 2 and str(file) in ended.err and ended.err.count("\n") == 1, ended.err


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (("{augment: none}", "{ema: 0.9}"), "small.yaml: first has ema, which space does not have"),
        (("overrides: []", "overrides: ['+hydra.job.env_set.A=b']"), "on the command line: .hydra.job.env_set.A=b"),
        (("overrides: []", "overrides: ['+augment@hydra.job=evil']"), "on the command line: .augment@hydra.job=evil"),
        (("overrides: []", r"overrides: ['name=$\{oc.env:HOME\}']"), "HOME.* is refused: a function"),
        (("{augment: none}", "{augment: ../evil}"), "on the command line: augment=../evil"),
        (("label_smoothing: [0.0, 0.1]", "backbone: [resnet18, resnet34]"), "differ in backbone cannot be averaged"),
        (("label_smoothing: [0.0, 0.1]", "image.size: [32, 64]"), "differ in image.size cannot be averaged; set"),
        (("label_smoothing: [0.0, 0.1]", "seed: [0, 1]"), "differ in seed cannot be averaged; set average: 1"),
        (("label_smoothing: [0.0, 0.1]", "folds: [4, 5]"), "differ in folds cannot be compared; leave it out"),
    ],
)
def test_a_space_whose_recipes_cannot_be_tried_is_refused(tmp_path: Path, space, change, error: str) -> None:
    (tmp_path / "own/tune/small.yaml").write_text(SPACE.replace(*change))
    with pytest.raises(UsageError, match=error):
        read_tune_spec("small", ConfFiles(tmp_path / "own"))


def test_a_space_of_ones_own_replaces_the_default(tmp_path: Path, space: list[str]) -> None:
    (tmp_path / "own/tune/default.yaml").write_text(SPACE)
    own = ConfFiles(tmp_path / "own")
    assert read_tune_spec("default", own) == read_tune_spec("small", own)


@pytest.mark.parametrize(
    ("first_fit", "what"), [(None, "a trial and its refit take about"), ("one", "one run takes about")]
)
def test_a_budget_that_is_too_short_is_told_what_it_must_hold(tlcli, space, unmeasured, first_fit, what: str) -> None:
    unmeasured.first_fit = first_fit
    ended = tlcli("tune", *space, "dataset=digits", "budget=90s")
    assert ended.code == 2 and f"budget=90s: {what}" in ended.err, ended.err


@pytest.mark.parametrize(("extra", "n_choices"), [((), 1), (("experiment=mine",), 0), (("tune=own",), 0)])
def test_the_backbone_of_an_experiment_or_a_space_is_kept(
    tlcli: Tlcli, space: list[str], tmp_path: Path, unmeasured, monkeypatch, extra: tuple[str, ...], n_choices: int
) -> None:
    own = SPACE.replace("label_smoothing: [0.0, 0.1]", "backbone: [resnet18, resnet34]")
    (tmp_path / "own/tune/own.yaml").write_text(own.replace("average: 2", "average: 1"))
    (tmp_path / "own/experiment").mkdir()
    text = "# @package _global_\ndefaults:\n  - override /backbone: efficientnet_lite1\n"
    (tmp_path / "own/experiment/mine.yaml").write_text(text)
    choices: list[tuple] = []
    monkeypatch.setattr("tlcli.cli.tune._choose_backbone", lambda *args: choices.append(args))
    ended = tlcli("tune", *space, "dataset=digits", "budget=1h", *extra)
    assert "the search would start now" in ended.err and len(choices) == n_choices, ended.err


def test_a_backbone_that_cannot_be_measured_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    def score(name: str, *args: Any):
        if name == "damaged":
            raise TlcliError("checksum differs")
        yield replace(scored(90, 10), backbone=name)

    specs = {n: SimpleNamespace(backbone=SimpleNamespace(imagenet_top1=n)) for n in (70, 80, 90)}
    found = {"worse": (["w"], specs[70]), "damaged": (["d"], specs[90]), "better": (["b"], specs[80])}
    monkeypatch.setattr("tlcli.engine.ranking.score", score)
    monkeypatch.setattr("tlcli.cli.tune.find_candidates", lambda *args: found)
    for default in ("worse", "damaged"):  # then one is left, which is not the default
        assert _choose_backbone([], default, time.monotonic() + 900, None, Notes()) == (["b"], 50.0)  # type: ignore[arg-type]
        found.pop("worse", None)


def test_backbones_are_ranked_in_a_share_of_the_time_and_the_chosen_one_fits_into_the_rest(monkeypatch) -> None:
    """The default is the first one; `slow` fits when it is ranked, but not after `good` has been ranked, too."""
    now, seconds, ranked = [0.0], {"default": 1.0, "slow": 850.0, "good": 1.0, "late": 1.0}, list[str]()

    def score(name: str, *args: Any):
        ranked.append(name)
        now[0] += 100
        assert seconds[name] <= args[-1], "the time that is left"
        yield replace(scored(90, seconds[name]), backbone=name)

    top1 = {"default": 60, "late": 70, "slow": 90, "good": 80}
    found = {n: ([n], SimpleNamespace(backbone=SimpleNamespace(imagenet_top1=top1[n]))) for n in top1}
    monkeypatch.setattr("tlcli.cli.tune.time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr("tlcli.cli.tune.RANK_SHARE", 0.25)
    monkeypatch.setattr("tlcli.engine.ranking.score", score)
    monkeypatch.setattr("tlcli.cli.tune.find_candidates", lambda *args: found)
    assert _choose_backbone([], "default", 1000.0, None, Notes()) == (["good"], 50.0)  # type: ignore[arg-type]
    assert ranked == ["default", "slow", "good"]


@pytest.mark.parametrize("flag", ["--resume", "--join"])
@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"cwd": "/gone"}, "was started in /gone, which is not there; create it, or a link"),
        ({"words": ["dataset=imagefolder", "dataset.root=gone"]}, "gone: no such folder"),
    ],
)
def test_nothing_is_recorded_if_the_data_or_the_start_folder_is_gone(tlcli, tmp_path, flag, change, error) -> None:
    state = {**STATE, "tlcli": __version__, "command": "tlcli tune", "cwd": str(tmp_path), **change}
    write_json(tmp_path / "tune.json", state)
    ended = tlcli("tune", flag, str(tmp_path))
    assert (ended.code, error in ended.err, ended.err.count("\n")) == (2, True, 1), ended.err
    assert read_json(tmp_path / "tune.json") == state and not list(tmp_path.rglob("run.json"))


@pytest.mark.parametrize("flag", ["--resume", "--join"])
@pytest.mark.parametrize(("own", "version"), [({}, "0.20 or earlier"), ({"tlcli": "0.1.2"}, "0.1.2")])
def test_a_search_of_another_minor_version_is_refused(tlcli: Tlcli, tmp_path: Path, flag: str, own, version) -> None:
    write_json(tmp_path / "tune.json", {**STATE, "command": "tlcli tune", "cwd": str(tmp_path), **own})
    ended = tlcli("tune", flag, str(tmp_path))
    error = f"{tmp_path}: was started with tlcli {version}; resume it with that version (this is {__version__})\n"
    assert (ended.code, ended.err.endswith(error), ended.err.count("\n")) == (1, True, 1), ended.err


def test_without_a_search_there_is_nothing_to_resume(tlcli: Tlcli, tmp_path: Path) -> None:
    ended = tlcli("tune", "--resume", str(tmp_path))
    assert ended.code == 2 and "not the file of a search" in ended.err
