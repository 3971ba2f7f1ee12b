"""LoRA starts as the frozen network, trains its updates and the head alone, and its checkpoints are ordinary ones."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import Compose, finish, slow
from tlcli.cli import main
from tlcli.cli.compose import load_spec
from tlcli.engine.trainer import Trainer
from tlcli.errors import UsageError
from tlcli.models.build import build_model
from tlcli.models.classifier import Classifier
from tlcli.models.tensorfile import read_tensors
from tlcli.runs.load import load_run
from tlcli.runs.run_dir import RunDir, read_predictions
from tlcli.specs import FreezeSpec
from tlcli.transfer.contract import apply_freeze, freeze_table, parameter_groups
from tlcli.transfer.lora import add_low_rank, merged, remove_low_rank

OTHERS = ("vit_b_16", "vit_little", "tiny_vit_21m", "convnext_tiny_in12k", "vit_base_dinov2", "eva02_small")
NETWORKS = [
    ("backbone=efficientnet_lite0",),
    *slow(*((f"backbone={name}", "backbone.weights=none") for name in OTHERS)),
]


@pytest.fixture
def built(spec: Compose) -> Callable[..., tuple[Classifier, FreezeSpec]]:
    def make(*words: str) -> tuple[Classifier, FreezeSpec]:
        own = spec("freeze=lora", *words)
        return build_model(own.backbone, ("a", "b"), size=None, seed=0), own.freeze

    return make


def logits(network: nn.Module, size: int) -> Tensor:
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        result: Tensor = network.eval()(images)
    return result


@pytest.mark.parametrize("words", NETWORKS)
def test_it_starts_as_the_frozen_network_and_ends_as_its_merged_weights(built, spec: Compose, words) -> None:
    classifier, freeze = built(*words)
    network, plain = classifier.network, dict(classifier.network.state_dict())
    for name, parameter in network.named_parameters():
        if name.endswith("gamma"):  # random layer scales are near zero, so that no layer in a block changes the logits
            nn.init.ones_(parameter)
    before = logits(network, classifier.size)
    apply_freeze(freeze, classifier)
    assert torch.equal(logits(network, classifier.size), before)
    trains = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    updates = trains - classifier.head_parameters()
    assert updates and all(name.endswith((".0.a", ".0.b")) for name in updates)
    own = spec("freeze=lora", *words)
    groups = parameter_groups(own.optimizer, classifier)
    assert sum(len(group["params"]) for group in groups) == len(trains), "each trains at the rate of its stage"
    rows, sizes = freeze_table(own.optimizer, classifier), {n: p.numel() for n, p in network.named_parameters()}
    assert sum(row.trainable for row in rows) == sum(sizes[name] for name in trains)
    with torch.no_grad():
        for name in updates:
            network.get_parameter(name).normal_(0, 0.05)
    changed, state = logits(network, classifier.size), merged(network, network.state_dict())
    assert not torch.allclose(changed, before, atol=1e-5)
    assert state.keys() == plain.keys()
    other = build_model(own.backbone, ("a", "b"), size=None, seed=1).network
    other.load_state_dict(state)
    assert torch.allclose(logits(other, classifier.size), changed, atol=1e-4)
    apply_freeze(spec("freeze=head").freeze, classifier)
    assert all(torch.equal(tensor, plain[name]) for name, tensor in network.state_dict().items()), "for the next job"


def test_parameters_are_in_the_order_of_a_new_network_once_updates_are_removed() -> None:
    network = nn.Sequential(nn.Linear(3, 4), nn.Conv2d(4, 2, 1), nn.Linear(2, 2, bias=False))
    names, tensors = list(network.state_dict()), dict(network.state_dict())
    assert len(add_low_rank(network, names, 1, 1.0)) == 6
    remove_low_rank(network)
    assert [name for name, _ in network.named_parameters()] == list(network.state_dict()) == names
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in network.state_dict().items())


def test_stages_have_updates_or_are_named(built) -> None:
    classifier, freeze = built("freeze.stages=[blocks.6]", "freeze.rank=2")
    apply_freeze(freeze, classifier)
    names = {name for name, p in classifier.network.named_parameters() if p.requires_grad and name.endswith(".b")}
    assert names and all(name.startswith(("blocks.6.", "conv_head.")) for name in names)
    assert all(classifier.network.get_parameter(name).shape[1] == 2 for name in names)
    for words, reason in (
        ("freeze.stages=[blocks.7]", r"freeze\.stages: efficientnet_lite0 has no stage 'blocks\.7'"),
        ("freeze.stages=[stem]", "has no linear layers or 1x1 convolutions in stem"),
    ):
        classifier, freeze = built(words)
        with pytest.raises(UsageError, match=reason):
            apply_freeze(freeze, classifier)


@pytest.mark.slow
def test_the_weights_below_the_updates_are_compared(shapes: Path, tmp_path: Path, monkeypatch) -> None:
    fit = Trainer.fit

    def spoiling(trainer: Trainer, *arguments: object, **more: object) -> object:
        row = fit(trainer, *arguments, **more)  # type: ignore[arg-type]
        for name, tensor in trainer._contract._frozen():
            if name.endswith("conv_pwl.parametrizations.weight.original"):
                tensor.data.add_(1)  # which PyTorch does not count
        return row

    monkeypatch.setattr(Trainer, "fit", spoiling)
    words = ("dataset=imagefolder", f"dataset.root='{shapes}'", "image.size=32", "epochs=1", "freeze=lora")
    assert main(["train", f"hydra.run.dir='{tmp_path}/run'", *words, "device.precision=fp32"]) == 1
    assert "conv_pwl.parametrizations.weight.original changed in training" in RunDir(tmp_path / "run").info["error"]


@pytest.mark.slow
def test_a_run_is_tested_with_the_weights_of_its_checkpoint(shapes: Path, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("tlcli.data.dataset.MIN_VALIDATION_IMAGES", 200)  # the last epoch is kept
    words = ("dataset=imagefolder", f"dataset.root='{shapes}'", "image.size=32", "epochs=1", "freeze=lora")
    run = RunDir(finish(tmp_path / "run", *words, "device.precision=fp32", "optimizer.lr=0.01"))
    tensors, _ = read_tensors(run.best_checkpoint)
    assert not any("parametrizations" in name for name in tensors)
    start = build_model(load_spec(run).backbone, ("a",), size=None, seed=0).network.state_dict()
    changed = {
        name for name in tensors if name in start and not torch.equal(tensors[name].float(), start[name].float())
    }
    assert "blocks.6.0.conv_pwl.weight" in changed and "blocks.6.0.conv_dw.weight" not in changed
    tested, loaded = read_predictions(run.test_predictions), load_run(run.path)
    with torch.inference_mode():
        found = torch.cat([loaded.model(loaded.preprocess(name)) for name in tested.names])
    assert torch.allclose(found, tested.logits, atol=1e-3)
