"""Freeze strategies: which parameters train. A strategy says nothing else; the contract holds it to that."""

import re
from collections.abc import Callable, Sequence

from torch import nn

from tlcli.errors import UsageError
from tlcli.models.classifier import Classifier
from tlcli.specs import (
    BiasSpec,
    FreezeNoneSpec,
    FreezeSpec,
    HeadSpec,
    LastStagesSpec,
    NormSpec,
    PatternSpec,
)
from tlcli.text import did_you_mean


def trainable_names(spec: FreezeSpec, model: Classifier) -> frozenset[str]:
    """The names of the parameters that train under this strategy; the head's are among them.

    (`freeze.keep` alone can take a head parameter out.) Raises UsageError where the strategy names what is not there.
    """
    return _STRATEGIES[type(spec)](spec, model)


def parameter_names(model: Classifier) -> frozenset[str]:
    """The names of all parameters."""
    return frozenset(name for name, _ in model.network.named_parameters())


def _none(spec: FreezeSpec, model: Classifier) -> frozenset[str]:
    return parameter_names(model)


def _head(spec: FreezeSpec, model: Classifier) -> frozenset[str]:
    return model.head_parameters()


def _last_stages(spec: FreezeSpec, model: Classifier) -> frozenset[str]:
    assert isinstance(spec, LastStagesSpec)
    before_head = len(model.stages) - 1
    if spec.n > before_head:
        names = ", ".join(stage.name for stage in model.stages[:-1])
        raise UsageError(f"freeze.n={spec.n}: {model.name} has {before_head} stages before its head ({names})")
    last = model.stages[before_head - spec.n :]
    return parameter_names(model) & frozenset().union(*(stage.tensors for stage in last))


def _pattern(spec: FreezeSpec, model: Classifier) -> frozenset[str]:
    assert isinstance(spec, PatternSpec)
    names = parameter_names(model)
    train = _matching("freeze.train", spec.train, model)
    keep = _matching("freeze.keep", spec.keep, model)
    return (names & train | model.head_parameters()) - keep


def _matching(key: str, patterns: Sequence[str], model: Classifier) -> frozenset[str]:
    """The parameters in whose names one of the patterns is found; each pattern must be found in one at least."""
    found: set[str] = set()
    names = parameter_names(model)
    for pattern in patterns:
        try:
            matched = {name for name in names if re.search(pattern, name)}
        except re.error as error:
            raise UsageError(f"{key}: {pattern!r} is no regular expression: {error}") from error
        if not matched:
            hint = did_you_mean(pattern, [stage.name for stage in model.stages] + sorted(names))
            raise UsageError(f"{key}: {pattern!r} matches no parameter of {model.name}.{hint}")
        found |= matched
    return frozenset(found)


def _norm(spec: FreezeSpec, model: Classifier) -> frozenset[str]:
    inside = {
        f"{module_name}.{name}"
        for module_name, module in model.network.named_modules()
        if is_norm(module)
        for name, _ in module.named_parameters(recurse=False)
    }
    return model.head_parameters() | (parameter_names(model) & inside)


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalises: torch's own norm layers, and those of others by their class's name (RMSNorm)."""
    return "norm" in type(module).__name__.lower() or isinstance(
        module, nn.modules.batchnorm._BatchNorm | nn.LayerNorm | nn.GroupNorm
    )


def _bias(spec: FreezeSpec, model: Classifier) -> frozenset[str]:
    biases = {name for name in parameter_names(model) if name.rpartition(".")[2] == "bias"}
    return model.head_parameters() | biases


_STRATEGIES: dict[type[FreezeSpec], Callable[[FreezeSpec, Classifier], frozenset[str]]] = {
    FreezeNoneSpec: _none,
    HeadSpec: _head,
    LastStagesSpec: _last_stages,
    PatternSpec: _pattern,
    NormSpec: _norm,
    BiasSpec: _bias,
}
