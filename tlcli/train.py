"""The main path: fine-tune one backbone on one dataset, and measure it on images that it has never seen."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from msgspec import convert, structs, to_builtins

from tlcli.data.images import Split
from tlcli.device import setup_process
from tlcli.engine.activations import Workload, load_workload
from tlcli.engine.decisions import Decisions, decide
from tlcli.engine.first_fit import choose_share, evaluate_shares, fit_head, run_first_fit
from tlcli.engine.inputs import Inputs
from tlcli.engine.metrics import BestEpochTracker, Predictions, evaluate, scores
from tlcli.engine.ranking import choose_image
from tlcli.engine.session import Session, session_for
from tlcli.engine.trainer import Trainer
from tlcli.engine.unknown import fit_unknown_score, with_unknown_score
from tlcli.errors import UsageError
from tlcli.interrupts import defer_interrupts
from tlcli.models.tensorfile import write_tensors
from tlcli.ranks import ALONE, Ranks
from tlcli.reporter import Reporter
from tlcli.runs.checkpointing import CheckpointManager, NoCheckpoints, image_fingerprints
from tlcli.runs.cross_validation import cross_validate
from tlcli.runs.recorder import Recorder, SilentRecorder
from tlcli.runs.resume_state import ResumeState, read_state
from tlcli.runs.run_dir import RunDir, SplitPredictions, read_predictions, write_predictions
from tlcli.specs import HeadInit, TrainSpec, spec_from
from tlcli.text import join_limited
from tlcli.transfer.freeze import HeadSpec


@dataclass(frozen=True)
class NewRun:
    """The start of a new run; `ResumeState` is that of an interrupted one."""

    is_trial: bool = False  # of a search
    decided: Decisions | None = None  # by rank 0, for another rank
    views: ClassVar[None] = None  # for Workload.stored_views

    def threads(self, ranks: Ranks) -> int | None:
        return None

    def complete_spec(self, workload: Workload, reporter: Reporter) -> tuple[TrainSpec, str | None]:
        """Return the spec with the size and the fit of images, and the comparison if they were chosen."""
        image, reason = choose_image(workload, reporter)
        return structs.replace(workload.spec, image=image), reason

    def decisions(self, workload: Workload, reporter: Reporter) -> Decisions:
        return self.decided or decide(workload)

    def begin(self, inputs: Inputs, trainer: Trainer, reporter: Reporter) -> tuple[int, BestEpochTracker]:
        """Fit the probe, and return the first epoch (0 if the head is worth an evaluation before) and the best one."""
        workload, is_ready = inputs.workload, inputs.workload.classifier.head_loaded
        if fit_head(inputs, reporter):
            reporter.note(f"probe: {inputs.decisions.reasons['probe']}")
            is_ready = True
        may_interpolate = workload.compares_shares or (self.is_trial and workload.chooses_share)
        if may_interpolate or (inputs.decisions.interpolate or 1) < 1:
            trainer.remember_start()
        workload.contract.seal()
        best_epoch = BestEpochTracker(workload.spec.keep_best, selects=workload.selects_epoch)
        return 0 if is_ready and len(workload.data.val) else 1, best_epoch


def train_with_rank_0(ranks: Ranks) -> None:
    """Take part in the run that rank 0 trains, as a rank that writes nothing."""
    if (message := ranks.broadcast()) is None:  # there is nothing to resume
        return
    spec, decisions, resumed = spec_from(message[0]), convert(message[1], Decisions), message[2]
    start = (read_state(RunDir(Path(resumed))) if resumed else None) or NewRun()
    train(spec, RunDir(Path()), Reporter(), session_for(spec.cache), replace(start, decided=decisions), ranks=ranks)


def train(
    spec: TrainSpec,
    run: RunDir,
    reporter: Reporter,
    session: Session,
    start: ResumeState | NewRun | None = None,
    *,
    is_trial: bool = False,
    ranks: Ranks = ALONE,
) -> float | None:
    """Fine-tune, test the epoch that is kept once, and return its validation metric; None without validation images.

    The validation of a refit is that of its folds, in directories next to the run's. A trial of a search does not read
    test images, and decides on the share of the weights for its refit. Jobs share the session. Several ranks call it at
    once: each computes its part, and rank 0 writes. Raises UsageError if the spec cannot be followed and TlcliError if
    the run fails.
    """
    start = start or NewRun(is_trial=is_trial)
    resumed = isinstance(start, ResumeState)
    record = Recorder(run, reporter, spec, resumed=resumed) if ranks.is_main else SilentRecorder()
    with record.phase("setup"):
        inputs = load_inputs(spec, session, reporter, start, ranks)
        workload, trainer = inputs.workload, Trainer(inputs.workload, inputs.device)
        contract, network = workload.contract, workload.classifier.network
    record.plan(inputs)
    with record.phase("extract"):
        loader = inputs.open("train", reporter)
        val_loader = inputs.open("val", reporter) if len(workload.data.val) else None
    validated, best_predictions, cross_validation = _predict_left_out(run, inputs, record, reporter)
    with record.phase("probe"):
        first_epoch, best_epoch = start.begin(inputs, trainer, reporter)
    record.log_inputs()
    if inputs.device.compile:
        loader.network.compile()  # in place: the names of its tensors stay

    manager = CheckpointManager if ranks.is_main else NoCheckpoints
    checkpoints = manager(run, inputs, trainer, epoch=first_epoch - 1)
    with checkpoints.save_on_exit():
        for epoch in range(first_epoch, workload.epochs + 1):  # epoch 0 is the network before it trains
            if spec.early_stop and best_epoch.epoch is not None and epoch > best_epoch.epoch + spec.early_stop:
                reporter.note(f"early stop: no better epoch since epoch {best_epoch.epoch}")
                break
            with record.phase("train"):
                callbacks = record.log_running, checkpoints.after_step
                fit = trainer.fit(loader, epoch, reporter, *callbacks) if epoch > 0 else {}
            contract.check()
            val_predictions = validation = None
            averaged = spec.ema is not None and epoch > 0
            if val_loader is not None:
                with record.phase("validate"):
                    with trainer.averaged(use=averaged):
                        val_predictions = evaluate(network, val_loader, inputs.device, reporter, "validation")
                    if averaged and workload.selects_epoch:  # then both compete
                        own = evaluate(network, val_loader, inputs.device, reporter, "validation")
                        averaged = best_epoch.rank(scores(val_predictions)) > best_epoch.rank(scores(own))
                        val_predictions = val_predictions if averaged else own
                    validation = scores(val_predictions)
            with defer_interrupts:
                if validation is not None:
                    trainer.schedule.after_epoch(validation.loss)
                is_best = best_epoch.update(epoch, validation)
                if is_best and val_predictions is not None:
                    best_predictions = val_predictions
                record.log_epoch(epoch, fit, validation, is_best=is_best, step=trainer.step)
                checkpoints.after_epoch(epoch, validation, is_best=is_best, averaged=averaged)

    n_frozen = contract.verify()  # before low-rank updates are merged
    if is_trial and val_loader is not None and workload.chooses_share and inputs.decisions.interpolate is None:
        checkpoints.load_best(1.0)
        with record.phase("validate"):
            choose_share(evaluate_shares(trainer, inputs, val_loader, reporter), inputs, reporter)
        record.log_inputs()  # before the weights are replaced
    share = inputs.decisions.interpolate or 1.0
    checkpoints.load_best(share)
    ranks.copy_tensors(network.state_dict().values())
    contract.verify()
    with record.phase("unknown"):
        # the result of a search is the mean of the trials, for which it does not hold, or a refit after folds
        unknown = None if is_trial and spec.folds is None else fit_unknown_score(inputs, reporter)
        if unknown is not None and ranks.is_main:
            unknown.write(run.unknown_file)
        if val_loader is not None:
            if unknown is not None:
                best_predictions = with_unknown_score(unknown, val_loader, inputs, reporter)
            elif best_predictions is None or share < 1:  # that epoch was before an interruption
                best_predictions = evaluate(network, val_loader, inputs.device, reporter, "validation, best epoch")
    if val_loader is not None and workload.compares_shares:
        by_share = evaluate_shares(trainer, inputs, val_loader, reporter)
        write_tensors(run.val_shares, {"logits": torch.stack([p.logits for p in by_share])}, {})
    predictions: Predictions | None = None
    if not is_trial and len(workload.data.test):
        with record.phase("extract"):
            test = inputs.open("test", reporter)
        with record.phase("test"):
            predictions = evaluate(network, test, inputs.device, reporter, "test")
    record.log_inputs()
    record.log_result(
        validated, best_predictions, predictions, best_epoch, cross_validation, step=trainer.step, n_frozen=n_frozen
    )
    return best_epoch.value


def _predict_left_out(
    run: RunDir, inputs: Inputs, record: Recorder, reporter: Reporter
) -> tuple[Split, Predictions | None, dict[str, Any] | None]:
    """Return the images that validate a run, with their predictions by its folds or first fit, and `cross_validation`.

    Folds or first fit decide on the share of the weights. There are no predictions yet if val validates each epoch.
    """
    spec, data, part = inputs.workload.spec, inputs.workload.data, inputs.workload.first_fit
    if spec.own_folds:
        choose = partial(choose_share, inputs=inputs, reporter=reporter)
        return data.train, *cross_validate(run, spec.own_folds, data, choose)
    if part is None:
        return data.val, None, None
    is_main = inputs.device.ranks.is_main
    if inputs.decisions.interpolate is None:  # a new run
        with record.phase("first fit"):
            predictions = run_first_fit(inputs, part, reporter)
        if is_main:
            write_predictions(run.val_predictions, SplitPredictions.of(part.data.val, predictions, data.classes))
    if not is_main:
        return part.data.val, None, None
    stored = read_predictions(run.val_predictions)
    return part.data.val, Predictions(stored.logits, stored.labels, stored.unknown), None


def load_inputs(
    spec: TrainSpec, session: Session, reporter: Reporter, start: NewRun | ResumeState, ranks: Ranks = ALONE
) -> Inputs:
    """Load the data and the network, mark what trains, and decide what `null` leaves open; rank 0 does for all."""
    accelerator = setup_process(spec.device, start.threads(ranks), ranks.size)
    data = session.dataset(spec.dataset, spec.seed, reporter, spec.folds, spec.fold)
    if ranks.size > len(data.train):
        raise UsageError(f"device.processes={ranks.size} is more than the {len(data.train)} training images")
    workload = load_workload(spec, data, accelerator, session)
    classifier = workload.classifier
    lost, dataset = classifier.lost_classes, spec.dataset
    if lost and classifier.known_rows and isinstance(spec.freeze, HeadSpec) and dataset.classes is None:
        place = getattr(dataset, "file", None) or dataset.root or dataset.name
        known = f"{join_limited([repr(name) for name in lost])}, which {spec.backbone.weights} knows"
        raise UsageError(f"{place}: has no images of {known}: add some, or leave them out with dataset.classes=[...]")
    norms = workload.contract.updated_norms()
    if norms and (spec.fits or 1) > 1:
        some = f"{len(norms)} BatchNorm layers update statistics, which have no mean"
        raise UsageError(f"fits={spec.fits}: {some}: set freeze.bn_stats=frozen or leave fits out")
    if norms and ranks.size > 1 and accelerator.type != "cuda":
        some = f"{len(norms)} BatchNorm layers update statistics, which PyTorch synchronizes on CUDA only"
        raise UsageError(f"{some}: set freeze.bn_stats=frozen or device.processes=1")
    is_new = bool(classifier.pretrained) and not classifier.head_loaded  # features of random weights are no use
    needs_probe = spec.freeze.head_init is HeadInit.probe and is_new
    workload = replace(workload, needs_probe=needs_probe)
    pool = session.dataset(spec.dataset, spec.seed, reporter, spec.folds)  # one choice for all folds
    spec, reason = start.complete_spec(replace(workload, data=pool), reporter)
    workload = replace(workload, spec=spec, stored_views=start.views)
    decisions = start.decisions(workload, reporter)
    if ranks.size > 1:
        if ranks.is_main:
            resumed = str(start.run.path.absolute()) if isinstance(start, ResumeState) else None
            ranks.broadcast(to_builtins([spec, decisions, resumed]))
        for split_name, fingerprints in image_fingerprints(data).items():
            ranks.check_same(split_name if split_name == "classes" else f"{split_name} images", repr(fingerprints))
        if norms:  # not before rank 0 has decided, alone
            workload.contract.synchronize_norms()
            session.forget_model()
        workload = replace(workload, ranks=ranks)
    inputs = Inputs(decisions, workload)
    if reason is not None:
        inputs.add_reason("image", reason)
    inputs.device.place(classifier.network)
    return inputs
