"""Parameter groups: each stage at its own rate, weight decay where it belongs."""

from dataclasses import dataclass

from torch import nn

from tlcli.models.classifier import Classifier, count
from tlcli.reporter import StageRow
from tlcli.specs import OptimizerSpec


@dataclass(frozen=True)
class Group:
    """Parameters of one stage with one rate and one weight decay."""

    name: str
    parameters: tuple[nn.Parameter, ...]
    lr: float
    weight_decay: float


def stage_rates(spec: OptimizerSpec, model: Classifier) -> dict[str, float]:
    """The rate of each stage: lr * head_lr_mult for the head, lr * layer_decay**d for the stage d before it.

    (Layer-wise decay as in BEiT, Bao et al. 2021: the last stage before the head has d = 1.)
    """
    depth = len(model.stages) - 1
    rates = {stage.name: spec.lr * spec.layer_decay ** (depth - i) for i, stage in enumerate(model.stages)}
    rates["head"] = spec.lr * spec.head_lr_mult
    return rates


def parameter_groups(spec: OptimizerSpec, model: Classifier) -> list[Group]:
    """The trainable parameters, from input to output, a group for each stage and weight decay; none is empty.

    Biases and the scales of normalisation (tensors of one dimension or none) have no weight decay, unless
    `decay_norm_and_bias`.
    """
    rates = stage_rates(spec, model)
    trainable = {name: p for name, p in model.network.named_parameters() if p.requires_grad}
    groups: list[Group] = []
    for stage in model.stages:
        inside = [p for name, p in trainable.items() if name in stage.tensors]
        decayed = [p for p in inside if p.ndim > 1 or spec.decay_norm_and_bias]
        plain = [p for p in inside if not (p.ndim > 1 or spec.decay_norm_and_bias)]
        for name, members, decay in ((stage.name, decayed, spec.weight_decay), (f"{stage.name}/no_decay", plain, 0.0)):
            if members:
                groups.append(Group(name, tuple(members), rates[stage.name], decay))
    return groups


def freeze_table(spec: OptimizerSpec, model: Classifier) -> tuple[StageRow, ...]:
    """A row for each stage: its parameters, how many of them train, and at which rate."""
    rates = stage_rates(spec, model)
    rows: list[StageRow] = []
    parameters = dict(model.network.named_parameters())
    for stage in model.stages:
        inside = [p for name, p in parameters.items() if name in stage.tensors]
        trainable = count(p for p in inside if p.requires_grad)
        rows.append(StageRow(stage.name, count(inside), trainable, rates[stage.name] if trainable else None))
    return tuple(rows)
