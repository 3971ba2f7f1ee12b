"""Experiment trackers that a run can also be written to: TensorBoard, MLflow, Weights & Biases.

Each is an extra that is imported only if it is chosen. A tracker cannot end a run or change its results, and uses the
network only if its own keys say so: the run directory is complete without it.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tlcli import __version__
from tlcli.errors import UsageError
from tlcli.registry import option
from tlcli.reporter import EpochRow, Reporter, RunPlan, RunResult
from tlcli.specs import LoggerSpec, TrainSpec
from tlcli.text import flat_keys, to_plain

Values = Mapping[str, Any]
Metrics = Mapping[str, float]

MLFLOW_BATCH = 100
"""Parameters that MLflow takes per request."""


@dataclass(frozen=True)
class Tracker:
    """A run of a tracker. Both functions may raise; training then continues without the tracker.

    Args:
        log: takes the metrics of an epoch and the epoch.
        end: takes the test metrics (empty if the run was not tested), the best epoch, and the status: `done`, `failed`
            or `interrupted`.
    """

    log: Callable[[Metrics, int], None]
    end: Callable[[Metrics, int, str], None]


class TrackerSpec(LoggerSpec, frozen=True):
    """A logger of an extra that has the name of its kind and of the package that it needs."""

    def start(self, run: Path, config: Values, info: Values) -> Tracker:
        """Start a run of the tracker.

        Args:
            run: the run's directory, for trackers that write files.
            config: the values of all keys by full key.
            info: sizes, model and device.
        """
        raise NotImplementedError


@option
class NoLoggerSpec(LoggerSpec, frozen=True, tag="none"):
    """The run directory alone."""


@option
class TensorboardSpec(TrackerSpec, frozen=True, tag="tensorboard"):
    """TensorBoard's event files, in the run directory; `tensorboard --logdir outputs` shows all runs."""

    def start(self, run: Path, config: Values, info: Values) -> Tracker:
        from torch.utils.tensorboard import SummaryWriter

        writer: Any = SummaryWriter(log_dir=str(run / "tensorboard"))
        for title, values in (("config", config), ("facts", info)):
            lines = [f"    {key}: {value}" for key, value in values.items()]  # four blanks: code in Markdown
            writer.add_text(title, "\n".join(lines))
        writer.flush()

        def log(metrics: Metrics, step: int) -> None:
            for name, value in metrics.items():
                writer.add_scalar(name, value, step)
            writer.flush()

        def end(metrics: Metrics, step: int, status: str) -> None:
            log(metrics, step)
            writer.add_text("status", status)
            writer.close()

        return Tracker(log, end)


@option
class MlflowSpec(TrackerSpec, frozen=True, tag="mlflow"):
    """A run of an MLflow experiment: the address of its store, and the experiment's name. It has no artifacts, so that
    no store needs a folder in addition."""

    uri: str
    experiment: str

    def start(self, run: Path, config: Values, info: Values) -> Tracker:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # a server that is down must not delay a run
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "15")
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        client: Any = MlflowClient(self.uri)
        found = client.get_experiment_by_name(self.experiment)
        experiment = found.experiment_id if found else client.create_experiment(self.experiment)
        tags = {key: str(value) for key, value in info.items()}
        run_id = client.create_run(experiment, run_name=info["name"], tags=tags).info.run_id
        params = [Param(key, str(value)) for key, value in config.items()]
        for first in range(0, len(params), MLFLOW_BATCH):
            client.log_batch(run_id, params=params[first : first + MLFLOW_BATCH])

        def log(metrics: Metrics, step: int) -> None:
            now = int(time.time() * 1000)
            client.log_batch(run_id, metrics=[Metric(name, value, now, step) for name, value in metrics.items()])

        def end(metrics: Metrics, step: int, status: str) -> None:
            log(metrics, step)
            statuses = {"done": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}
            client.set_terminated(run_id, status=statuses[status])

        return Tracker(log, end)


class WandbMode(Enum):
    """Whether a Weights & Biases run is sent during training."""

    offline = "offline"
    online = "online"


@option
class WandbSpec(TrackerSpec, frozen=True, tag="wandb"):
    """A Weights & Biases run, stored in the run directory until `wandb sync` if the mode is offline."""

    project: str
    mode: WandbMode

    def start(self, run: Path, config: Values, info: Values) -> Tracker:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        if self.mode is WandbMode.online and not wandb.login(prompt=False):
            raise UsageError("not logged in; run `wandb login`, or set logger.mode=offline")
        settings = wandb.Settings(  # metrics and config only: no code, no terminal output, no machine
            silent=True,
            console="off",
            save_code=False,
            disable_code=True,
            disable_git=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_disable_machine_info=True,
            x_save_requirements=False,
        )
        tracked: Any = wandb.init(
            project=self.project,
            name=info["name"],
            mode=self.mode.value,
            dir=str(run),
            config={**config, **{f"run.{key}": value for key, value in info.items()}},
            reinit="create_new",  # an earlier job whose logger failed may have left its run open
            settings=settings,
        )

        def end(metrics: Metrics, step: int, status: str) -> None:
            tracked.summary.update({**metrics, "status": status})
            tracked.finish(exit_code=0 if status == "done" else 1)

        return Tracker(lambda metrics, step: tracked.log(dict(metrics), step=step), end)


def check_logger(spec: LoggerSpec) -> None:
    """Raise UsageError if the package of the chosen logger is not installed."""
    if isinstance(spec, TrackerSpec) and find_spec(spec.kind) is None:
        raise UsageError(f"logger={spec.kind} needs {spec.kind}: pip install 'tlcli[{spec.kind}]'")


@contextmanager
def logged_run(spec: TrainSpec, run: Path, reporter: Reporter) -> Iterator[Reporter]:
    """Yield a reporter to train with: it passes everything to the given one, and the metrics to the chosen logger.

    Args:
        run: the run's directory.
    """
    if not isinstance(spec.logger, TrackerSpec):
        yield reporter
        return
    check_logger(spec.logger)
    logged = LoggedReporter(reporter, spec.logger, spec, run)
    status = "failed"
    try:
        yield logged
        status = "done"
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    finally:
        logged.end(status)


class LoggedReporter(Reporter):
    """Passes everything to a reporter, and metrics to a tracker. After the tracker's first error, a note, it is off."""

    def __init__(self, reporter: Reporter, logger: TrackerSpec, spec: TrainSpec, run: Path) -> None:
        self._reporter = reporter
        self._logger = logger
        self._spec = spec
        self._run = run
        self._tracker: Tracker | None = None
        self._result: RunResult | None = None

    def note(self, text: str) -> None:
        self._reporter.note(text)

    @contextmanager
    def track(self, label: str, total: int, unit: str = "images") -> Iterator[Callable[[int], None]]:
        with self._reporter.track(label, total, unit) as advance:
            yield advance

    def plan(self, plan: RunPlan) -> None:
        self._reporter.plan(plan)
        config = flat_keys(to_plain(self._spec))
        info = {
            "run": str(plan.run),
            "name": plan.name,
            "tlcli": __version__,
            "model": plan.model,
            "n_classes": len(plan.classes),
            **{f"n_{split}": sum(counts) for split, counts in plan.counts.items()},
            "parameters": sum(stage.parameters for stage in plan.stages),
            "parameters_trainable": sum(stage.trainable for stage in plan.stages),
            "device": plan.device,
            "activations": plan.activations,
        }
        with self._off_after_error():  # the logger's own keys are left out: its address may contain a password
            config = {key: value for key, value in config.items() if not key.startswith("logger.")}
            self._tracker = self._logger.start(self._run, config, info)

    def epoch(self, row: EpochRow) -> None:
        self._reporter.epoch(row)
        if self._tracker is not None:
            with self._off_after_error():
                self._tracker.log(epoch_metrics(row), row.epoch)

    def outcome(self, outcome: RunResult) -> None:
        self._reporter.outcome(outcome)
        self._result = outcome

    def end(self, status: str) -> None:
        """End the tracker's run."""
        metrics, epoch = (result_metrics(self._result), self._result.epoch) if self._result else ({}, 0)
        if self._tracker is not None:
            with self._off_after_error():
                self._tracker.end(metrics, epoch, status)

    @contextmanager
    def _off_after_error(self) -> Iterator[None]:
        try:
            yield
        except Exception as exc:  # the libraries of trackers raise anything
            self._tracker = None
            reason = (str(exc) or type(exc).__name__).strip().split("\n")[0]
            self._reporter.note(f"logger={self._logger.kind} failed and is off for the rest of this run: {reason}")


def epoch_metrics(row: EpochRow) -> dict[str, float]:
    """Return the metrics of an epoch under the names by which trackers group them; without those that are None."""
    metrics = {
        "train/loss": row.train_loss,
        "train/accuracy": row.train_accuracy,
        "val/loss": row.val_loss,
        "val/accuracy": row.val_accuracy,
        "val/macro_f1": row.val_macro_f1,
        "lr": row.lr,
        "images_per_second": row.images_per_second,
        "seconds": row.seconds,
    }
    return {name: float(value) for name, value in metrics.items() if value is not None}


def result_metrics(result: RunResult) -> dict[str, float]:
    """Return the metrics of the test, likewise."""
    metrics = {
        "test/accuracy": result.accuracy,
        "test/accuracy_low": result.ci95[0],
        "test/accuracy_high": result.ci95[1],
        "test/top5": result.top5,
        "test/loss": result.loss,
        "best_epoch": result.epoch,
    }
    return {name: float(value) for name, value in metrics.items() if value is not None}
