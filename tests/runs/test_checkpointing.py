"""Checkpoints are of the epochs that they say, however seldom they are written."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from tests.conftest import Compose
from tests.engine.test_trainer import Setting
from tlcli.cli import main
from tlcli.engine.metrics import evaluate, scores
from tlcli.reporter import Reporter
from tlcli.runs import checkpointing, recorder
from tlcli.runs.checkpointing import load_state, save_weights, trainable_state
from tlcli.runs.run_dir import confusion_matrix, read_json, stored_confusion


@pytest.fixture
def network() -> nn.Sequential:
    """Return a network of a frozen convolution, a norm and a head."""
    own = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    own[0].requires_grad_(False)
    return own


def test_weights_of_an_earlier_epoch_are_written_when_the_network_has_moved_on(
    network: nn.Sequential, tmp_path: Path
) -> None:
    """What training changes is copied: parameters that train, and buffers."""
    wanted = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    taken = {name: tensor.clone() for name, tensor in trainable_state(network).items()}
    assert wanted.keys() - taken.keys() == {"0.weight", "0.bias"}
    with torch.no_grad():
        for tensor in trainable_state(network).values():
            tensor.add_(1)
    save_weights(tmp_path / "then.safetensors", network, {"epoch": 3}, instead=taken)
    save_weights(tmp_path / "now.safetensors", network, {"epoch": 4})
    then, now = (load_file(tmp_path / f"{name}.safetensors") for name in ("then", "now"))
    assert then.keys() == now.keys() == wanted.keys()
    assert all(torch.equal(then[name], wanted[name]) for name in wanted)
    assert all(torch.equal(now[name], tensor) for name, tensor in network.state_dict().items())
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []  # no temporary files


def epoch_of(checkpoint: Path) -> int:
    with safe_open(checkpoint, framework="pt") as content:
        return int(json.loads(content.metadata()["tlcli"])["epoch"])


WORDS = ("image.size=32", "device.precision=fp32", "freeze=head", "optimizer=sgd", "optimizer.lr=0.3", "epochs=9",
         "keep_best=loss", "freeze.head_init=random", "dataset=imagefolder")  # fmt: skip


@pytest.fixture
def quick(tmp_path: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Return a run whose epochs are shorter than the writing of a checkpoint, which may take `share` of the time."""

    def run(share: float, *overrides: str) -> Path:
        written: list[Any] = []
        monkeypatch.setattr(recorder.Recorder, "_plot", lambda *args: None)
        monkeypatch.setattr(checkpointing, "MAX_TIME_SHARE", share)
        save = checkpointing.save_weights
        with monkeypatch.context() as patch:
            patch.setattr(checkpointing, "save_weights", lambda *a, **k: written.append(a) or save(*a, **k))
            out = tmp_path / f"share{share:g}"
            assert main(["train", f"hydra.run.dir='{out}'", f"dataset.root='{shapes}'", *WORDS, *overrides]) == 0
        assert len(written) <= 3 if share < 1 else len(written) >= 9
        return out

    return run


@pytest.mark.slow
def test_seldom_written_checkpoints_are_those_of_every_epoch(
    quick: Callable[..., Path], spec: Compose, shapes: Path
) -> None:
    seldom, often = (quick(share, "checkpoint.keep_state=true") for share in (1e-9, 1e9))
    record = read_json(seldom / "run.json")
    assert epoch_of(seldom / "checkpoints/best.safetensors") == record["best"]["epoch"]
    assert epoch_of(seldom / "checkpoints/last.safetensors") == 9
    for name in ("best", "last"):
        one, other = ((run / f"checkpoints/{name}.safetensors").read_bytes() for run in (seldom, often))
        assert one == other
    state, other_state = (load_state(run / "checkpoints/state.safetensors") for run in (seldom, often))
    assert state["epoch"] == other_state["epoch"] == 9
    assert state["trainer"]["step"] == other_state["trainer"]["step"]

    setting = Setting(spec(*WORDS, f"dataset.root='{shapes}'"))
    setting.model.network.load_state_dict(load_file(seldom / "checkpoints/best.safetensors"))
    found = scores(
        evaluate(
            setting.model.network, setting.opened.open("val", Reporter()), setting.device, Reporter(), "validation"
        )
    )
    assert found.loss == pytest.approx(record["best"]["loss"], rel=1e-5)


@pytest.mark.slow
def test_the_best_epoch_is_not_the_last_where_training_does_harm(quick: Callable[..., Path]) -> None:
    run = quick(1e-9, "label_smoothing=0.9", "freeze.head_init=probe")
    record = read_json(run / "run.json")
    best, last = (run / f"checkpoints/{name}.safetensors" for name in ("best", "last"))
    assert epoch_of(best) == record["best"]["epoch"] < epoch_of(last) == 9
    assert not torch.equal(load_file(best)["classifier.weight"], load_file(last)["classifier.weight"])
    assert read_json(run / "test.json")["epoch"] == record["best"]["epoch"]


@pytest.mark.parametrize("links", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_last_is_best_where_the_last_epoch_was(
    quick: Callable[..., Path], links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One file of two names; two files with the same weights where the file system has no such names."""
    if not links:
        monkeypatch.setattr(checkpointing, "replace_with_hardlink", lambda path, name: False)
    run = quick(1e-9)
    best, last = (run / f"checkpoints/{name}.safetensors" for name in ("best", "last"))
    assert epoch_of(best) == epoch_of(last) == 9
    assert best.samefile(last) == links
    one, other = load_file(best), load_file(last)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_of_many_classes_only_cells_of_the_confusion_that_are_not_zero_are_stored() -> None:
    few = [[1, 0], [2, 3]]
    assert stored_confusion(few) == few
    assert np.array_equal(confusion_matrix({"classes": ["a", "b"], "confusion": few}), few)
    many = np.zeros((300, 300), dtype=np.int64)
    many[7, 9], many[299, 0] = 4, 1
    stored = stored_confusion(many.tolist())
    assert stored == [[7, 9, 4], [299, 0, 1]]
    assert np.array_equal(confusion_matrix({"classes": [str(i) for i in range(300)], "confusion": stored}), many)
    assert confusion_matrix({"classes": [str(i) for i in range(300)], "confusion": many.tolist()}).sum() == 5
