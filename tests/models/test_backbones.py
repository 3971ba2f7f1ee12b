"""Every backbone of conf/: its stages and output, and frozen tensors that keep their bits under every strategy."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from timm.models.volo import VOLO
from torch.nn import functional as F

from tests.conftest import Compose, freeze_words, slow
from tests.faults.programs import scale
from tlcli.cli.conf_files import conf_dir
from tlcli.models import backbones
from tlcli.models.build import build_model
from tlcli.models.classifier import Classifier
from tlcli.specs import options
from tlcli.transfer.contract import apply_freeze, parameter_groups

QUICK = ("efficientnet_lite0", "timm")
OTHERS = sorted({path.stem for path in Path(conf_dir(), "backbone").glob("*.yaml")} - {*QUICK})
FIXED_SIZES = {"vit_b_16": 32, "vit_little": 32, "vit_base_dinov2": 28, "eva02_small": 28}  # small ones
CLASSES = ("ant", "bee", "cat")
TIMM_FAMILIES = ["vit_tiny_patch16_224", "convnextv2_atto", "deit_tiny_distilled_patch16_224", "levit_128s"]
TIMM_FAMILIES += ["volo_d1_224"]


def model_of(spec: Compose, name: str, *overrides: str, size: int | None = None) -> Classifier:
    option, *timm_name = name.split()
    named = [f"backbone.name={timm_name[0] if timm_name else 'resnet10t'}"] if option == "timm" else []
    backbone = spec(f"backbone={option}", "backbone.weights=none", *named, *overrides).backbone
    return build_model(backbone, CLASSES, size=size, seed=0)


@pytest.mark.parametrize("name", [*QUICK, *slow(*OTHERS, *(f"timm {name}" for name in TIMM_FAMILIES))])
def test_stages_hold_each_tensor_once_and_end_in_the_head(spec: Compose, name: str) -> None:
    model = model_of(spec, name)
    names = [n for stage in model.stages for n in stage.tensors]
    assert len(model.stages) > 3
    assert sorted(names) == sorted(model.network.state_dict())
    assert model.stages[-1].name == "head"
    assert len({stage.name for stage in model.stages}) == len(model.stages)
    assert {model.network.get_parameter(n).shape[0] for n in model.head_parameters() if "bn" not in n} == {len(CLASSES)}
    size = model.size
    with torch.inference_mode():
        logits = model.network.eval()(torch.zeros(2, 3, size, size))
    assert logits.shape == (2, len(CLASSES))
    assert logits.isfinite().all()


@pytest.mark.parametrize("name", [*QUICK, *slow(*OTHERS)])
def test_frozen_tensors_keep_their_bits(spec: Compose, name: str) -> None:
    """Through some steps (50 with TLCLI_FAULTS=full) under each strategy, with momentum and weight decay: what takes no
    gradient, and the statistics of the modules that have nothing else to train."""
    early = "^(stem|conv|features|blocks|layer|encoder|patch_embed).*weight"
    pattern = ("freeze.train=['(weight|bias)$']", f"freeze.keep=['{early}']")
    size = FIXED_SIZES.get(name, 32)
    model = model_of(spec, name, size=FIXED_SIZES.get(name))
    model = replace(model, pretrained=frozenset(model.network.state_dict()))
    for strategy in options("freeze"):
        words = freeze_words(strategy, model.stages[1].name)
        own = spec(*words, *(pattern if strategy == "pattern" else ()), "optimizer=adamw")
        contract = apply_freeze(own.freeze, model)
        contract.seal()
        frozen = frozen_names(model)
        before = {n: t.clone() for n, t in model.network.state_dict().items()}
        optimizer = own.optimizer.build(parameter_groups(own.optimizer, model))
        contract.train_mode()
        for _ in range(scale(2 if name in QUICK else 1, 50)):
            optimizer.zero_grad()
            F.cross_entropy(model.network(torch.randn(4, 3, size, size)), torch.tensor([0, 1, 2, 0])).backward()
            optimizer.step()
        contract.verify()
        changed = {n for n, t in model.network.state_dict().items() if not torch.equal(t, before[n])}
        assert not changed & frozen, strategy
        assert changed & model.head_parameters()
        assert bool(frozen) == (strategy != "none")


def frozen_names(model: Classifier) -> set[str]:
    """Return parameters without a gradient, and buffers of modules that have such parameters alone."""
    names = {n for n, parameter in model.network.named_parameters() if not parameter.requires_grad}
    for prefix, module in model.network.named_modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            names |= {f"{prefix}.{n}".lstrip(".") for n, _ in module.named_buffers()}
    return names & set(model.network.state_dict())


def test_volo_has_stages_of_unique_names_and_both_its_classifiers_in_the_head(spec: Compose, monkeypatch) -> None:
    """A small one: blocks of one module are groups of their own, and an auxiliary classifier is for the patches."""
    sizes = {"layers": [2, 2], "embed_dims": [8, 8], "num_heads": [2, 2], "img_size": 32, "stem_hidden_dim": 4}
    network = VOLO(**sizes, downsamples=(True, False), outlook_attention=(True, False), num_classes=len(CLASSES))
    published = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    network.pretrained_cfg = {**published, "classifier": ("head", "aux_head")}
    monkeypatch.setattr(backbones, "_timm_network", lambda *args, **options: network)
    model = model_of(spec, "timm volo_d1_224")
    assert len({stage.name for stage in model.stages}) == len(model.stages) > 4
    assert sorted(n for stage in model.stages for n in stage.tensors) == sorted(network.state_dict())
    assert model.head_parameters() == {f"{name}.{part}" for name in ("head", "aux_head") for part in ("weight", "bias")}


def test_backbone_size_is_that_of_images_unless_they_have_one(spec: Compose) -> None:
    words = ("timm vit_tiny_patch16_224", "backbone.size=64")
    models = model_of(spec, *words), model_of(spec, *words, size=32)
    assert [(m.size, m.network.patch_embed.img_size) for m in models] == [(64, (64, 64)), (64, (32, 32))]
    assert spec("backbone=vit_base_dinov2").backbone.size == 224


def test_dropout_before_the_head_is_ours_alone(spec: Compose) -> None:
    model = model_of(spec, "efficientnet_b0", "backbone.dropout=0.4")
    assert model.network.get_submodule("classifier.1").dropout == 0.4
    assert model.network.get_submodule("classifier.0").p == 0.0


def test_lite0_is_right(spec: Compose) -> None:
    """In a wrong order, BatchNorm statistics of the package would not fit the layers."""
    model = build_model(spec().backbone, CLASSES, size=96, seed=0)
    state = model.network.state_dict()
    assert {n for n in state if n not in model.stages[-1].tensors} == model.pretrained
    assert not model.head_loaded
    assert model.mean == (0.5, 0.5, 0.5)
    with torch.inference_mode():
        x = torch.rand(4, 3, 96, 96) * 2 - 1
        features = model.network.eval().forward_features(x)
    assert 0.05 < features.mean() < 5  # ReLU6 features of a trained network neither vanish nor saturate
    assert (features > 0).float().mean() > 0.02
