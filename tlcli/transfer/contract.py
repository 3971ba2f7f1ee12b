"""The freeze contract: frozen parts stay in eval mode while the rest trains, and end bit for bit as they began."""

import hashlib
from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from tlcli.errors import FrozenTensorError, UsageError
from tlcli.models.classifier import Classifier
from tlcli.specs import BnStats, FreezeSpec
from tlcli.transfer.cut.graph import digest_of_tensor


class FreezeContract:
    """Which parameters of a model train, and proof that everything else did not change.

    What trains is settled when a contract is made. The digests are taken when training begins (`seal`) and compared
    when it is over (`verify`). In between, after each epoch, it is enough to look at the counters with which PyTorch
    marks every change in place (`check`).
    """

    def __init__(self, model: Classifier, bn_stats: BnStats) -> None:
        self._network = model.network
        self._keeps_stats = frozenset(
            name
            for name, module in model.network.named_modules()
            if isinstance(module, _NormBase) and _keeps(name, bn_stats, model.pretrained)
        )
        self._frozen_modules = {name: m for name, m in model.network.named_modules() if self._is_frozen(name, m)}
        self._digests: dict[str, str] = {}
        self._versions: dict[str, int] = {}

    def seal(self) -> None:
        """Take the digests of what is frozen, as it is now: everything before training is done."""
        self._digests = {name: digest_of_tensor(tensor) for name, tensor in self._frozen()}
        self._versions = {name: tensor._version for name, tensor in self._frozen()}

    def digest(self) -> str:
        """The sha256 of everything that was sealed."""
        text = "".join(f"{name} {digest}\n" for name, digest in sorted(self._digests.items()))
        return hashlib.sha256(text.encode()).hexdigest()

    def train_mode(self, *, update_stats: bool = True) -> None:
        """Training mode for what trains, eval mode for what is frozen; no BatchNorm trains without `update_stats`.

        A module is frozen where it has parameters and none of them trains, with all that is in it: its dropout is
        off. A BatchNorm layer that keeps its statistics is in eval mode even where its scale and shift train.
        """
        self._network.train()
        for name, module in self._frozen_modules.items():
            if name.rpartition(".")[0] not in self._frozen_modules:  # else it is one of those within another
                module.eval()  # BatchNorm must not drift, or the frozen part is not the one that was loaded
        if not update_stats:
            for module in self._network.modules():
                if isinstance(module, _NormBase):
                    module.eval()

    def check(self) -> None:
        """After an epoch: raises FrozenChanged for a tensor that was written to and differs from what was sealed."""
        for name, tensor in self._frozen():
            if tensor._version != self._versions[name]:
                self._compare(name, tensor)
                self._versions[name] = tensor._version

    def verify(self) -> int:
        """The number of frozen tensors, each of them unchanged. Raises FrozenChanged naming the first that is not."""
        for name, tensor in self._frozen():
            self._compare(name, tensor)
        return len(self._digests)

    def _compare(self, name: str, tensor: Tensor) -> None:
        if digest_of_tensor(tensor) != self._digests[name]:
            raise FrozenTensorError(f"frozen tensor {name} changed in training: this run's result is not to be trusted")

    def _frozen(self) -> Iterator[tuple[str, Tensor]]:
        """Each frozen parameter, and each buffer of a module that is in eval mode while training."""
        for name, parameter in self._network.named_parameters():
            if not parameter.requires_grad:
                yield name, parameter
        for module_name, module in self._frozen_modules.items():
            for name, buffer in module.named_buffers(recurse=False):
                yield f"{module_name}.{name}".lstrip("."), buffer

    def _is_frozen(self, name: str, module: nn.Module) -> bool:
        """Whether a module is in eval mode while the rest trains."""
        parameters = list(module.parameters())
        return name in self._keeps_stats or (bool(parameters) and not any(p.requires_grad for p in parameters))


def apply_freeze(spec: FreezeSpec, model: Classifier) -> FreezeContract:
    """Set requires_grad as the strategy says and nothing else; the contract to train under and to verify."""
    names = spec.trainable(model)
    if not names:
        raise UsageError("nothing is left to train: freeze.keep keeps every parameter")
    for name, parameter in model.network.named_parameters():
        parameter.requires_grad_(name in names)
    return FreezeContract(model, spec.bn_stats)


def _keeps(module_name: str, bn_stats: BnStats, pretrained: frozenset[str]) -> bool:
    """Whether a BatchNorm layer keeps its statistics: `auto` keeps those that were loaded with the weights.

    Batches of a few dozen images overwrite good statistics with noisy ones: on small sets that costs 5 to 10 points.
    """
    if bn_stats is BnStats.auto:
        return f"{module_name}.running_mean" in pretrained
    return bn_stats is BnStats.frozen
