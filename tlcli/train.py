"""The main path: fine-tune one backbone on one data set, and measure it on images that it has never seen."""

import hashlib

from tlcli.device import Device, prepare
from tlcli.engine.evaluate import evaluate, features
from tlcli.engine.inputs import Feed, image_size
from tlcli.engine.metrics import scores
from tlcli.engine.planning import plan_inputs
from tlcli.engine.selection import Selection
from tlcli.engine.session import Session
from tlcli.engine.trainer import Trainer
from tlcli.models.classifier import Classifier
from tlcli.runs.recorder import Recorder
from tlcli.runs.run_dir import RunDir
from tlcli.specs import HeadInit, TrainSpec
from tlcli.transfer.contract import apply_freeze
from tlcli.transfer.probe import probe_weights, probed_head
from tlcli.watch import Watch


def train(spec: TrainSpec, run: RunDir, watch: Watch, session: Session) -> float | None:
    """Fine-tune, keep the epoch best on validation, test that one once; the validation figure that selected it.

    All that it gives is in the run's directory; the session has what the jobs of a sweep share. Raises UsageError where
    the spec cannot be followed and TlcliError where the run fails.
    """
    record = Recorder(run, watch, spec)
    with record.phase("setup"):
        accelerator = prepare(spec.device)
        data = session.dataset(spec.dataset, spec.seed, watch)
        model = session.model(spec.backbone, data.classes, size=image_size(spec), seed=spec.seed)
        model.network.to(accelerator)
        contract = apply_freeze(spec.freeze, model)  # sets requires_grad, nothing else
        plan = plan_inputs(data, model, contract, spec, accelerator, session, wants_probe=wants_probe(spec, model))
        device = plan.device
        device.place(model.network)
        trainer = Trainer(model, contract, spec, device, data.train.class_counts(len(data.classes)))
    record.plan(data, model, plan)
    with record.phase("extract"):
        inputs = plan.open(watch)  # live images, or activations of what is frozen: both yield (x, y)
    with record.phase("probe"):
        head_is_ready = model.head_loaded or init_head(spec, model, inputs.probe, device, session, watch)
    contract.seal()
    device.compile_where_asked(inputs.train.network)

    selection = Selection(spec.keep_best, spec.early_stop)
    with record.keeping_best():
        for epoch in range(0 if head_is_ready else 1, spec.epochs + 1):  # epoch 0 is the network before it trains
            with record.phase("train"):
                fit = trainer.fit(inputs.train, epoch, watch, record.running) if epoch > 0 else None
            contract.check()
            with record.phase("validate"):
                found = evaluate(model.network, inputs.val, device, watch, "validation")
                validation = scores(found)
            trainer.require_finite(validation.loss, epoch, "validation loss")
            trainer.schedule.after_epoch(validation.loss)
            best = selection.improves(epoch, validation)
            record.epoch(epoch, fit, validation, predictions=found, best=best, trainer=trainer, network=model.network)
            if selection.exhausted:
                watch.note(f"early stop: no better epoch since epoch {selection.epoch}")
                break

    record.load_best(model.network)
    frozen = contract.verify()
    with record.phase("extract"):
        test = plan.open_test(watch)
    with record.phase("test"):
        predictions = evaluate(model.network, test, device, watch, "test")
    record.inputs(plan)
    record.result(data, predictions, selection, step=trainer.step, frozen=frozen)
    return selection.value


def wants_probe(spec: TrainSpec, model: Classifier) -> bool:
    """Whether the head is to start from a linear probe; random features are worth none."""
    return spec.freeze.head_init is HeadInit.probe and bool(model.pretrained) and not model.head_loaded


def init_head(spec: TrainSpec, model: Classifier, feed: Feed, device: Device, session: Session, watch: Watch) -> bool:
    """Fill the head with a linear probe on the features, where the spec asks for one; whether that was done."""
    if not wants_probe(spec, model):
        return False
    head = probed_head(model)
    if head is None:
        watch.note("head starts random: a probe needs a head of one linear layer")
        return False
    x, y = features(model.network, head, feed, device, watch, "features for the probe")
    seen = hashlib.sha256(x.numpy().tobytes() + y.numpy().tobytes()).hexdigest()
    head.load_state_dict(session.once(("probe", seen), lambda: probe_weights(head, x, y)))
    return True
