"""The options of `freeze`, in the order of `tlcli inspect`: classes, which import without torch, and YAML files."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar

from tlcli.errors import UsageError
from tlcli.specs import Count, FreezeSpec, OpenFraction, Positive, option
from tlcli.text import did_you_mean

if TYPE_CHECKING:
    from tlcli.models.classifier import Classifier

MAX_SHOWN_STAGES = 3  # of last_stages in `tlcli inspect`, besides the n of the config


@option
class HeadSpec(FreezeSpec, frozen=True, tag="head"):
    """Only the head trains: a linear probe."""

    part: ClassVar[str] = "only its head"

    def trainable(self, classifier: "Classifier") -> frozenset[str]:
        return classifier.head_parameters()


@option
class LastStagesSpec(FreezeSpec, frozen=True, tag="last_stages"):
    """The head and the last n stages train."""

    n: Count

    part: ClassVar[str] = "its head and last stages"

    @classmethod
    def variants(cls, own: FreezeSpec, classifier: "Classifier") -> Iterator[FreezeSpec]:
        own_n = {own.n} if isinstance(own, LastStagesSpec) else set()
        for n in sorted({*range(1, min(MAX_SHOWN_STAGES, len(classifier.stages) - 1) + 1), *own_n}):
            yield cls(bn_stats=own.bn_stats, head_init=own.head_init, n=n)

    def trainable(self, classifier: "Classifier") -> frozenset[str]:
        *body, head = classifier.stages
        if self.n > len(body):
            names = ", ".join(stage.name for stage in body)
            raise UsageError(f"freeze.n={self.n}: {classifier.name} has {len(body)} stages before its head ({names})")
        last = (*body[len(body) - self.n :], head)
        return classifier.parameter_names() & frozenset().union(*(stage.tensors for stage in last))


@option
class StagesSpec(FreezeSpec, frozen=True, tag="stages"):
    """The head and exactly the named stages train: surgical fine-tuning (Lee et al. 2023)."""

    stages: tuple[str, ...]

    part: ClassVar[str] = "its head and the stages that the config names"

    def trainable(self, classifier: "Classifier") -> frozenset[str]:
        return classifier.head_parameters() | (classifier.parameter_names() & _tensors_of(self.stages, classifier))


@option
class LoraSpec(FreezeSpec, frozen=True, tag="lora"):
    """The head and low-rank updates of linear layers and 1x1 convolutions train (Hu et al. 2021)."""

    rank: Count
    alpha: Positive
    stages: tuple[str, ...] | None

    part: ClassVar[str] = "its head and low-rank updates"
    interpolates: ClassVar[bool] = False  # they are products

    def trainable(self, classifier: "Classifier") -> frozenset[str]:
        from tlcli.transfer.lora import add_low_rank

        stages = [stage.name for stage in classifier.stages[:-1]] if self.stages is None else self.stages
        updates = add_low_rank(classifier.network, _tensors_of(stages, classifier), self.rank, self.alpha)
        if not updates:
            where = "" if self.stages is None else f" in {', '.join(self.stages)}"
            raise UsageError(f"freeze=lora: {classifier.name} has no linear layers or 1x1 convolutions{where}")
        return classifier.head_parameters() | updates


def _tensors_of(stages: Sequence[str], classifier: "Classifier") -> frozenset[str]:
    """Return the tensors of the stages with these names, of which the head is none. Raise UsageError for others."""
    tensors = {stage.name: stage.tensors for stage in classifier.stages[:-1]}
    for name in stages:
        if name not in tensors:
            hint = did_you_mean(name, tensors) or f" Its stages are {', '.join(tensors)}."
            raise UsageError(f"freeze.stages: {classifier.name} has no stage {name!r}.{hint}")
    return frozenset[str]().union(*(tensors[name] for name in stages))


@option
class PatternSpec(FreezeSpec, frozen=True, tag="pattern"):
    """The head trains, and parameters whose names match one of `train` and none of `keep`."""

    train: tuple[str, ...]
    keep: tuple[str, ...]

    part: ClassVar[str] = "its head and the parameters that a pattern names"

    def trainable(self, classifier: "Classifier") -> frozenset[str]:
        from tlcli.models.classifier import match_names

        names, stages = classifier.parameter_names(), [stage.name for stage in classifier.stages]
        train = match_names("freeze.train", self.train, names, stages)
        return classifier.head_parameters() | (train - match_names("freeze.keep", self.keep, names, stages))


@option
class NormSpec(FreezeSpec, frozen=True, tag="norm"):
    """Normalization layers and the head train."""

    part: ClassVar[str] = "its head and normalization layers"

    def trainable(self, classifier: "Classifier") -> frozenset[str]:
        modules, names = classifier.network.named_modules(), classifier.parameter_names()
        # of torch's classes and of others: RMSNorm; the network itself, which has no name, is none
        norms = {name for name, module in modules if name and "norm" in type(module).__name__.lower()}
        return classifier.head_parameters() | {name for name in names if name.rpartition(".")[0] in norms}


@option
class BiasSpec(FreezeSpec, frozen=True, tag="bias"):
    """Biases and the head train."""

    part: ClassVar[str] = "its head and biases"

    def trainable(self, classifier: "Classifier") -> frozenset[str]:
        names = classifier.parameter_names()
        # also in_proj_bias of torch.nn.MultiheadAttention, and q_bias and v_bias of timm's attention
        return classifier.head_parameters() | {name for name in names if name.endswith("bias")}


@option
class EarlySpec(FreezeSpec, frozen=True, tag="early"):
    """The early stages are frozen: those at the input with at most `share` of the body's parameters, if pretrained."""

    share: OpenFraction

    part: ClassVar[str] = "all but its early stages"

    def trainable(self, classifier: "Classifier") -> frozenset[str]:
        sizes = {name: parameter.numel() for name, parameter in classifier.network.named_parameters()}
        body = [stage.tensors & sizes.keys() for stage in classifier.stages[:-1]]
        left, trainable = self.share * sum(sizes[name] for names in body for name in names), frozenset(sizes)
        for names in body:
            left -= sum(sizes[name] for name in names)
            if left < 0 or not names <= classifier.pretrained:
                break
            trainable -= names
        return trainable


@option
class FreezeNoneSpec(FreezeSpec, frozen=True, tag="none"):
    """The whole network trains."""

    part: ClassVar[str] = "the whole network"

    def trainable(self, classifier: "Classifier") -> frozenset[str]:
        return classifier.parameter_names()
