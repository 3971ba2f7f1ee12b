"""What is on the page of one run."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import torch

from tlcli.errors import UsageError
from tlcli.runs.predictions import read_predictions
from tlcli.runs.report import words
from tlcli.runs.report.calibration import Calibration, calibration_of
from tlcli.runs.report.confusion import ClassRow, Matrix, class_rows, matrix
from tlcli.runs.report.figures import Chart, curves
from tlcli.runs.report.gallery import Gallery, mistakes, uncertain
from tlcli.runs.report.pictures import Pictures
from tlcli.runs.report.reading import Facts, RunFiles, at, facts, number, pair, read_run, text, whole
from tlcli.runs.run_dir import RunDir, process_has_exited


@dataclass(frozen=True)
class Result:
    """Accuracy on test, its 95 % interval, and what always naming the most frequent class would give."""

    accuracy: float
    ci95: tuple[float, float] | None
    n: int | None
    baseline: float | None


@dataclass(frozen=True)
class Term:
    """One figure of the summary. `note` says what it is of."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Epoch:
    """A row of the table beside the curves."""

    epoch: int
    train_loss: float | None
    train_accuracy: float | None
    val_loss: float | None
    val_accuracy: float | None
    lr: float | None
    kept: bool


@dataclass(frozen=True)
class Stage:
    """A row of the freeze table; `lr` is None where nothing in the stage trains."""

    name: str
    parameters: int | None
    trainable: int | None
    lr: float | None


@dataclass(frozen=True)
class Phase:
    """Seconds of a phase, and their share of the longest."""

    name: str
    seconds: float
    share: float


@dataclass(frozen=True)
class Galleries:
    """The images that were mistaken and those that were undecided; `missing` says why there are none, or None."""

    mistakes: Gallery | None
    uncertain: Gallery | None
    missing: str | None


@dataclass(frozen=True)
class RunPage:
    """Everything that the page of a run shows. A part that the run does not have is None or empty."""

    name: str
    title: str
    when: str | None
    status: str
    status_words: str
    error: str | None
    sentence: str
    training: str | None
    result: Result | None
    best: Facts
    keep_best: str
    terms: tuple[Term, ...]
    curves: tuple[Chart, ...]
    epochs: tuple[Epoch, ...]
    matrix: Matrix | None
    classes: tuple[ClassRow, ...]
    galleries: Galleries
    calibration: Calibration | None
    calibration_missing: str | None
    stages: tuple[Stage, ...]
    parameters: Facts
    verified: int | None
    activations: str | None
    phases: tuple[Phase, ...]
    total: float | None
    environment: tuple[tuple[str, str], ...]
    command: str | None
    config: str
    folder: str


def run_page(run: RunDir, pictures: Pictures) -> RunPage:
    """The page of a run, whatever became of it. Raises TlcliError where its run.json cannot be read."""
    files = read_run(run)
    record, test = files.record, files.test
    status = _status(record)
    best = facts(record.get("best"))
    result, seen = _result(test), _Seen(run, record)
    name = text(record.get("name")) or run.path.resolve().name
    kept = whole(best.get("epoch"))
    seconds = facts(record.get("seconds"))
    return RunPage(
        name=name,
        title=f"{words.percent(result.accuracy)} {name}" if result else f"{words.STATUS.get(status, status)}: {name}",
        when=words.moment(record.get("started")),
        status=status,
        status_words=words.STATUS.get(status, status),
        error=text(record.get("error")),
        sentence=words.sentence(files),
        training=words.training(files),
        result=result,
        best=best,
        keep_best=text(record.get("keep_best")) or "accuracy",
        terms=_terms(files),
        curves=curves(files.rows, kept),
        epochs=_epochs(files.rows, kept),
        matrix=matrix(test),
        classes=class_rows(test),
        galleries=seen.galleries(pictures),
        calibration=seen.calibration(),
        calibration_missing=seen.why_uncalibrated,
        stages=_stages(record),
        parameters=facts(record.get("parameters")),
        verified=whole(record.get("frozen_tensors_verified")),
        activations=_activations(record),
        phases=_phases(seconds),
        total=number(seconds.get("total")),
        environment=words.environment(record),
        command=words.again(record),
        config=files.config_text,
        folder=PurePath(run.path).as_posix(),
    )


class _Seen:
    """The predictions on test, or the sentence that says why there are none."""

    def __init__(self, run: RunDir, record: Facts) -> None:
        self.missing: str | None = None
        temperature = number(at(record, "calibration", "temperature"))
        self.is_calibrated = temperature is not None and temperature > 0
        self.temperature = temperature if temperature and self.is_calibrated else 1.0
        if not run.test_predictions.exists():
            tested = run.test_file.exists()
            self.missing = (
                "This run has no test_predictions.safetensors, which tlcli writes since 0.3.0."
                if tested
                else "The run ended before it was tested."
            )
            return
        try:
            found = read_predictions(run.test_predictions)
            self.logits, self.labels = found.logits.double(), found.labels.long()
            self.classes, self.keys = found.classes, found.keys
            if not len(self.labels) or not self.logits.isfinite().all():
                raise UsageError(f"{run.test_predictions}: no finite logits in it")
            if self.labels.min() < 0 or self.labels.max() >= len(self.classes):
                raise UsageError(f"{run.test_predictions}: labels that name no class")
        except UsageError as exc:
            self.missing = f"The predictions cannot be read: {exc}."

    @property
    def why_uncalibrated(self) -> str | None:
        """Why there is no reliability diagram, where there could be one."""
        if self.missing or self.is_calibrated:
            return self.missing
        return "This run has no temperature; newer releases of tlcli fit one on validation."

    def galleries(self, pictures: Pictures) -> Galleries:
        if self.missing:
            return Galleries(None, None, self.missing)
        p = torch.softmax(self.logits / self.temperature, dim=1)
        arguments = (p.numpy(), self.labels.numpy(), self.classes, self.keys, pictures)
        return Galleries(mistakes(*arguments), uncertain(*arguments), pictures.missing)

    def calibration(self) -> Calibration | None:
        if self.missing or not self.is_calibrated or len(self.classes) < 2:
            return None
        return calibration_of(self.logits, self.labels, self.temperature)


def _status(record: Facts) -> str:
    """As run.json has it; `died` where it says running and that process is gone."""
    status = text(record.get("status")) or "damaged"
    return "died" if status == "running" and process_has_exited(record) else status


def _result(test: Facts) -> Result | None:
    accuracy, n = number(test.get("accuracy")), whole(test.get("n"))
    if accuracy is None:
        return None
    supports = [whole(at(own, "support")) or 0 for own in facts(test.get("per_class")).values()]
    total = sum(supports)
    baseline = max(supports) / total if total and len(supports) > 1 else None
    return Result(accuracy, pair(test.get("accuracy_ci95")), n, baseline)


def _terms(files: RunFiles) -> tuple[Term, ...]:
    """The figures beside the result, those that there are."""
    record, test = files.record, files.test
    best = facts(record.get("best"))
    terms = []
    if (value := number(best.get("accuracy"))) is not None:
        epoch, n = whole(best.get("epoch")), whole(record.get("n_val"))
        note = f"epoch {epoch}" + (f", {words.plural(n, 'image')}" if n else "")
        terms.append(Term("Validation accuracy", words.percent(value), note))
    if (value := number(test.get("top5"))) is not None:
        terms.append(Term("Test top-5", words.percent(value), "the right class is among the five likeliest"))
    if (value := number(test.get("macro_f1"))) is not None:
        terms.append(Term("Macro F1", words.figure(value), "mean over classes, on test"))
    if (value := number(at(test, "calibration", "ece_after"))) is not None:
        terms.append(Term("Calibration error", words.percent(value), "expected, on test"))
    if (value := number(at(record, "seconds", "total"))) is not None:
        terms.append(Term("Time", words.seconds(value), "from start to result"))
    if (trains := whole(at(record, "parameters", "trainable"))) is not None:
        note = f"of {words.count(at(record, 'parameters', 'total'))} parameters"
        terms.append(Term("Trainable", words.count(trains), note))
    return tuple(terms)


def _epochs(rows: tuple[Facts, ...], kept: int | None) -> tuple[Epoch, ...]:
    found: dict[int, dict[str, Facts]] = {}
    for row in rows:
        epoch, split = whole(row.get("epoch")), row.get("split")
        if epoch is not None and split in ("train", "val"):
            found.setdefault(epoch, {})[split] = row
    return tuple(_epoch(epoch, own, kept) for epoch, own in sorted(found.items()))


def _epoch(epoch: int, own: Mapping[str, Any], kept: int | None) -> Epoch:
    train, val = facts(own.get("train")), facts(own.get("val"))
    rates = [r for r in map(number, facts(train.get("lr")).values()) if r is not None]
    return Epoch(
        epoch=epoch,
        train_loss=number(train.get("loss")),
        train_accuracy=number(train.get("accuracy")),
        val_loss=number(val.get("loss")),
        val_accuracy=number(val.get("accuracy")),
        lr=max(rates, default=None),
        kept=epoch == kept,
    )


def _stages(record: Facts) -> tuple[Stage, ...]:
    found = record.get("stages")
    return tuple(
        Stage(str(row.get("name")), whole(row.get("parameters")), whole(row.get("trainable")), number(row.get("lr")))
        for row in (map(facts, found) if isinstance(found, list) else ())
    )


PHASES = {
    "setup": "Load data and network",
    "extract": "Run the frozen part",
    "probe": "Fit the first head",
    "train": "Train",
    "validate": "Validate",
    "test": "Test",
    "plots": "Draw plots",
    "calibrate": "Calibrate",
}


def _phases(seconds: Facts) -> tuple[Phase, ...]:
    found = {str(name): number(value) for name, value in seconds.items() if name != "total"}
    known = {name: value for name, value in found.items() if value is not None}
    longest = max([*known.values(), 1e-9])
    return tuple(Phase(PHASES.get(name, name), s, s / longest) for name, s in known.items())


def _activations(record: Facts) -> str | None:
    """What was computed once and kept, in one sentence."""
    used, why = at(record, "cache", "used"), text(at(record, "cache", "why"))
    if used is None:
        return None
    if not used:
        return f"Training was live: {why}." if why else "Training was live."
    place = text(at(record, "cache", "at"))
    return f"What comes before {place} ran once over the images, and training read what it gave." if place else None
