"""Costs of freeze strategies: counts are exact, and measurements are plausible."""

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from tests.conftest import TINY, Compose, make_folder
from tlcli.data.augment import AugmentNoneSpec
from tlcli.data.dataset import load_dataset
from tlcli.device import ComputeFormat, allowed_formats
from tlcli.engine import costs, numerics
from tlcli.engine.activations import Workload
from tlcli.engine.costs import inspect
from tlcli.engine.session import session_for
from tlcli.errors import UsageError
from tlcli.reporter import Reporter
from tlcli.transfer.contract import apply_freeze

NONE = AugmentNoneSpec(erasing=0.0, mixup=0.0, cutmix=0.0)


def base(shapes: Path, *more: str) -> list[str]:
    small = ["backbone=resnet18", "image.size=32", "epochs=3", "batch_size=8"]
    return ["dataset=imagefolder", f"dataset.root={shapes}", *small, *more]


@pytest.fixture(scope="module")
def found(spec: Compose, shapes: Path) -> dict[str, Any]:
    """ResNet-18 at 32 px on shapes: 54 train, 6 val and 24 test images."""
    return inspect(spec(*base(shapes)), NONE, Reporter())


@pytest.mark.slow
def test_what_can_be_counted_is_exact(found: dict[str, Any]) -> None:
    sizes = {stage["name"]: stage["parameters"] for stage in found["stages"]}
    assert list(sizes) == ["stem", "layer1", "layer2", "layer3", "layer4", "head"]
    assert sizes["head"] == 512 * 3 + 3
    assert sum(stage["share"] for stage in found["stages"]) == pytest.approx(1)
    assert found["images"] == {"train": 54, "val": 6, "test": 24}
    costs = {cost["freeze"]: cost for cost in found["strategies"]}
    assert [name for name in costs if "stages " not in name] == ["head", "norm", "bias", "early", "none"]
    assert {f"last_stages n={n}" for n in (1, 2, 3)} <= costs.keys()
    assert costs["head"]["trainable"] == sizes["head"]
    assert costs["last_stages n=2"]["trainable"] == sizes["head"] + sizes["layer4"] + sizes["layer3"]
    assert costs["none"]["trainable"] == sum(sizes.values())
    head, last, none = costs["head"], costs["last_stages n=1"], costs["none"]
    assert (head["at"], last["at"]) == ("fc", "layer4")
    assert head["row_bytes"] in (512 * 2, 512 * 4), "in bfloat16 or float32"
    assert last["row_bytes"] in (256 * 2 * 2 * 2, 256 * 2 * 2 * 4)
    assert head["cache_bytes"] == head["row_bytes"] * (54 + 6 + 24)
    assert [none[key] for key in ("at", "row_bytes", "cache_bytes", "first_pass", "cached_epoch")] == [None] * 5
    assert "no frozen layers at the input" in str(none["why_live"])
    assert (head["takes"], head["why_live"], last["takes"]) == ("cached", None, "live")
    assert "cache.views" in str(last["why_live"]), "it trains on random crops"
    assert head["cached_epoch"] == 0 < none["live_epoch"] < 600, "a linear layer takes next to no time"
    assert head["total"] >= head["first_pass"] > 0
    assert none["total"] >= 3 * none["live_epoch"]


@pytest.fixture
def ten_per_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set all measured speeds to 10 images per second."""

    def fastest(workload: Workload, *args: object, only: ComputeFormat | None = None, **options: object):
        option = only or allowed_formats(workload.spec.device, workload.accelerator)[0]
        return replace(option, images_per_second=10.0)

    monkeypatch.setattr(numerics, "_fastest", fastest)


@pytest.mark.slow
@pytest.mark.usefixtures("ten_per_second")
def test_seconds_follow_from_speeds(spec: Compose, shapes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = spec(*base(shapes, "freeze=last_stages", "freeze.n=4", "augment=none"))
    found = inspect(own, NONE, Reporter())
    assert [strategy["freeze"] for strategy in found["strategies"]][1:5] == [f"last_stages n={n}" for n in (1, 2, 3, 4)]
    assert all(strategy["takes"] == "cached" for strategy in found["strategies"][:5]), "there is no augmentation"
    assert found["strategies"][-1]["live_epoch"] == pytest.approx((54 + 6) / 10)
    assert found["strategies"][1]["cached_epoch"] == pytest.approx((54 + 6) / 10)
    monkeypatch.setattr("tlcli.data.dataset.MIN_VALIDATION_IMAGES", 200)
    specs = spec(*base(shapes, "augment=none")), spec(*base(shapes, "augment=none", "interpolate=1"))
    totals = [inspect(own, NONE, Reporter())["strategies"][-1]["total"] for own in specs]
    assert totals[0] - totals[1] == pytest.approx(3 * (48 + 60) / 10, abs=0.1), (
        "a first fit on 48 of 60 images, and a second one on all"
    )


def test_the_network_stays_as_it_is(spec: Compose, shapes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numerics, "MEASURE_SECONDS", 0.0)
    monkeypatch.setattr(numerics, "BATCH_SECONDS", 0.0)
    own = spec(*base(shapes, "backbone.weights=none", "device.precision=fp32", "device.channels_last=true"))
    session, accelerator = session_for(own.cache), torch.device("cpu")
    model = session.model(own.backbone, ("a", "b", "c"), size=32, seed=0)
    before = {name: tensor.clone() for name, tensor in model.network.state_dict().items()}
    data = load_dataset(own.dataset, seed=0, reporter=Reporter(), decode=False)
    workload = Workload(data, model, apply_freeze(own.freeze, model), own, accelerator, session)
    assert costs.estimate_cost(workload, numerics.measure_network(workload))[0]["live_epoch"] > 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.network.state_dict().items())


def test_nothing_is_downloaded(spec: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "setup_process", lambda device: torch.device("cpu"))
    download = Mock()
    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", download)
    with pytest.raises(UsageError, match="cifar10: not found under"):
        inspect(spec("dataset=cifar10", f"dataset.root='{tmp_path}'"), NONE, Reporter())
    download.assert_not_called()


@pytest.mark.usefixtures("ten_per_second")
def test_images_that_do_not_decode_are_left_out_of_the_sample(spec: Compose, tmp_path: Path, monkeypatch) -> None:
    for split in ("train", "val", "test"):
        make_folder(tmp_path / split, {"across": 4, "down": 4}, seed=len(split))
    first, *others = sorted((tmp_path / "train").rglob("*.png"))
    first.write_bytes(b"damaged")
    monkeypatch.setattr(costs, "setup_process", lambda device: torch.device("cpu"))
    words = ("dataset=imagefolder", f"dataset.root='{tmp_path}'", "dataset.on_bad=skip", *TINY, "image.size=32")
    assert inspect(spec(*words), NONE, Reporter())["images"]["train"] == 8
    for file in others:
        file.write_bytes(b"damaged")
    with pytest.raises(UsageError, match="no image of a sample of 64 decodes"):
        inspect(spec(*words), NONE, Reporter())
