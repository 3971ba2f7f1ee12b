"""Checkpoints are of the epochs that they say, however seldom they are written."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.conftest import slow
from tlcli.cli import main
from tlcli.runs import checkpointing
from tlcli.runs.checkpointing import load_state
from tlcli.runs.resume_state import prepare_resume
from tlcli.runs.run_dir import RunDir, read_json


def epoch_of(checkpoint: Path) -> int:
    with safe_open(checkpoint, framework="pt") as content:
        return int(json.loads(content.metadata()["tlcli"])["epoch"])


WORDS = ("image.size=32", "device.precision=fp32", "freeze=head", "optimizer=sgd", "optimizer.lr=0.3", "epochs=9",
         "keep_best=loss", "freeze.head_init=random", "dataset=imagefolder")  # fmt: skip


@pytest.fixture
def quick(tmp_path: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch, no_plots: None) -> Callable[..., Path]:
    """Return a run whose epochs are shorter than the writing of a checkpoint, which may take `share` of the time."""

    def run(share: float, *overrides: str) -> Path:
        written: list[Any] = []
        monkeypatch.setattr(checkpointing, "MAX_TIME_SHARE", share)
        save = checkpointing.write_tensors
        with monkeypatch.context() as patch:
            patch.setattr(checkpointing, "write_tensors", lambda *args: written.append(args[0].stem) or save(*args))
            out = tmp_path / f"share{share:g}"
            assert main(["train", f"hydra.run.dir='{out}'", f"dataset.root='{shapes}'", *WORDS, *overrides]) == 0
        n = len(written) - written.count("state")  # of weights
        assert n <= 3 if share < 1 else n >= 9
        return out

    return run


def test_a_run_that_goes_on_has_no_results_of_the_weights_that_it_had(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.update(status="interrupted", test={"accuracy": 1.0}, calibration={"temperature": 2.0}, unknown={"threshold": 1})
    for file in (run.test_file, run.test_predictions, run.unknown_file, run.val_predictions):
        file.touch()
    run.mark_resumed("tlcli train --resume")
    prepare_resume(run, None)
    assert {key: run.info[key] for key in ("test", "calibration", "unknown")} == dict.fromkeys(
        ("test", "calibration", "unknown")
    )
    assert {file.name for file in tmp_path.iterdir()} == {"run.json", run.val_predictions.name}


@pytest.mark.slow
def test_seldom_written_checkpoints_are_those_of_every_epoch(quick: Callable[..., Path]) -> None:
    """Training does harm here, so that the best epoch is not the last."""
    words = ("checkpoint.keep_state=true", "label_smoothing=0.9", "freeze.head_init=probe")
    seldom, often = (quick(share, *words) for share in (1e-9, 1e9))
    best = read_json(seldom / "run.json")["best"]["epoch"]
    assert read_json(seldom / "test.json")["epoch"] == best
    for name, epoch in (("best", best), ("last", 9)):
        one, other = (run / f"checkpoints/{name}.safetensors" for run in (seldom, often))
        assert (epoch_of(one), one.read_bytes()) == (epoch, other.read_bytes())
    assert best < 9
    state, other_state = (load_state(run / "checkpoints/state.safetensors") for run in (seldom, often))
    assert state["epoch"] == other_state["epoch"] == 9
    assert state["trainer"]["step"] == other_state["trainer"]["step"]


@pytest.mark.slow
@pytest.mark.parametrize("links", [True, *slow(False)])
def test_last_is_best_where_the_last_epoch_was(quick: Callable[..., Path], links: bool, monkeypatch) -> None:
    """One file of two names; two files with the same weights where the file system has no such names."""
    if not links:
        monkeypatch.setattr(checkpointing, "replace_with_hardlink", lambda path, name: False)
    run = quick(1e-9)
    best, last = (run / f"checkpoints/{name}.safetensors" for name in ("best", "last"))
    assert epoch_of(best) == epoch_of(last) == 9
    assert best.samefile(last) == links
    one, other = load_file(best), load_file(last)
    assert all(torch.equal(one[name], other[name]) for name in one)
