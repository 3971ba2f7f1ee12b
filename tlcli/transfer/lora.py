"""Low-rank updates of linear layers and 1x1 convolutions: LoRA (Hu et al. 2021).

A layer's weight W becomes W + alpha / rank * B A, of which A and B train; B starts at zero. Checkpoints have the sum.
"""

import zlib
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

_ORIGINAL, _PARTS = ".parametrizations.weight.original", ".parametrizations.weight.0."


class LowRank(nn.Module):
    """The update of one weight (out, in, ...) of a layer with this name, which seeds A."""

    def __init__(self, name: str, weight: Tensor, rank: int, alpha: float) -> None:
        super().__init__()
        n_out, n_in = weight.shape[0], weight[0].numel()
        a = torch.randn(rank, n_in, generator=torch.Generator().manual_seed(zlib.crc32(name.encode()))) / n_in**0.5
        self.a, self.b = nn.Parameter(a.to(weight.device)), nn.Parameter(weight.new_zeros(n_out, rank))
        self.scale = alpha / rank

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.scale * (self.b @ self.a).view_as(weight)


def add_low_rank(network: nn.Module, tensors: Collection[str], rank: int, alpha: float) -> frozenset[str]:
    """Add updates to the layers whose weights are among these tensors; return the names of what trains in them."""
    names = set()
    for name, layer in list(network.named_modules()):
        is_pointwise = isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and layer.groups == 1
        if (isinstance(layer, nn.Linear) or is_pointwise) and f"{name}.weight" in tensors:
            parametrize.register_parametrization(layer, "weight", LowRank(name, layer.weight, rank, alpha))
            names |= {f"{name}{_PARTS}a", f"{name}{_PARTS}b"}
    return frozenset(names)


def remove_low_rank(network: nn.Module) -> None:
    """Make each layer an ordinary one again, with the weight that it had before the update."""
    for layer in list(network.modules()):
        if parametrize.is_parametrized(layer, "weight"):
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
            for name in [name for name in layer._parameters if name != "weight"]:  # first again, as in a new layer
                layer.register_parameter(name, layer._parameters.pop(name))


def plain_name(name: str) -> str:
    """Return the name of the weight that a parameter of an update belongs to; of others, their own."""
    place, inside, _ = name.partition(".parametrizations.weight.")
    return f"{place}.weight" if inside else name


def merged(network: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state of a network without updates that computes the same as `network` does with this state."""
    plain = {name: tensor for name, tensor in state.items() if plain_name(name) == name}
    for name, layer in network.named_modules():
        if isinstance(layer, LowRank):
            place = name.removesuffix(".parametrizations.weight.0")
            original, a, b = (state[f"{place}{part}"] for part in (_ORIGINAL, f"{_PARTS}a", f"{_PARTS}b"))
            plain[f"{place}.weight"] = original + layer.scale * (b @ a).view_as(original)
    return plain
