"""Pickles with a payload, handed in wherever tlcli reads a file: they are refused in a line, and nothing runs."""

import os
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torchvision.models import ResNet18_Weights

from tests.conftest import TINY, slow
from tests.data.samples import torchvision_spec
from tests.security.conftest import COMMANDS
from tlcli.cli import main
from tlcli.errors import TlcliError, UsageError
from tlcli.models.build import published_weights, read_weights
from tlcli.reporter import Reporter
from tlcli.runs.run_dir import RunDir


class Payload:
    """Unpickled, it makes a folder."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.canary),)


def array(value: object, path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.array([value], dtype=object), allow_pickle=True)


Way = Callable[[object, Path], object]
WAYS: dict[str, Way] = {
    "pickle": lambda value, path: path.write_bytes(pickle.dumps(value)),
    "torch.save": torch.save,
    "torch.save of old": lambda value, path: torch.save(value, path, _use_new_zipfile_serialization=False),
    "beside tensors": lambda value, path: torch.save({"state_dict": {"w": torch.ones(3)}, "more": value}, path),
    "numpy": array,
}


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


def test_a_payload_would_run(canary: Path) -> None:
    """Else the tests below would show nothing."""
    pickle.loads(pickle.dumps(Payload(canary)))
    assert canary.exists()


@pytest.mark.parametrize("name", ["evil.pth", "evil.safetensors", "evil"])
@pytest.mark.parametrize("way", WAYS)
def test_weights_with_a_payload_are_refused(way: str, name: str, canary: Path, tmp_path: Path) -> None:
    WAYS[way](Payload(canary), tmp_path / name)
    with pytest.raises(UsageError) as caught:
        read_weights(tmp_path / name)
    assert not canary.exists()
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_published_weights_of_torchvision_with_a_payload_are_refused(spec, canary, tmp_path, monkeypatch) -> None:
    """A file that is there is not compared with its digest: it may be another's."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    file = tmp_path / "hub/checkpoints" / Path(ResNet18_Weights.DEFAULT.url).name
    file.parent.mkdir(parents=True)
    WAYS["beside tensors"](Payload(canary), file)
    with pytest.raises(TlcliError, match="the weights of resnet18"):
        published_weights(spec("backbone=resnet18").backbone, Mock(), 2, 32)
    assert not canary.exists()


def test_a_torchscript_archive_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its code is no pickle, but code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch on the age of TorchScript
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "script.pt")
        monkeypatch.setattr(torch.jit, "load", lambda *args, **options: pytest.fail("the archive was run"))
        with pytest.raises(UsageError, match="cannot be read as plain tensors"):
            read_weights(tmp_path / "script.pt")


COMMANDS = COMMANDS | {
    "export": "export {run} --to timm",
    "train from it": f"train {TINY[0]} {TINY[1]} backbone.weights='{{run}}' epochs=1 dataset.train_per_class=5",
    "resume": "train --resume {run}",
}
READS_NO_WEIGHTS = {"report", "compare", "list", "inspect", "resume"}
"""Commands that may succeed on a run without usable weights; a finished run is not resumed."""
SLOW = ("inspect", "export as a graph", "train from it")


@pytest.mark.parametrize("spoilt", ["config.yaml", "torch.save", *slow("pickle")])
@pytest.mark.parametrize("command", [*sorted(COMMANDS.keys() - SLOW), *slow(*SLOW)])
def test_no_command_runs_what_a_run_directory_has_instead_of_its_files(
    command: str, spoilt: str, run: RunDir, finished: Path, shapes: Path, canary: Path, tmp_path, monkeypatch, capsys
) -> None:
    """Spoil its config, or all its files of tensors with a payload that is packed in this way."""
    monkeypatch.chdir(tmp_path)
    if spoilt == "config.yaml":
        tag = f"!!python/object/apply:os.mkdir ['{canary}']"
        target = f"{{_target_: os.mkdir, _args_: ['{canary}'], path: '{canary}'}}"
        with run.config_file.open("a") as file:
            file.write(f"\nevil: {tag}\nmore: {target}\n")
    else:
        tensors = [*run.path.rglob("*.safetensors"), *run.path.rglob("*.state")]
        assert len(tensors) >= 3
        for path in tensors:
            WAYS[spoilt](Payload(canary), path)
    image = next((shapes / "test").rglob("*.png"))
    code = main([word.format(run=run.path, other=finished, image=image) for word in COMMANDS[command].split()])
    error = capsys.readouterr().err
    assert not canary.exists()
    assert "Traceback" not in error
    if spoilt != "config.yaml":
        assert error.count("\n") <= 1
        assert code in (1, 2) or (code == 0 and command in READS_NO_WEIGHTS)


CIFAR = ("batches.meta", "test_batch", *(f"data_batch_{n}" for n in range(1, 6)))


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("CIFAR10", [f"cifar-10-batches-py/{name}" for name in CIFAR]),
        ("FashionMNIST", ["FashionMNIST/processed/training.pt", "FashionMNIST/processed/test.pt"]),
    ],
)
def test_data_sets_of_others_are_not_unpickled(name: str, files: list[str], canary: Path, tmp_path: Path) -> None:
    """CIFAR is pickles, which torchvision compares with their digests; old files of MNIST are those of torch.save."""
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        WAYS["pickle" if name == "CIFAR10" else "torch.save"](Payload(canary), tmp_path / file)
    with pytest.raises((TlcliError, pickle.UnpicklingError)):
        torchvision_spec(name, tmp_path, train={"train": True}, test={"train": False}).load(Reporter())
    assert not canary.exists()


def test_what_unpickles_unchecked_is_not_used(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unpickles"):
        torchvision_spec("LSUN", tmp_path, train={}).load(Reporter())
