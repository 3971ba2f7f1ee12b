"""The main path: fine-tune one backbone on one dataset, and measure it on images that it has never seen."""

import hashlib

from tlcli.device import machine_name, setup_process
from tlcli.engine.activations import Workload, image_size
from tlcli.engine.decisions import decide
from tlcli.engine.inputs import Inputs
from tlcli.engine.loaders import BatchLoader
from tlcli.engine.metrics import BestEpochTracker, Predictions, evaluate, features, scores
from tlcli.engine.session import Session
from tlcli.engine.trainer import Trainer
from tlcli.interrupts import defer_interrupts
from tlcli.reporter import Reporter
from tlcli.runs.recorder import Recorder
from tlcli.runs.resume_state import ResumeState, TrainingStart, machine_info, provenance
from tlcli.runs.run_dir import RunDir
from tlcli.specs import HeadInit, TrainSpec
from tlcli.transfer.contract import apply_freeze, fit_probe, linear_head


def train(
    spec: TrainSpec, run: RunDir, reporter: Reporter, session: Session, resume: ResumeState | None = None
) -> float | None:
    """Fine-tune, test the epoch best on validation once, and return the validation metric that selected it.

    All results are in the run's directory; the session holds what the jobs of a sweep share. With `resume` an
    interrupted run continues. Raises UsageError if the spec cannot be followed and TlcliError if the run fails.
    """
    record = Recorder(run, reporter, spec, resume)
    with record.phase("setup"):
        accelerator = setup_process(spec.device, threads=resume.threads if resume else None)
        machine = machine_info(accelerator)
        data = session.dataset(spec.dataset, spec.seed, reporter)
        computing = (accelerator.type, machine_name(accelerator), spec.device.compile)
        classifier = session.model(
            spec.backbone, data.classes, size=image_size(spec), seed=spec.seed, computing=computing
        )
        network = classifier.network.to(accelerator)
        contract = apply_freeze(spec.freeze, classifier)  # sets requires_grad, nothing else
        is_new = bool(classifier.pretrained) and not classifier.head_loaded  # features of random weights are no use
        needs_probe = spec.freeze.head_init is HeadInit.probe and is_new
        workload = Workload(data, classifier, contract, spec, accelerator, session, needs_probe)
        decisions = resume.decisions(workload, reporter) if resume else decide(workload)
        inputs = Inputs(decisions, workload)
        inputs.device.place(network)
        trainer = Trainer(classifier, contract, spec, inputs.device, data.train.class_counts(len(data.classes)))
    record.plan(data, classifier, inputs)
    with record.phase("extract"):
        train_eval = inputs.open("train_eval", reporter) if needs_probe else None
        loader, val_loader = inputs.open("train", reporter), inputs.open("val", reporter)
    with record.phase("probe"):
        start = resume.restore(inputs, trainer, reporter) if resume else begin(inputs, train_eval, reporter)
    record.inputs(inputs)
    inputs.device.compile_if_set(loader.network)

    best_epoch, state = start.best_epoch, {"head_is_ready": start.head_is_ready, "machine": machine}
    checkpoints = record.checkpoints(network, trainer, lambda: {**state, **provenance(inputs)})
    best_predictions: Predictions | None = None  # for validation
    with checkpoints.save_on_exit():
        for epoch in range(start.epoch, spec.epochs + 1):  # epoch 0 is the network before it trains
            if best_epoch.should_stop:
                reporter.note(f"early stop: no better epoch since epoch {best_epoch.epoch}")
                break
            with record.phase("train"):
                fit = None
                if epoch > 0:
                    fit = trainer.fit(loader, epoch, reporter, record.log_running, checkpoints.after_step)
            contract.check()
            with record.phase("validate"):
                val_predictions = evaluate(network, val_loader, inputs.device, reporter, "validation")
                validation = scores(val_predictions)
            trainer.check_finite(validation.loss, epoch, "validation loss")
            with defer_interrupts:
                trainer.schedule.after_epoch(validation.loss)
                is_best = best_epoch.update(epoch, validation)
                best_predictions = val_predictions if is_best else best_predictions
                record.log_epoch(epoch, fit, validation, is_best=is_best, step=trainer.step)
                checkpoints.after_epoch(epoch, validation, is_best=is_best)

    checkpoints.load_best()
    n_frozen = contract.verify()
    if best_predictions is None:  # that epoch was before an interruption
        best_predictions = evaluate(network, val_loader, inputs.device, reporter, "validation of the best epoch")
    with record.phase("extract"):
        test = inputs.open("test", reporter)
    with record.phase("test"):
        predictions = evaluate(network, test, inputs.device, reporter, "test")
    record.inputs(inputs)
    record.log_result(data, best_predictions, predictions, best_epoch, step=trainer.step, n_frozen=n_frozen)
    return best_epoch.value


def begin(inputs: Inputs, train_eval: BatchLoader | None, reporter: Reporter) -> TrainingStart:
    """Fill the head from a linear probe on `train_eval`, if given, and record the digests of the frozen tensors."""
    workload, is_ready = inputs.workload, inputs.workload.classifier.head_loaded
    network, head = workload.classifier.network, linear_head(workload.classifier)
    if train_eval is not None and head is None:
        reporter.note("head starts random: a probe needs a head of one linear layer")
    elif train_eval is not None and head is not None:
        x, y = features(network, head, train_eval, inputs.device, reporter, "features for the probe")
        digest = hashlib.sha256(x.numpy().tobytes() + y.numpy().tobytes()).hexdigest()
        head.load_state_dict(workload.session.get_or_create(("probe", digest), lambda: fit_probe(head, x, y)))
        is_ready = True
    workload.contract.seal()
    best_epoch = BestEpochTracker(workload.spec.keep_best, workload.spec.early_stop)
    return TrainingStart(0 if is_ready else 1, is_ready, best_epoch)
