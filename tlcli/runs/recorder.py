"""Write the results of a run while it runs: run.json, metrics.jsonl, test.json, predictions, plots."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from msgspec import to_builtins

from tlcli.data.dataset import MIN_VALIDATION_IMAGES, Dataset
from tlcli.data.images import Split
from tlcli.engine.inputs import Inputs
from tlcli.engine.metrics import (
    BestEpochTracker,
    Predictions,
    Scores,
    calibrate,
    calibrated,
    compute_report,
    most_confused,
    scores,
    unknown_threshold,
)
from tlcli.engine.schedule import steps_per_epoch
from tlcli.reporter import EpochRow, Reporter, RunPlan, StageRow
from tlcli.runs.checkpointing import weights_metadata
from tlcli.runs.plots import plot_confusion, plot_curves, plot_samples
from tlcli.runs.run_dir import RunDir, SplitPredictions, environment, stored_confusion, total_seconds, write_predictions
from tlcli.specs import TrainSpec
from tlcli.text import duration_text, to_plain
from tlcli.transfer.contract import freeze_table


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
        spec, data = self._spec, workload.data
        stages = freeze_table(spec.optimizer, workload.classifier)
        reasons = {use: inputs.decisions.reasons.get(use, "") for use in ("training", "evaluation")}
        self._run.write_bad_files(data.bad_files)
        self._run.update(
            name=spec.name,
            seed=spec.seed,
            dataset=spec.dataset.name,
            freeze=spec.freeze.kind,
            epochs=workload.epochs,
            fits=workload.fits,
            tta=spec.tta.value,
            keep_best=spec.keep_best.value,
            **weights_metadata(workload.classifier, spec.backbone.kind, workload.preprocessing),
            **environment(),
            device=device.accelerator.type,
            precision={"train": str(device.train_dtype), "evaluate": str(device.eval_dtype)},
            numerics={"device": device.description, **reasons},
            **{f"n_{name}": len(split) for name, split in data.splits.items()},
            n_bad_files=len(data.bad_files),
            parameters={"total": sum(s.parameters for s in stages), "trainable": sum(s.trainable for s in stages)},
            stages=[asdict(stage) for stage in stages],
        )
        if (part := workload.first_fit) is not None:
            self._run.update(first_fit={"n_train": len(part.data.train), "n_val": len(part.data.val)})
        self.log_inputs()
        self._reporter.plan(_run_plan(self._run.path, inputs, stages))

    def log_inputs(self) -> None:
        """Write how each split is read, and how the extractions so far went."""
        inputs, decisions = self._inputs, to_builtins(self._inputs.decisions, order="deterministic")
        self._run.update(cache=inputs.cache_info, decisions=decisions, extraction=inputs.extraction())

    def log_running(self, epoch: int, batch: int, loss: float) -> None:
        """Write the running loss within an epoch."""
        self._run.log_metrics({"split": "running", "epoch": epoch, "batch": batch, "loss": loss})
        self._reporter.note(f"epoch {epoch}, batch {batch}: loss {loss:.3f}")

    def log_epoch(
        self, epoch: int, fit: Mapping[str, Any], validation: Scores | None, *, is_best: bool, step: int
    ) -> None:
        """Write the metrics of an epoch; `fit` is empty for epoch 0, before training."""
        if fit:
            self._max_images_per_second = max(self._max_images_per_second, fit["images_per_second"])
            self._run.log_metrics({"split": "train", "epoch": epoch, **fit})
        metrics = asdict(validation) if validation else {}
        if metrics:
            self._log_evaluation("val", epoch, step, metrics, fit.get("lr"))
        best = {"best": {"epoch": epoch, **metrics}} if is_best else {}
        self._run.update(**best, seconds=self._seconds_so_far(), images_per_second=self._max_images_per_second or None)
        self._reporter.epoch(
            EpochRow(
                epoch=epoch,
                epochs=self._inputs.workload.epochs,
                train_loss=fit.get("loss"),
                train_accuracy=fit.get("accuracy"),
                **{f"val_{name}": metrics.get(name) for name in ("loss", "accuracy", "macro_f1")},
                lr=max(fit["lr"].values()) if fit else None,
                images_per_second=fit.get("images_per_second"),
                seconds=time.perf_counter() - self._start,
                best=is_best and self._inputs.workload.selects_epoch,
            )
        )

    def log_result(
        self,
        validated: Split,
        validation: Predictions | None,
        predictions: Predictions | None,
        best_epoch: BestEpochTracker,
        cross_validation: Mapping[str, Any] | None,
        *,
        step: int,
        n_frozen: int,
    ) -> None:
        """Write test.json, predictions, plots, and the temperature that fits `validation`, and show the result.

        `validation` is of the images of `validated`: val, those left out of a first fit, or with `cross_validation` all
        training images.
        """
        run, data, epoch = self._run, self._inputs.workload.data, best_epoch.epoch
        assert epoch is not None
        if validation is not None:
            best_epoch.scores = scores(validation)
            run.update(best={"epoch": epoch, **asdict(best_epoch.scores)})
        if cross_validation is not None:
            run.update(cross_validation=cross_validation)
        if predictions is not None:
            self._log_evaluation("test", epoch, step, asdict(scores(predictions)), None)
        with self.phase("calibrate"):
            calibration = threshold = None
            if validation is not None:
                write_predictions(run.val_predictions, SplitPredictions.of(validated, validation, data.classes))
                calibration, threshold = calibrate(validation.logits, validation.labels), unknown_threshold(validation)
                text = f"temperature {calibration['temperature']:.2f}, fitted on {calibration['n']:,} held-out images"
                self._reporter.note(f"calibration: {text}")
            run.update(calibration=calibration, unknown=threshold)
            t = calibration["temperature"] if calibration else 1.0
            report = compute_report(predictions, data.classes, t) if predictions is not None else {}
            report |= {"checkpoint": run.best_checkpoint.relative_to(run.path).as_posix(), "epoch": epoch}
            if predictions is not None:
                stored = {**report, "confusion": stored_confusion(report["confusion"])}
                run.write_test(stored, SplitPredictions.of(data.test, predictions, data.classes))
        with self.phase("plots"):
            self._plot(data, predictions, report, epoch)
        spent = self._seconds_so_far()
        run.update(seconds=spent, frozen_tensors_verified=n_frozen)
        result = {
            **report,
            "val_accuracy": best_epoch.scores and best_epoch.scores.accuracy,
            "left_out": None if validated is data.val else len(validated),
            "cross_validation": cross_validation,
            "seconds": total_seconds({"seconds": spent, "cross_validation": cross_validation}),
        }
        if predictions is not None:
            result["confused"] = most_confused(report)
        self._reporter.outcome(run.path, result)

    def _log_evaluation(
        self, split: str, epoch: int, step: int, metrics: Mapping[str, float], lr: Mapping[str, float] | None
    ) -> None:
        n, seconds = len(self._inputs.workload.split(split)), self._phase_seconds
        speed = {"images_per_second": n / seconds, "seconds": seconds}
        self._run.log_metrics({"split": split, "epoch": epoch, "step": step, **metrics, "lr": lr, **speed})

    def _seconds_so_far(self) -> dict[str, float]:
        total = time.perf_counter() - self._start
        return {name: round(seconds, 3) for name, seconds in [*self._seconds.items(), ("total", total)]}

    def _plot(self, data: Dataset, predictions: Predictions | None, report: Mapping[str, Any], best_epoch: int) -> None:
        folder = self._run.plots
        folder.mkdir(exist_ok=True)
        plot_curves(self._run.metrics(), best_epoch, folder / "curves.png")
        if predictions is None:
            return
        plot_confusion(report, folder / "confusion.png")
        probability, predicted = calibrated(predictions.logits, report["calibration"]["temperature"]).max(dim=1)
        plot_samples(data.test, predicted.numpy(), probability.numpy(), data.classes, folder / "samples.png")


def _run_plan(run: Path, inputs: Inputs, stages: tuple[StageRow, ...]) -> RunPlan:
    """Return the texts of a plan."""
    workload, data, speed = inputs.workload, inputs.workload.data, inputs.decisions.train_images_per_second
    spec, preprocessing = workload.spec, workload.preprocessing
    options = {key: value for key, value in to_plain(spec.augment).items() if key not in ("kind", "name") and value}
    values = ", ".join(key if value is True else f"{key} {value}" for key, value in options.items())
    augment = f"{spec.augment.kind} ({values})" if values else "without augmentation"
    if workload.augments and workload.train_size != preprocessing.size:
        augment = f"{workload.train_size} px, {augment}"
    if workload.augments and inputs.decisions.views:
        augment += f", {inputs.decisions.views} views of each"
    epochs, kept = f"{workload.epochs} epoch" + ("s" if workload.epochs > 1 else ""), "the last epoch"
    if workload.fits > 1:
        epochs, kept = f"{epochs} ({workload.fits} fits of {workload.epochs_per_fit})", "the mean of the fits"
    if workload.selects_epoch:
        kept = f"the epoch best in validation {spec.keep_best.value}"
    steps = workload.epochs * steps_per_epoch(spec, len(data.train))
    fits = [workload] if workload.first_fit is None else [workload, workload.first_fit]
    n_images = sum(fit.epochs * len(fit.data.train) for fit in fits)
    about = f" (about {duration_text(n_images / speed)})" if speed else ""
    batches = f"batches of {spec.batch_size}" + (f" x {spec.accumulate}" if spec.accumulate > 1 else "")
    return RunPlan(
        run=run,
        name=spec.name,
        dataset=data.name,
        classes=data.classes,
        counts={name: split.class_counts(len(data.classes)) for name, split in data.splits.items() if len(split)},
        model=workload.classifier.name,
        image=f"{preprocessing.size} px, {preprocessing.fit.value}; training images: {augment}",
        stages=stages,
        training=f"{epochs}, {steps:,} steps{about}, {batches}, {spec.optimizer.kind} lr {spec.optimizer.lr:g}, "
        f"{spec.scheduler.kind}, head from {spec.freeze.head_init.value}, keeps {kept}",
        device=inputs.device.description,
        activations=inputs.summary,
        notes=_plan_notes(inputs),
    )


def _plan_notes(inputs: Inputs) -> tuple[str, ...]:
    """Return what is worth a line of its own in a plan."""
    workload, spec, data = inputs.workload, inputs.workload.spec, inputs.workload.data
    reasons, notes = inputs.decisions.reasons, [*workload.classifier.notes, *data.notes]
    if "image" in reasons:
        notes.append(f"image: {reasons['image']}")
    if workload.first_fit is not None:
        n = len(workload.first_fit.data.val)
        notes.append(f"first fit: without {n:,} images, which say how far weights change (interpolate=1: none)")
    elif not len(data.val) and spec.folds is None:
        notes.append("no images are held out: probabilities are not calibrated")
    if len(data.val) and spec.fold is None and not workload.selects_epoch:
        few = f"since fewer than {MIN_VALIDATION_IMAGES} do not select an epoch (early_stop=N does)"
        why = f"as the mean of {workload.fits} fits" if workload.fits > 1 else few
        notes.append(f"val has {len(data.val):,} images: the last epoch is kept, {why}")
    measured = [use for use in ("training", "evaluation") if "measured" in reasons.get(use, "")]
    return *notes, *(f"{use}: {reasons[use]}" for use in measured)


class SilentRecorder(Recorder):
    """Writes and shows nothing, for the ranks of a run other than 0."""

    def __init__(self) -> None:
        self._seconds = {}

    def plan(self, *args: Any, **settings: Any) -> None:
        """Do nothing."""

    log_inputs = log_running = log_epoch = log_result = plan
