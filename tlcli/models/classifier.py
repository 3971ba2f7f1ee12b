"""A classifier: a network, the names of its parts from input to output, and what its weights expect of images."""

import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tlcli.errors import UsageError
from tlcli.specs import Fit
from tlcli.text import did_you_mean


@dataclass(frozen=True)
class Stage:
    """A named run of layers: the names of the tensors (parameters and buffers) that it holds."""

    name: str
    tensors: frozenset[str]


@dataclass(frozen=True)
class Classifier:
    """A network of images (B, 3, S, S) to logits (B, classes), and what is known of it."""

    name: str
    network: nn.Module
    head: tuple[str, ...]  # the modules that map features to logits
    stages: tuple[Stage, ...]  # from input to output, the last is the head; every parameter is in exactly one
    size: int  # as mean, std and fit, what its weights expect of images
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    fit: Fit = Fit.crop
    classes: tuple[str, ...] = ()
    pretrained: frozenset[str] = frozenset()  # the tensors that were loaded
    head_loaded: bool = False  # if the head was among them, with a row for each class
    known_rows: tuple[int, ...] = ()  # the classes whose rows of the head were among them
    lost_classes: tuple[str, ...] = ()  # classes of the weights that are not among `classes`
    notes: tuple[str, ...] = ()  # lines for the plan

    def parameter_names(self) -> frozenset[str]:
        return frozenset(name for name, _ in self.network.named_parameters())

    def head_parameters(self) -> frozenset[str]:
        return self.stages[-1].tensors & self.parameter_names()


class InFloat32(nn.Module):
    """Base class of layers that compute in float32 under autocast too: in bfloat16 the logits of many classes tie."""

    def forward(self, features: Tensor) -> Tensor:
        if not torch.is_autocast_enabled(features.device.type):
            return super().forward(features)  # type: ignore[no-any-return]
        with torch.autocast(features.device.type, enabled=False):
            return super().forward(features.float())  # type: ignore[no-any-return]


class Float32Linear(InFloat32, nn.Linear):
    """A linear layer in float32."""


def compute_in_float32(classifier: nn.Module) -> None:
    """Make each linear layer and convolution of a classifier an InFloat32; it keeps all else that its class does."""
    for layer in classifier.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            base = type(layer)
            in_float32 = type(f"Float32{base.__name__}", (InFloat32, base), {})
            layer.__class__ = Float32Linear if base is nn.Linear else in_float32


class Head(Float32Linear):
    """Dropout, then a linear layer; its tensors are those of nn.Linear, whatever the dropout."""

    def __init__(self, in_features: int, out_features: int, dropout: float) -> None:
        super().__init__(in_features, out_features)
        self.dropout = dropout

    def forward(self, features: Tensor) -> Tensor:
        return super().forward(F.dropout(features, self.dropout, self.training))


def head_modules(network: nn.Module) -> tuple[Any, ...]:
    """Return the modules that a timm network names as its classifier: two in distilled models; none in others."""
    classifier: Any = getattr(network, "get_classifier", tuple)()  # a few encoders have none
    return tuple(classifier) if isinstance(classifier, tuple | list) else (classifier,)


def is_inside(name: str, modules: Iterable[str]) -> bool:
    """Return True if a tensor of this name belongs to one of these modules."""
    return any(name.startswith(module + ".") for module in modules)


def match_names(
    key: str, patterns: Iterable[str], names: Collection[str], stages: Iterable[str] = (), match: Any = re.search
) -> set[str]:
    """Return the names that one of these regular expressions matches. Raise UsageError for one without a match."""
    matched: set[str] = set()
    for pattern in patterns:
        try:
            matches = {name for name in names if match(pattern, name)}
        except re.error as error:
            raise UsageError(f"{key}: {pattern!r} is not a regular expression: {error}") from error
        if not matches:
            hint = did_you_mean(pattern, [*stages, *sorted(names)])
            raise UsageError(f"{key}: {pattern!r} matches no parameter.{hint}")
        matched |= matches
    return matched


def check_state_dict(state: dict[str, Tensor], network: nn.Module, source: str, optional: Collection[str] = ()) -> None:
    """Raise UsageError for the first tensor that is missing, unknown, of another shape, or not finite."""
    expected = network.state_dict()
    for name in {**expected, **state}:
        if name not in expected:
            problem = f"unknown tensor {name}"
        elif name not in state:
            if name in optional or name.endswith("num_batches_tracked"):
                continue
            problem = f"no tensor {name}"
        elif state[name].shape != expected[name].shape:
            shape, expected_shape = ("x".join(map(str, tensors[name].shape)) for tensors in (state, expected))
            problem = f"{name} is {shape}, not {expected_shape}"
        elif state[name].is_complex():
            problem = f"{name} has complex numbers"
        elif not state[name].to(expected[name].dtype).isfinite().all():  # float64 holds more than float32
            problem = f"{name} has values that are not finite"
        else:
            continue
        raise UsageError(f"{source}: {problem}; are the weights damaged, or of another architecture?")


def count(parameters: Iterable[Tensor]) -> int:
    return sum(p.numel() for p in parameters)


@contextmanager
def eval_mode(network: nn.Module) -> Iterator[None]:
    """Set eval mode in the block, and restore the mode of every module after it."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
