"""A small finished run that the tests of one module share."""

from pathlib import Path

import pytest

from tests.conftest import make_folder
from tlcli.cli import main
from tlcli.runs.load import LoadedRun, load_run


def small_run(folder: Path, *overrides: str) -> Path:
    """A run of an untrained network on images of its own, in a folder; its directory."""
    make_folder(folder / "images/train", {"ants": 10, "bees `x`": 10, "wasps": 10})
    make_folder(folder / "images/test", {"ants": 6, "bees `x`": 6, "wasps": 6}, seed=1)
    words = ["dataset=imagefolder", f"dataset.root='{folder}/images'", "backbone.weights=none", "image.size=32"]
    words += ["epochs=1", "freeze=head", "cache.mode=off", "device.precision=fp32", "device.channels_last=false"]
    assert main(["train", *words, *overrides, f"hydra.run.dir='{folder}/run'"]) == 0
    return folder / "run"


@pytest.fixture(scope="session")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a torchvision network that timm has too."""
    return small_run(tmp_path_factory.mktemp("a place"), "backbone=resnet18")


@pytest.fixture(scope="session")
def mobilenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That of a network of timm's."""
    return small_run(tmp_path_factory.mktemp("timm"), "backbone=timm", "backbone.name=mobilenetv3_small_050")


@pytest.fixture(scope="session")
def loaded(resnet: Path) -> LoadedRun:
    return load_run(resnet)
