"""The frozen part over many images: folded, compiled where that pays, and the same rows whichever way."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from tests.conftest import Compose, Notes
from tlcli.data.batches import Preprocessing
from tlcli.device import ComputeFormat
from tlcli.engine.extraction import NOTES, Extractor, _fold_batchnorm
from tlcli.models.build import build_model
from tlcli.reporter import Reporter
from tlcli.specs import CacheDtype, Fit
from tlcli.store import Column, Store
from tlcli.transfer.contract import apply_freeze
from tlcli.transfer.cut import Cut, split_frozen

CPU = torch.device("cpu")
SMALL = Preprocessing(size=32, fit=Fit.crop, mean=(0.5, 0.4, 0.3), std=(0.5, 0.5, 0.4))
PIXELS = torch.randint(0, 256, (32, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def cut_of(spec: Compose, *overrides: str) -> Cut:
    """Return the cut of a backbone at its head; random weights get random statistics."""
    own = spec("freeze=head", *overrides)
    model = build_model(own.backbone, ("a", "b", "c"), size=32, seed=0)
    generator = torch.Generator().manual_seed(1)
    if not model.pretrained:
        for norm in model.network.modules():
            if isinstance(norm, nn.BatchNorm2d):
                for tensor in (norm.running_mean, norm.weight.data, norm.bias.data):
                    tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.1)
                norm.running_var.mul_(0.5 + torch.rand(norm.running_var.shape, generator=generator))
    apply_freeze(own.freeze, model).train_mode()
    cut = split_frozen(model.network, 32)
    assert isinstance(cut, Cut)
    return cut


@pytest.fixture(scope="module")
def lite0(spec: Compose) -> Cut:
    return cut_of(spec)


@pytest.fixture(scope="module")
def resnet18(spec: Compose) -> Cut:
    return cut_of(spec, "backbone=resnet18", "backbone.weights=none")


@pytest.fixture(scope="module")
def resnet18_maps(spec: Compose) -> Cut:
    """Cut before the last stage."""
    return cut_of(spec, "backbone=resnet18", "backbone.weights=none", "freeze=last_stages")


def norms(network: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())


@pytest.mark.parametrize("name", ["lite0", "resnet18"])
def test_folded_batchnorm_gives_the_same(name: str, request: pytest.FixtureRequest) -> None:
    """All of it: 20 of ResNet-18's, and those of timm that have their activation inside."""
    network = request.getfixturevalue(name).prefix
    had = norms(network)
    before = [tensor.clone() for tensor in network.state_dict().values()]
    folded = _fold_batchnorm(network, SMALL)
    assert (had >= 20, norms(folded)) == (True, 0)
    with torch.inference_mode():
        (found,), (wanted,) = folded(SMALL.normalize(PIXELS)), network(SMALL.normalize(PIXELS))
    assert not torch.equal(found, wanted)  # it was computed in another way,
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())  # to the same
    assert norms(network) == had
    assert all(torch.equal(a, b) for a, b in zip(before, network.state_dict().values(), strict=True))


def test_batchnorm_is_folded_in_full_float32(lite0, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    seen = list[bool]()
    network = lite0.prefix
    hook = network.get_submodule("conv_stem").register_forward_hook(
        lambda *args: seen.append(torch.backends.cudnn.allow_tf32)
    )
    _fold_batchnorm(network, SMALL)
    hook.remove()
    assert seen == [False, False] and torch.backends.cudnn.allow_tf32


class Layers(nn.Module):
    """A convolution and a norm, in the order of a function."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], norm: nn.Module | None = None) -> None:
        super().__init__()
        self.conv, self.norm, self.how = nn.Conv2d(3, 4, 3), norm or nn.BatchNorm2d(4), forward

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (self.how(self, x),)


class Shifted(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class Tracer(fx.Tracer):
    """Has layers as leaves, as the cut has them."""

    def is_leaf_module(self, m: nn.Module, name: str) -> bool:
        return True


NOT_TRACKED = nn.BatchNorm2d(4, track_running_stats=False)
NETWORKS = {
    "called by keyword": (Layers(lambda n, x: n.norm(input=n.conv(x))), True),
    "a norm before its convolution": (Layers(lambda n, x: n.conv(torch.relu(n.norm(x))), nn.BatchNorm2d(3)), False),
    "a convolution that others read": (Layers(lambda n, x: n.norm(n.conv(x)) + n.conv(x.flip(2))), False),
    "statistics of the batch": (Layers(lambda n, x: n.norm(n.conv(x)), NOT_TRACKED), False),
    "a norm that does more": (Layers(lambda n, x: n.norm(n.conv(x)), Shifted(4)), False),
}


@pytest.mark.parametrize(("layers", "folds"), NETWORKS.values(), ids=NETWORKS)
def test_batchnorm_is_folded_only_where_that_gives_the_same(layers: Layers, folds: bool) -> None:
    whole = fx.GraphModule(layers.eval(), Tracer().trace(layers))
    folded = _fold_batchnorm(whole, SMALL)
    assert (folded is not whole) == (norms(folded) == 0) == folds
    with torch.inference_mode():
        pairs = zip(folded(SMALL.normalize(PIXELS)), whole(SMALL.normalize(PIXELS)), strict=True)
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in pairs)


# -- rows


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


@pytest.fixture
def make(store: Store) -> Callable[..., Extractor]:
    """Extractors over a cut that share a store."""

    def made(cut: Cut, dtype=torch.float32, stored: CacheDtype = CacheDtype.auto, compiled: bool = False) -> Extractor:
        extractor = Extractor("name", cut.prefix, SMALL, CPU, ComputeFormat(dtype, torch.channels_last), store, stored)
        extractor.compiled = compiled
        return extractor

    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_short_batch_gives_the_rows_of_a_full_one(dtype: torch.dtype, make, resnet18: Cut) -> None:
    extractor = make(resnet18, dtype=dtype)
    extractor.prepare(Reporter())
    assert extractor.batch_size == len(PIXELS)
    (full,) = extractor(PIXELS)
    for n in (1, 5):
        (short,) = extractor(PIXELS[:n])
        assert torch.equal(short, full[:n])


@pytest.mark.parametrize(
    ("stored", "computed", "expected"),
    [("auto", "float32", "float32"), ("auto", "bfloat16", "bfloat16"),
     ("bf16", "float32", "bfloat16"), ("fp32", "bfloat16", "float32")],
)  # fmt: skip
def test_rows_are_stored_as_they_are_computed_or_as_the_user_says(
    stored: str, computed: str, expected: str, make, resnet18_maps: Cut
) -> None:
    extractor = make(resnet18_maps, getattr(torch, computed), CacheDtype(stored))
    assert extractor.columns == (Column(expected, (2, 2, 256)),)  # a map, its channels last
    extractor.prepare(Reporter())
    (rows,) = extractor(PIXELS[:3])
    assert rows.is_contiguous()
    assert (rows.dtype, rows.shape) == (getattr(torch, expected), (3, 2, 2, 256))
    with torch.inference_mode():
        (plain,) = resnet18_maps.prefix(SMALL.normalize(PIXELS[:3]))
    wanted = plain.permute(0, 2, 3, 1)
    far = (rows.float() - wanted).norm() / wanted.norm()
    assert far < (1e-5 if expected == computed == "float32" else 2e-2)


# -- compiling


def works(rows: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(t * (1 + 1e-7) for t in rows)


def is_wrong(rows: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(t * 1.1 for t in rows)


def fails(rows: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    raise RuntimeError("no C++ compiler")


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[nn.Module]]:
    """compiler(change) replaces torch.compile: the compiled network changes the rows; returns what was compiled."""

    def put(change: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]) -> list[nn.Module]:
        compiled: list[nn.Module] = []

        def stand_in(network: nn.Module, dynamic: bool) -> Any:
            compiled.append(network)
            return lambda images: change(network(images))

        monkeypatch.setattr(torch, "compile", stand_in)
        return compiled

    return put


def test_what_compiles_gives_the_same_and_is_compiled_once(make, store: Store, resnet18: Cut, compiler) -> None:
    compiled, reporter = compiler(works), Notes()
    extractor, plain = make(resnet18, compiled=True), make(resnet18)
    for one in (extractor, extractor, plain):
        one.prepare(reporter)
    assert reporter.notes == ["extraction: compiling, about 12 s"]
    assert len(compiled) == 1
    assert extractor.reason.startswith("compiled in ")
    assert plain.reason == "BatchNorm folded"
    for n in (32, 5):
        assert torch.allclose(extractor(PIXELS[:n])[0], plain(PIXELS[:n])[0], rtol=1e-3, atol=1e-4)
    (note,) = store.read_notes(NOTES).values()
    assert note.keys() == {"seconds", "images_per_second"}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (fails, "BatchNorm folded, not compiled (RuntimeError)"),
        (is_wrong, "BatchNorm folded, not compiled: the compiled network is less exact"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_does_not_compile_runs_as_it_is(change, reason: str, dtype, make, store, resnet18, compiler) -> None:
    """It is not tried again for the next split: it would cost as long again."""
    compiled = compiler(change)
    extractor, plain = make(resnet18, dtype=dtype, compiled=True), make(resnet18, dtype=dtype)
    for one in (extractor, extractor, plain):
        one.prepare(Reporter())
    assert len(compiled) == 1
    assert extractor.reason == reason
    assert torch.equal(extractor(PIXELS)[0], plain(PIXELS)[0])
    assert store.read_notes(NOTES) == {}


def test_comparing_with_float32_may_take_too_much_memory(make, store, resnet18: Cut, compiler, monkeypatch) -> None:
    compiler(works)
    extractor, forward = make(resnet18, dtype=torch.bfloat16, compiled=True), Extractor._forward

    def limited(self: Extractor, network: Any, images: Tensor, dtype: torch.dtype | None = None) -> Any:
        if dtype == torch.float32:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, network, images, dtype)

    monkeypatch.setattr(Extractor, "_forward", limited)
    extractor.prepare(Reporter())
    assert extractor.reason == "BatchNorm folded, not compiled (OutOfMemoryError)"


def test_compiling_is_worthwhile_for_many_images_by_what_it_took_before(make, store: Store, resnet18: Cut) -> None:
    extractor = make(resnet18)
    is_worthwhile = lambda images: extractor.estimate_seconds(images, 100.0) < images / 100.0  # noqa: E731
    assert [is_worthwhile(images) for images in (6000, 8000)] == [False, True]
    for seconds, speed, images, expected in ((500, 200, 6000, False), (1, 101, 6000, False), (1, 300, 300, True)):
        store.add_note(NOTES, extractor._note_key, {"seconds": seconds, "images_per_second": speed})
        assert is_worthwhile(images) == expected
    extractor.may_compile = False
    assert not is_worthwhile(10**6)
    extractor.may_compile = True
    extractor.batch_size //= 2  # which has not been compiled yet
    assert not is_worthwhile(300)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_compile_gives_the_same_rows(dtype: torch.dtype, make, store: Store, lite0: Cut) -> None:
    """As near to float32 as the network itself comes in this format."""
    if not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))):
        pytest.skip("inductor needs a C++ compiler")
    exact, own, compiled = make(lite0), make(lite0, dtype=dtype), make(lite0, dtype=dtype, compiled=True)
    for extractor in (exact, own, compiled):
        extractor.prepare(Reporter())
    assert compiled.reason.startswith("compiled in ")
    for n in (32, 7):
        wanted, near, found = (extractor(PIXELS[:n])[0].float() for extractor in (exact, own, compiled))
        assert (found - wanted).norm() <= 2 * (near - wanted).norm() + 1e-4 * wanted.norm()
