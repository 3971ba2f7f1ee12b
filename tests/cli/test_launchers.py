"""Sweeps in other processes, with the real engines: joblib, submitit's local executor and Ray on two nodes."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hydra.errors import MissingConfigException

from tests.cli.conftest import finished
from tlcli.cli.conf_files import ConfFiles
from tlcli.cli.explain import error_message
from tlcli.cli.launchers import other_processes
from tlcli.errors import TlcliError
from tlcli.interrupts import defer_interrupts, handle_signals
from tlcli.runs import leaderboard
from tlcli.runs.run_dir import RunDir, read_json

WORDS = (
    *("dataset=imagefolder", "image.size=32", "backbone=resnet18", "backbone.weights=none", "freeze=head"),
    *("freeze.head_init=random", "device.workers=0", "device.precision=fp32", "device.channels_last=true"),
    *("cache.mode=require", "cache.dtype=fp32"),
)
LAUNCHERS = ["joblib", "submitit_local", "ray"]


@pytest.mark.parametrize(("option", "extra"), [("joblib", "joblib"), ("submitit_slurm", "submitit")])
def test_a_missing_plugin_is_one_line_with_the_command_that_installs_it(option: str, extra: str) -> None:
    missing = MissingConfigException("not found", f"hydra/launcher/{option}")
    line = f"hydra/launcher={option} is not installed: pip install 'tlcli[{extra}]'"
    assert error_message(missing, ConfFiles()) == line


def test_without_ray_a_sweep_leaves_nothing(tlcli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tlcli.ray_tasks.find_spec", lambda name: None)
    ended = tlcli("train", "-m", "hydra/launcher=ray", "seed=1,2")
    assert (ended.code, ended.err) == (2, "tlcli train: Ray is not installed: pip install 'tlcli[ray]'\n")
    assert list(tmp_path.iterdir()) == []


def end(run: Path, seed: int, **values: object) -> None:
    """Write the files of a job of a sweep over seeds, and its leaderboard."""
    job = RunDir(run)
    job.start(command="tlcli train -m seed=1,2,3 epochs=2", overrides=[f"seed={seed}", "epochs=2"], config="")
    job.update(process_start=None, **values)
    leaderboard.write(run.parent)


def test_each_job_that_ends_in_another_process_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    best = {"epoch": 1, "accuracy": 0.5}
    end(tmp_path / "0", 1, status="done", best=best, keep_best="accuracy")  # before
    with other_processes(tmp_path, ["seed=1,2,3", "epochs=2"], is_joblib=False):
        end(tmp_path / "1", 2)
        (tmp_path / "1/run.json").write_text("{")
        end(tmp_path / "2", 2, status="failed", error="no luck")
        end(tmp_path / "3", 3)
        end(tmp_path / "3", 3, status="done", best=best, keep_best="accuracy")
    out = capsys.readouterr().out.splitlines()
    assert out[1].startswith("[1]: damaged: ")
    assert out[2:] == ["[2] seed=2: failed: no luck", "[3] seed=3: done, validation 0.5000"]


def test_a_killed_process_of_an_engine_is_one_line(tmp_path: Path) -> None:
    line = "a job ended without a result: the pool is broken"
    with pytest.raises(TlcliError, match=line), other_processes(tmp_path, [], is_joblib=True):
        raise RuntimeError("the pool is broken")


def test_a_signal_reaches_the_jobs_of_joblib_and_waits_for_them(tmp_path: Path) -> None:
    """Jobs that ran before are of another command, or their pid is that of another program."""
    waiting = [sys.executable, "-c", "input()"]
    with subprocess.Popen(waiting, stdin=subprocess.PIPE) as job, subprocess.Popen(waiting, stdin=-1) as other:
        end(tmp_path / "1", 1, pid=other.pid)
        code = None
        with pytest.raises(KeyboardInterrupt), handle_signals(), other_processes(tmp_path, [], is_joblib=True):
            end(tmp_path / "0", 1, pid=job.pid)
            defer_interrupts.interrupt(KeyboardInterrupt())
            code = job.wait(60)
        assert (code, other.poll()) == (-signal.SIGTERM, None)


def test_joblib_with_one_worker_is_interrupted_as_a_sweep_without_it(tlcli, training) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    began: list[int] = []

    def train(spec, run, reporter):
        began.append(spec.seed)
        if len(began) == 1:
            signal.raise_signal(signal.SIGINT)
        return finished(spec, run, reporter)

    training(train)
    ended = tlcli("train", "-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=1", "seed=1,2")
    assert (ended.code, began) == (130, [1]) and "other processes" not in ended.out


def finish_jobs(folder: Path, seeds: range) -> None:
    for seed in seeds:
        end(folder / str(seed), seed, status="done", best={"epoch": 1, "accuracy": seed / 100}, keep_best="accuracy")


def test_two_workers_never_lose_a_line_of_the_leaderboard(tmp_path: Path) -> None:
    pids = []
    for part in (range(12), range(12, 24)):
        if (pid := os.fork()) == 0:
            with contextlib.suppress(BaseException):
                finish_jobs(tmp_path, part)
            os._exit(0)
        pids.append(pid)
    for pid in pids:
        os.waitpid(pid, 0)
    jobs = read_json(tmp_path / "sweep.json")["jobs"]
    assert [(job["rank"], job["name"]) for job in jobs] == [(24 - n, str(n)) for n in reversed(range(24))]
    assert (tmp_path / "leaderboard.csv").read_text().count("\n") == 25


# --- Real engines

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def launcher(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Start]:
    """Start `tlcli train` with a launcher of two workers in a process whose output can be read, and a cold cache."""
    name = request.param
    pytest.importorskip({"joblib": "hydra_plugins.hydra_joblib_launcher", "ray": "ray"}.get(name, "submitit"))
    environment = {**os.environ, "TLCLI_CACHE": str(tmp_path / "cache"), "RAY_USAGE_STATS_ENABLED": "0"}
    cluster, started = None, []
    if name == "ray":
        from ray.cluster_utils import Cluster

        with pytest.MonkeyPatch.context() as patch:
            for key, value in environment.items():
                patch.setenv(key, value)
            cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
            cluster.add_node(num_cpus=1)
        environment["RAY_ADDRESS"] = cluster.address

    def start(*words: str) -> "subprocess.Popen[str]":
        chosen = [] if "--resume" in words else ["-m", f"hydra/launcher={name}", "hydra.sweep.dir=swept"]
        chosen += ["hydra.launcher.n_jobs=2"] if chosen and name == "joblib" else []
        argv = [sys.executable, "-m", "tlcli", "train", *chosen, *words]
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(argv, stdout=pipe, stderr=pipe, text=True, env=environment, cwd=tmp_path))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()
    if cluster is not None:
        cluster.shutdown()


def statuses(sweep: Path) -> dict[str, str]:
    return {job["name"]: job["status"] for job in read_json(sweep / "sweep.json")["jobs"]}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS, indirect=True)
def test_a_sweep_on_two_workers_is_that_of_one_process(launcher: Start, shapes: Path, tmp_path: Path) -> None:
    words = (*WORDS, f"dataset.root='{shapes}'", "epochs=2", "optimizer.lr=0.01,0.001,-1")
    sweep = launcher(*words)
    out, err = sweep.communicate(timeout=300)
    assert sweep.returncode == 1, err
    assert err.startswith("tlcli train: 1 of 3 jobs did not finish:\n  2  failed: optimizer.lr=-1"), err
    lines = [line.partition(":")[0] for line in out.splitlines() if line.startswith("[")]
    assert sorted(lines) == ["[0] optimizer.lr=0.01", "[1] optimizer.lr=0.001", "[2] optimizer.lr=-1"]
    assert statuses(tmp_path / "swept") == {"0": "done", "1": "done", "2": "failed"}
    infos = [RunDir(tmp_path / "swept" / name).info for name in "01"]
    assert os.getpid() not in (pids := {info["pid"] for info in infos}) and sweep.pid not in pids
    filled = [info["extraction"]["images"] for info in infos if info["extraction"]]
    assert sum(filled) == 60 + 24  # each image once
    alone = [sys.executable, "-m", "tlcli", "train", "-m", "hydra.sweep.dir=alone", *words]
    environment = {**os.environ, "TLCLI_CACHE": str(tmp_path / "cache")}
    assert subprocess.run(alone, env=environment, cwd=tmp_path, capture_output=True, timeout=300).returncode == 1
    for name in "01":
        for file in ("test.json", "checkpoints/last.safetensors"):
            assert (tmp_path / "swept" / name / file).read_bytes() == (tmp_path / "alone" / name / file).read_bytes()


def signal_second_job(sweep: "subprocess.Popen[str]", folder: Path, number: int) -> None:
    """Send a signal to the process of the second job as soon as the first one has ended."""
    assert sweep.stdout is not None
    while not (line := sweep.stdout.readline()).startswith("[0]"):
        assert line, sweep.stderr.read() if sweep.stderr else ""
    info = RunDir(folder / "1").info
    assert info["status"] == "running"
    os.kill(info["pid"], number)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS, indirect=True)
def test_a_worker_that_is_killed_loses_no_finished_job(launcher: Start, shapes: Path, tmp_path: Path) -> None:
    sweep, folder = launcher(*WORDS, f"dataset.root='{shapes}'", "epochs=1,500"), tmp_path / "swept"
    signal_second_job(sweep, folder, signal.SIGKILL)
    out, err = sweep.communicate(timeout=300)
    assert sweep.returncode == 1, err
    assert "a job ended without a result" in err or "1 jobs ended without a result" in err
    assert statuses(folder) == {"0": "done", "1": "died"}
    first = (folder / "0/run.json").read_bytes()
    resumed = launcher("--resume", "swept")
    out, err = resumed.communicate(timeout=300)
    assert (resumed.returncode, err) == (0, ""), out
    assert statuses(folder) == {"0": "done", "1": "done"}
    assert (folder / "0/run.json").read_bytes() == first
    assert len(RunDir(folder / "1").info["resumed"]) == 1


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["submitit_local"], indirect=True)
def test_a_job_that_is_pre_empted_is_queued_again_and_goes_on(launcher: Start, shapes: Path, tmp_path: Path) -> None:
    sweep, folder = launcher(*WORDS, f"dataset.root='{shapes}'", "epochs=1,500"), tmp_path / "swept"
    signal_second_job(sweep, folder, signal.SIGUSR2)
    first = (folder / "1/metrics.jsonl").read_text().splitlines()[0]
    _, err = sweep.communicate(timeout=300)
    assert (sweep.returncode, statuses(folder)) == (0, {"0": "done", "1": "done"}), err
    info = RunDir(folder / "1").info
    assert len(info["resumed"]) == 1
    lines = (folder / "1/metrics.jsonl").read_text().splitlines()
    assert lines[0] == first  # with its seconds: it did not start again
    rows = [json.loads(line) for line in lines]
    epochs = [row["epoch"] for row in rows if row["split"] == "train"]
    assert epochs == list(range(1, 501))
