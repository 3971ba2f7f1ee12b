"""A search for a better recipe: what is searched, the study, and the mean of the weights of the best recipes."""

import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from math import ceil
from pathlib import Path
from typing import Annotated, Any, Literal

import optuna
import torch
import yaml  # type: ignore[import-untyped]
from msgspec import Meta, Struct, structs
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import TrialState
from torch.nn import functional as F

from tlcli.engine.metrics import Predictions, calibrate, likely_temperature, scores, unknown_threshold
from tlcli.engine.session import Session
from tlcli.errors import UsageError
from tlcli.evaluate import predict_split
from tlcli.files import read_yaml
from tlcli.models.tensorfile import read_tensors, write_tensors
from tlcli.reporter import Reporter
from tlcli.runs.load import load_run
from tlcli.runs.run_dir import RunDir, SplitPredictions, write_json, write_predictions
from tlcli.specs import Count, OpenFraction, TrainSpec, Tta, leaf_types

Value = bool | int | float | str | None

STATES = {"done": TrialState.COMPLETE, "stopped": TrialState.PRUNED}  # else the trial failed, or it is lost
SIZE_KEY = "image.train_size"
STARTUP_TRIALS = 4  # finished before one is stopped
WARMUP_PERCENT = 40  # of a trial's schedule: earlier values of a cosine schedule mislead


class Bounds(Struct, frozen=True, forbid_unknown_fields=True):
    """The lowest and the highest value of a key."""

    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        if not self.low < self.high or (self.log and self.low <= 0):
            above = ", and above 0" if self.log else ""
            raise ValueError(f"low={self.low:g} must be below high={self.high:g}{above}")


class TuneSpec(Struct, frozen=True, forbid_unknown_fields=True):
    """What `tlcli tune` searches: a file of conf/tune."""

    overrides: tuple[str, ...]
    val_fraction: OpenFraction | None
    average: Count
    trials: Count | None
    sampler: Literal["tpe", "random"]
    first: tuple[dict[str, Value], ...]
    sizes: tuple[Annotated[float, Meta(gt=0)], ...]
    space: dict[str, tuple[Value, ...] | Bounds]
    mirrors: bool = False  # files for 0.16 or earlier do not have it

    def without(self, keys: Collection[str]) -> "TuneSpec":
        """Return the spec without keys that have a value already."""
        sizes, mirrors = () if SIZE_KEY in keys else self.sizes, self.mirrors and "tta" not in keys
        space = {key: values for key, values in self.space.items() if key not in keys}
        return structs.replace(self, sizes=sizes, mirrors=mirrors, space=space)


class Study:
    """Optuna's study of a search, which workers share through a file: the recipes of trials, and how they ended.

    A trial ends as `done`, `stopped` or `failed`, or as `lost` if its worker died; then it is queued again.
    """

    def __init__(self, spec: TuneSpec, defaults: Mapping[str, Value], file: Path, *, seed: int, minimize: bool) -> None:
        """Open the study in `file`, or begin it there with the recipes of `spec.first`.

        `defaults` are the values of the keys in a run with default settings. One worker at a time may do this.
        """
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._seed = seed
        self._sampler: Any = {"tpe": optuna.samplers.TPESampler, "random": optuna.samplers.RandomSampler}[spec.sampler]
        self._distributions: dict[str, Any] = {}
        for key, values in spec.space.items():
            own = [defaults[key], *(recipe[key] for recipe in spec.first if key in recipe)]
            if isinstance(values, Bounds):
                numbers = [v for v in own if isinstance(v, int | float) and not isinstance(v, bool)]
                if bad := [v for v in own if v not in numbers or (values.log and v <= 0)]:
                    rule = "above 0, as log: true needs it" if values.log else "a number, as bounds need it"
                    raise UsageError(f"space: {key}={bad[0]} must be {rule}")
                low, high = min(values.low, *numbers), max(values.high, *numbers)
                if int in (types := leaf_types(key)) and float not in types:
                    bounds = ceil(low), int(high)
                    self._distributions[key] = optuna.distributions.IntDistribution(*bounds, log=values.log)
                else:
                    self._distributions[key] = optuna.distributions.FloatDistribution(low, high, log=values.log)
            else:
                choices = dict.fromkeys((own[0], *values, *own[1:]))
                self._distributions[key] = optuna.distributions.CategoricalDistribution(tuple(choices))
        lock = JournalFileOpenLock(str(file))
        if file.exists():  # a disk that was full leaves half a line, to which Optuna would append the next one
            lock.acquire()
            try:
                text = file.read_bytes()
                if not text.endswith(b"\n"):
                    os.truncate(file, text.rfind(b"\n") + 1)
            finally:
                lock.release()
        try:
            backend = JournalFileBackend(str(file), lock)
            self._storage = optuna.storages.JournalStorage(backend)
            self._study: optuna.Study = optuna.create_study(
                storage=self._storage,
                study_name="tlcli",
                load_if_exists=True,
                direction="minimize" if minimize else "maximize",
                pruner=optuna.pruners.MedianPruner(STARTUP_TRIALS, WARMUP_PERCENT),
            )
        except (ValueError, KeyError, TypeError, AssertionError) as exc:
            raise UsageError(f"{file}: damaged ({type(exc).__name__}); start the search again") from exc
        first = [{key: recipe.get(key, defaults[key]) for key in self._distributions} for recipe in spec.first]
        first = [recipe for i, recipe in enumerate(first) if recipe not in first[:i]]  # without keys that were given
        for recipe in first[len(self._study.get_trials(deepcopy=False)) :]:
            self._study.enqueue_trial(recipe)

    def next_trial(self, worker: str) -> optuna.trial.Trial:
        """Return a new trial of a worker. One worker at a time may do this."""
        seed = self._seed + len(self._study.get_trials(deepcopy=False))
        self._study.sampler = self._sampler(seed=seed)  # no two workers draw the same
        trial = self._study.ask(self._distributions)
        trial.set_user_attr("worker", worker)
        recipe: dict[str, Value] = trial.params
        for key, values in self._distributions.items():
            if isinstance(values, optuna.distributions.FloatDistribution):
                recipe[key] = min(max(float(f"{recipe[key]:.3g}"), values.low), values.high)
        trial.set_user_attr("recipe", recipe)
        return trial

    def tell(self, number: int, value: float | None, status: str, *, seconds: float = 0.0, error: str = "") -> str:
        """Record how a trial ended, if `done` with its validation metric; queue the recipe of a `lost` one again.

        Return the status that is recorded: that of another worker, if it was first.
        """
        trial = self._study.get_trials(deepcopy=False)[number]
        try:
            for key, attribute in (("status", status), ("seconds", seconds), ("error", error)):
                self._storage.set_trial_user_attr(trial._trial_id, key, attribute)
            self._study.tell(number, value, state=STATES.get(status, TrialState.FAIL))
        except (optuna.exceptions.UpdateFinishedTrialError, ValueError):  # it has ended
            return str(self._study.get_trials(deepcopy=False)[number].user_attrs.get("status", "lost"))
        if status == "lost":
            self._study.enqueue_trial({**trial.params, **trial.system_attrs.get("fixed_params", {})})
        return status

    def put_back(self, number: int) -> None:
        """Queue a trial that was interrupted again, under its number."""
        trial, waiting = self._study.get_trials(deepcopy=False)[number], TrialState.WAITING
        with suppress(RuntimeError):  # another worker has ended it
            self._storage.set_trial_state_values(trial._trial_id, waiting)

    def running(self) -> dict[int, str | None]:
        """Return the worker of each trial that runs, by its number; None if it died before it could be recorded."""
        trials = self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        return {trial.number: trial.user_attrs.get("worker") for trial in trials}

    def ended(self) -> list[dict[str, Any]]:
        """Return the trials that have ended, as tune.json has them."""
        return [
            {
                "name": str(trial.number),
                "value": trial.value if trial.user_attrs["status"] == "done" else None,
                "recipe": {},
                **trial.user_attrs,  # worker, recipe, status, seconds and error
            }
            for trial in self._study.get_trials(deepcopy=False)
            if trial.state.is_finished()
        ]

    def importances(self) -> dict[str, float]:
        """Return the share of each key in the variance of the metric (fANOVA, Hutter et al. 2014), highest first."""
        done = [trial["value"] for trial in self.ended() if trial["value"] is not None]
        if len(done) <= STARTUP_TRIALS or len(set(done)) < 2:
            return {}
        return dict(optuna.importance.get_param_importances(self._study))


def mean_weights(runs: Sequence[RunDir]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the mean of the runs' best weights (Wortsman et al. 2022, model soups), and the first one's metadata."""
    files = [read_tensors(run.best_checkpoint) for run in runs]
    state, metadata = files[0]
    means = {name: torch.stack([other[name].double() for other, _ in files]).mean(dim=0) for name in state}
    return {name: means[name].to(tensor.dtype) for name, tensor in state.items()}, metadata


def predict_mean(runs: Sequence[RunDir], spec: TrainSpec, session: Session, reporter: Reporter) -> SplitPredictions:
    """Return the predictions of the runs' mean weights for the validation images of `spec`."""
    loaded = load_run(runs[-1].path)
    loaded.model.load_state_dict(mean_weights(runs)[0])
    return predict_split(loaded, "val", spec, spec, session, reporter).named_predictions


def choose_members(
    runs: Sequence[RunDir], limit: int, spec: TrainSpec, session: Session, reporter: Reporter
) -> list[RunDir]:
    """Return the runs whose weights are averaged, at most `limit`.

    `runs` are in order of validation, the best first. Each is added unless the loss, at the best temperature, becomes
    higher by more than one standard error of the paired difference.
    """
    members: list[RunDir] = []
    best: torch.Tensor | None = None
    for run in runs:
        losses = _losses(predict_mean([*members, run], spec, session, reporter))
        change = losses if best is None else losses - best
        if best is None or change.mean() <= change.std() / len(change) ** 0.5:
            members, best = [*members, run], losses
        if len(members) == limit:
            break
    return members


def prefers_mirrors(runs: Sequence[RunDir], spec: TrainSpec, session: Session, reporter: Reporter) -> bool:
    """Return True if `tta=flip` lowers the validation loss of the runs' mean by more than one standard error."""
    plain, mirrored = (predict_mean(runs, structs.replace(spec, tta=tta), session, reporter) for tta in Tta)
    gains = _losses(plain) - _losses(mirrored)
    return bool(gains.mean() > gains.std() / len(gains) ** 0.5)


def _losses(p: SplitPredictions) -> torch.Tensor:
    """Return the loss (N), float64, at the best temperature."""
    scaled = p.logits.double() / likely_temperature(p.logits, p.labels)
    return F.cross_entropy(scaled, p.labels, reduction="none")


def average_runs(runs: Sequence[RunDir], average: RunDir, validation: SplitPredictions, tta: Tta, command: str) -> None:
    """Write a run with the mean of the runs' weights, and with the validation result of their recipes with `tta`.

    `command` is that of the search, which makes such a run again.
    """
    first, predictions = runs[0], Predictions(validation.logits, validation.labels)
    state, metadata = mean_weights(runs)
    average.best_checkpoint.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(average.best_checkpoint, state, metadata)
    write_predictions(average.val_predictions, validation)
    config = read_yaml(first.config_file) | {"tta": tta.value}
    average.write_config(yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    best = {"epoch": metadata["epoch"], **asdict(scores(predictions))}
    info = {**first.info, "averaged": [run.path.name for run in runs], "best": best, "tta": tta.value}
    info |= {"command": command, "n_val": len(predictions.labels), "seconds": {"total": 0.0}}
    info["calibration"] = calibrate(validation.logits, validation.labels)
    write_json(average.info_file, {**info, "unknown": unknown_threshold(predictions)})
