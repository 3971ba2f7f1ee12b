"""The options of `optimizer`: a new one is a decorated class here, which imports without torch, and a YAML file."""

from typing import TYPE_CHECKING, Any

from tlcli.specs import FractionBelowOne, OptimizerSpec, option

if TYPE_CHECKING:
    from torch.optim import Optimizer


@option
class AdamWSpec(OptimizerSpec, frozen=True, tag="adamw"):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019)."""

    betas: tuple[FractionBelowOne, FractionBelowOne]

    def build(self, groups: list[dict[str, Any]]) -> "Optimizer":
        from torch.optim import AdamW

        # fused: on a CPU a step on a small head takes three quarters of the time of the loop over tensors
        return AdamW(groups, betas=self.betas, fused=True)


@option
class AdamSpec(AdamWSpec, frozen=True, tag="adam"):
    """Adam (Kingma and Ba 2015)."""

    def build(self, groups: list[dict[str, Any]]) -> "Optimizer":
        from torch.optim import Adam

        return Adam(groups, betas=self.betas, fused=True)


@option
class SgdSpec(OptimizerSpec, frozen=True, tag="sgd"):
    """Stochastic gradient descent with momentum."""

    momentum: FractionBelowOne
    nesterov: bool

    def __post_init__(self) -> None:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov=true needs optimizer.momentum above 0")

    def build(self, groups: list[dict[str, Any]]) -> "Optimizer":
        from torch.optim import SGD

        return SGD(groups, lr=self.lr, momentum=self.momentum, nesterov=self.nesterov)
