"""Parameter groups of the optimizer: a learning rate per stage, and weight decay where it belongs."""

from collections.abc import Collection
from dataclasses import dataclass

from torch import nn

from tlcli.models.classifier import Classifier, count
from tlcli.reporter import StageRow
from tlcli.specs import OptimizerSpec

EMBEDDINGS = ("cls_token", "class_token", "dist_token", "reg_token", "pos_embed", "pos_embedding")
"""Last names of tokens and of tables of positions, in timm and torchvision; timm's networks list further ones."""


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters of one stage with one learning rate and one weight decay."""

    name: str
    parameters: tuple[nn.Parameter, ...]
    lr: float
    weight_decay: float


def stage_rates(spec: OptimizerSpec, classifier: Classifier) -> dict[str, float]:
    """Return the learning rate per stage: lr * head_lr_mult for the head, else lr * layer_decay**d, d stages before it.

    This is layer-wise decay as in BEiT (Bao et al. 2021); the last stage before the head has d = 1.
    """
    depth = len(classifier.stages) - 1
    rates = {stage.name: spec.lr * spec.layer_decay ** (depth - i) for i, stage in enumerate(classifier.stages)}
    rates["head"] = spec.lr * spec.head_lr_mult
    return rates


def parameter_groups(spec: OptimizerSpec, classifier: Classifier) -> list[ParameterGroup]:
    """Return the trainable parameters from input to output, one group per stage and weight decay; none is empty.

    Unless `decay_norm_and_bias` is set, there is no weight decay for biases and scales of normalization (tensors of one
    dimension or none) and for tokens and positions of transformers.
    """
    network, rates = classifier.network, stage_rates(spec, classifier)
    listed: Collection[str] = getattr(network, "no_weight_decay", set)()  # timm's
    trainable = [(name, parameter) for name, parameter in network.named_parameters() if parameter.requires_grad]
    groups: list[ParameterGroup] = []
    for stage in classifier.stages:
        decayed: list[nn.Parameter] = []
        plain: list[nn.Parameter] = []
        for name, parameter in trainable:
            if name in stage.tensors:
                is_embedding = name in listed or name.rpartition(".")[2] in EMBEDDINGS
                decays = spec.decay_norm_and_bias or (parameter.ndim > 1 and not is_embedding)
                (decayed if decays else plain).append(parameter)
        for name, members, decay in ((stage.name, decayed, spec.weight_decay), (f"{stage.name}/no_decay", plain, 0.0)):
            if members:
                groups.append(ParameterGroup(name, tuple(members), rates[stage.name], decay))
    return groups


def freeze_table(spec: OptimizerSpec, classifier: Classifier) -> tuple[StageRow, ...]:
    """Return a row per stage: its parameters, how many of them train, and the learning rate."""
    rates = stage_rates(spec, classifier)
    parameters = dict(classifier.network.named_parameters())
    rows = []
    for stage in classifier.stages:
        members = [p for name, p in parameters.items() if name in stage.tensors]
        trainable = count(p for p in members if p.requires_grad)
        rows.append(StageRow(stage.name, count(members), trainable, rates[stage.name] if trainable else None))
    return tuple(rows)
