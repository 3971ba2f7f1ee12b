"""The freeze contract: frozen parts stay in eval mode while the rest trains, and do not change by a bit."""

import hashlib
from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from tlcli.errors import FrozenTensorError, UsageError
from tlcli.models.classifier import Classifier
from tlcli.specs import BnStats, FreezeSpec
from tlcli.transfer.cut.graph import digest_of_tensor


class FreezeContract:
    """Which parameters of a network train, and proof that everything else did not change.

    What trains is fixed when a contract is made. The digests are recorded when training begins (`seal`) and compared at
    the end (`verify`). After each epoch it is enough to compare the counters with which PyTorch marks every change in
    place (`check`).
    """

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
        self._digests: dict[str, str] = {}
        self._versions: dict[str, int] = {}

    def seal(self) -> None:
        """Record the digests of the frozen tensors: everything before training is done."""
        self._digests = {name: digest_of_tensor(tensor) for name, tensor in self._frozen()}
        self._versions = {name: tensor._version for name, tensor in self._frozen()}

    def digest(self) -> str:
        """Return the sha256 of all recorded digests."""
        text = "".join(f"{name} {digest}\n" for name, digest in sorted(self._digests.items()))
        return hashlib.sha256(text.encode()).hexdigest()

    def train_mode(self, *, update_stats: bool = True) -> None:
        """Set training mode for what trains and eval mode for what is frozen.

        A module whose parameters are all frozen is frozen with everything in it: its dropout is off. A BatchNorm layer
        that keeps its statistics is in eval mode even if its scale and shift train; without `update_stats` all are.
        """
        self._network.train()
        for name, module in self._frozen_modules.items():
            if name.rpartition(".")[0] not in self._frozen_modules:  # else a module around it is set
                module.eval()
        if not update_stats:
            for module in self._network.modules():
                if isinstance(module, _NormBase):
                    module.eval()

    def check(self) -> None:
        """Raise FrozenTensorError if a frozen tensor was written to and differs from its recorded digest."""
        for name, tensor in self._frozen():
            if tensor._version != self._versions[name]:
                self._compare(name, tensor)
                self._versions[name] = tensor._version

    def verify(self) -> int:
        """Return the number of frozen tensors. Raise FrozenTensorError naming the first that has changed."""
        for name, tensor in self._frozen():
            self._compare(name, tensor)
        return len(self._digests)

    def _compare(self, name: str, tensor: Tensor) -> None:
        if digest_of_tensor(tensor) != self._digests[name]:
            raise FrozenTensorError(f"frozen tensor {name} changed in training; do not use the result of this run")

    def _frozen(self) -> Iterator[tuple[str, Tensor]]:
        """Yield each frozen parameter, and each buffer of a module that is in eval mode while the rest trains."""
        for name, parameter in self._network.named_parameters():
            if not parameter.requires_grad:
                yield name, parameter
        for module_name, module in self._frozen_modules.items():
            for name, buffer in module.named_buffers(recurse=False):
                yield f"{module_name}.{name}".lstrip("."), buffer


def apply_freeze(spec: FreezeSpec, classifier: Classifier) -> FreezeContract:
    """Set requires_grad as the strategy says and nothing else; return the contract to train under and to verify."""
    names = spec.trainable(classifier)
    if not names:
        raise UsageError("nothing is left to train: freeze.keep matches every parameter")
    for name, parameter in classifier.network.named_parameters():
        parameter.requires_grad_(name in names)
    return FreezeContract(classifier, spec.bn_stats)
