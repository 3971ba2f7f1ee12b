"""What each way of freezing costs: what can be counted is exact, and what is measured is sane."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import Compose
from tlcli.data.augment import AugmentNoneSpec
from tlcli.data.dataset import load_without_decoding
from tlcli.engine import costs
from tlcli.engine.activations import Workload
from tlcli.engine.costs import Inspection, StrategyCost, inspect
from tlcli.engine.session import session_for
from tlcli.models.build import build_model
from tlcli.reporter import Reporter
from tlcli.specs import TrainSpec
from tlcli.transfer.contract import apply_freeze

NONE = AugmentNoneSpec(erasing=0.0)


def base(shapes: Path, *more: str) -> list[str]:
    small = ["backbone=resnet18", "image.size=32", "epochs=3", "batch_size=8"]
    return ["dataset=imagefolder", f"dataset.root={shapes}", *small, *more]


@pytest.fixture(scope="module")
def found(spec: Compose, shapes: Path) -> Inspection:
    """ResNet-18 at 32 px on shapes: 54 train, 6 val and 24 test images."""
    return inspect(spec(*base(shapes)), NONE, Reporter())


@pytest.fixture(scope="module")
def by_name(found: Inspection) -> dict[str, StrategyCost]:
    return {strategy.freeze: strategy for strategy in found.strategies}


@pytest.mark.slow
def test_stages_are_the_networks(found: Inspection) -> None:
    assert [stage.name for stage in found.stages] == ["stem", "layer1", "layer2", "layer3", "layer4", "head"]
    assert found.stages[-1].parameters == 512 * 3 + 3
    assert sum(stage.share for stage in found.stages) == pytest.approx(1)
    assert found.images == {"train": 54, "val": 6, "test": 24}


@pytest.mark.slow
def test_every_strategy_is_there(by_name: dict[str, StrategyCost]) -> None:
    last = [f"last_stages n={n}" for n in (1, 2, 3)]
    assert list(by_name) == ["head", *last, "norm", "bias", "none"]


@pytest.mark.slow
def test_what_trains_is_counted(found: Inspection, by_name: dict[str, StrategyCost]) -> None:
    sizes = {stage.name: stage.parameters for stage in found.stages}
    assert by_name["head"].trainable == sizes["head"]
    assert by_name["last_stages n=2"].trainable == sizes["head"] + sizes["layer4"] + sizes["layer3"]
    assert by_name["none"].trainable == sum(sizes.values())


@pytest.mark.slow
def test_cuts_and_what_crosses_them(by_name: dict[str, StrategyCost]) -> None:
    head, last = by_name["head"], by_name["last_stages n=1"]
    assert (head.at, last.at) == ("fc", "layer4")
    assert head.row_bytes in (512 * 2, 512 * 4), "in bfloat16 or float32"
    assert last.row_bytes in (256 * 2 * 2 * 2, 256 * 2 * 2 * 4)
    assert head.cache_bytes == head.row_bytes * (54 + 6 + 24)  # type: ignore[operator]
    none = by_name["none"]
    assert (none.at, none.row_bytes, none.cache_bytes, none.first_pass, none.cached_epoch) == (None,) * 5
    assert "no frozen layers at the input" in str(none.why_live)


@pytest.mark.slow
def test_what_train_would_do(by_name: dict[str, StrategyCost]) -> None:
    assert (by_name["head"].takes, by_name["head"].why_live) == ("cached", None)
    assert by_name["last_stages n=1"].takes == "live"
    assert "cache.views" in str(by_name["last_stages n=1"].why_live), "it trains on random crops"


@pytest.mark.slow
def test_times_are_of_that_order(by_name: dict[str, StrategyCost]) -> None:
    head, none = by_name["head"], by_name["none"]
    assert 0 < head.cached_epoch < head.live_epoch < 600  # type: ignore[operator]
    assert head.cached_epoch < none.live_epoch < 600  # by how much head.live_epoch is less, a busy machine hides
    assert head.total >= head.first_pass + 3 * head.cached_epoch  # type: ignore[operator]
    assert none.total >= 3 * none.live_epoch


@pytest.mark.slow
def test_the_specs_own_strategy_is_among_them_and_seconds_follow_from_speeds(
    spec: Compose, shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(costs, "measure_throughput", lambda step, most, *more: (most, 10.0))
    own = spec(*base(shapes, "freeze=last_stages", "freeze.n=4", "augment=none"))
    found = inspect(own, NONE, Reporter())
    assert [strategy.freeze for strategy in found.strategies][1:5] == [f"last_stages n={n}" for n in (1, 2, 3, 4)]
    assert all(strategy.takes == "cached" for strategy in found.strategies[:5]), "there is no augmentation"
    assert found.strategies[-1].live_epoch == pytest.approx((54 + 6) / 10)
    assert found.strategies[1].cached_epoch == pytest.approx((54 + 6) / 10)


def test_weights_stay_as_they_are(spec: Compose, shapes: Path) -> None:
    own = spec(*base(shapes, "backbone.weights=none"))
    model = build_model(own.backbone, ("a", "b", "c"), size=32, seed=0)
    before = {name: tensor.clone() for name, tensor in model.network.state_dict().items()}
    _one_epoch(own, model)
    after = model.network.state_dict()
    moved = [name for name, t in before.items() if not torch.allclose(after[name].float(), t.float(), atol=1e-8)]
    assert moved, "BatchNorm statistics of random weights train"
    assert all("running" in name or "num_batches" in name for name in moved)


def _one_epoch(spec: TrainSpec, model) -> None:  # type: ignore[no-untyped-def]
    data = load_without_decoding(spec.dataset, seed=0, reporter=Reporter())
    session = session_for(spec.cache)
    workload = Workload(data, model, apply_freeze(spec.freeze, model), spec, torch.device("cpu"), session)
    costs.CostMeter(replace(data, train=data.train.take(np.arange(8))), 0.0).uncached(workload)


@pytest.mark.parametrize("seconds", [0.001, 0.06, 0.3])
def test_speed_takes_as_many_images_as_there_is_time_for(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the clock: an image takes so many seconds."""
    now = 0.0

    def step(n: int) -> None:
        nonlocal now
        now += n * seconds

    monkeypatch.setattr(costs.time, "perf_counter", lambda: now)
    n, per_second = costs.measure_throughput(step, 32)
    assert per_second == pytest.approx(1 / seconds)
    assert n == (32 if seconds == 0.001 else 8)
    assert now <= 3 * costs.MAX_STEP_SECONDS or n == costs.WARMUP_IMAGES
