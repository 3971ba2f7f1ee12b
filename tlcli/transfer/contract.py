"""Trainable parameters: the freeze contract and the optimizer's parameter groups."""

import hashlib
from collections.abc import Collection, Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from tlcli.errors import FrozenTensorError
from tlcli.models.classifier import Classifier, count
from tlcli.reporter import StageRow
from tlcli.specs import BnStats, FreezeSpec, OptimizerSpec
from tlcli.transfer.graph import digest_of_tensor
from tlcli.transfer.lora import plain_name, remove_low_rank

TOKENS = ("cls_token", "class_token", "dist_token", "reg_token")
EMBEDDINGS = (*TOKENS, "pos_embed", "pos_embedding", "relative_position_bias_table", "layer_scale")
"""Last names of tokens, tables of positions and scales, in timm and torchvision; timm's networks list further ones."""


class FreezeContract:
    """Keeps frozen parts in eval mode while the rest trains, and proves that they do not change by a bit."""

    def __init__(self, classifier: Classifier, bn_stats: BnStats) -> None:
        self._network = classifier.network
        self._frozen_modules: dict[str, nn.Module] = {}
        for name, module in classifier.network.named_modules():
            # `auto` keeps the statistics that were loaded with the weights: batches of a few dozen images overwrite
            # good statistics with noisy ones, which costs 5 to 10 points on small datasets
            is_loaded = f"{name}.running_mean" in classifier.pretrained
            keeps_stats = is_loaded if bn_stats is BnStats.auto else bn_stats is BnStats.frozen
            parameters = list(module.parameters())
            has_nothing_to_train = bool(parameters) and not any(p.requires_grad for p in parameters)
            if has_nothing_to_train or (keeps_stats and isinstance(module, _NormBase)):
                self._frozen_modules[name] = module

    def updated_norms(self) -> dict[str, _NormBase]:
        """Return the BatchNorm layers whose statistics follow the batches of training, by name."""
        frozen = {module for frozen in self._frozen_modules.values() for module in frozen.modules()}
        return {n: m for n, m in self._network.named_modules() if isinstance(m, _NormBase) and m not in frozen}

    def synchronize_norms(self) -> None:
        """Replace `updated_norms` by layers with the statistics of a batch over all ranks. Names of tensors stay."""
        from timm.layers import convert_sync_batchnorm  # here: a run of one process does not wait for it

        for name, norm in self.updated_norms().items():
            self._network.set_submodule(name, convert_sync_batchnorm(norm))

    def seal(self) -> None:
        """Record the digests of the frozen tensors, and the counters that PyTorch increments with each write."""
        self._digests = {name: digest_of_tensor(tensor) for name, tensor in self._frozen()}
        self._versions = {name: tensor._version for name, tensor in self._frozen()}

    def digest(self) -> str:
        """Return one digest of all frozen tensors, as `seal` recorded them."""
        text = "".join(f"{name} {digest}\n" for name, digest in sorted(self._digests.items()))
        return hashlib.sha256(text.encode()).hexdigest()

    def train_mode(self, *, update_stats: bool = True) -> None:
        """Set training mode for what trains and eval mode for what is frozen.

        A module whose parameters are all frozen is frozen with everything in it: its dropout is off. A BatchNorm layer
        that keeps its statistics is in eval mode even if its scale and shift train; without `update_stats` all are.
        """
        self._network.train()
        for module in self._frozen_modules.values():
            module.eval()
        if not update_stats:
            for module in self._network.modules():
                if isinstance(module, _NormBase):
                    module.eval()

    def check(self) -> None:
        """Raise FrozenTensorError if a frozen tensor that was written to since the last check has changed."""
        self._compare({name for name, tensor in self._frozen() if tensor._version != self._versions[name]})

    def verify(self) -> int:
        """Return the number of frozen tensors. Raise FrozenTensorError if one has changed; all are read."""
        self._compare(self._digests)
        return len(self._digests)

    def _compare(self, names: Collection[str]) -> None:
        for name, tensor in self._frozen():
            if name in names and digest_of_tensor(tensor) != self._digests[name]:
                raise FrozenTensorError(f"frozen tensor {name} changed in training; do not use the result of this run")
            self._versions[name] = tensor._version

    def _frozen(self) -> Iterator[tuple[str, Tensor]]:
        """Yield each frozen parameter, and each buffer of a module that is in eval mode while the rest trains."""
        for name, parameter in self._network.named_parameters():
            if not parameter.requires_grad:
                yield name, parameter
        for module_name, module in self._frozen_modules.items():
            for name, buffer in module.named_buffers(recurse=False):
                yield f"{module_name}.{name}".lstrip("."), buffer


def apply_freeze(spec: FreezeSpec, classifier: Classifier) -> FreezeContract:
    """Set requires_grad as the strategy says (LoRA adds parameters); return the contract to train under."""
    remove_low_rank(classifier.network)  # of an earlier job
    names = spec.trainable(classifier)
    for name, parameter in classifier.network.named_parameters():
        parameter.requires_grad_(name in names)
    return FreezeContract(classifier, spec.bn_stats)


def _stage_rates(spec: OptimizerSpec, classifier: Classifier) -> dict[str, float]:
    """Return the learning rate per stage, with layer-wise decay as in BEiT (Bao et al. 2021)."""
    depth = len(classifier.stages) - 1
    rates = {stage.name: spec.lr * spec.layer_decay ** (depth - i) for i, stage in enumerate(classifier.stages)}
    rates["head"] = spec.lr * spec.head_lr_mult
    return rates


def parameter_groups(spec: OptimizerSpec, classifier: Classifier) -> list[dict[str, Any]]:
    """Return torch's parameter groups, each with a `name`: one per stage and weight decay, from input to output.

    Biases, scales of normalization, tokens and positions have no weight decay unless `decay_norm_and_bias` is set.
    """
    network, rates = classifier.network, _stage_rates(spec, classifier)
    listed: Collection[str] = getattr(network, "no_weight_decay", set)()  # timm's
    groups: dict[str, dict[str, Any]] = {}
    for stage in classifier.stages:
        for decays in (True, False):
            name, weight_decay = (stage.name, spec.weight_decay) if decays else (f"{stage.name}/no_decay", 0.0)
            groups[name] = {"name": name, "params": [], "lr": rates[stage.name], "weight_decay": weight_decay}
        for name, parameter in network.named_parameters():
            if parameter.requires_grad and plain_name(name) in stage.tensors:
                is_embedding = name in listed or name.rpartition(".")[2] in EMBEDDINGS
                decays = spec.decay_norm_and_bias or (parameter.ndim > 1 and not is_embedding)
                groups[stage.name if decays else f"{stage.name}/no_decay"]["params"].append(parameter)
    return [group for group in groups.values() if group["params"]]


def freeze_table(spec: OptimizerSpec, classifier: Classifier) -> tuple[StageRow, ...]:
    """Return a row per stage: its parameters, how many of them train, and the learning rate."""
    rates = _stage_rates(spec, classifier)
    rows = []
    for stage in classifier.stages:
        members = [p for name, p in classifier.network.named_parameters() if plain_name(name) in stage.tensors]
        trainable = count(p for p in members if p.requires_grad)
        rows.append(StageRow(stage.name, count(members), trainable, rates[stage.name] if trainable else None))
    return tuple(rows)


def linear_head(classifier: Classifier) -> nn.Linear | None:
    """Return the head if it is one linear layer, which a probe can fill; else None (distilled models: two heads)."""
    modules = [classifier.network.get_submodule(name) for name in classifier.head]
    return modules[0] if len(modules) == 1 and isinstance(modules[0], nn.Linear) else None
