"""Write the results of a run while it runs: run.json, metrics.jsonl, test.json, checkpoints, plots."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from msgspec import to_builtins

from tlcli.data.dataset import Dataset
from tlcli.engine.inputs import Inputs
from tlcli.engine.metrics import (
    BestEpochTracker,
    Predictions,
    Scores,
    calibrate,
    calibration_report,
    most_confused,
    scores,
    test_report,
)
from tlcli.reporter import EpochRow, Reporter, RunPlan
from tlcli.runs.checkpointing import weights_metadata
from tlcli.runs.plots import plot_confusion, plot_curves, plot_samples
from tlcli.runs.run_dir import RunDir, SplitPredictions, environment, stored_confusion, write_json, write_predictions
from tlcli.specs import TrainSpec
from tlcli.text import to_plain
from tlcli.transfer.contract import freeze_table

MIN_VALIDATION_IMAGES = 20  # the accuracy of 20 images has a standard error of up to 11 points


class Recorder:
    """Writes the directory of one run, and tells the reporter what it wrote."""

    def __init__(self, run: RunDir, reporter: Reporter, spec: TrainSpec, *, resumed: bool) -> None:
        self._run, self._reporter, self._spec = run, reporter, spec
        before = run.info if resumed else {}
        self._seconds: dict[str, float] = dict(before.get("seconds") or {})
        self._start = time.perf_counter() - self._seconds.pop("total", 0.0)
        self._phase_seconds = 0.0
        self._max_images_per_second: float = before.get("images_per_second") or 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of the block to the seconds of this phase in run.json."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._phase_seconds = time.perf_counter() - start
            self._seconds[name] = self._seconds.get(name, 0.0) + self._phase_seconds

    def plan(self, inputs: Inputs) -> None:
        """Write what is known before training of data, model and machine, and show the plan."""
        self._inputs, workload, device = inputs, inputs.workload, inputs.device
        spec, data, classifier = self._spec, workload.data, workload.classifier
        splits = {"train": data.train, "val": data.val, "test": data.test}
        stages = freeze_table(spec.optimizer, classifier)
        reasons = {use: inputs.decisions.reasons.get(use, "") for use in ("training", "evaluation")}
        self._run.write_bad_files(data.bad_files)
        self._run.update(
            name=spec.name,
            seed=spec.seed,
            dataset=spec.dataset.name,
            freeze=spec.freeze.kind,
            keep_best=spec.keep_best.value,
            **weights_metadata(workload),
            **environment(),
            device=device.accelerator.type,
            precision={"train": str(device.train_dtype), "evaluate": str(device.eval_dtype)},
            memory_format=str(device.memory_format),
            numerics={"device": device.description, **reasons},
            **{f"n_{name}": len(split) for name, split in splits.items()},
            n_bad_files=len(data.bad_files),
            parameters={"total": sum(s.parameters for s in stages), "trainable": sum(s.trainable for s in stages)},
            stages=[asdict(stage) for stage in stages],
        )
        self.inputs()
        options = {key: value for key, value in to_plain(spec.augment).items() if key not in ("kind", "name") and value}
        values = ", ".join(key if value is True else f"{key} {value}" for key, value in options.items())
        augment = f"{spec.augment.kind} ({values})" if values else "without augmentation"
        epochs = f"{spec.epochs} epoch" + ("s" if spec.epochs > 1 else "")
        batches = f"batches of {spec.batch_size}" + (f" x {spec.accumulate}" if spec.accumulate > 1 else "")
        notes = [*classifier.notes, *data.notes]
        if len(data.val) < MIN_VALIDATION_IMAGES:
            notes.append(f"val has {len(data.val)} images: the best epoch and the temperature are uncertain")
        notes += [f"{use}: {reason}" for use, reason in reasons.items() if "measured" in reason]
        self._reporter.plan(
            RunPlan(
                run=self._run.path,
                name=spec.name,
                dataset=data.name,
                classes=data.classes,
                counts={name: split.class_counts(len(data.classes)) for name, split in splits.items()},
                model=classifier.name,
                image=f"{workload.preprocessing.size} px, {spec.image.fit.value}; training images: {augment}",
                stages=stages,
                training=f"{epochs}, {batches}, {spec.optimizer.kind} lr {spec.optimizer.lr:g}, {spec.scheduler.kind}, "
                f"head from {spec.freeze.head_init.value}, keeps the epoch best in validation {spec.keep_best.value}",
                device=device.description,
                activations=inputs.summary,
                notes=tuple(notes),
            )
        )

    def inputs(self) -> None:
        """Write how each split is read, and how the extractions so far went."""
        inputs, decisions = self._inputs, to_builtins(self._inputs.decisions, order="deterministic")
        self._run.update(cache=inputs.cache_info, decisions=decisions, extraction=inputs.extraction())

    def log_running(self, epoch: int, batch: int, loss: float) -> None:
        """Write the running loss within an epoch."""
        self._run.log_metrics({"split": "running", "epoch": epoch, "batch": batch, "loss": loss})
        self._reporter.note(f"epoch {epoch}, batch {batch}: loss {loss:.3f}")

    def log_epoch(self, epoch: int, fit: Mapping[str, Any], validation: Scores, *, is_best: bool, step: int) -> None:
        """Write the metrics of an epoch that was validated; `fit` is empty for epoch 0, before training."""
        if fit:
            self._max_images_per_second = max(self._max_images_per_second, fit["images_per_second"])
            self._run.log_metrics({"split": "train", "epoch": epoch, **fit})
        self._log_evaluation("val", epoch, step, validation, fit.get("lr"))
        best = {"best": {"epoch": epoch, **asdict(validation)}} if is_best else {}
        self._run.update(**best, seconds=self._seconds_so_far(), images_per_second=self._max_images_per_second or None)
        self._reporter.epoch(
            EpochRow(
                epoch=epoch,
                epochs=self._spec.epochs,
                train_loss=fit.get("loss"),
                train_accuracy=fit.get("accuracy"),
                val_loss=validation.loss,
                val_accuracy=validation.accuracy,
                val_macro_f1=validation.macro_f1,
                lr=max(fit["lr"].values()) if fit else None,
                images_per_second=fit.get("images_per_second"),
                seconds=time.perf_counter() - self._start,
                best=is_best,
            )
        )

    def log_result(
        self,
        validation: Predictions,
        predictions: Predictions,
        best_epoch: BestEpochTracker,
        *,
        step: int,
        n_frozen: int,
    ) -> None:
        """Write test.json, predictions, plots, and the temperature that fits `validation`, and show the result."""
        run, data, epoch, best_scores = self._run, self._inputs.workload.data, best_epoch.epoch, best_epoch.scores
        assert epoch is not None and best_scores is not None
        self._log_evaluation("test", epoch, step, scores(predictions), None)
        report = test_report(predictions, data.classes)
        with self.phase("calibrate"):
            calibration = calibrate(validation.logits, validation.labels)
            run.update(calibration=calibration)
            results = ((data.val, run.val_predictions, validation), (data.test, run.test_predictions, predictions))
            for split, file, p in results:
                write_predictions(file, SplitPredictions.of(split, p.logits, p.labels, data.classes))
            t = calibration["temperature"]
            effect = calibration_report(predictions.logits, predictions.labels, t)
            after = f"{effect['ece_after']:.4f} with it" if t != 1 else "no better otherwise"
            self._reporter.note(
                f"calibration: temperature {t:.2f}, fitted on {calibration['n']:,} validation images; "
                f"expected calibration error on test {effect['ece_before']:.4f}, {after}"
            )
        checkpoint = run.best_checkpoint.relative_to(run.path).as_posix()
        stored = {**report, "calibration": effect, "checkpoint": checkpoint, "epoch": epoch}
        write_json(run.test_file, {**stored, "confusion": stored_confusion(report["confusion"])})
        with self.phase("plots"):
            self._plot(data, predictions, report, epoch)
        spent = self._seconds_so_far()
        # with the test metrics, so that the leaderboard of a sweep need not read test.json of each job
        test = {key: report[key] for key in ("accuracy", "accuracy_ci95")}
        run.update(seconds=spent, frozen_tensors_verified=n_frozen, test=test)
        extra = {"val_accuracy": best_scores.accuracy, "confused": most_confused(report), "seconds": spent["total"]}
        self._reporter.outcome(run.path, {**stored, **extra})

    def _log_evaluation(
        self, split: str, epoch: int, step: int, metrics: Scores, lr: Mapping[str, float] | None
    ) -> None:
        n, seconds = len(self._inputs.workload.split(split)), self._phase_seconds
        speed = {"images_per_second": n / seconds, "seconds": seconds}
        self._run.log_metrics({"split": split, "epoch": epoch, "step": step, **asdict(metrics), "lr": lr, **speed})

    def _seconds_so_far(self) -> dict[str, float]:
        total = time.perf_counter() - self._start
        return {name: round(seconds, 3) for name, seconds in [*self._seconds.items(), ("total", total)]}

    def _plot(self, data: Dataset, predictions: Predictions, report: Mapping[str, Any], best_epoch: int) -> None:
        folder = self._run.plots
        folder.mkdir(exist_ok=True)
        plot_curves(self._run.metrics(), best_epoch, folder / "curves.png")
        plot_confusion(report, folder / "confusion.png")
        probability, predicted = torch.softmax(predictions.logits, dim=1).max(dim=1)
        plot_samples(data.test, predicted.numpy(), probability.numpy(), data.classes, folder / "samples.png")
