"""tlcli train -m: a directory a job, failures that do not stop the others, a leaderboard."""

import csv
import gc
import json
import os
import shlex
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from tests.cli.conftest import finished, runs_in
from tests.faults.refusals import untouched
from tlcli.cli import job, resume
from tlcli.cli.job import Command
from tlcli.cli.train import make_folder
from tlcli.errors import TlcliError, UsageError
from tlcli.locks import heartbeat
from tlcli.reporter import Reporter
from tlcli.runs.run_dir import RunDir, read_json, rerun_command
from tlcli.specs import TrainSpec


def test_ranked_by_validation(tlcli, training, tmp_path: Path) -> None:
    training(finished)
    ended = tlcli("train", "-m", "seed=3,1,2")
    assert (ended.code, ended.err) == (0, "")
    headings = [line for line in ended.out.splitlines() if line.startswith("[")]
    assert headings == ["[0] seed=3", "[1] seed=1", "[2] seed=2"]
    (file,) = tmp_path.rglob("sweep.json")
    sweep = json.loads(file.read_text())
    assert sweep["command"] == "tlcli train -m seed=3,1,2"
    assert sweep["keys"] == ["seed"]
    ranked = [(job["rank"], job["name"], job["values"]["seed"]) for job in sweep["jobs"]]
    assert ranked == [(1, "1", "1"), (2, "2", "2"), (3, "0", "3")]
    with (file.parent / "leaderboard.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert [row["seed"] for row in rows] == ["1", "2", "3"]
    assert [row["test_accuracy"] for row in rows] == ["0.88", "0.87", "0.86"]


@pytest.mark.parametrize(
    ("words", "recorded"),
    [
        (("seed=1",), "null"),
        (("-m", "seed=1"), "0.1"),
        (("early_stop=3",), "0.1"),
        (("scheduler=plateau",), "0.1"),
        (("-m", "dataset.val_fraction=0.3"), "0.3"),
    ],
)
def test_what_reads_validation_images_holds_them_out(words, recorded, tlcli, training, tmp_path) -> None:
    fractions = []
    training(lambda spec, run, reporter: fractions.append(spec.dataset.val_fraction) or finished(spec, run, reporter))
    assert tlcli("train", *words).code == 0
    (run,) = runs_in(tmp_path)
    assert f"val_fraction: {recorded}\n" in run.config_file.read_text()
    assert fractions == [None if recorded == "null" else float(recorded)]
    again = shlex.split(rerun_command(run.info))[2:]
    assert tlcli("train", *again, "hydra.run.dir=again").code == 0
    assert fractions[0] == fractions[1]


def in_folds(spec: TrainSpec, run: RunDir, reporter: Reporter) -> float:
    """Replace training by a stand-in whose folds look better than the refit, which is worth more with a higher seed."""
    accuracy = 0.99 - spec.fold / 100 if spec.fold is not None else 0.5 + spec.seed / 100
    best = {"epoch": 1, "accuracy": accuracy, "loss": 1 - accuracy}
    run.update(best=best, keep_best="accuracy")
    return accuracy


def test_jobs_over_folds_are_ranked_by_their_refits(tlcli, training, tmp_path: Path) -> None:
    training(in_folds)
    assert tlcli("train", "-m", "folds=2", "seed=1,2,3", "hydra.sweep.dir=swept").code == 0
    jobs = read_json(tmp_path / "swept/sweep.json")["jobs"]
    assert [(job["rank"], job["name"], job["validation"]) for job in jobs] == [
        (1, "2/best", 0.53),
        (2, "1/best", 0.52),
        (3, "0/best", 0.51),
    ]
    (entry,) = json.loads(tlcli("list", "swept", "--format", "json").out)
    assert (entry["kind"], entry["jobs"], entry["val"]) == ("sweep", 3, 0.53)
    assert "val_fraction: null" in (tmp_path / "swept/0/fold-1/config.yaml").read_text()


@pytest.mark.slow
def test_a_fold_that_fails_fails_its_job_and_the_others_stay(tlcli, training, tmp_path: Path) -> None:
    ran, fails = [], [True]

    def train(spec, run, reporter):
        ran.append((spec.seed, spec.fold))
        if fails[0] and spec.fold == 1 and spec.seed == 1:
            raise TlcliError("the disk is full")
        return in_folds(spec, run, reporter)

    training(train)
    ended = tlcli("train", "folds=3", "seed=1", "hydra.run.dir=alone")
    assert (ended.code, ended.err) == (1, "tlcli train: the disk is full\n")
    ended = tlcli("train", "-m", "folds=3", "seed=1,2", "hydra.sweep.dir=swept")
    assert ended.code == 1
    assert "1 of 2 jobs did not finish:\n  0/best  failed: the disk is full" in ended.err
    jobs = {job["name"]: job["status"] for job in read_json(tmp_path / "alone/sweep.json")["jobs"]}
    assert jobs == {"fold-0": "done", "fold-1": "failed", "best": "failed"}
    ended = tlcli("train", "--resume", "alone", "epochs=30")
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert "epochs=30: a run with folds is resumed as it was started" in ended.err
    fails[0] = False
    ran.clear()
    for folder in ("alone", "swept/0", "swept"):
        assert tlcli("train", "--resume", folder).code == 0
    assert ran == 2 * [(1, 1), (1, 2), (1, None)]
    board = read_json(tmp_path / "swept/sweep.json")["jobs"]
    assert [(job["name"], job["status"]) for job in board] == [("1/best", "done"), ("0/best", "done")]
    shutil.rmtree(tmp_path / "alone/best")
    assert tlcli("train", "--resume", "alone").code == 0
    assert ran[6:] == [(1, None)]


def test_failing_jobs_do_not_stop_the_others(tlcli, training, tmp_path: Path) -> None:
    def train(spec, run, reporter):
        if spec.seed == 1:
            raise TlcliError("seed 1 is unlucky")
        return finished(spec, run, reporter)

    training(train)
    ended = tlcli("train", "-m", "seed=1,2", "epochs=0,1")
    assert ended.code == 1
    assert ended.err.startswith("[0] failed: epochs=0: expected a whole number")  # at once, and again at the end
    assert "3 of 4 jobs did not finish" in ended.err
    assert "1  failed: seed 1 is unlucky" in ended.err
    records = {run.path.name: read_json(run.info_file) for run in runs_in(tmp_path)}
    assert [records[str(job)]["status"] for job in range(4)] == ["failed", "failed", "failed", "done"]
    assert records["0"]["error"] == "epochs=0: expected a whole number >= 1"
    (file,) = tmp_path.rglob("sweep.json")
    assert [job["name"] for job in json.loads(file.read_text())["jobs"]] == ["3", "0", "1", "2"]


def test_a_sweep_goes_on_with_what_is_not_done(tlcli, training, tmp_path: Path) -> None:
    """Of four jobs one is done, one failed, one was interrupted and one never began."""
    ran = []

    def first(spec, run, reporter):
        if spec.seed == 2:
            raise TlcliError("the disk is full")
        if spec.seed == 3:
            raise KeyboardInterrupt
        return finished(spec, run, reporter)

    training(first)
    assert tlcli("train", "-m", "seed=1,2,3,4", "epochs=2").code == 130
    (sweep,) = (path.parent for path in tmp_path.rglob("sweep.json"))
    done = (sweep / "0/run.json").read_bytes()
    jobs = json.loads((sweep / "sweep.json").read_text())["jobs"]
    assert [job["status"] for job in jobs] == ["done", "failed", "interrupted"]

    (sweep / "2/run.json").write_bytes(b"")  # by a power failure
    training(lambda spec, run, reporter: ran.append(spec.seed) or finished(spec, run, reporter))
    ended = tlcli("train", f"resume={sweep}")
    assert (ended.code, ended.err) == (0, "")
    assert ran == [2, 3, 4]
    assert "[0] seed=1 epochs=2: done before, validation 0.8900" in ended.out
    assert (sweep / "0/run.json").read_bytes() == done
    board = json.loads((sweep / "sweep.json").read_text())
    assert [(job["name"], job["status"]) for job in board["jobs"]] == [(str(n), "done") for n in range(4)]
    assert board["command"] == "tlcli train -m seed=1,2,3,4 epochs=2"
    assert read_json(sweep / "1/run.json")["error"] is None


@pytest.mark.parametrize("is_queued", [True, False])
def test_a_sweep_whose_jobs_are_queued_stays_if_it_is_interrupted(tlcli, monkeypatch, tmp_path, is_queued) -> None:
    def submit(command: Command, config: DictConfig, loader: object, folder: Path) -> None:
        OmegaConf.set_readonly(config.hydra, False)
        config.hydra.launcher._target_ = f"submitit.{'Slurm' if is_queued else 'Local'}Launcher"
        (folder / ".submitit").mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(Command, "launch", submit)
    ended = tlcli("train", "-m", "seed=1,2", "hydra.sweep.dir=swept")
    assert ended.code == 130 and ("scancel" in ended.err) == is_queued
    assert (tmp_path / "swept/.submitit").exists() == is_queued


def test_a_job_that_goes_on_alone_is_ranked(tlcli, training, tmp_path: Path) -> None:
    def statuses() -> list[str]:
        return [job["status"] for job in json.loads((sweep / "sweep.json").read_text())["jobs"]]

    def first(spec, run, reporter):
        if spec.seed == 2:
            raise KeyboardInterrupt
        return finished(spec, run, reporter)

    def fails(spec, run, reporter):
        raise TlcliError("no luck")

    training(first)
    mine = {"sweep.json": '{"my": "own"}', "multirun.yaml": "my: own\n"}  # less than four directories above a job
    for name, text in mine.items():
        (tmp_path / name).write_text(text)
    where = ("hydra.sweep.dir=swept", "hydra.sweep.subdir=seeds/${seed}")
    assert tlcli("train", "-m", "seed=1,2", *where).code == 130
    sweep = tmp_path / "swept"
    (job,) = (run.path for run in runs_in(sweep) if read_json(run.info_file)["status"] == "interrupted")
    assert statuses() == ["done", "interrupted"]
    training(fails)
    assert tlcli("train", "--resume", str(job)).code == 1
    assert statuses() == ["done", "failed"]
    training(finished)
    assert tlcli("train", "--resume", str(job)).code == 0
    assert statuses() == ["done", "done"]
    assert {path.name: path.read_text() for path in tmp_path.iterdir() if path.is_file()} == mine


def test_a_sweep_goes_on_from_another_directory(tlcli, training, tmp_path: Path, monkeypatch) -> None:
    """Relative places in its command are those of the directory in which it was begun."""
    training(lambda spec, run, reporter: finished(spec, run, reporter) if spec.seed == 1 else 1 / 0)
    tlcli("train", "-m", "seed=1,2", "hydra.sweep.dir=swept")
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    training(finished)
    monkeypatch.setattr("pathlib.Path.expanduser", lambda self: self)
    ended = tlcli("train", "--resume", "../swept")
    assert ended.code == 0
    assert f"sweep      {(tmp_path / 'swept').resolve()}\n" in ended.out, "a path that can be typed here"
    assert read_json(tmp_path / "swept/1/run.json")["status"] == "done"
    assert not (tmp_path / "below/swept").exists()


def test_words_that_a_file_may_not_hold_are_repeated_to_resume(tlcli, training, tmp_path: Path, monkeypatch) -> None:
    """The sweep may be that of someone else: its settings of Hydra could run code, and its functions read secrets."""
    training(lambda spec, run, reporter: 1 / 0)
    own = ["hydra.sweep.dir=swept", "hydra/launcher=basic", "out=../x", "freeze=head,none"]
    words = ["+hydra.job.env_set.SET=b", "name='by ${oc.env:WHO}'"]
    monkeypatch.setenv("WHO", "me")
    tlcli("train", "-m", *own, *words)
    training(finished)
    for repeated in (words[:0], words[:1], words[1:]):
        with untouched(tmp_path):
            ended = tlcli("train", "--resume", "swept", *repeated)
        assert (ended.code, ended.out, ended.err.count("\n")) == (2, "", 1)
        place, _, missing = ended.err.partition(" refused in a file; give on the command line: ")
        assert "run.json" in place and shlex.split(missing) == [word for word in words if word not in repeated]
    assert tlcli("train", "--resume", "swept", *words).code == 0
    assert read_json(tmp_path / "swept/1/run.json")["status"] == "done"


def test_a_folder_of_options_is_that_of_the_sweep(tlcli, training, tmp_path: Path, monkeypatch) -> None:
    for folder, epochs in (("mine", 7), ("other/mine", 9)):
        (tmp_path / folder / "experiment").mkdir(parents=True)
        (tmp_path / folder / "experiment/x.yaml").write_text(f"# @package _global_\nepochs: {epochs}\n")
    training(lambda spec, run, reporter: 1 / 0)
    tlcli("train", "-m", "--config-dir", "mine", "experiment=x", "seed=1,2", "hydra.sweep.dir=swept")
    seen = []
    training(lambda spec, run, reporter: seen.append(spec.epochs) or finished(spec, run, reporter))
    monkeypatch.chdir(tmp_path / "other")
    assert tlcli("train", "--resume", "../swept").code == 0
    assert seen == [7, 7]


def test_a_sweep_cannot_change_as_it_goes_on(tlcli, training, tmp_path: Path) -> None:
    training(finished)
    tlcli("train", "-m", "seed=1,2", "hydra.sweep.dir=swept")
    ended = tlcli("train", "--resume", "swept", "epochs=9")
    assert ended.code == 2
    assert "a sweep is resumed as it was started" in ended.err
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/multirun.yaml").touch()
    ended = tlcli("train", "--resume", "empty")
    assert ended.code == 2
    assert "no job has a run.json" in ended.err


@pytest.mark.slow
@pytest.mark.parametrize("owner", ["this machine", "another machine", "a machine that is down"])
def test_a_job_that_still_runs_is_left_alone(owner: str, tlcli, training, tmp_path: Path, monkeypatch) -> None:
    training(finished)
    tlcli("train", "-m", "seed=1,2,3", "hydra.sweep.dir=swept")
    RunDir(tmp_path / "swept/0").update(status="failed")
    running = RunDir(tmp_path / "swept/1")
    running.update(status="running", **({} if owner == "this machine" else {"host": "another"}))
    before, now, mtime = running.info_file.read_bytes(), 0.0, 0.0

    def sleep(seconds: float) -> None:
        nonlocal now, mtime
        now, mtime = now + seconds, mtime + 1
        if owner == "another machine":
            os.utime(running.info_file, (mtime, mtime))  # whatever its clock says

    monkeypatch.setattr("tlcli.locks.observer.clock", lambda: now)
    monkeypatch.setattr("tlcli.locks.observer.sleep", sleep)
    ended = tlcli("train", "--resume", "swept")
    if owner == "a machine that is down":
        assert (ended.code, running.info["status"]) == (0, "running")
        assert RunDir(running.path).info["status"] == "done"
        assert 60 <= now < 65
    else:
        error = "tlcli train: 1 of 3 jobs did not finish:\n  1  running: in another process\n"
        assert (ended.code, ended.err) == (1, error)
        assert "[1] seed=2: another process is running it" in ended.out
        assert running.info_file.read_bytes() == before
        assert now <= 2
    assert RunDir(tmp_path / "swept/0").info["status"] == "done"
    ended = tlcli("train", "--resume", "swept/1")
    said = "nothing to resume" if owner == "a machine that is down" else "is still running it"
    assert said in ended.out + ended.err


def test_no_other_process_looks_if_a_job_runs_until_run_json_says_so(tlcli, training, tmp_path, monkeypatch) -> None:
    """Else two of them that are started together would both run it."""
    held = dict[str, set[bool]]()

    def note(name: str, place: object, path: Callable[[Any], Path]) -> None:
        function = getattr(place, name)

        def noted(of: Any, *args: Any, **options: Any) -> Any:
            held.setdefault(name, set()).add((path(of) / ".start.lock").exists())
            return function(of, *args, **options)

        monkeypatch.setattr(place, name, noted)

    note("living_jobs", job, lambda folder: folder)
    for name in ("start", "mark_resumed"):
        note(name, RunDir, lambda run: run.path)

    def train(spec, run, reporter):
        held.setdefault("train", set()).add((run.path / ".start.lock").exists())
        return finished(spec, run, reporter)

    training(train)
    assert tlcli("train", "-m", "seed=1,2", "hydra.sweep.dir=swept").code == 0
    RunDir(tmp_path / "swept/0").update(status="interrupted")
    assert tlcli("train", "--resume", "swept").code == 0
    assert held == {"living_jobs": {True}, "start": {True}, "mark_resumed": {True}, "train": {False}}
    RunDir(tmp_path / "swept/1").update(status="interrupted")
    del held["train"]
    monkeypatch.setattr(resume, "living_jobs", job.living_jobs)
    assert tlcli("train", "--resume", "swept/1").code == 0
    assert held == {"living_jobs": {True, False}, "start": {True}, "mark_resumed": {True}, "train": {False}}
    assert not [*tmp_path.rglob(".start.lock")]


def test_a_job_that_failed_leaves_nothing_in_memory(tlcli, training) -> None:
    """Neither network nor batch, which its traceback holds: on a GPU the next job could have too little."""
    batches = list["weakref.ref[set[str]]"]()

    def train(spec, run, reporter):
        if batches:
            assert batches[0]() is None
            return finished(spec, run, reporter)
        batch = {"images"}
        batches.append(weakref.ref(batch))
        raise TlcliError("out of memory")

    training(train)
    gc.collect()
    gc.disable()
    try:
        assert "1 of 2 jobs did not finish" in tlcli("train", "-m", "seed=1,2").err
    finally:
        gc.enable()


def test_run_json_is_touched_while_the_job_runs(tlcli, training, tmp_path: Path) -> None:
    touched = []

    def train(spec, run, reporter):
        os.utime(run.info_file, (0, 0))
        heartbeat.beat()
        touched.append(run.info_file.stat().st_mtime > 0)
        return finished(spec, run, reporter)

    training(train)
    assert tlcli("train", "hydra.run.dir=run").code == 0
    os.utime(tmp_path / "run/run.json", (0, 0))
    heartbeat.beat()
    assert touched == [True]
    assert (tmp_path / "run/run.json").stat().st_mtime == 0


def test_jobs_never_share_a_directory(tlcli, training, tmp_path: Path) -> None:
    """The later job fails and names the earlier one, whose files stay, also when the sweep is resumed."""
    training(finished)
    words = ("optimizer.lr=1e-4", "seed=0,1", "hydra.sweep.subdir=lr${optimizer.lr}", "hydra.sweep.dir=swept")
    ended = tlcli("train", "-m", *words)
    assert ended.code == 1
    assert "1 of 2 jobs did not finish" in ended.err
    first, second = (read_json(tmp_path / f"swept/lr0.0001{suffix}/run.json") for suffix in ("", "-2"))
    assert (first["status"], first["overrides"][1]) == ("done", "seed=0")
    assert (second["status"], second["overrides"][1]) == ("failed", "seed=1")
    assert "is the directory of the job optimizer.lr=0.0001 seed=0:" in second["error"]
    assert "- seed=0" in (tmp_path / "swept/lr0.0001/.hydra/overrides.yaml").read_text()
    before = {path: path.read_bytes() for path in tmp_path.glob("swept/lr*/*.json")}
    assert tlcli("train", "--resume", "swept").code == 1
    assert {path.name for path in (tmp_path / "swept").glob("lr*")} == {path.parent.name for path in before}
    assert all(path.read_bytes() == text for path, text in before.items() if not path.parent.name.endswith("-2"))


@pytest.mark.parametrize("place", ["../lr", "{path}/lr"])
def test_a_job_stays_inside_its_sweep_which_leaves_nothing_then(place: str, tlcli, training, tmp_path: Path) -> None:
    training(finished)
    (tmp_path / "swept").mkdir()
    words = f"hydra.sweep.subdir={place.format(path=tmp_path)}${{seed}}", "hydra.sweep.dir=swept"
    ended = tlcli("train", "-m", "seed=0,1", *words)
    assert ended.code == 2 and "hydra.sweep.subdir must name a folder inside the sweep" in ended.err
    assert not list(tmp_path.glob("lr*/*")) and not list((tmp_path / "swept").iterdir())


def test_two_runs_never_share_a_named_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mkdir, run = Path.mkdir, tmp_path / "run"

    def after_another(path: Path, *args: bool, **options: bool) -> None:
        monkeypatch.undo()
        assert make_folder(run, "hydra.run.dir")[0] == run  # another process, after this one has found it free
        mkdir(path, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "mkdir", after_another)
    with pytest.raises(UsageError, match=r"cannot create .*/run: File exists; choose another folder"):
        make_folder(run, "hydra.run.dir")


@pytest.mark.parametrize(
    "name", ["bad_files.csv", "val_shares.safetensors", "test_predictions.safetensors", "study.journal", "plots"]
)
def test_a_file_that_a_run_or_a_search_would_overwrite_is_kept(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("my own")
    for key in ("hydra.run.dir", "hydra.sweep.dir"):
        with untouched(tmp_path), pytest.raises(UsageError, match=f"{name} already exists there"):
            make_folder(tmp_path, key)


@pytest.mark.parametrize("argv", [(), ("-m",)])
def test_a_job_that_changes_its_directory_finds_its_images(argv, tlcli, training, tmp_path: Path, shapes: Path) -> None:
    (tmp_path / "images").symlink_to(shapes)
    roots = []

    def train(spec, run, reporter):
        roots.append(Path(spec.dataset.root).resolve())
        assert Path.cwd() == run.path
        return finished(spec, run, reporter)

    training(train)
    ended = tlcli("train", *argv, "dataset=imagefolder", "dataset.root=images", "hydra.job.chdir=true")
    assert (ended.code, ended.err) == (0, "")
    assert roots == [shapes]
    (run,) = runs_in(tmp_path)
    assert read_json(run.info_file)["cwd"] == str(tmp_path)


def test_the_leaderboard_is_there_after_each_job_and_needs_no_test_json(tlcli, training, tmp_path: Path) -> None:
    ranked = []

    def train(spec, run, reporter):
        ranked.append([job["name"] for board in tmp_path.rglob("sweep.json") for job in read_json(board)["jobs"]])
        value = finished(spec, run, reporter)
        run.test_file.unlink()
        run.update(test={"accuracy": value, "accuracy_ci95": [0.1, 0.9]})
        return value

    training(train)
    assert tlcli("train", "-m", "seed=1,2").code == 0
    assert ranked == [[], ["0"]]
    (board,) = tmp_path.rglob("sweep.json")
    assert [job["test_accuracy"] for job in read_json(board)["jobs"]] == [0.89, 0.88]
