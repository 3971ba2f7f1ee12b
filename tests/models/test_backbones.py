"""Every backbone of conf/: built, forward at its size, the parameters that strategies leave trainable, frozen bits."""

import hashlib
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.conftest import Compose, freeze_words
from tests.faults.programs import scale
from tlcli.cli.conf_files import conf_dir
from tlcli.models.build import build_model
from tlcli.models.classifier import Classifier, Head
from tlcli.registry import options
from tlcli.specs import BackboneSpec
from tlcli.transfer.contract import FreezeContract, apply_freeze, parameter_groups

BACKBONES = sorted(path.stem for path in Path(conf_dir(), "backbone").glob("*.yaml"))
CLASSES = ("ant", "bee", "cat")
TIMM_FAMILIES = ["vit_tiny_patch16_224", "convnextv2_atto", "deit_tiny_distilled_patch16_224", "levit_128s"]


def backbone(spec: Compose, name: str, *overrides: str) -> BackboneSpec:
    model = ["backbone.name=resnet10t"] if name == "timm" else []
    return spec(f"backbone={name}", "backbone.weights=none", *model, *overrides).backbone


def model_of(spec: Compose, name: str) -> Classifier:
    return build_model(backbone(spec, name), CLASSES, size=32 if name == "vit_b_16" else None, seed=0)


@pytest.mark.parametrize("name", BACKBONES)
def test_stages_hold_each_parameter_once_and_end_in_the_head(spec: Compose, name: str) -> None:
    model = model_of(spec, name)
    names = [n for stage in model.stages for n in stage.tensors]
    assert len(names) == len(set(names))
    assert set(names) == set(model.network.state_dict())
    assert model.stages[-1].name == "head"
    outputs = {p.shape[0] for n, p in model.network.named_parameters() if n in model.stages[-1].tensors}
    assert outputs == {len(CLASSES)}


@pytest.mark.parametrize("name", BACKBONES)
def test_forward_at_its_own_size(spec: Compose, name: str) -> None:
    model = build_model(backbone(spec, name), CLASSES, size=None, seed=0)
    size = model.architecture.size
    with torch.inference_mode():
        logits = model.network.eval()(torch.zeros(2, 3, size, size))
    assert logits.shape == (2, len(CLASSES))
    assert logits.isfinite().all()


@pytest.mark.parametrize("strategy", ["head", "last_stages"])
@pytest.mark.parametrize("name", BACKBONES)
def test_frozen_stays_frozen_through_three_steps(spec: Compose, name: str, strategy: str) -> None:
    model = model_of(spec, name)
    contract = apply_freeze(spec(f"freeze={strategy}").freeze, model)
    contract.seal()
    expected = model.stages[-1].tensors if strategy == "head" else model.stages[-1].tensors | model.stages[-2].tensors
    parameters = dict(model.network.named_parameters())
    assert {n for n, p in parameters.items() if p.requires_grad} == expected & set(parameters)
    before = {n: p.detach().clone() for n, p in parameters.items() if p.requires_grad}
    take_steps(model, contract, 3)
    assert contract.verify() > 0
    assert any(not torch.equal(before[n], parameters[n]) for n in before)
    assert all(p.grad is None for n, p in parameters.items() if n not in before)


@pytest.mark.slow
@pytest.mark.parametrize("name", BACKBONES)
def test_frozen_tensors_keep_their_sha256(spec: Compose, name: str) -> None:
    """Through 50 steps (3 unless TLCLI_FAULTS=full) under each strategy, with momentum and weight decay: what takes no
    gradient, and the statistics of the modules that have nothing else to train."""
    pattern = ("freeze.train=['(weight|bias)$']", "freeze.keep=['^(stem|conv|features|blocks|layer|encoder).*weight']")
    for strategy in options("freeze"):
        model = model_of(spec, name)
        words = freeze_words(strategy, model.stages[1].name)
        own = spec(*words, *(pattern if strategy == "pattern" else ()), "optimizer=adamw")
        contract = apply_freeze(own.freeze, model)
        frozen = frozen_names(model.network)
        before = digests(model.network)
        optimizing = own.optimizer.build(parameter_groups(own.optimizer, model))
        take_steps(model, contract, scale(3, 50), optimizing)
        after = digests(model.network)
        assert [n for n in frozen if after[n] != before[n]] == [], strategy
        assert bool(frozen) == (strategy != "none")
        assert any(after[n] != before[n] for n in before)


def digests(network: nn.Module) -> dict[str, str]:
    """sha256 of the bytes of every parameter and buffer."""
    state = network.state_dict()
    return {
        n: hashlib.sha256(t.contiguous().reshape(-1).view(torch.uint8).numpy()).hexdigest() for n, t in state.items()
    }


def frozen_names(network: nn.Module) -> set[str]:
    """Parameters that take no gradient, and buffers of modules that have parameters, none of which takes one."""
    names = {n for n, parameter in network.named_parameters() if not parameter.requires_grad}
    for prefix, module in network.named_modules():
        own = list(module.parameters())
        if own and not any(parameter.requires_grad for parameter in own):
            names |= {f"{prefix}.{n}".lstrip(".") for n, _ in module.named_buffers()}
    return names & set(network.state_dict())


def take_steps(
    model: Classifier, contract: FreezeContract, n: int, optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Take steps on small images of noise in the contract's training mode, with SGD by default."""
    trainable = [p for p in model.network.parameters() if p.requires_grad]
    optimizer = optimizer or torch.optim.SGD(trainable, lr=0.01, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    contract.train_mode()
    for _ in range(n):
        x = torch.randn(4, 3, 32, 32, generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model.network(x), torch.tensor([0, 1, 2, 0])).backward()
        optimizer.step()


@pytest.mark.parametrize("name", TIMM_FAMILIES)
def test_timm_models_have_stages_and_a_head(spec: Compose, name: str) -> None:
    model = build_model(
        spec("backbone=timm", f"backbone.name={name}", "backbone.weights=none").backbone, CLASSES, size=None, seed=0
    )
    assert len(model.stages) > 3
    assert set().union(*(stage.tensors for stage in model.stages)) == set(model.network.state_dict())
    heads = {n.split(".")[0] for n in model.stages[-1].tensors}
    assert heads == ({"head", "head_dist"} if "distilled" in name or "levit" in name else {"head"})


def test_head_drops_out_in_training_alone() -> None:
    head = Head(64, 5, dropout=0.5)
    x = torch.ones(3, 64)
    assert not torch.equal(head(x), head(x))
    head.eval()
    assert torch.equal(head(x), head(x))
    assert set(head.state_dict()) == {"weight", "bias"}


def test_dropout_before_the_head_is_ours_alone(spec: Compose) -> None:
    model = build_model(backbone(spec, "efficientnet_b0", "backbone.dropout=0.4"), CLASSES, size=None, seed=0)
    assert model.network.get_submodule("classifier.1").dropout == 0.4
    assert model.network.get_submodule("classifier.0").p == 0.0


def test_lite0_is_right(spec: Compose) -> None:
    """The package's tensors under timm's names: in a wrong order BatchNorm statistics would not fit the layers."""
    model = build_model(spec().backbone, CLASSES, size=96, seed=0)
    state = model.network.state_dict()
    assert {n for n in state if n not in model.stages[-1].tensors} == model.pretrained
    assert not model.head_loaded
    assert model.architecture.mean == (0.5, 0.5, 0.5)
    with torch.inference_mode():
        x = torch.rand(4, 3, 96, 96) * 2 - 1
        features = model.network.eval().forward_features(x)
    assert 0.05 < features.mean() < 5  # ReLU6 features of a trained network neither vanish nor saturate
    assert (features > 0).float().mean() > 0.02
