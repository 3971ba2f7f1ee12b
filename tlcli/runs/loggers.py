"""Experiment trackers that a run can also be written to: TensorBoard, MLflow, Weights & Biases.

Each is an extra, imported only when it is chosen. None of them can end a run or change what it computes, and none uses
the network unless its own keys say so: the run directory has everything without them.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from tlcli import __version__
from tlcli.errors import UsageError
from tlcli.reporter import EpochRow, Reporter, RunPlan, RunResult
from tlcli.specs import LoggerSpec, MlflowSpec, TensorboardSpec, TrainSpec, WandbMode, WandbSpec
from tlcli.text import flat_keys, to_plain

Values = Mapping[str, Any]


class Logger(Protocol):
    """Where a run is written to. Any method may raise: the run goes on without the logger."""

    def start(self, config: Values, facts: Values) -> None:
        """Training is about to begin. `config`: every key in full and its value; `facts`: what the run found out."""

    def epoch(self, row: EpochRow) -> None:
        """An epoch ended."""

    def end(self, result: RunResult | None, status: str) -> None:
        """The run ended: `done`, `failed` or `interrupted`; `result` is there once it was tested."""


PACKAGES = {"tensorboard": "tensorboard", "mlflow": "mlflow", "wandb": "wandb"}
"""The package that each kind of logger needs; the extra has the kind's name."""


def check_logger(spec: LoggerSpec) -> None:
    """Raise UsageError where the package of the chosen logger is not installed."""
    package = PACKAGES.get(spec.kind)
    if package is not None and find_spec(package) is None:
        raise UsageError(f"logger={spec.kind} needs {package}: pip install 'tlcli[{spec.kind}]'")


@contextmanager
def logged_run(spec: TrainSpec, run: Path, reporter: Reporter) -> Iterator[Reporter]:
    """A watch to train with: it tells the given one everything, and the logger that the spec chooses.

    Args:
        run: the run's directory, where TensorBoard and Weights & Biases write.
    """
    make = LOGGERS.get(type(spec.logger))
    if make is None:
        yield reporter
        return
    check_logger(spec.logger)
    logged = LoggedWatch(reporter, make(spec.logger, run), spec)
    status = "failed"
    try:
        yield logged
        status = "done"
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    finally:
        logged.end(status)


class LoggedWatch(Reporter):
    """Tells a watch everything, and a logger what it is for. The first error of the logger is a note and its end."""

    def __init__(self, reporter: Reporter, logger: Logger, spec: TrainSpec) -> None:
        self._watch = reporter
        self._logger = logger
        self._spec = spec
        self._outcome: RunResult | None = None
        self._is_on = False

    def note(self, text: str) -> None:
        self._watch.note(text)

    @contextmanager
    def track(self, label: str, total: int, unit: str = "images") -> Iterator[Callable[[int], None]]:
        with self._watch.track(label, total, unit) as advance:
            yield advance

    def plan(self, plan: RunPlan) -> None:
        self._watch.plan(plan)
        self._is_on = True
        self._tell(lambda: self._logger.start(flat_config(self._spec), facts_of(plan)))

    def epoch(self, row: EpochRow) -> None:
        self._watch.epoch(row)
        self._tell(lambda: self._logger.epoch(row))

    def outcome(self, outcome: RunResult) -> None:
        self._watch.outcome(outcome)
        self._outcome = outcome

    def end(self, status: str) -> None:
        """The run ended with this status."""
        self._tell(lambda: self._logger.end(self._outcome, status))

    def _tell(self, what: Callable[[], None]) -> None:
        if not self._is_on:
            return
        try:
            what()
        except Exception as exc:  # a tracker's libraries raise anything
            self._is_on = False
            reason = (str(exc) or type(exc).__name__).strip().split("\n")[0]
            self._watch.note(f"logger={self._spec.logger.kind} failed and is off for the rest of this run: {reason}")


def flat_config(spec: TrainSpec) -> dict[str, Any]:
    """{"optimizer.lr": 5e-4, ...}: every key but the logger's own, whose address may have a password in it."""
    return {key: value for key, value in flat_keys(to_plain(spec)).items() if not key.startswith("logger.")}


def facts_of(plan: RunPlan) -> dict[str, Any]:
    """What a plan says that the config does not."""
    return {
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


def epoch_figures(row: EpochRow) -> dict[str, float]:
    """An epoch's figures by the names that trackers group them by; those that it has not are left out."""
    figures = {
        "train/loss": row.train_loss,
        "train/accuracy": row.train_accuracy,
        "val/loss": row.val_loss,
        "val/accuracy": row.val_accuracy,
        "val/macro_f1": row.val_macro_f1,
        "lr": row.lr,
        "images_per_second": row.images_per_second,
        "seconds": row.seconds,
    }
    return {name: float(value) for name, value in figures.items() if value is not None}


def result_figures(outcome: RunResult) -> dict[str, float]:
    """The test's figures, likewise."""
    figures = {
        "test/accuracy": outcome.accuracy,
        "test/accuracy_low": outcome.ci95[0],
        "test/accuracy_high": outcome.ci95[1],
        "test/top5": outcome.top5,
        "test/loss": outcome.loss,
        "best_epoch": outcome.epoch,
    }
    return {name: float(value) for name, value in figures.items() if value is not None}


class _Tensorboard:
    """Event files in RUN/tensorboard; `tensorboard --logdir outputs` shows all runs."""

    def __init__(self, spec: TensorboardSpec, run: Path) -> None:
        self._folder = run / "tensorboard"

    def start(self, config: Values, facts: Values) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(log_dir=str(self._folder))
        for title, values in (("config", config), ("facts", facts)):
            lines = [f"    {key}: {value}" for key, value in values.items()]  # four blanks: code, in Markdown
            self._writer.add_text(title, "\n".join(lines))
        self._writer.flush()

    def epoch(self, row: EpochRow) -> None:
        for name, value in epoch_figures(row).items():
            self._writer.add_scalar(name, value, row.epoch)
        self._writer.flush()

    def end(self, result: RunResult | None, status: str) -> None:
        if result is not None:
            for name, value in result_figures(result).items():
                self._writer.add_scalar(name, value, result.epoch)
        self._writer.add_text("status", status)
        self._writer.close()


class _Mlflow:
    """A run of an MLflow experiment. Without any artifact, so that a store of any kind needs no folder beside it."""

    STATUS: Mapping[str, str] = {"done": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}
    BATCH = 100  # parameters that MLflow takes in one request

    def __init__(self, spec: MlflowSpec, run: Path) -> None:
        self._spec = spec

    def start(self, config: Values, facts: Values) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # it would send facts about its use to its makers
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # a server that is down must not hold a run up
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "15")
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._metric = Metric
        self._client: Any = MlflowClient(self._spec.uri)
        found = self._client.get_experiment_by_name(self._spec.experiment)
        experiment = found.experiment_id if found else self._client.create_experiment(self._spec.experiment)
        tags = {key: str(value) for key, value in facts.items()}
        self._run = self._client.create_run(experiment, run_name=facts["name"], tags=tags).info.run_id
        params = [Param(key, str(value)) for key, value in config.items()]
        for first in range(0, len(params), self.BATCH):
            self._client.log_batch(self._run, params=params[first : first + self.BATCH])

    def epoch(self, row: EpochRow) -> None:
        self._log(epoch_figures(row), row.epoch)

    def end(self, result: RunResult | None, status: str) -> None:
        if result is not None:
            self._log(result_figures(result), result.epoch)
        self._client.set_terminated(self._run, status=self.STATUS[status])

    def _log(self, figures: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        self._client.log_batch(self._run, metrics=[self._metric(name, v, now, step) for name, v in figures.items()])


class _Wandb:
    """A Weights & Biases run, kept in RUN/wandb until `wandb sync` where the mode is offline."""

    def __init__(self, spec: WandbSpec, run: Path) -> None:
        self._spec = spec
        self._folder = run

    def start(self, config: Values, facts: Values) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # it would send its own errors to its makers
        import wandb

        if self._spec.mode is WandbMode.online and not wandb.login(prompt=False):
            raise UsageError("nobody is logged in; run `wandb login`, or set logger.mode=offline")
        settings = wandb.Settings(  # figures and config alone: no code, no terminal, nothing about the machine
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
        self._run: Any = wandb.init(
            project=self._spec.project,
            name=facts["name"],
            mode=self._spec.mode.value,
            dir=str(self._folder),
            config={**config, **{f"run.{key}": value for key, value in facts.items()}},
            reinit="create_new",  # a job whose logger failed may have left its own run open
            settings=settings,
        )

    def epoch(self, row: EpochRow) -> None:
        self._run.log(epoch_figures(row), step=row.epoch)

    def end(self, result: RunResult | None, status: str) -> None:
        self._run.summary.update({**(result_figures(result) if result else {}), "status": status})
        self._run.finish(exit_code=0 if status == "done" else 1)


LOGGERS: dict[type[LoggerSpec], Callable[[Any, Path], Logger]] = {
    TensorboardSpec: _Tensorboard,
    MlflowSpec: _Mlflow,
    WandbSpec: _Wandb,
}
"""What makes the logger of each kind of spec; `none` has no entry."""
