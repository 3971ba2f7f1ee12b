"""The main path: fine-tune one backbone on one data set, and measure it on images that it has never seen."""

from tlcli.data.dataset import load_dataset
from tlcli.device import Device, choose_numerics, prepare
from tlcli.engine.evaluate import evaluate, features
from tlcli.engine.inputs import LiveImages, image_size, open_inputs
from tlcli.engine.metrics import scores
from tlcli.engine.selection import Selection
from tlcli.engine.trainer import Trainer
from tlcli.models.build import build_model
from tlcli.models.classifier import Classifier
from tlcli.runs.recorder import Recorder
from tlcli.runs.run_dir import RunDir
from tlcli.specs import HeadInit, TrainSpec
from tlcli.transfer.contract import apply_freeze
from tlcli.transfer.probe import fit_probe, probed_head
from tlcli.watch import Watch


def train(spec: TrainSpec, run: RunDir, watch: Watch) -> float | None:
    """Fine-tune, keep the epoch best on validation, test that one once; the validation figure that selected it.

    All that it gives is in the run's directory. Raises UsageError where the spec cannot be followed and TlcliError
    where the run fails.
    """
    record = Recorder(run, watch, spec)
    with record.phase("setup"):
        accelerator = prepare(spec.device)
        data = load_dataset(spec.dataset, seed=spec.seed, watch=watch)
        model = build_model(spec.backbone, data.classes, size=image_size(spec), seed=spec.seed)
        contract = apply_freeze(spec.freeze, model)  # sets requires_grad, nothing else
        device = choose_numerics(spec.device, accelerator, model.network)
        device.place(model.network)
        inputs = open_inputs(data, model, spec, device)
        trainer = Trainer(model, contract, spec, device, data.train.class_counts(len(data.classes)))
    record.plan(data, model, inputs, device)
    with record.phase("probe"):
        head_is_ready = model.head_loaded or init_head(spec, model, inputs.probe, device, watch)
    contract.seal()
    device.compile_where_asked(model.network)

    selection = Selection(spec.keep_best, spec.early_stop)
    for epoch in range(0 if head_is_ready else 1, spec.epochs + 1):  # epoch 0 is the network before it trains
        with record.phase("train"):
            fit = trainer.fit(inputs.train, epoch, watch, record.running) if epoch > 0 else None
        contract.verify()
        with record.phase("validate"):
            validation = scores(evaluate(model.network, inputs.val, device, watch, "validation"))
        trainer.require_finite(validation.loss, epoch, "validation loss")
        trainer.schedule.after_epoch(validation.loss)
        best = selection.improves(epoch, validation)
        record.epoch(epoch, fit, validation, best=best, trainer=trainer, network=model.network)
        if selection.exhausted:
            watch.note(f"early stop: no better epoch since epoch {selection.epoch}")
            break

    record.load_best(model.network)
    frozen = contract.verify()
    with record.phase("test"):
        predictions = evaluate(model.network, inputs.test, device, watch, "test")
    record.result(data, predictions, selection, step=trainer.step, frozen=frozen)
    return selection.value


def init_head(spec: TrainSpec, model: Classifier, inputs: LiveImages, device: Device, watch: Watch) -> bool:
    """Fill the head with a linear probe on the features, where the spec asks for one; whether that was done."""
    if spec.freeze.head_init is not HeadInit.probe or not model.pretrained:  # random features are worth no probe
        return False
    head = probed_head(model)
    if head is None:
        watch.note("head starts random: a probe needs a head of one linear layer")
        return False
    x, y = features(model.network, head, inputs, device, watch, "features for the probe")
    fit_probe(head, x, y)
    return True
