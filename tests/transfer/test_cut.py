"""The cut: suffix(prefix(x)) is the network, in evaluation and in training, for every backbone; and where it is."""

import copy
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn import functional as F

from tests.conftest import Compose, slow
from tests.models.test_backbones import FIXED_SIZES, OTHERS, QUICK
from tests.models.test_backbones import model_of as backbone_of
from tlcli.models.classifier import Classifier, eval_mode, is_inside
from tlcli.specs import BnStats
from tlcli.transfer.contract import FreezeContract, apply_freeze
from tlcli.transfer.cut import Cut, NoCut, Splitter, split_frozen

SMALL = {"swin_t": 32, "convnext_tiny": 32, "convnext_tiny_in12k": 32, **FIXED_SIZES}
LEADING = {
    "efficientnet_lite0": "blocks.[56]",
    "timm": "layer[34]",
    "resnet18": "layer4.1.conv2",
    "efficientnet_b0": "features.[678]",
    "mobilenet_v3_small": "features.1[012]",
    "regnet_y_400mf": "block[34]",
    "swin_t": "features.[67]",
    "vit_b_16": "layer_11.mlp",
    "convnext_tiny": "features.[67]",
    "tiny_vit_21m": "stages.3.blocks.1",
    "eva02_small": "blocks.11.mlp",
}
"""Patterns of trained parameters beside the head, for a cut in the middle: one of each family."""


def model_of(spec: Compose, name: str, *overrides: str) -> Classifier:
    return backbone_of(spec, name, *overrides, size=SMALL.get(name, 64))


def cut_of(network: nn.Module, size: int = 16, trainable: frozenset[str] | None = None) -> Cut:
    cut = split_frozen(network, size, trainable)
    assert isinstance(cut, Cut), cut
    return cut


def frozen(spec: Compose, model: Classifier, *freeze: str) -> FreezeContract:
    contract = apply_freeze(spec(*freeze).freeze, model)
    contract.train_mode()
    return contract


def no_cut_reason(network: nn.Module, size: int = 16) -> str:
    cut = split_frozen(network, size)
    assert isinstance(cut, NoCut), cut
    return cut.reason


def assert_same(network: nn.Module, cut: Cut, size: int) -> None:
    """Compare logits in evaluation; logits, gradients and statistics of a training step with the same random state."""
    x = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(1))
    with eval_mode(network), torch.no_grad():
        activations = cut.prefix(x)
        assert [tuple(a.shape) for a in activations] == [(4, *shape) for shape in cut.shapes]
        close(cut.suffix(*activations), network(x))
        close(cut.suffix(*cut.prefix(x[:3])), network(x[:3]))
    copies = [a.clone() for a in activations]
    state = copy.deepcopy(network.state_dict())
    steps = []
    for forward in (lambda: network(x), lambda: cut.suffix(*activations)):
        network.load_state_dict(state)
        network.zero_grad()
        torch.manual_seed(0)
        logits = forward()
        F.cross_entropy(logits, torch.tensor([0, 1, 2, 0])).backward()
        gradients = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
        assert gradients.keys() == {name for name, p in network.named_parameters() if p.requires_grad}
        steps.append({"logits": logits.detach(), **gradients, **{n: b.clone() for n, b in network.named_buffers()}})
    for name, value in steps[0].items():
        close(steps[1][name], value, name)
    assert all(torch.equal(a, b) for a, b in zip(activations, copies, strict=True))  # the suffix has not changed them


def close(value: Tensor, expected: Tensor, name: str = "") -> None:
    """Compare up to the rounding of float32, which the batch's layout in memory can change on some processors."""
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("name", [QUICK[0], *slow(QUICK[1], *OTHERS, "timm deit_tiny_distilled_patch16_224")])
def test_every_backbone(spec: Compose, name: str) -> None:
    model, size = model_of(spec, name), SMALL.get(name, 64)
    strategies = [["freeze=head"], ["freeze=last_stages", "freeze.n=1"]]
    if name in LEADING:
        strategies.append(["freeze=pattern", f"freeze.train=['{LEADING[name]}']"])
    for freeze in strategies:
        frozen(spec, model, *freeze)
        cut = cut_of(model.network, size)
        assert_same(model.network, cut, size)
        if freeze == ["freeze=head"]:  # two in distilled models
            assert all(is_inside(f"{head}.weight", cut.suffix_start.split(", ")) for head in model.head)


def test_modules_are_those_of_the_network(spec: Compose) -> None:
    """Hooks, optimizer steps and modes of the network take effect in the suffix."""
    model = model_of(spec, "mobilenet_v3_small", "backbone.dropout=0.5")
    contract = frozen(spec, model, "freeze=head")
    cut = cut_of(model.network, 64)
    head = model.network.get_submodule("classifier.3")
    calls: list[Tensor] = []
    head.register_forward_hook(lambda module, inputs, output: calls.append(output))
    with torch.no_grad():
        activations = tuple(torch.randn_like(a) for a in cut.prefix(torch.randn(4, 3, 64, 64)))
        assert not torch.equal(cut.suffix(*activations), cut.suffix(*activations))
        model.network.eval()
        logits = cut.suffix(*activations)
        head.bias += 1.0
        close(cut.suffix(*activations), logits + 1.0)
    assert len(calls) == 4
    contract.train_mode()
    assert not torch.equal(cut.suffix(*activations), cut.suffix(*activations))


def test_prefix_has_no_training_mode(spec: Compose) -> None:
    """Features for a probe, while the whole network trains later: statistics stay and dropout is off."""
    model = model_of(spec, "mobilenet_v3_small")
    frozen(spec, model, "freeze=none", "freeze.bn_stats=update")
    cut = cut_of(model.network, 64, trainable=model.head_parameters())
    assert cut.suffix_start == "classifier.3"
    x = torch.randn(4, 3, 64, 64)
    state = copy.deepcopy(model.network.state_dict())
    with torch.no_grad():
        activations = cut.prefix(x)
        assert all(torch.equal(value, state[name]) for name, value in model.network.state_dict().items())
        model.network.eval()
        close(cut.suffix(*activations), model.network(x))


def test_channels_last_maps_cross(spec: Compose) -> None:
    model = model_of(spec, "timm")
    model.network.to(memory_format=torch.channels_last)
    frozen(spec, model, "freeze=last_stages")
    cut = cut_of(model.network, 64)
    with torch.no_grad():
        assert cut.prefix(torch.randn(2, 3, 64, 64))[0].is_contiguous(memory_format=torch.channels_last)
    assert_same(model.network, cut, 64)


def test_a_residual_block_is_cut_before_it(spec: Compose) -> None:
    """The block's input is one tensor, cheaper than the two that reach what trains inside."""
    model = model_of(spec, "resnet18")
    frozen(spec, model, "freeze=pattern", "freeze.train=['layer4.1.conv2']")
    cut = cut_of(model.network, 64)
    assert (cut.suffix_start, cut.shapes) == ("layer4.1", ((512, 2, 2),))


@pytest.mark.parametrize(
    ("freeze", "reason"),
    [
        ("freeze=none", "no frozen layers at the input: conv_stem trains"),
        ("freeze=norm", "bn1 trains, and the frozen layers before it cost less to run again than to store"),
    ],
)
def test_what_trains_near_the_input_is_named(spec: Compose, freeze: str, reason: str) -> None:
    model = model_of(spec, "efficientnet_lite0")
    frozen(spec, model, freeze)
    assert no_cut_reason(model.network, 64) == reason


Way = Callable[["Net", Tensor], Tensor]


class Net(nn.Module):
    """Two convolutions with something between them, and a head with something before it; `way` replaces forward."""

    def __init__(self, between: nn.Module | None = None, before_head: nn.Module | None = None, way: Way | None = None):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=4)
        self.between = between or nn.Identity()
        self.second = nn.Conv2d(8, 8, 3, stride=2)
        self.before_head = before_head or nn.Identity()
        self.head = nn.Linear(8, 3)
        self.factor = 1.0
        self.way = way or Net.whole

    def features(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(x) * self.factor)).mean((2, 3))

    def whole(self, x: Tensor) -> Tensor:
        return self.head(self.before_head(self.features(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.way(self, x)


def logits(network: Net, features: Tensor) -> Tensor:
    return network.head(network.second(features).mean((2, 3)))


def head_trains(network: Net) -> Net:
    network.requires_grad_(False).train()
    network.head.requires_grad_(True)
    for module in network.children():
        module.train(module is network.head or not list(module.parameters()))
    return network


PLACES: dict[str, tuple[nn.Module, str]] = {
    "dropout": (nn.Dropout(0.5), "second"),
    "dropout of nothing": (nn.Dropout(0.0), "head"),
    "stochastic depth": (DropPath(0.5), "second"),
    "statistics that are updated": (nn.BatchNorm2d(8, affine=False), "second"),
    "statistics of the batch": (nn.BatchNorm2d(8, track_running_stats=False), "between"),
}


@pytest.mark.parametrize("case", PLACES)
def test_the_cut_is_before_what_is_random_or_depends_on_the_batch(case: str) -> None:
    between, suffix_start = PLACES[case]
    network = head_trains(Net(between=between))
    cut = cut_of(network)
    assert cut.suffix_start == suffix_start
    assert_same(network, cut, 16)


def test_dropout_that_is_off_is_frozen() -> None:
    network = head_trains(Net(between=nn.Dropout(0.5)))
    assert cut_of(network, trainable=frozenset({"head.weight", "head.bias"})).suffix_start == "head"
    assert network.training
    network.between.eval()
    assert cut_of(network).suffix_start == "head"


def dropout(network: Net, x: Tensor) -> Tensor:
    """As functions, whose `training` is fixed when they are traced."""
    features = F.dropout(network.features(x), 0.5, network.training)
    if network.training:
        features = features * torch.ones_like(features).bernoulli_(0.9)
    return network.head(features)


def in_place(network: Net, x: Tensor) -> Tensor:
    x = network.first(x)
    x.mul_(2.0)
    return logits(network, x)


def shapes(network: Net, x: Tensor) -> Tensor:
    """Compute the batch size and the sides from the tensor at the cut."""
    n, _, height, width = x.shape
    features = network.features(x).reshape(n * 2, -1) / (height * width)
    return network.head(features.reshape(n, -1).reshape(x.shape[0], 8))


def constants(network: Net, x: Tensor) -> Tensor:
    """Use parameters of the network itself, one of them once per image."""
    token = network.token.sigmoid().expand(x.shape[0], -1, -1)
    both = torch.cat([network.head(network.features(x)).unsqueeze(1) @ torch.ones(3, 8), token], 1)
    return network.head(both.mean(1) + network.position)


FORWARD: dict[str, Way] = {
    "dropout as a function": dropout,
    "a later change in place": in_place,
    "shapes": shapes,
    "constants": constants,
    "a factor in training": lambda n, x: n.head(n.features(x) * (2 if n.training else 1)),
}


@pytest.mark.parametrize("case", FORWARD)
def test_forms_of_training_and_evaluation_are_both_kept(case: str) -> None:
    network = Net(way=FORWARD[case])
    network.position, network.token = nn.Parameter(torch.randn(1, 8)), nn.Parameter(torch.randn(1, 1, 8))
    attributes = set(vars(head_trains(network)))
    cut = cut_of(network)
    assert cut.shapes == ((8,),)
    assert set(vars(network)) == attributes  # tracing keeps its constants elsewhere
    assert_same(network, cut, 16)


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x


def test_a_part_that_cannot_be_traced_is_taken_whole() -> None:
    network = head_trains(Net(before_head=Branches()))
    network.second.requires_grad_(True)
    cut = cut_of(network)
    assert cut.suffix_start == "second"
    assert_same(network, cut, 16)


def behind_a_view(network: Net, x: Tensor) -> Tensor:
    """Change a tensor in place without a node in the graph."""
    x = network.first(x)
    view = x.flatten(2)
    x.mul_(2.0)
    return logits(network, view.unflatten(2, (4, 4)))


class Differs(nn.Module):
    """Not the same in training, and with no parameters it is never frozen; control flow makes it a leaf."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (2 if self.training else 3) if x.isfinite().all() else x


REFUSED: dict[str, tuple[nn.Module, str]] = {
    "branches on values": (
        Net(way=lambda n, x: n.whole(x) if x.sum() > 0 else n.head(n.features(x))),
        "cannot be traced: TraceError: symbolically traced variables",
    ),
    "one batch size": (Net(way=lambda n, x: logits(n, n.first(x).reshape(3, -1).view(-1, 8, 4, 4))), "cannot be split"),
    "place in the batch": (
        Net(way=lambda n, x: n.head(n.features(x).cumsum(0))),
        "the frozen part's values for an image depend on the other images of the batch",
    ),
    "a change behind a view": (Net(way=behind_a_view), "prefix and suffix do not give the network's logits"),
    "numbers of another generator": (
        Net(way=lambda n, x: n.whole(x) * (float(np.random.default_rng().random()) if n.training else 1.0)),
        "prefix and suffix do not train as the network does",
    ),
    "numbers drawn in forward": (
        Net(way=lambda n, x: n.whole(x) * (0.0 if random.random() < 0.5 and n.training else 1.0)),
        "cannot be traced: forward draws random numbers",
    ),
    "training differs": (Net(between=Differs()), "the frozen part gives other values in training than in evaluation"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_network_that_cannot_be_cut_has_a_reason(case: str) -> None:
    network, reason = REFUSED[case]
    assert no_cut_reason(head_trains(network)).startswith(reason)


def test_a_second_size_gives_the_same_cut_for_less_work(spec: Compose) -> None:
    model, calls = model_of(spec, "efficientnet_lite0"), []
    frozen(spec, model, "freeze=pattern", "freeze.train=['blocks.[56]']")
    model.network.register_forward_hook(lambda *_: calls.append(1))
    splitter = Splitter(model.network)
    assert isinstance(splitter.split(32), Cut)
    first = len(calls)
    second = splitter.split(64)
    assert len(calls) - first < first / 2, "compared in evaluation only"
    assert isinstance(second, Cut)
    expected = cut_of(model.network, 64)
    assert (second.shapes, second.digest()) == (expected.shapes, expected.digest())
    assert_same(model.network, second, 64)


def test_a_network_that_computes_something_else_at_a_second_size_has_no_cut_for_it() -> None:
    scale = [1.0]  # a trace fixes it
    splitter = Splitter(head_trains(Net(way=lambda n, x: n.whole(x) * scale[0])))
    assert isinstance(splitter.split(16), Cut)
    scale[0] = 2.0
    assert splitter.split(24) == NoCut("prefix and suffix do not give the network's logits")


def test_nothing_that_trains_reaches_the_output() -> None:
    assert no_cut_reason(Net().requires_grad_(False)) == "nothing that trains reaches the output"


def test_the_network_is_left_as_it_was(spec: Compose) -> None:
    model = model_of(spec, "mobilenet_v3_small")
    frozen(spec, model, "freeze=pattern", "freeze.train=['features.1[012]']", "freeze.bn_stats=update")
    network = model.network
    state = copy.deepcopy(network.state_dict())

    def everything_else() -> tuple[object, ...]:
        modules = [(name, module.training, set(vars(module))) for name, module in network.named_modules()]
        generators = torch.get_rng_state().tolist(), random.getstate()
        return modules, generators, [p.grad for p in network.parameters()], torch.is_grad_enabled()

    before = everything_else()
    assert isinstance(split_frozen(network, 64), Cut)
    assert everything_else() == before
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


def test_the_digest_is_of_the_prefix_alone(spec: Compose) -> None:
    model = model_of(spec, "mobilenet_v3_small")
    frozen(spec, model, "freeze=last_stages", "freeze.n=2")
    network = model.network
    cut, digest = cut_of(network, 64), cut_of(network, 64).digest()
    prefix = {name for name, _ in cut.prefix.named_parameters()} | {name for name, _ in cut.prefix.named_buffers()}
    assert 0 < len(prefix) < len(network.state_dict())
    for name, tensor in list(network.state_dict().items())[::9]:
        value = tensor.clone()
        tensor += 1
        assert (cut.digest() != digest) == (name in prefix), name
        tensor.copy_(value)
    assert cut.digest() == digest


def test_the_digest_knows_the_place_and_the_settings() -> None:
    def digest(change: Callable[[Net], object] = lambda network: None) -> str:
        torch.manual_seed(0)
        network = Net(nn.BatchNorm2d(8))
        change(network)
        return cut_of(head_trains(network)).digest()

    def moved(network: Net) -> None:
        network.second = nn.Sequential(network.second, nn.Identity())

    assert digest() == digest()
    assert digest(lambda n: setattr(n, "factor", 2.0)) != digest()
    assert digest(lambda n: setattr(n.between, "eps", 1e-3)) != digest()
    assert digest(lambda n: setattr(n.second, "stride", (1, 1))) != digest()
    assert digest(moved) != digest()
    network = head_trains(Net())
    early = {"second.weight", "second.bias", "head.weight", "head.bias"}
    earlier, later = (cut_of(network, trainable=frozenset(names)) for names in (early, {"head.weight"}))
    assert (earlier.suffix_start, later.suffix_start) == ("second", "head")
    assert earlier.digest() != later.digest()


FAMILIES = """
cait_xxs24_224 coat_tiny convit_tiny convnext_atto cs3darknet_focus_s cspnext_tiny dla34 dpn48b eca_botnext26ts_256
edgenext_xx_small efficientformerv2_s0 efficientvit_b0 efficientvit_m0 eva02_tiny_patch14_224 fasternet_t0 fastvit_t8
ghostnet_050 hgnetv2_b0 hrnet_w18_small inception_next_atto levit_128s mambaout_femto mobileone_s1 mobilevit_xxs
nf_resnet26 pit_xs_224 poolformer_s12 pvt_v2_b0 repghostnet_050 repvit_m0_9 rexnet_100 selecsls42 shvit_s1 skresnet18
starnet_s050 swiftformer_xs tiny_vit_5m_224 visformer_tiny vit_tiny_patch16_224 xcit_nano_12_p8_224
""".split()  # noqa: SIM905


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of timm itself
@pytest.mark.parametrize("name", FAMILIES)
def test_families_of_timm(spec: Compose, name: str) -> None:
    """At the head, and with two fifths of the parameters training."""
    model = model_of(spec, f"timm {name}", "backbone.dropout=0.1")
    names = [name for name, _ in model.network.named_parameters()]
    for share in (0.0, 0.4):
        last = {*names[len(names) - int(share * len(names)) :], *model.head_parameters()}
        for parameter_name, parameter in model.network.named_parameters():
            parameter.requires_grad_(parameter_name in last)
        FreezeContract(model, BnStats.auto).train_mode()
        assert_same(model.network, cut_of(model.network, 64), 64)
