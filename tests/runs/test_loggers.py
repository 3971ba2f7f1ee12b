"""Experiment trackers: what reaches them, and that none of them can end a run or change it.

The real packages are extras: if one is not installed, its test is skipped.
"""

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock, call

import pytest

from tests.conftest import Compose, finish
from tlcli.cli import main
from tlcli.cli.compose import compose_config, parse_flags
from tlcli.reporter import EpochRow, Reporter, RunPlan, StageRow
from tlcli.runs import loggers
from tlcli.runs.loggers import MlflowSpec, TensorboardSpec, logged_run
from tlcli.runs.run_dir import RunDir
from tlcli.specs import TrainSpec

RUN = Path("outputs/2026-11-24/10-15-00")
PLAN = RunPlan(
    run=RUN,
    name="photos-resnet18-head",
    dataset="photos",
    classes=("ants", "bees"),
    counts={"train": (10, 20), "val": (1, 2), "test": (3, 4)},
    model="resnet18",
    image="32 px",
    stages=(StageRow("stem", 100, 0, None), StageRow("head", 10, 10, 1e-3)),
    training="2 epochs",
    device="CPU",
    activations="live",
    notes=(),
)
START = EpochRow(0, 2, None, None, 0.7, 0.5, 0.4, None, None, 1.5, True)
ROW = EpochRow(1, 2, 0.6, 0.7, 0.5, 0.8, 0.75, 1e-3, 120.0, 3.0, True)
RESULT = {"accuracy": 0.9, "accuracy_ci95": [0.8, 0.95], "top5": None, "loss": 0.3, "epoch": 1}
REPORTED = [call.plan(PLAN), call.epoch(START), call.epoch(ROW), call.outcome(RUN, RESULT)]


@pytest.fixture
def tracker() -> Mock:
    """Return a tracker that records its calls: `start`, and `log` of the run that it starts."""
    fake = Mock()
    fake.start.return_value = fake.log
    return fake


@pytest.fixture
def chosen(spec: Compose, tracker: Mock, monkeypatch: pytest.MonkeyPatch) -> TrainSpec:
    """Return a spec with a logger, whose tracker is the recording one."""
    monkeypatch.setattr(MlflowSpec, "start", lambda spec, *values: tracker.start(*values))
    monkeypatch.setattr(loggers, "find_spec", lambda name: object())
    address = "logger.uri='http://hunter2@host'"
    return spec("logger=mlflow", address, "optimizer.lr=0.25", "image.mean=[0.1,0.2,0.3]")


def report_run(reporter: Reporter) -> None:
    """Report what a run of one epoch does."""
    reporter.plan(PLAN)
    reporter.epoch(START)
    reporter.epoch(ROW)
    reporter.outcome(RUN, RESULT)


def test_a_logger_gets_plan_metrics_and_result(chosen: TrainSpec, tracker: Mock, monkeypatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    shown = Mock(spec=Reporter)
    with logged_run(chosen, RUN, shown) as reporter:
        report_run(reporter)
    assert shown.mock_calls == REPORTED
    run, config, info = tracker.start.call_args.args
    assert (run, config["optimizer.lr"], config["image.mean"]) == (RUN, 0.25, [0.1, 0.2, 0.3])
    assert (info["name"], info["n_train"], info["n_test"], info["parameters"]) == (PLAN.name, 30, 7, 110)
    first = {"val/loss": 0.7, "val/accuracy": 0.5, "val/macro_f1": 0.4, "seconds": 1.5}
    second = {"train/loss": 0.6, "train/accuracy": 0.7, "val/loss": 0.5, "val/accuracy": 0.8, "val/macro_f1": 0.75}
    second |= {"lr": 1e-3, "images_per_second": 120.0, "seconds": 3.0}
    test = {"test/accuracy": 0.9, "test/accuracy_low": 0.8, "test/accuracy_high": 0.95, "test/loss": 0.3}
    ended = call({**test, "best_epoch": 1.0}, 1, "done")
    assert tracker.log.mock_calls == [call(first, 0, None), call(second, 1, None), ended]
    assert "hunter2" not in repr(tracker.mock_calls)  # neither the environment nor the logger's own keys


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt(), "interrupted"), (ValueError("x"), "failed")])
def test_the_end_of_a_run_is_logged(chosen: TrainSpec, tracker: Mock, error: BaseException, status: str) -> None:
    with pytest.raises(type(error)), logged_run(chosen, RUN, Reporter()) as reporter:
        reporter.plan(PLAN)
        raise error
    assert tracker.log.mock_calls == [call({}, 0, status)]


@pytest.mark.parametrize(("raising", "calls"), [("start", 1), ("log", 2)])
@pytest.mark.parametrize("error", [ConnectionError("the server is down\nand more lines"), RuntimeError()])
def test_a_logger_that_fails_is_a_note_and_then_off(chosen: TrainSpec, tracker: Mock, raising, calls, error) -> None:
    getattr(tracker, raising).side_effect = error
    shown = Mock(spec=Reporter)
    with logged_run(chosen, RUN, shown) as reporter:
        report_run(reporter)
    reason = "the server is down" if str(error) else "RuntimeError"
    note = call.note(f"logger=mlflow failed and is off for the rest of this run: {reason}")
    assert [each for each in shown.mock_calls if each != note] == REPORTED
    assert (shown.note.call_count, len(tracker.mock_calls)) == (1, calls)


def test_a_missing_package_ends_a_command_before_it_leaves_anything(shapes, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)
    for kind in ("tensorboard", "mlflow", "wandb"):
        assert main(["train", "dataset=imagefolder", f"dataset.root='{shapes}'", f"logger={kind}"]) == 2
        shown = capsys.readouterr()
        assert f"logger={kind} needs {kind}: pip install 'tlcli[{kind}]'" in shown.err
        assert shown.out == ""  # before torch is imported and the run's first line
    assert list(tmp_path.iterdir()) == []
    assert main(["train", "-m", "seed=0", "dataset=imagefolder", f"dataset.root='{shapes}'", "logger=mlflow"]) == 1
    assert "0  failed: logger=mlflow needs mlflow" in capsys.readouterr().err


@pytest.mark.parametrize("words", [(), ("-m", "seed=1,2")])
def test_a_password_is_not_saved_with_a_run(words: tuple[str, ...], tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", *words, "logger=mlflow", "logger.uri='https://me:hunter2@server/a[b'"]) == 2
    shown = capsys.readouterr()
    assert "MLFLOW_TRACKING_PASSWORD" in shown.err and "hunter2" not in shown.err
    assert list(tmp_path.iterdir()) == []
    for uri in ("https://me@server:80", "sqlite:///a:b.db", "databricks"):
        compose_config(parse_flags(["logger=mlflow", f"logger.uri='{uri}'"]))


# -- the real packages


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shapes: Path) -> Callable[..., Path]:
    """train("logger=wandb"): the directory of a small run without a network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    connect = socket.socket.connect

    def local_only(self: socket.socket, address: Any) -> None:
        assert self.family == socket.AF_UNIX or address[0] in ("127.0.0.1", "::1"), address
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local_only)
    small = ["backbone=resnet18", "backbone.weights=none", "image.size=32", "epochs=2", "device.precision=fp32"]
    small += ["device.channels_last=false", "cache.mode=off", "dataset=imagefolder", f"dataset.root='{shapes}'"]

    def run(logger: str, *words: str) -> Path:
        out = finish(tmp_path / logger, f"logger={logger}", *words, *small)
        assert "failed and is off" not in (out / "run.log").read_text()
        return out

    return run


def metrics_of(path: Path) -> tuple[list[float], float]:
    """Return the validation losses by epoch and the test accuracy of a run directory."""
    run = RunDir(path)
    return [row["loss"] for row in run.metrics() if row["split"] == "val"], run.test()["accuracy"]


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # theirs
def test_tensorboard_reads_what_was_written(train) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train("tensorboard")
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    losses, accuracy = metrics_of(run)
    assert [event.step for event in events.Scalars("val/loss")] == [1, 2]
    assert [event.value for event in events.Scalars("val/loss")] == pytest.approx(losses)
    assert events.Scalars("test/accuracy")[0].value == pytest.approx(accuracy)
    assert {"config/text_summary", "facts/text_summary", "status/text_summary"} <= set(events.Tags()["tensors"])
    text = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "optimizer.lr: 0.0005" in text
    log = TensorboardSpec().start(run, {}, {})  # resumed: metrics.jsonl has two epochs, and the test of the second
    log({"val/loss": 5.0}, 3, None)
    events.Reload()
    assert [event.step for event in events.Scalars("val/loss")] == [1, 2, 3]
    first = RunDir(run).metrics()[0]  # cut within the second epoch
    running = {**first, "split": "running", "epoch": 2}
    RunDir(run).metrics_file.write_text(f"{json.dumps(first)}\n{json.dumps(running)}\n")
    log = TensorboardSpec().start(run, {}, {})
    log({"val/loss": 5.0}, 2, None)
    events.Reload()
    assert [event.step for event in events.Scalars("val/loss")] == [1, 2]


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_mlflow_reads_what_was_written(train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    plain, run = train("none"), train("mlflow", "logger.experiment=mine")
    monkeypatch.setenv("HOME", str(tmp_path))
    MlflowSpec(uri="sqlite:///~/own.db", experiment="mine").start(run, {}, {"name": "a"})
    assert (tmp_path / "own.db").exists()
    assert metrics_of(run) == metrics_of(plain)  # a logger changes nothing
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/outputs/mlflow.db")
    experiment = client.get_experiment_by_name("mine")
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id])
    losses, accuracy = metrics_of(run)
    history = sorted(client.get_metric_history(found.info.run_id, "val/loss"), key=lambda metric: metric.step)
    assert [metric.value for metric in history] == pytest.approx(losses)
    assert found.data.metrics["test/accuracy"] == pytest.approx(accuracy)
    assert found.data.params["optimizer.lr"] == "0.0005"
    assert found.data.tags["run"] == str(run)
    assert found.info.status == "FINISHED"
    assert b"hunter2" not in (tmp_path / "outputs/mlflow.db").read_bytes()
    assert not (tmp_path / "mlruns").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_wandb_offline_has_what_was_written(train) -> None:
    wandb = pytest.importorskip("wandb")
    run = train("wandb", "logger.project=mine")
    wandb.teardown()  # as at the end of a process: its service has written everything then
    (folder,) = run.glob("wandb/offline-run-*")
    content = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert b"hunter2" not in content
    losses, accuracy = metrics_of(run)  # its records have JSON in them
    for text in ('"done"', "optimizer.lr", "mine", *map(json.dumps, (0.0005, accuracy, *losses))):
        assert text.encode() in content
