"""The main path: fine-tune one backbone on one data set, and measure it on images that it has never seen."""

import hashlib
from dataclasses import dataclass
from typing import Any

from tlcli.data.dataset import Dataset
from tlcli.device import Device, prepare
from tlcli.engine.evaluate import evaluate, features
from tlcli.engine.inputs import BatchLoader, InputPlan, Inputs, image_size
from tlcli.engine.metrics import BestEpochTracker, Predictions, scores
from tlcli.engine.origin import images_of, machine_of
from tlcli.engine.planning import plan_inputs
from tlcli.engine.resuming import ResumePlanner
from tlcli.engine.session import Session
from tlcli.engine.trainer import Trainer
from tlcli.interrupts import defer_interrupts
from tlcli.models.classifier import Classifier
from tlcli.reporter import Reporter
from tlcli.runs.recorder import Recorder
from tlcli.runs.restart import ResumeState
from tlcli.runs.run_dir import RunDir
from tlcli.specs import HeadInit, TrainSpec
from tlcli.transfer.contract import FreezeContract, apply_freeze
from tlcli.transfer.probe import linear_head, probe_weights


def train(
    spec: TrainSpec, run: RunDir, reporter: Reporter, session: Session, restart: ResumeState | None = None
) -> float | None:
    """Fine-tune, keep the epoch best on validation, test that one once; the validation figure that selected it.

    All that it gives is in the run's directory; the session has what the jobs of a sweep share. With `restart` a run
    goes on where it was interrupted. Raises UsageError where the spec cannot be followed and TlcliError where the run
    fails.
    """
    record = Recorder(run, reporter, spec, restart)
    with record.phase("setup"):
        accelerator = prepare(spec.device)
        if restart is not None:
            restart.prepare()
        machine = machine_of(accelerator)
        data = session.dataset(spec.dataset, spec.seed, reporter)
        if restart is not None:
            restart.require_same(data)
        model = session.model(spec.backbone, data.classes, size=image_size(spec), seed=spec.seed)
        model.network.to(accelerator)
        contract = apply_freeze(spec.freeze, model)  # sets requires_grad, nothing else
        planned, wanted = (data, model, contract, spec, accelerator, session), needs_probe(spec, model)
        if restart is None:
            plan = plan_inputs(*planned, needs_probe=wanted)
        else:
            plan = ResumePlanner(restart.formats, *planned, wanted).plan()
        device = plan.device
        device.place(model.network)
        trainer = Trainer(model, contract, spec, device, data.train.class_counts(len(data.classes)))
    record.plan(data, model, plan)
    with record.phase("extract"):
        inputs = plan.open(reporter)  # live images, or activations of what is frozen: both yield (x, y)
    with record.phase("probe"):
        if restart is None:
            start = begin(spec, model, inputs, contract, device, session, reporter)
        else:
            start = go_on(restart, spec, model, trainer, contract, plan, reporter)
    selection = start.selection
    device.compile_where_asked(inputs.train.network)

    told = {"head_is_ready": start.head_is_ready, "machine": machine}
    keeper = record.keeper(model.network, trainer, lambda: {**told, **origin(data, plan, contract)})
    of_best: Predictions | None = None  # for validation
    with keeper.keeping():
        for epoch in range(start.epoch, spec.epochs + 1):  # epoch 0 is the network before it trains
            if selection.should_stop:
                reporter.note(f"early stop: no better epoch since epoch {selection.epoch}")
                break
            with record.phase("train"):
                fit = trainer.fit(inputs.train, epoch, reporter, record.running, keeper.step) if epoch > 0 else None
            contract.check()
            with record.phase("validate"):
                found = evaluate(model.network, inputs.val, device, reporter, "validation")
                validation = scores(found)
            trainer.check_finite(validation.loss, epoch, "validation loss")
            with defer_interrupts:
                trainer.schedule.after_epoch(validation.loss)
                best = selection.update(epoch, validation)
                of_best = found if best else of_best
                record.epoch(epoch, fit, validation, best=best, step=trainer.step)
                keeper.epoch(epoch, validation, best=best)

    keeper.load_best()
    frozen = contract.verify()
    if of_best is None:  # that epoch was before an interruption
        of_best = evaluate(model.network, inputs.val, device, reporter, "validation of the best epoch")
    with record.phase("extract"):
        test = plan.open_test(reporter)
    with record.phase("test"):
        predictions = evaluate(model.network, test, device, reporter, "test")
    record.inputs(plan)
    record.result(data, of_best, predictions, selection, step=trainer.step, frozen=frozen)
    return selection.value


def origin(data: Dataset, plan: InputPlan, contract: FreezeContract) -> dict[str, Any]:
    """What a run's result depends on that its config does not say, for the run to go on with after an interruption."""
    return {
        "images": images_of(data),
        "frozen": contract.digest(),
        "formats": plan.formats.to_json(),
        "activations": plan.checksums(),
    }


@dataclass(frozen=True)
class Start:
    """Where training begins: the epoch, what is known of the best one, and whether the network is of use before it."""

    epoch: int
    selection: BestEpochTracker
    head_is_ready: bool


def begin(
    spec: TrainSpec,
    model: Classifier,
    inputs: Inputs,
    contract: FreezeContract,
    device: Device,
    session: Session,
    reporter: Reporter,
) -> Start:
    """Fill the head, and seal what is frozen."""
    head_is_ready = model.head_loaded or init_head(spec, model, inputs.probe, device, session, reporter)
    contract.seal()
    return Start(0 if head_is_ready else 1, BestEpochTracker(spec.keep_best, spec.early_stop), head_is_ready)


def go_on(
    restart: ResumeState,
    spec: TrainSpec,
    model: Classifier,
    trainer: Trainer,
    contract: FreezeContract,
    plan: InputPlan,
    reporter: Reporter,
) -> Start:
    """Put the state of training back, seal what is frozen and compare it with what was; say where the run goes on, and
    whether its result is going to be the one that it would have had."""
    restart.load(model.network, trainer)
    contract.seal()
    restart.require_frozen(contract)
    reporter.note(restart.words)
    if differences := restart.differences(plan.device.accelerator, plan):
        reporter.note(f"the result will not be exactly that of an undisturbed run: {'; '.join(differences)}")
    return Start(restart.first_epoch, restart.selection(spec), restart.head_is_ready)


def needs_probe(spec: TrainSpec, model: Classifier) -> bool:
    """Whether the head is to start from a linear probe; random features are worth none."""
    return spec.freeze.head_init is HeadInit.probe and bool(model.pretrained) and not model.head_loaded


def init_head(
    spec: TrainSpec, model: Classifier, feed: BatchLoader, device: Device, session: Session, reporter: Reporter
) -> bool:
    """Fill the head with a linear probe on the features, where the spec asks for one; whether that was done."""
    if not needs_probe(spec, model):
        return False
    head = linear_head(model)
    if head is None:
        reporter.note("head starts random: a probe needs a head of one linear layer")
        return False
    x, y = features(model.network, head, feed, device, reporter, "features for the probe")
    seen = hashlib.sha256(x.numpy().tobytes() + y.numpy().tobytes()).hexdigest()
    head.load_state_dict(session.once(("probe", seen), lambda: probe_weights(head, x, y)))
    return True
