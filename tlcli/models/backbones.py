"""Networks by the kind of their spec, built with random weights: EfficientNet-Lite, torchvision's, timm's.

A new torchvision model is a YAML file under conf/backbone; a new kind of backbone is a spec and a builder here.
"""

import re
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import timm
import torchvision
from timm.models._manipulate import group_with_matcher  # timm exports only its form for parameters
from torch import nn

from tlcli.errors import UsageError
from tlcli.models.classifier import Architecture, Float32Linear, Head, Stage, within
from tlcli.specs import BackboneSpec, LiteBackboneSpec, TimmBackboneSpec, TorchvisionBackboneSpec
from tlcli.text import did_you_mean

LITE_SIZES = {"efficientnet_lite0": 224, "efficientnet_lite1": 240, "efficientnet_lite2": 260}


def build_architecture(spec: BackboneSpec, n_classes: int, size: int | None = None) -> Architecture:
    """The network of a spec for n classes and images of `size` pixels a side (None: its own), with random weights.

    Raises UsageError where the library has no such model.
    """
    return _BUILDERS[type(spec)](spec, n_classes, size)


def timm_name(spec: LiteBackboneSpec | TimmBackboneSpec) -> str:
    """The name by which timm knows this backbone."""
    return f"tf_{spec.name}" if isinstance(spec, LiteBackboneSpec) else spec.name


def build_timm(
    spec: LiteBackboneSpec | TimmBackboneSpec, n_classes: int, size: int | None, *, pretrained: bool
) -> nn.Module:
    """timm's own network; `pretrained=True` looks for its weights in timm's cache, then on the network."""
    name = timm_name(spec)
    if not timm.is_model(name):
        raise UsageError(f"backbone.name={name}: timm has no such model.{did_you_mean(name, timm.list_models())}")
    options: dict[str, Any] = {"num_classes": n_classes, "drop_rate": spec.dropout}
    config = timm.get_pretrained_cfg(name)
    if size is not None and config is not None and config.fixed_input_size:
        options["img_size"] = size  # such a model holds a table of positions, one for each patch
    return timm.create_model(name, pretrained=pretrained, **options)  # type: ignore[no-any-return]


def _timm(spec: BackboneSpec, n_classes: int, size: int | None) -> Architecture:
    assert isinstance(spec, LiteBackboneSpec | TimmBackboneSpec)
    network = build_timm(spec, n_classes, size, pretrained=False)
    head = timm_head(network)
    if not head:
        raise UsageError(f"backbone.name={spec.name}: this timm model has no classifier that can be replaced")
    for name in head:
        layer = network.get_submodule(name)
        if type(layer) is nn.Linear:
            network.set_submodule(name, Float32Linear.of(layer))
    config: dict[str, Any] = network.pretrained_cfg  # type: ignore[assignment]
    lite = isinstance(spec, LiteBackboneSpec)
    if lite and spec.name not in LITE_SIZES:
        raise UsageError(f"backbone.name={spec.name} is no EfficientNet-Lite: give {', '.join(LITE_SIZES)}")
    return Architecture(
        network=network,
        head=head,
        stages=timm_stages(network, head),
        size=LITE_SIZES[spec.name] if lite else config["input_size"][-1],
        mean=config["mean"],
        std=config["std"],
    )


def timm_head(network: nn.Module) -> tuple[str, ...]:
    """The names of the modules that are its classifier: two in distilled models, else one."""
    classifier: Any = getattr(network, "get_classifier", tuple)  # a few encoders have none
    found = classifier()
    wanted = {id(m) for m in (found if isinstance(found, tuple | list) else (found,))}
    return tuple(name for name, m in network.named_modules() if id(m) in wanted and any(True for _ in m.parameters()))


def timm_stages(network: nn.Module, head: tuple[str, ...]) -> tuple[Stage, ...]:
    """timm's own coarse groups, in order; what follows the last one (a final norm or convolution) belongs to it."""
    try:
        matcher = network.group_matcher(coarse=True)  # type: ignore[operator]
        layer_of = group_with_matcher(network.state_dict(keep_vars=True).items(), matcher, reverse=True)
    except (AssertionError, AttributeError, NotImplementedError, TypeError):  # some assert that `coarse` is False
        layer_of = dict.fromkeys(network.state_dict(), 0)
    groups: dict[int, set[str]] = defaultdict(set)
    for name, layer in layer_of.items():
        if not within(name, head):
            groups[layer].add(name)
    parameters = {name for name, _ in network.named_parameters()}
    ordered = [groups[layer] for layer in sorted(groups)]
    # Groups after the head's own place are those that no pattern matched: they stand between the last stage and head
    if len(ordered) > 1 and any(within(n, head) and layer_of[n] == max(groups) for n in layer_of):
        last = ordered.pop()
        ordered[-1] |= last
    ordered = [tensors for tensors in ordered if tensors & parameters]
    names = ["stem" if i == 0 and len(ordered) > 1 else _common_name(t, i) for i, t in enumerate(ordered)]
    head_tensors = frozenset(name for name in layer_of if within(name, head))
    return (*(Stage(n, frozenset(t)) for n, t in zip(names, ordered, strict=True)), Stage("head", head_tensors))


def _common_name(tensors: set[str], index: int) -> str:
    """The module that most of these tensors are in, as `blocks.3`, else `stage3`."""
    found: dict[str, int] = defaultdict(int)
    for name in tensors:
        if match := re.match(r"(?:[A-Za-z_]\w*\.)+?\d+(?=\.)", name):
            found[match[0]] += 1
    return max(sorted(found), key=lambda n: found[n]) if found else f"stage{index}"


def _torchvision(spec: BackboneSpec, n_classes: int, size: int | None) -> Architecture:
    assert isinstance(spec, TorchvisionBackboneSpec)
    known = torchvision.models.list_models(module=torchvision.models)
    if spec.name not in known:
        raise UsageError(f"backbone.name={spec.name}: torchvision has no such model.{did_you_mean(spec.name, known)}")
    expected = torchvision.models.get_model_weights(spec.name).DEFAULT.transforms()
    own_size = expected.crop_size[0]
    options: dict[str, Any] = {"image_size": size or own_size} if spec.name.startswith("vit_") else {}
    try:
        network = torchvision.models.get_model(spec.name, weights=None, **options)
    except AssertionError as error:  # torchvision's ViTs assert that their patches tile the image
        raise UsageError(f"image.size={size} does not suit {spec.name}: {error}") from error
    replace_head(network, spec.head, n_classes, spec.dropout)
    return Architecture(
        network=network,
        head=(spec.head,),
        stages=pattern_stages(network, spec),
        size=own_size,
        mean=tuple(expected.mean),
        std=tuple(expected.std),
    )


def replace_head(network: nn.Module, name: str, n_classes: int, dropout: float) -> None:
    """Put a new Head where the last linear layer is. The architecture's own dropouts in the same classifier are turned
    off: backbone.dropout is the only one there."""
    parent_name, _, last = name.rpartition(".")
    try:
        parent = network.get_submodule(parent_name)
        old = parent.get_submodule(last)
    except AttributeError:
        raise UsageError(f"backbone.head={name}: this model has no module of that name") from None
    if not isinstance(old, nn.Linear):
        raise UsageError(f"backbone.head={name} is no linear layer, but {type(old).__name__}")
    setattr(parent, last, Head(old.in_features, n_classes, dropout))
    if isinstance(parent, nn.Sequential):
        for module in parent:
            if isinstance(module, nn.Dropout):
                module.p = 0.0


def pattern_stages(network: nn.Module, spec: TorchvisionBackboneSpec) -> tuple[Stage, ...]:
    """The stages that the spec's regular expressions give. Raises UsageError unless each parameter is in one."""
    body = [name for name in network.state_dict() if not within(name, (spec.head,))]
    stages: list[Stage] = []
    for stage, pattern in spec.stages.items():
        try:
            stages.append(Stage(stage, frozenset(name for name in body if re.match(pattern, name))))
        except re.error as error:
            raise UsageError(f"backbone.stages.{stage}={pattern!r} is no regular expression: {error}") from error
        if not stages[-1].tensors:
            raise UsageError(f"backbone.stages.{stage}: {pattern!r} matches no parameter of {spec.name}")
    for name in body:
        owners = [stage.name for stage in stages if name in stage.tensors]
        if len(owners) != 1:
            where = f"in {' and '.join(owners)}" if owners else "in none of them"
            raise UsageError(f"backbone.stages: {spec.name}'s {name} is {where}; each belongs in one")
    head = frozenset(name for name in network.state_dict() if within(name, (spec.head,)))
    return (*stages, Stage("head", head))


_BUILDERS: dict[type[BackboneSpec], Callable[[BackboneSpec, int, int | None], Architecture]] = {
    LiteBackboneSpec: _timm,
    TimmBackboneSpec: _timm,
    TorchvisionBackboneSpec: _torchvision,
}
