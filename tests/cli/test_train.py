"""tlcli train: directories, first line, and the status of a run in every ending."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest

import tlcli as package
from tests.cli.conftest import Ended, finished, runs_in
from tlcli.cli.completion import candidates
from tlcli.errors import TlcliError, UsageError
from tlcli.runs.run_dir import read_json


def status(folder: Path) -> tuple[str, str | None]:
    (run,) = runs_in(folder)
    record = read_json(run.info_file)
    return record["status"], record.get("error")


def test_done(tlcli, training, tmp_path: Path) -> None:
    training(finished)
    ended = tlcli("train", "freeze=head", "epochs=3")
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.splitlines()[0].startswith(f"tlcli {package.__version__}: digits ")
    (run,) = runs_in(tmp_path)
    record = read_json(run.info_file)
    assert record["status"] == "done"
    assert record["command"] == "tlcli train freeze=head epochs=3"
    assert record["overrides"] == ["freeze=head", "epochs=3"]
    assert "epochs: 3" in run.config_file.read_text() and "${" not in run.config_file.read_text()
    assert "digits" in run.log_file.read_text(encoding="utf-8")
    assert (run.path / ".hydra" / "overrides.yaml").is_file()
    assert record["cwd"] == str(Path.cwd()) == str(tmp_path)


RUN, SWEEP = ("hydra.run.dir=mine",), ("-m", "seed=1,2", "hydra.sweep.dir=mine")
OLD, FOLDS = ("hydra.run.dir=mine/best",), ("folds=3", *RUN)


@pytest.mark.parametrize(("first", "argv"), [(RUN, RUN), (SWEEP, SWEEP), (OLD, SWEEP), (OLD, FOLDS)])
def test_a_named_directory_is_not_overwritten(first, argv, tlcli, training, tmp_path: Path) -> None:
    training(finished)
    assert tlcli("train", *first).code == 0
    before = [run.info_file.read_text() for run in runs_in(tmp_path)]
    ended = tlcli("train", *argv)
    assert ended.code == 2
    assert "json already exists" in ended.err
    assert [run.info_file.read_text() for run in runs_in(tmp_path)] == before
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (TlcliError("the loss is nan"), 1, "tlcli train: the loss is nan\n"),
        (TypeError("a\nb"), 1, "internal error: TypeError: a b (rerun with --debug for the traceback)\n"),
        (ValueError("a"), 1, "internal error: ValueError: a (rerun with --debug for the traceback)\n"),
        (MemoryError(), 1, "tlcli train: out of memory: close other programs, or use smaller images"),
        (RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"), 1, "was killed: set device.workers=0, or"),
        (RuntimeError("unable to open shared memory object </torch_7>"), 1, "was killed: set device.workers=0, or"),
        (RuntimeError("Caught RuntimeError in DataLoader worker process 0."), 1, "internal error: Runtime"),
        (OSError(errno.ENOSPC, "No space left on device", "x/y"), 1, "tlcli train: the disk is full, or your quota"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "x/y"), 1, "quota of it: no space left for x/y\n"),
    ],
)
def test_failed(error, code, line, tlcli, training, tmp_path: Path) -> None:
    def fail(spec, run, reporter):
        raise error

    training(fail)
    ended = tlcli("train")
    assert ended.code == code
    assert line in ended.err and ended.err.count("\n") == 1
    assert status(tmp_path)[0] == "failed"
    assert status(tmp_path)[1] in ended.err
    log = runs_in(tmp_path)[0].log_file.read_text(encoding="utf-8")
    assert ("Traceback" in log) == (not isinstance(error, TlcliError))
    assert "in fail" in tlcli("train", "--debug").err


def test_an_error_before_the_run_begins_ends_the_command(tlcli, training, monkeypatch: pytest.MonkeyPatch) -> None:
    training(finished)
    monkeypatch.setattr("tlcli.cli.job.TerminalReporter", Mock(side_effect=ValueError("no terminal")))
    ended = tlcli("train")
    assert ended.code == 1 and "internal error: ValueError: no terminal" in ended.err and ended.err.count("\n") == 1


@pytest.mark.parametrize("begun", [False, True])
def test_usage_error_before_training_leaves_nothing(begun: bool, tlcli, training, tmp_path: Path) -> None:
    def misfit(spec, run, reporter):
        if begun:
            run.log_metrics({"epoch": 1})
        raise UsageError("fc.weight does not fit")

    training(misfit)
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "notes.txt").touch()
    ended = tlcli("train")
    assert (ended.code, ended.err) == (2, "tlcli train: fc.weight does not fit\n")
    assert len(runs_in(tmp_path)) == begun
    assert (tmp_path / "outputs" / "notes.txt").exists() and (begun or len(list(tmp_path.rglob("*"))) == 2)


def test_a_named_folder_is_free_again_after_a_usage_error(tlcli, training, tmp_path: Path) -> None:
    def misfit(spec, run, reporter):
        raise UsageError("fc.weight does not fit")

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").touch()
    training(finished)
    assert tlcli("train", "hydra.run.dir=mine/other").code == 0
    training(misfit)
    assert tlcli("train", *RUN).err == "tlcli train: fc.weight does not fit\n"
    assert sorted(file.name for file in (tmp_path / "mine").iterdir()) == ["notes.txt", "other"]
    training(finished)
    assert tlcli("train", *RUN).code == 0


@pytest.mark.parametrize(("number", "word", "code"), [("SIGINT", "interrupted", 130), ("SIGTERM", "terminated", 143)])
def test_a_signal_ends_a_run(number: str, word: str, code: int, tlcli, training, tmp_path: Path) -> None:
    training(lambda spec, run, reporter: signal.raise_signal(signal.Signals[number]))
    ended = tlcli("train")
    (run,) = runs_in(tmp_path)
    hint = f"resume with: tlcli train --resume {run.path.relative_to(tmp_path)}"
    assert (ended.code, ended.err) == (code, f"tlcli train: {word}: {hint}\n")
    assert status(tmp_path) == ("interrupted", word)


STUB = """
import signal, sys, types
from tlcli.interrupts import defer_interrupts
def train(*arguments, **options):
    with defer_interrupts:
        for _ in range(120):
            signal.raise_signal(signal.SIGINT)
            print("waits", flush=True)
sys.modules["tlcli.train"] = types.SimpleNamespace(train=train)
from tlcli.cli import main
sys.exit(main(["train"]))
"""


@pytest.mark.slow
def test_a_second_interrupt_ends_at_once(tmp_path: Path) -> None:
    """The first one waits for the end of a step that does not end."""
    env = os.environ | {"PYTHONPATH": str(Path(package.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", STUB], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout.count("waits")) == (130, 1), done.stderr
    assert status(tmp_path)[0] == "running", "nothing was recorded"


def test_other_ranks_follow_the_first_one_if_there_is_a_run(tlcli, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("tlcli.cli.train.follow_main", lambda: 7)
    argvs = (["--cfg", "job"], ["epochs=2"], ["--resume", "run"])
    assert [tlcli("train", *argv) for argv in argvs] == [Ended(code, "", "") for code in (0, 7, 7)]


def test_options_of_the_user(tlcli, training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "mine" / "optimizer" / "slow.yaml"
    file.parent.mkdir(parents=True)
    file.write_text("# Slow\ndefaults:\n  - sgd\n  - _self_\nlr: 1e-5\n", encoding="utf-8")
    specs = []
    training(lambda spec, run, reporter: specs.append(spec))
    assert tlcli("train", "optimizer=slow", "--config-dir=mine").code == 0
    assert specs[0].optimizer.lr == 1e-5 and specs[0].optimizer.kind == "sgd"
    for place in ("mine", "~/mine"):
        help_text = tlcli("train", "--help", "--config-dir", place).out
        assert "slow" in help_text and "Slow" in help_text
    assert candidates("tlcli train --config-dir ~/mine optimizer=sl") == ["optimizer=slow "]


def test_a_config_file_may_name_the_home_directory(tlcli, training, tmp_path: Path, monkeypatch) -> None:
    training(finished)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "mine/experiment").mkdir(parents=True)
    (tmp_path / "mine/experiment/x.yaml").write_text("# @package _global_\nout: ~/runs\n", encoding="utf-8")
    assert tlcli("train", "experiment=x", "--config-dir=mine").code == 0
    assert len(list((tmp_path / "home/runs").rglob("run.json"))) == 1 and not (tmp_path / "~").exists()
