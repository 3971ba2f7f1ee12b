"""What a run leaves behind, written as it goes: run.json, metrics.jsonl, test.json, checkpoints, plots."""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from tlcli import __version__
from tlcli.data.dataset import Dataset
from tlcli.engine.calibration import Calibration, calibrate, calibration_report
from tlcli.engine.inputs import Inputs
from tlcli.engine.metrics import BestEpochTracker, Predictions, Scores, most_confused, scores, test_report
from tlcli.engine.trainer import EpochStats, RunningLoss, Trainer
from tlcli.models.classifier import Classifier
from tlcli.reporter import EpochRow, Reporter, RunPlan, RunResult
from tlcli.runs.keeping import CheckpointManager
from tlcli.runs.plots import plot_confusion, plot_curves, plot_samples
from tlcli.runs.predictions import SplitPredictions, write_predictions
from tlcli.runs.restart import ResumeState
from tlcli.runs.run_dir import RunDir, environment, read_json, write_json
from tlcli.specs import CropSpec, TrainSpec
from tlcli.transfer.groups import freeze_table


class Recorder:
    """Writes one run's directory and tells the watcher what it wrote."""

    def __init__(self, run: RunDir, reporter: Reporter, spec: TrainSpec, restart: ResumeState | None = None) -> None:
        self._run = run
        self._watch = reporter
        self._spec = spec
        self._restart = restart
        before = read_json(run.info_file) if restart is not None else {}
        self._seconds: dict[str, float] = dict(before.get("seconds") or {})
        self._began = time.perf_counter() - self._seconds.pop("total", 0.0)
        self._last = 0.0
        self._best_images_per_second: float = before.get("images_per_second") or 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time spent within to this phase's seconds in run.json."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._last = time.perf_counter() - start
            self._seconds[name] = self._seconds.get(name, 0.0) + self._last

    def plan(self, data: Dataset, model: Classifier, inputs: Inputs) -> None:
        """Everything is loaded: write what is known of data, model and machine, and show the plan."""
        spec, splits = self._spec, {"train": data.train, "val": data.val, "test": data.test}
        stages, device = freeze_table(spec.optimizer, model), inputs.device
        self._sizes = {name: len(split) for name, split in splits.items()}
        self._facts = {
            "tlcli": __version__,
            "backbone": model.name,
            "backbone_kind": spec.backbone.kind,
            "classes": list(model.classes),
            "preprocessing": inputs.preprocessing.to_json(),
        }
        self._run.write_bad_files(data.bad_files)
        self._run.update(
            name=spec.name,
            seed=spec.seed,
            dataset=spec.dataset.name,
            freeze=spec.freeze.kind,
            keep_best=spec.keep_best.value,
            **self._facts,
            **environment(),
            device=device.accelerator.type,
            precision={"train": str(device.train_dtype), "evaluate": str(device.eval_dtype)},
            memory_format=str(device.memory_format),
            numerics={"device": device.words, **inputs.numerics},
            **{f"n_{name}": n for name, n in self._sizes.items()},
            n_bad_files=len(data.bad_files),
            parameters={"total": sum(s.parameters for s in stages), "trainable": sum(s.trainable for s in stages)},
            stages=[asdict(stage) for stage in stages],
            cache=inputs.cache_info,
            decisions=inputs.decisions.to_json(),
        )
        own = inputs.preprocessing
        self._watch.plan(
            RunPlan(
                run=self._run.path,
                name=spec.name,
                dataset=data.name,
                classes=data.classes,
                counts={name: split.class_counts(len(data.classes)) for name, split in splits.items()},
                model=model.name,
                image=f"{own.size} px, {own.fit.value}, {_augment_words(spec)}",
                stages=stages,
                training=_training_words(spec),
                device=device.words,
                activations=inputs.summary,
                notes=(*model.notes, *data.notes, *_formats(inputs.numerics)),
            )
        )

    def running(self, running: RunningLoss) -> None:
        """The running loss inside an epoch."""
        self._run.log_metrics({"split": "running", **asdict(running)})
        self._watch.note(f"epoch {running.epoch}, batch {running.batch}: loss {running.loss:.3f}")

    def keeper(
        self, network: nn.Module, trainer: Trainer, origin: Callable[[], Mapping[str, Any]]
    ) -> CheckpointManager:
        """What keeps this run's checkpoints; `origin` as it takes it."""
        seconds = 60 * self._spec.checkpoint.every_minutes
        epoch = None if self._restart is None else self._restart.epoch
        return CheckpointManager(self._run, network, trainer, self._facts, origin, seconds=seconds, epoch=epoch)

    def epoch(
        self,
        epoch: int,
        fit: EpochStats | None,
        validation: Scores,
        *,
        best: bool,
        step: int,
    ) -> None:
        """An epoch was validated: a line for train and one for val."""
        if fit is not None:
            self._best_images_per_second = max(self._best_images_per_second, fit.images_per_second)
            self._run.log_metrics({"split": "train", "epoch": epoch, **asdict(fit)})
        self._log_evaluation("val", epoch, step, validation, fit.lr if fit else None)
        found = {"best": {"epoch": epoch, **asdict(validation)}} if best else {}
        self._run.update(**found, seconds=self._spent(), images_per_second=self._best_images_per_second or None)
        self._watch.epoch(
            EpochRow(
                epoch=epoch,
                epochs=self._spec.epochs,
                train_loss=fit.loss if fit else None,
                train_accuracy=fit.accuracy if fit else None,
                val_loss=validation.loss,
                val_accuracy=validation.accuracy,
                val_macro_f1=validation.macro_f1,
                lr=max(fit.lr.values()) if fit else None,
                images_per_second=fit.images_per_second if fit else None,
                seconds=time.perf_counter() - self._began,
                best=best,
            )
        )

    def inputs(self, inputs: Inputs) -> None:
        """Everything was read: what came from the cache, and how the frozen part ran over the images where it did."""
        self._run.update(cache=inputs.cache_info, decisions=inputs.decisions.to_json(), extraction=inputs.extraction())

    def _log_evaluation(
        self, split: str, epoch: int, step: int, found: Scores, rates: Mapping[str, float] | None
    ) -> None:
        """A line for the evaluation that the last phase was."""
        speed = {"images_per_second": self._sizes[split] / self._last, "seconds": self._last}
        self._run.log_metrics({"split": split, "epoch": epoch, "step": step, **asdict(found), "lr": rates, **speed})

    def _spent(self) -> dict[str, float]:
        """Seconds by phase, and in all."""
        total = time.perf_counter() - self._began
        return {name: round(seconds, 3) for name, seconds in [*self._seconds.items(), ("total", total)]}

    def result(
        self,
        data: Dataset,
        validation: Predictions,
        predictions: Predictions,
        selection: BestEpochTracker,
        *,
        step: int,
        frozen: int,
    ) -> None:
        """The test is done: test.json, plots, the last facts of run.json, and the outcome.

        Args:
            validation: of the best epoch, which is tested.
        """
        assert selection.epoch is not None
        assert selection.scores is not None
        self._log_evaluation("test", selection.epoch, step, scores(predictions), None)
        report = test_report(predictions, data.classes)
        with self.phase("calibrate"):
            report["calibration"] = self._calibrate(data, validation, predictions)
        checkpoint = self._run.best_checkpoint.relative_to(self._run.path)
        write_json(self._run.test_file, {**report, "checkpoint": checkpoint.as_posix(), "epoch": selection.epoch})
        with self.phase("plots"):
            self._plot(data, predictions, report, selection.epoch)
        spent = self._spent()
        self._run.update(seconds=spent, frozen_tensors_verified=frozen)
        low, high = report["accuracy_ci95"]
        self._watch.outcome(
            RunResult(
                run=self._run.path,
                accuracy=report["accuracy"],
                ci95=(low, high),
                top5=report["top5"],
                loss=report["loss"],
                n=report["n"],
                epoch=selection.epoch,
                val_accuracy=selection.scores.accuracy,
                confused=most_confused(report),
                checkpoint=self._run.best_checkpoint,
                seconds=spent["total"],
            )
        )

    def _calibrate(self, data: Dataset, val: Predictions, test: Predictions) -> dict[str, Any]:
        """Fit the temperature to the best epoch's validation and write all predictions; what it does for the test."""
        found = calibrate(val.logits, val.labels)
        self._run.update(calibration=found.to_json())
        write_predictions(
            self._run.val_predictions, SplitPredictions.of(data.val, val.logits, val.labels, data.classes)
        )
        write_predictions(
            self._run.test_predictions, SplitPredictions.of(data.test, test.logits, test.labels, data.classes)
        )
        report = calibration_report(test.logits, test.labels, found.temperature)
        self._watch.note(_calibration_words(found, report["ece_before"], report["ece_after"]))
        return report

    def _plot(self, data: Dataset, predictions: Predictions, report: Mapping[str, Any], best_epoch: int) -> None:
        self._run.plots.mkdir(exist_ok=True)
        rows = [json.loads(line) for line in self._run.metrics_file.read_text(encoding="utf-8").splitlines()]
        plot_curves(rows, best_epoch, self._run.plots / "curves.png")
        plot_confusion(report, self._run.plots / "confusion.png")
        probability, predicted = torch.softmax(predictions.logits, dim=1).max(dim=1)
        plot_samples(data.test, predicted.numpy(), probability.numpy(), data.classes, self._run.plots / "samples.png")


def _calibration_words(found: Calibration, before: float, after: float) -> str:
    """What the temperature is and what it does, in one line."""
    fitted = f"temperature {found.temperature:.2f}, fitted on {found.n:,} validation images"
    change = f"{before:.4f}, {after:.4f} with it" if found.temperature != 1 else f"{before:.4f}, no better otherwise"
    return f"calibration: {fitted}; expected calibration error on test {change}"


def _formats(numerics: Mapping[str, str]) -> list[str]:
    """How the number and memory formats were chosen, where it was by measurement."""
    return [f"{what}: {why}" for what, why in numerics.items() if "measured" in why]


def _augment_words(spec: TrainSpec) -> str:
    """What happens to training images, for the plan."""
    augment, words = spec.augment, []
    if isinstance(augment, CropSpec):
        words.append(f"crops of {augment.scale[0]:.0%} or more")
        if augment.flip:
            words.append("flips")
    if augment.kind in ("trivial", "randaugment"):
        words.append(augment.kind)
    if augment.erasing:
        words.append("erasing")
    return "training on " + (", ".join(words) if words else "images as they are")


def _training_words(spec: TrainSpec) -> str:
    """The line of the plan that says how it trains."""
    epochs = f"{spec.epochs} epoch" + ("s" if spec.epochs > 1 else "")
    batch = f"batches of {spec.batch_size}" + (f" x {spec.accumulate}" if spec.accumulate > 1 else "")
    return (
        f"{epochs}, {batch}, {spec.optimizer.kind} lr {spec.optimizer.lr:g}, {spec.scheduler.kind}, "
        f"head from {spec.freeze.head_init.value}, the epoch best in validation {spec.keep_best.value} is kept"
    )
