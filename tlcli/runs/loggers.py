"""Experiment trackers that a run can also be written to, each an extra. They cannot end a run or change its results."""

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from tlcli import __version__
from tlcli.errors import UsageError
from tlcli.files import expand_user
from tlcli.reporter import EpochRow, Reporter, RunPlan
from tlcli.runs.run_dir import RunDir
from tlcli.specs import LoggerSpec, TrainSpec, option
from tlcli.text import flat_keys, to_plain

Values = Mapping[str, Any]
Metrics = Mapping[str, float]

# Takes the metrics of an epoch, the epoch and None; at the end the test metrics (empty if the run was not tested), the
# best epoch and the status: done, failed or interrupted. If it raises, training continues without it.
Tracker = Callable[[Metrics, int, str | None], None]


class TrackerSpec(LoggerSpec, frozen=True):
    """A logger whose kind is the name of its package, and of the extra that installs it."""

    def start(self, run: Path, config: Values, info: Values) -> Tracker:
        """Start a run of the tracker with all keys, and with sizes, model and device; files go into `run`."""
        raise NotImplementedError


@option
class NoLoggerSpec(LoggerSpec, frozen=True, tag="none"):
    """The run directory alone."""


@option
class TensorboardSpec(TrackerSpec, frozen=True, tag="tensorboard"):
    """TensorBoard's event files, in the run directory; `tensorboard --logdir outputs` shows all runs."""

    def start(self, run: Path, config: Values, info: Values) -> Tracker:
        from torch.utils.tensorboard import SummaryWriter

        # after a resume later ones are repeated
        steps = [row["epoch"] for row in RunDir(run).metrics() if row.get("split") != "running"]
        writer: Any = SummaryWriter(log_dir=str(run / "tensorboard"), purge_step=max(steps, default=-1) + 1)
        for title, values in (("config", config), ("facts", info)):
            lines = [f"    {key}: {value}" for key, value in values.items()]  # four blanks: code in Markdown
            writer.add_text(title, "\n".join(lines))
        writer.flush()

        def log(metrics: Metrics, step: int, status: str | None) -> None:
            for name, value in metrics.items():
                writer.add_scalar(name, value, step)
            writer.flush()
            if status:
                writer.add_text("status", status)
                writer.close()

        return log


@option
class MlflowSpec(TrackerSpec, frozen=True, tag="mlflow"):
    """A run of an MLflow experiment, without artifacts, so that the store at `uri` needs no folder in addition."""

    uri: str
    experiment: str

    def start(self, run: Path, config: Values, info: Values) -> Tracker:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # a server that is down must not delay a run
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "15")
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        uri = f"sqlite:///{expand_user(self.uri[10:])}" if self.uri.startswith("sqlite:///~") else self.uri
        client: Any = MlflowClient(uri)
        known = client.get_experiment_by_name(self.experiment)
        experiment = known.experiment_id if known else client.create_experiment(self.experiment)
        tags = {key: str(value) for key, value in info.items()}
        run_id = client.create_run(experiment, run_name=info["name"], tags=tags).info.run_id
        params = [Param(key, str(value)) for key, value in config.items()]
        for first in range(0, len(params), 100):  # MLflow takes no more per request
            client.log_batch(run_id, params=params[first : first + 100])

        def log(metrics: Metrics, step: int, status: str | None) -> None:
            now = int(time.time() * 1000)
            client.log_batch(run_id, metrics=[Metric(name, value, now, step) for name, value in metrics.items()])
            if status:
                statuses = {"done": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}
                client.set_terminated(run_id, status=statuses[status])

        return log


@option
class WandbSpec(TrackerSpec, frozen=True, tag="wandb"):
    """A Weights & Biases run, stored in the run directory until `wandb sync` if the mode is offline."""

    project: str
    mode: Literal["offline", "online"]

    def start(self, run: Path, config: Values, info: Values) -> Tracker:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        if self.mode == "online" and not wandb.login(prompt=False):
            raise UsageError("not logged in; run `wandb login`, or set logger.mode=offline")
        # metrics and config only: no code, no terminal output, no machine
        off = ("disable_code", "disable_git", "x_disable_meta", "x_disable_stats", "x_disable_machine_info")
        settings = wandb.Settings(
            silent=True, console="off", save_code=False, x_save_requirements=False, **dict.fromkeys(off, True)
        )
        tracked: Any = wandb.init(
            project=self.project,
            name=info["name"],
            mode=self.mode,
            dir=str(run),
            config={**config, **{f"run.{key}": value for key, value in info.items()}},
            reinit="create_new",  # an earlier job whose logger failed may have left its run open
            settings=settings,
        )

        def log(metrics: Metrics, step: int, status: str | None) -> None:
            if status:
                tracked.summary.update({**metrics, "status": status})
                tracked.finish(exit_code=0 if status == "done" else 1)
            else:
                tracked.log(dict(metrics), step=step)

        return log


def check_logger(spec: LoggerSpec) -> None:
    """Raise UsageError if the package of the chosen logger is not installed, or its address has a password."""
    if isinstance(spec, TrackerSpec) and find_spec(spec.kind) is None:
        raise UsageError(f"logger={spec.kind} needs {spec.kind}: pip install 'tlcli[{spec.kind}]'")
    check_address(str(getattr(spec, "uri", "")))


def check_address(uri: str) -> None:
    """Raise UsageError if an address has a password, before anything is saved with it."""
    if re.search("//[^/?#]*:[^/?#]*@", uri):
        remedy = "set MLFLOW_TRACKING_PASSWORD in the environment (for a database, use its own file, as ~/.pgpass)"
        raise UsageError(f"logger.uri: its password would be saved with the run: leave it out, and {remedy}")


def logged_run(spec: TrainSpec, run: Path, reporter: Reporter) -> AbstractContextManager[Reporter]:
    """Return a context with a reporter that passes everything to `reporter`, and metrics to the logger of the spec."""
    if isinstance(spec.logger, TrackerSpec):
        return _LoggedReporter(reporter, spec.logger, spec, run)
    return nullcontext(reporter)


class _LoggedReporter(Reporter):
    """Passes everything to a reporter, and metrics to a tracker. After the tracker's first error, a note, it is off."""

    def __init__(self, reporter: Reporter, logger: TrackerSpec, spec: TrainSpec, run: Path) -> None:
        self._reporter, self._logger, self._spec, self._run = reporter, logger, spec, run
        self._tracker: Tracker | None = None
        self._result: tuple[Metrics, int] = {}, 0  # test metrics and best epoch
        self.note, self.track = reporter.note, reporter.track  # type: ignore[method-assign]

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, error: type[BaseException] | None, *details: object) -> None:
        status = "done" if error is None else "interrupted" if issubclass(error, KeyboardInterrupt) else "failed"
        self.log(*self._result, status)

    def plan(self, plan: RunPlan) -> None:
        self._reporter.plan(plan)
        # the logger's own keys are left out: its address may contain a password
        config = {key: v for key, v in flat_keys(to_plain(self._spec)).items() if not key.startswith("logger.")}
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
        with self._off_after_error():
            self._tracker = self._logger.start(self._run, config, info)

    def epoch(self, row: EpochRow) -> None:
        self._reporter.epoch(row)
        values = {name: value for name, value in vars(row).items() if value is not None}
        names = values.keys() - {"epoch", "epochs", "best"}
        metrics = {re.sub("^(train|val)_", r"\1/", name): float(values[name]) for name in sorted(names)}
        self.log(metrics, row.epoch)

    def outcome(self, run: Path, result: Mapping[str, Any]) -> None:
        self._reporter.outcome(run, result)
        epoch, names = result["epoch"], ("accuracy", "top5", "loss")
        metrics = {f"test/{name}": result[name] for name in names if result.get(name) is not None}
        metrics |= zip(("test/accuracy_low", "test/accuracy_high"), result.get("accuracy_ci95", ()), strict=False)
        self._result = metrics | {"best_epoch": float(epoch)}, epoch

    def log(self, metrics: Metrics, step: int, status: str | None = None) -> None:
        with self._off_after_error():
            if self._tracker is not None:
                self._tracker(metrics, step, status)

    @contextmanager
    def _off_after_error(self) -> Iterator[None]:
        try:
            yield
        except Exception as exc:  # the libraries of trackers raise anything
            self._tracker = None
            reason = (str(exc) or type(exc).__name__).strip().split("\n")[0]
            self._reporter.note(f"logger={self._logger.kind} failed and is off for the rest of this run: {reason}")
