"""Experiment trackers: what reaches them, and that none of them can end a run or change it.

The real packages are extras: where one is not installed, its test is skipped.
"""

import json
import socket
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tlcli.cli import main
from tlcli.errors import UsageError
from tlcli.reporter import EpochRow, Reporter, RunPlan, RunResult, StageRow
from tlcli.runs import loggers
from tlcli.runs.loggers import MlflowSpec, Tracker, logged_run
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
OUTCOME = RunResult(RUN, 0.9, (0.8, 0.95), None, 0.3, 7, 1, 0.8, (), RUN / "checkpoints/best.safetensors", 4.0)


class Recorder(Reporter):
    """Keeps what is reported."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.events: list[object] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def plan(self, plan: RunPlan) -> None:
        self.events.append(plan)

    def epoch(self, row: EpochRow) -> None:
        self.events.append(row)

    def outcome(self, outcome: RunResult) -> None:
        self.events.append(outcome)


class Fake:
    """A tracker that records its calls, and raises in the methods that are named."""

    def __init__(self, *raising: str, error: Exception | None = None) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self._raising, self._error = raising, error or ValueError()

    def _called(self, name: str, *values: Any) -> None:
        self.calls.append((name, *values))
        if name in self._raising:
            raise self._error

    def start(self, run: Path, config: Mapping[str, Any], info: Mapping[str, Any]) -> Tracker:
        self._called("start", config, info)
        return partial(self._called, "log"), partial(self._called, "end")


Compose = Callable[..., TrainSpec]


@pytest.fixture
def choose(spec: Compose, monkeypatch: pytest.MonkeyPatch) -> Callable[..., TrainSpec]:
    """choose(fake): a spec with a logger, and a fake in the place of the real one."""

    def choose(fake: Fake, *overrides: str) -> TrainSpec:
        monkeypatch.setattr(MlflowSpec, "start", lambda spec, *values: fake.start(*values))
        monkeypatch.setattr(loggers, "find_spec", lambda name: object())
        return spec("logger=mlflow", "logger.uri='http://me:hunter2@host'", "optimizer.lr=0.25", *overrides)

    return choose


def report_run(reporter: Reporter) -> None:
    """Report what a run of one epoch does."""
    reporter.plan(PLAN)
    reporter.epoch(START)
    reporter.epoch(ROW)
    reporter.outcome(OUTCOME)


def test_a_logger_gets_plan_metrics_and_result(choose, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    fake, recorder = Fake(), Recorder()
    with logged_run(choose(fake, "image.mean=[0.1,0.2,0.3]"), RUN, recorder) as reporter:
        report_run(reporter)
    assert (recorder.events, recorder.notes) == ([PLAN, START, ROW, OUTCOME], [])
    (start, config, info), *calls = fake.calls
    assert (start, config["optimizer.lr"], config["image.mean"]) == ("start", 0.25, [0.1, 0.2, 0.3])
    assert (info["name"], info["n_train"], info["n_test"], info["parameters"]) == (PLAN.name, 30, 7, 110)
    first = {"val/loss": 0.7, "val/accuracy": 0.5, "val/macro_f1": 0.4, "seconds": 1.5}
    second = {"train/loss": 0.6, "train/accuracy": 0.7, "val/loss": 0.5, "val/accuracy": 0.8, "val/macro_f1": 0.75}
    second |= {"lr": 1e-3, "images_per_second": 120.0, "seconds": 3.0}
    test = {"test/accuracy": 0.9, "test/accuracy_low": 0.8, "test/accuracy_high": 0.95, "test/loss": 0.3}
    assert calls == [("log", first, 0), ("log", second, 1), ("end", {**test, "best_epoch": 1.0}, 1, "done")]
    assert "hunter2" not in repr(fake.calls)  # neither the environment nor the logger's own keys


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt(), "interrupted"), (ValueError("x"), "failed")])
def test_the_end_of_a_run_is_logged(choose, error: BaseException, status: str) -> None:
    fake = Fake()
    with pytest.raises(type(error)), logged_run(choose(fake), RUN, Recorder()) as reporter:
        reporter.plan(PLAN)
        raise error
    assert fake.calls[-1] == ("end", {}, 0, status)


def test_a_run_that_never_began_is_not_logged(choose) -> None:
    fake = Fake()
    with pytest.raises(UsageError), logged_run(choose(fake), RUN, Recorder()):
        raise UsageError("no such folder")
    assert fake.calls == []


@pytest.mark.parametrize(("raising", "calls"), [("start", 1), ("log", 2), ("end", 4)])
@pytest.mark.parametrize("error", [ConnectionError("the server is down\nand more lines"), RuntimeError()])
def test_a_logger_that_fails_is_a_note_and_then_off(choose, raising: str, calls: int, error: Exception) -> None:
    fake, recorder = Fake(raising, error=error), Recorder()
    with logged_run(choose(fake), RUN, recorder) as reporter:
        report_run(reporter)
    assert recorder.events == [PLAN, START, ROW, OUTCOME]
    reason = "the server is down" if str(error) else "RuntimeError"
    assert recorder.notes == [f"logger=mlflow failed and is off for the rest of this run: {reason}"]
    assert len(fake.calls) == calls


def test_a_missing_package_ends_a_command_before_it_leaves_anything(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)
    for kind in ("tensorboard", "mlflow", "wandb"):
        assert main(["train", "dataset=imagefolder", f"dataset.root='{shapes}'", f"logger={kind}"]) == 2
        shown = capsys.readouterr()
        assert f"logger={kind} needs {kind}: pip install 'tlcli[{kind}]'" in shown.err
        assert shown.out == ""  # before torch is imported and the run's first line
    assert list(tmp_path.iterdir()) == []


# -- the real packages


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shapes: Path, capsys: pytest.CaptureFixture[str]):
    """train("logger=wandb"): a small run without a network; its directory. A note that a logger failed is an error."""
    monkeypatch.chdir(tmp_path)
    connect = socket.socket.connect

    def local_only(self: socket.socket, address: Any) -> None:
        assert self.family == socket.AF_UNIX or address[0] in ("127.0.0.1", "::1"), address
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local_only)
    small = ["backbone=resnet18", "backbone.weights=none", "image.size=32", "epochs=2", "device.precision=fp32"]
    small += ["device.channels_last=false", "cache.mode=off"]
    count = 0

    def run(*overrides: str) -> Path:
        nonlocal count
        count += 1
        out = tmp_path / f"run{count}"
        words = ["dataset=imagefolder", f"dataset.root='{shapes}'", *small, f"hydra.run.dir='{out}'", *overrides]
        assert main(["train", *words]) == 0, capsys.readouterr().err
        assert "failed and is off" not in capsys.readouterr().out
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

    run = train("logger=tensorboard")
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    losses, accuracy = metrics_of(run)
    assert [event.step for event in events.Scalars("val/loss")] == [1, 2]
    assert [event.value for event in events.Scalars("val/loss")] == pytest.approx(losses)
    assert events.Scalars("test/accuracy")[0].value == pytest.approx(accuracy)
    assert {"config/text_summary", "facts/text_summary", "status/text_summary"} <= set(events.Tags()["tensors"])
    text = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "optimizer.lr: 0.0005" in text


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_mlflow_reads_what_was_written(train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    plain = train()
    run = train("logger=mlflow", "logger.experiment=mine")
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
def test_wandb_offline_has_what_was_written(train, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    run = train("logger=wandb", "logger.project=mine")
    wandb.teardown()  # as at the end of a process: its service has written everything then
    (folder,) = run.glob("wandb/offline-run-*")
    content = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert b"hunter2" not in content
    losses, accuracy = metrics_of(run)  # its records have JSON in them
    for text in ('"done"', "optimizer.lr", "mine", *map(json.dumps, (0.0005, accuracy, *losses))):
        assert text.encode() in content
