"""Cached and uncached training agree: same seed, same order, the same weights except for rounding.

Observed in float32: bitwise identical with BatchNorm as it is (6e-8 for the head alone, whose gradient is a formula);
9e-6 under SGD with BatchNorm folded, 9e-4 if that turns a ReLU on; 2.4e-4 from a probe; 5e-5 under AdamW.
"""

from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import TINY, Compose, finish
from tests.engine.test_trainer import Setting
from tlcli.engine import extraction
from tlcli.runs.run_dir import RunDir, read_json

RTOL, ATOL = 1e-3, 5e-5
NORM = 1e-3
"""Of a tensor's own, for what AdamW gives."""
Train = Callable[..., Path]

LITE0 = ("backbone=efficientnet_lite0", "freeze.head_init=random")
RESNET = ("backbone=resnet18", "backbone.weights=none", "freeze.bn_stats=frozen")
UPDATING = ("backbone=resnet18", "backbone.weights=none", "freeze.bn_stats=update")
SMALL = (*TINY, "freeze.bn_stats=frozen")
HEAD = ("freeze=head",)
LAST = ("freeze=last_stages", "freeze.n=1")
PATTERN = {LITE0: ("freeze=pattern", "freeze.train=['blocks\\.5']")}
PATTERN |= dict.fromkeys((RESNET, UPDATING), ("freeze=pattern", "freeze.train=['layer3']"))
PLAIN = ("augment=none",)
SGD = ("optimizer=sgd", "optimizer.lr=0.01", "device.precision=fp32", "device.channels_last=true")
VIEWS = ("augment=basic", "cache.views=2", "image.train_size=48")


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shapes: Path) -> Train:
    """train("freeze=head"): a run of two epochs on the shapes at 32 px; its directory."""
    monkeypatch.chdir(tmp_path)
    runs = (tmp_path / f"run{i}" for i in count())
    words = ("dataset=imagefolder", f"dataset.root='{shapes}'", "image.size=32", "epochs=2")
    return lambda *overrides: finish(next(runs), *words, *overrides)


def both(train: Train, *overrides: str) -> tuple[Path, Path]:
    """Return the same run, cached and uncached."""
    cached, live = (train(*overrides, f"cache.mode={mode}") for mode in ("require", "off"))
    assert read_json(cached / "run.json")["cache"]["used"] is True
    assert read_json(live / "run.json")["cache"]["used"] is False
    return cached, live


@pytest.fixture(autouse=True)
def cold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use a new cache for each test: folded and unfolded activations have one key."""
    monkeypatch.setenv("TLCLI_CACHE", str(tmp_path / "cold"))


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints/last.safetensors")


def assert_same_course(cached: Path, live: Path) -> None:
    """Assert the same epochs, losses, selected epoch and test metrics."""
    for row, wanted in zip(RunDir(cached).metrics(), RunDir(live).metrics(), strict=True):
        assert [row[key] for key in ("split", "epoch", "step")] == [wanted[key] for key in ("split", "epoch", "step")]
        assert row["loss"] == pytest.approx(wanted["loss"], rel=1e-3, abs=1e-4)
    assert read_json(cached / "run.json")["best"]["epoch"] == read_json(live / "run.json")["best"]["epoch"]
    assert read_json(cached / "test.json")["accuracy"] == read_json(live / "test.json")["accuracy"]


def assert_close(cached: Path, live: Path, *, rtol: float, atol: float) -> None:
    one, other = weights(cached), weights(live)
    assert one.keys() == other.keys()
    for name, tensor in other.items():
        assert torch.allclose(one[name].float(), tensor.float(), rtol=rtol, atol=atol), name


def cases() -> Iterator[Any]:
    """Yield every kind of boundary with every backbone, as images are and in views in turn; a small one is not slow."""
    yield pytest.param(SMALL, ("freeze=pattern", "freeze.train=['blocks\\.3']"), VIEWS, id="small")
    for i, backbone in enumerate((LITE0, RESNET, UPDATING)):
        for j, freeze in enumerate((HEAD, LAST, PATTERN[backbone])):
            case = backbone, freeze, (VIEWS, PLAIN)[(i + j) % 2]
            yield pytest.param(*case, marks=pytest.mark.slow, id=" ".join(word for words in case for word in words))


@pytest.mark.parametrize(("backbone", "freeze", "augment"), list(cases()))
def test_cached_and_uncached_training_are_one_computation(backbone, freeze, augment, train: Train, monkeypatch) -> None:
    """With BatchNorm as it is, the frozen part gives what it gives in the whole network."""
    monkeypatch.setattr(extraction, "_fold_batchnorm", lambda prefix, preprocessing: prefix)
    cached, live = both(train, *backbone, *freeze, *augment, *SGD)
    assert_same_course(cached, live)
    assert_close(cached, live, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backbone", "freeze", "augment"), [(LITE0, HEAD, PLAIN), (RESNET, LAST, VIEWS)], ids=lambda words: words[-1]
)
def test_folded_batchnorm_changes_weights_by_rounding_alone(backbone, freeze, augment, train: Train) -> None:
    cached, live = both(train, *backbone, *freeze, *augment, *SGD)
    assert "BatchNorm folded" in read_json(cached / "run.json")["extraction"]["why"]
    assert_same_course(cached, live)
    assert_close(cached, live, rtol=RTOL, atol=ATOL)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilenet_v3_small", "convnext_tiny", "vit_b_16"])
def test_other_families_of_backbones(name: str, train: Train) -> None:
    words = (f"backbone={name}", "backbone.weights=none", "epochs=1", "augment=none", "freeze.bn_stats=frozen")
    cached, live = both(train, *words, "freeze=last_stages", *SGD)
    assert_same_course(cached, live)
    assert_close(cached, live, rtol=RTOL, atol=ATOL)


@pytest.mark.slow
def test_the_defaults_give_the_same_but_for_rounding(train: Train) -> None:
    """A head from the probe, AdamW."""
    cached, live = both(train, *LAST, *PLAIN, "device.precision=fp32")
    assert_same_course(cached, live)
    one = weights(cached)
    for name, tensor in weights(live).items():
        assert (one[name].float() - tensor.float()).norm() <= NORM * tensor.float().norm(), name


def test_the_leading_frozen_part_stores_nothing_for_backward(spec: Compose, shapes: Path) -> None:
    """Uncached: nothing is stored before the first module that trains."""
    words = ("dataset=imagefolder", f"dataset.root='{shapes}'", "image.size=32", "cache.mode=off", "augment=none",
             "device.precision=fp32", "device.channels_last=true", "freeze.head_init=random")  # fmt: skip
    before: dict[str, int] = {}
    total: dict[str, int] = {}
    for freeze in ("last_stages", "none"):
        setting = Setting(spec(*words, f"freeze={freeze}"))
        network, sizes = setting.model.network, [0]
        setting.contract.train_mode()
        note = lambda *_, freeze=freeze, sizes=sizes: before.update({freeze: sum(sizes)})  # noqa: E731
        network.get_submodule("blocks.6").register_forward_pre_hook(note)
        pack = lambda t, sizes=sizes: sizes.append(t.nbytes) or t  # noqa: E731
        (x, _) = next(setting.train.epoch(1))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            network(*x)
        total[freeze] = sum(sizes)
    assert before["last_stages"] == 0 < before["none"]
    assert 0 < total["last_stages"] < total["none"] / 4
