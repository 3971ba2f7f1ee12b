"""A search for a better recipe: what is searched, the study, and the mean of the weights of the best recipes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from msgspec import Meta, Struct, structs
from torch.nn import functional as F

from tlcli.engine.metrics import Predictions, calibrate, likely_temperature, scores
from tlcli.engine.session import Session
from tlcli.errors import UsageError
from tlcli.evaluate import predict_split
from tlcli.models.tensorfile import read_tensors, write_tensors
from tlcli.reporter import Reporter
from tlcli.runs.load import load_run
from tlcli.runs.run_dir import RunDir, SplitPredictions, write_json, write_predictions
from tlcli.specs import Count, FractionAboveZero, TrainSpec

if TYPE_CHECKING:
    import optuna

Value = bool | int | float | str | None

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
            raise ValueError(
                f"low={self.low:g} must be below high={self.high:g}" + (", and above 0" if self.log else "")
            )


class TuneSpec(Struct, frozen=True, forbid_unknown_fields=True):
    """What `tlcli tune` searches: a file of conf/tune."""

    overrides: tuple[str, ...]
    val_fraction: FractionAboveZero | None
    average: Count
    trials: Count | None
    sampler: Literal["tpe", "random"]
    first: tuple[dict[str, Value], ...]
    sizes: tuple[Annotated[float, Meta(gt=0)], ...]
    space: dict[str, tuple[Value, ...] | Bounds]

    def without(self, keys: Sequence[str]) -> "TuneSpec":
        """Return the spec without keys that have a value already."""

        def rest(values: Mapping[str, Any]) -> dict[str, Any]:
            return {key: value for key, value in values.items() if key not in keys}

        sizes = () if SIZE_KEY in keys else self.sizes
        return structs.replace(self, first=tuple(map(rest, self.first)), sizes=sizes, space=rest(self.space))


class Study:
    """Optuna's study of a search, in a file: it suggests the recipe of the next trial, and stops one without hope."""

    def __init__(self, file: Path, spec: TuneSpec, defaults: Mapping[str, Value], seed: int, *, minimize: bool) -> None:
        """Open the study, or start it with the recipes of `spec.first`; `defaults` are the values of its keys."""
        try:
            import optuna
        except ImportError:
            raise UsageError("tlcli tune needs Optuna: pip install 'tlcli[tune]'") from None
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        sampler: Any = {"tpe": optuna.samplers.TPESampler, "random": optuna.samplers.RandomSampler}[spec.sampler]
        self._optuna, self._space = optuna, dict(spec.space)
        for key, values in self._space.items():
            if isinstance(values, tuple) and defaults[key] not in values:
                self._space[key] = (defaults[key], *values)
            elif isinstance(values, Bounds):
                value = defaults[key]
                if isinstance(value, bool) or not isinstance(value, int | float):
                    raise UsageError(f"space: {key}={value} is no number, so that it cannot have bounds")
                self._space[key] = structs.replace(values, low=min(values.low, value), high=max(values.high, value))
        is_new = not file.exists()
        self.study: optuna.Study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(file))),
            study_name="tlcli",
            load_if_exists=True,
            direction="minimize" if minimize else "maximize",
            sampler=sampler(seed=seed),
            pruner=optuna.pruners.MedianPruner(STARTUP_TRIALS, WARMUP_PERCENT),
        )
        for recipe in spec.first if is_new else ():
            self.study.enqueue_trial({key: recipe.get(key, defaults[key]) for key in self._space})

    def next_trial(self) -> "optuna.trial.Trial":
        """Return the trial that was interrupted, if one was, or a new one."""
        states = self._optuna.trial.TrialState
        running = self.study.get_trials(deepcopy=False, states=(states.RUNNING,))
        return self._optuna.trial.Trial(self.study, running[0]._trial_id) if running else self.study.ask()

    def recipe(self, trial: "optuna.trial.Trial") -> dict[str, Value]:
        """Return the values that a trial tries, by key."""
        recipe: dict[str, Value] = {}
        for key, values in self._space.items():
            if isinstance(values, Bounds):
                recipe[key] = float(f"{trial.suggest_float(key, values.low, values.high, log=values.log):.3g}")
            elif isinstance(values, tuple):
                recipe[key] = trial.suggest_categorical(key, values)
        return recipe

    def tell(self, trial: "optuna.trial.Trial", value: float | None, *, stopped: bool = False) -> None:
        """Record the validation metric of a trial; None if it failed."""
        states = self._optuna.trial.TrialState
        if stopped:
            self.study.tell(trial, state=states.PRUNED)
        elif value is None:
            self.study.tell(trial, state=states.FAIL)
        else:
            self.study.tell(trial, value)

    def importances(self) -> dict[str, float]:
        """Return the share of each key in the variance of the metric (fANOVA, Hutter et al. 2014), highest first."""
        done = self.study.get_trials(deepcopy=False, states=(self._optuna.trial.TrialState.COMPLETE,))
        if len(done) <= STARTUP_TRIALS or len({trial.value for trial in done}) < 2:
            return {}
        return dict(self._optuna.importance.get_param_importances(self.study))


def mean_weights(runs: Sequence[RunDir]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the mean of the runs' best weights (Wortsman et al. 2022, model soups), and the first one's metadata."""
    files = [read_tensors(run.best_checkpoint) for run in runs]
    state, metadata = files[0]
    means = {name: torch.stack([other[name].double() for other, _ in files]).mean(dim=0) for name in state}
    return {name: means[name].to(tensor.dtype) for name, tensor in state.items()}, metadata


def choose_members(
    runs: Sequence[RunDir], limit: int, spec: TrainSpec, session: Session, reporter: Reporter
) -> tuple[list[RunDir], SplitPredictions]:
    """Return the runs whose weights are averaged, at most `limit`, and the predictions of the mean for validation.

    `runs` are in order of validation, the best first. Each is added unless the loss, at the best temperature, becomes
    higher by more than one standard error of the paired difference.
    """

    def losses(predictions: Predictions) -> torch.Tensor:
        logits, labels = predictions.logits, predictions.labels
        return F.cross_entropy(logits.double() / likely_temperature(logits, labels), labels, reduction="none")

    members: list[RunDir] = []
    best: tuple[torch.Tensor, SplitPredictions] | None = None
    for run in runs:
        loaded = load_run(run.path)
        loaded.model.load_state_dict(mean_weights([*members, run])[0])
        result = predict_split(loaded, "val", spec, spec, session, reporter)
        change = losses(result.predictions) - (best[0] if best else math.inf)
        if best is None or change.mean() <= change.std() / len(change) ** 0.5:
            members.append(run)
            best = losses(result.predictions), result.rows
        if len(members) == limit:
            break
    assert best is not None
    return members, best[1]


def average_runs(runs: Sequence[RunDir], average: RunDir, validation: SplitPredictions) -> None:
    """Write a run with the mean of the runs' weights, and with the validation result of their recipes."""
    first, predictions = runs[0], Predictions(validation.logits, validation.labels)
    info = first.info
    state, metadata = mean_weights(runs)
    average.best_checkpoint.parent.mkdir(parents=True)
    write_tensors(average.best_checkpoint, state, metadata)
    write_predictions(average.val_predictions, validation)
    average.write_config(first.config_file.read_text(encoding="utf-8"))
    write_json(
        average.info_file,
        {
            **info,
            "averaged": [run.path.name for run in runs],
            "best": {"epoch": metadata["epoch"], **asdict(scores(predictions))},
            "calibration": calibrate(validation.logits, validation.labels),
        },
    )
