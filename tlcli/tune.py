"""A search for a better recipe: what is searched, the study, and the mean of the weights of the best recipes."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from msgspec import Meta, Struct, structs
from torch.nn import functional as F

from tlcli.engine.metrics import Predictions, calibrate, likely_temperature, scores, unknown_threshold
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

    def without(self, keys: Collection[str]) -> "TuneSpec":
        """Return the spec without keys that have a value already."""

        def rest(values: Mapping[str, Any]) -> dict[str, Any]:
            return {key: value for key, value in values.items() if key not in keys}

        sizes = () if SIZE_KEY in keys else self.sizes
        return structs.replace(self, first=tuple(map(rest, self.first)), sizes=sizes, space=rest(self.space))


def require_optuna() -> None:
    """Raise UsageError if Optuna is not installed."""
    if find_spec("optuna") is None:
        raise UsageError("Optuna is not installed: pip install 'tlcli[tune]'")


class Study:
    """Optuna's study of a search: it suggests the recipe of the next trial, and stops one without hope."""

    def __init__(
        self,
        spec: TuneSpec,
        defaults: Mapping[str, Value],
        trials: Sequence[Mapping[str, Any]],
        current: Mapping[str, Value] | None,
        *,
        seed: int,
        minimize: bool,
    ) -> None:
        """Start with the `trials` so far, as tune.json has them, then `current`, which was interrupted, if any.

        Then come the recipes of `spec.first`. `defaults` are the values of the keys in a run with default settings.
        """
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        sampler: Any = {"tpe": optuna.samplers.TPESampler, "random": optuna.samplers.RandomSampler}[spec.sampler]
        self._optuna = optuna
        self._distributions: dict[str, Any] = {}
        for key, values in spec.space.items():
            default = defaults[key]
            if isinstance(values, Bounds):
                if isinstance(default, bool) or not isinstance(default, int | float):
                    raise UsageError(f"space: {key}={default} is no number, so that it cannot have bounds")
                low, high = min(values.low, default), max(values.high, default)
                self._distributions[key] = optuna.distributions.FloatDistribution(low, high, log=values.log)
            else:
                choices = dict.fromkeys((default, *values))
                self._distributions[key] = optuna.distributions.CategoricalDistribution(tuple(choices))
        self._study: optuna.Study = optuna.create_study(
            direction="minimize" if minimize else "maximize",
            sampler=sampler(seed=seed + len(trials)),
            pruner=optuna.pruners.MedianPruner(STARTUP_TRIALS, WARMUP_PERCENT),
        )
        for trial in trials:
            self._study.add_trial(
                optuna.trial.create_trial(
                    state=self._state(trial["status"]),
                    value=trial["value"],
                    params=dict(trial["recipe"]),
                    distributions=self._distributions,
                    intermediate_values={int(percent): value for percent, value in trial["reports"].items()},
                )
            )
        n_tried = len(trials) + (current is not None)
        for recipe in (*([current] if current else []), *spec.first[n_tried:]):
            self._study.enqueue_trial({key: recipe.get(key, defaults[key]) for key in self._distributions})

    def next_trial(self) -> "optuna.trial.Trial":
        """Return a new trial."""
        return self._study.ask()

    def recipe(self, trial: "optuna.trial.Trial") -> dict[str, Value]:
        """Return the values that a trial tries, by key."""
        recipe: dict[str, Value] = {}
        for key, values in self._distributions.items():
            if isinstance(values, self._optuna.distributions.FloatDistribution):
                number = trial.suggest_float(key, values.low, values.high, log=values.log)
                recipe[key] = min(max(float(f"{number:.3g}"), values.low), values.high)
            else:
                recipe[key] = trial.suggest_categorical(key, values.choices)
        return recipe

    def tell(self, trial: "optuna.trial.Trial", value: float | None, status: str) -> None:
        """Record how a trial ended: `done` with its validation metric, `stopped` or `failed`."""
        self._study.tell(trial, value, state=self._state(status))

    def importances(self) -> dict[str, float]:
        """Return the share of each key in the variance of the metric (fANOVA, Hutter et al. 2014), highest first."""
        done = self._study.get_trials(deepcopy=False, states=(self._state("done"),))
        if len(done) <= STARTUP_TRIALS or len({trial.value for trial in done}) < 2:
            return {}
        return dict(self._optuna.importance.get_param_importances(self._study))

    def _state(self, status: str) -> Any:
        states = self._optuna.trial.TrialState
        return {"done": states.COMPLETE, "stopped": states.PRUNED, "failed": states.FAIL}[status]


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
    return predict_split(loaded, "val", spec, spec, session, reporter).rows


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
        p = predict_mean([*members, run], spec, session, reporter)
        scaled = p.logits.double() / likely_temperature(p.logits, p.labels)
        losses = F.cross_entropy(scaled, p.labels, reduction="none")
        change = losses if best is None else losses - best
        if best is None or change.mean() <= change.std() / len(change) ** 0.5:
            members, best = [*members, run], losses
        if len(members) == limit:
            break
    return members


def average_runs(runs: Sequence[RunDir], average: RunDir, validation: SplitPredictions) -> None:
    """Write a run with the mean of the runs' weights, and with the validation result of their recipes."""
    first, predictions = runs[0], Predictions(validation.logits, validation.labels)
    info = first.info
    state, metadata = mean_weights(runs)
    average.best_checkpoint.parent.mkdir(parents=True, exist_ok=True)
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
            "unknown": unknown_threshold(validation.logits),
        },
    )
