"""The main path from the command line to a complete run directory, on small images."""

import json
import traceback
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from msgspec import structs
from PIL import Image
from safetensors import safe_open
from torch.nn import functional

import tlcli.train
from tests.conftest import TINY, Compose, finish
from tlcli.cli import main
from tlcli.engine.inputs import Inputs
from tlcli.engine.metrics import Predictions, Scores
from tlcli.engine.session import session_for
from tlcli.models.tensorfile import read_tensors
from tlcli.reporter import Reporter
from tlcli.runs import checkpointing
from tlcli.runs.load import load_run
from tlcli.runs.recorder import Recorder
from tlcli.runs.resume_state import read_state
from tlcli.runs.run_dir import RunDir, read_json

PACKAGE = str(Path(tlcli.__file__).parent)
RUN_KEYS = {
    "schema_version", "status", "command", "overrides", "seed", "classes", "versions", "git_commit", "machine",
    "device", "precision", "seconds", "images_per_second", "n_train", "n_val", "n_test", "parameters", "cache",
    "name", "best",
}  # fmt: skip


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shapes: Path):
    """train("freeze=head"): a run on the shapes at 32 px without plots; its directory."""
    monkeypatch.chdir(tmp_path)
    runs, words = (tmp_path / f"run{i}" for i in count()), ("dataset=imagefolder", f"dataset.root='{shapes}'")
    return lambda *overrides: finish(next(runs), *words, "image.size=32", "epochs=2", *overrides)


def test_a_run_directory_is_complete(shapes: Path, tiny: tuple[str, ...], tmp_path: Path, monkeypatch) -> None:
    depths, cross_entropy = set(), functional.cross_entropy

    def counting(*args: Any, **options: Any) -> Any:
        frames = [frame.name for frame in traceback.extract_stack() if frame.filename.startswith(PACKAGE)]
        depths.update([len(frames)] if frames[-1] == "_step" else [])
        return cross_entropy(*args, **options)

    monkeypatch.setattr(functional, "cross_entropy", counting)
    run, words = tmp_path / "run", ("dataset=imagefolder", f"dataset.root='{shapes}'", "image.size=32", "epochs=2")
    words += (*tiny, "freeze=none", "optimizer.lr=1e-4", "log_every=1")
    assert main(["train", f"hydra.run.dir='{run}'", *words]) == 0
    assert max(depths) <= 8, "frames of tlcli between main and the loss"
    record, test = read_json(run / "run.json"), read_json(run / "test.json")
    assert record.keys() >= RUN_KEYS
    assert record["status"] == "done"
    assert (record["n_train"], record["n_val"], record["n_test"]) == (54, 6, 24)
    assert record["classes"] == ["across", "checks", "down"]
    assert record["parameters"]["trainable"] == record["parameters"]["total"]
    assert record["cache"]["used"] is False
    assert "trains" in record["cache"]["why"]  # what keeps training live
    assert yaml.safe_load((run / "config.yaml").read_text())["optimizer"]["lr"] == 1e-4
    assert (run / ".hydra/overrides.yaml").exists()
    assert test["n"] == 24
    assert test["accuracy_ci95"][0] <= test["accuracy"] <= test["accuracy_ci95"][1]
    assert sum(map(sum, test["confusion"])) == 24
    assert test["epoch"] == record["best"]["epoch"]
    assert (run / test["checkpoint"]).is_file()
    assert (run / "checkpoints/last.safetensors").is_file()
    with safe_open(run / "checkpoints/best.safetensors", framework="pt") as content:
        metadata = json.loads(content.metadata()["tlcli"])
    assert (metadata["classes"], metadata["backbone"]) == (record["classes"], "test_efficientnet")
    own = {"size": 32, "fit": "crop", "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    assert metadata["preprocessing"].items() >= own.items()
    vals = {row["epoch"]: row for row in RunDir(run).metrics() if row["split"] == "val"}
    assert test["epoch"] == max(vals, key=lambda epoch: (vals[epoch]["accuracy"], -vals[epoch]["loss"]))
    epochs = [(r["split"], r["epoch"]) for r in RunDir(run).metrics() if r["split"] != "running"]
    assert epochs == [("val", 0), ("train", 1), ("val", 1), ("train", 2), ("val", 2), ("test", test["epoch"])]
    for row in RunDir(run).metrics():
        if row["split"] != "running":
            assert row.keys() >= {"split", "epoch", "step", "loss", "accuracy", "lr", "images_per_second", "seconds"}
    assert isinstance(next(r for r in RunDir(run).metrics() if r["split"] == "train")["lr"], dict)
    assert [r["batch"] for r in RunDir(run).metrics() if r["split"] == "running"] == [1, 2, 1, 2]
    assert record["best"]["accuracy"] >= vals[0]["accuracy"]  # a fine-tune that does harm keeps the probe
    assert not (run / "checkpoints/state.safetensors").exists()
    assert record["test"] == {key: test[key] for key in ("accuracy", "accuracy_ci95")}
    assert "test" in (run / "run.log").read_text()
    for plot in ("curves", "confusion", "samples"):
        with Image.open(run / f"plots/{plot}.png") as image:
            assert min(image.size) > 200


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Require the real number of validation images."""
    monkeypatch.setattr("tlcli.data.dataset.MIN_VALIDATION_IMAGES", 200)


@pytest.mark.parametrize(
    "words", [pytest.param((), id="first fit"), pytest.param(("interpolate=1",), id="none", marks=pytest.mark.slow)]
)
def test_a_small_set_trains_on_all_images_and_every_command_reads_the_run(
    train, small, capsys, shapes: Path, tiny, words
) -> None:
    run = train("freeze=head", *tiny, *words)
    out = capsys.readouterr().out
    assert "all training images train, and the last epoch is kept" in out
    assert "train acc" in out and "val loss" not in out
    record = read_json(run / "run.json")
    assert (record["n_train"], record["n_val"], record["n_test"]) == (60, 0, 24)
    has_first_fit = not words
    epochs = 4 if has_first_fit else 2  # of two fits, or of one
    expected = [*(("train", i + 1) for i in range(epochs)), ("test", epochs)]
    assert [(row["split"], row["epoch"]) for row in RunDir(run).metrics()] == expected
    assert ("(2 fits of 2)" in out) == has_first_fit
    assert (run / "val_predictions.safetensors").exists() == has_first_fit
    if has_first_fit:
        assert record["first_fit"] == {"n_train": 48, "n_val": 12}
        assert record["calibration"]["n"] == 12 and load_run(run).temperature == record["calibration"]["temperature"]
        assert f"validation accuracy {record['best']['accuracy']:.4f} in the first fit, on 12 images left out" in out
    else:
        assert "no images are held out: probabilities are not calibrated" in out
        assert (record["best"], record["calibration"], load_run(run).temperature) == ({"epoch": 2}, None, 1)
    image = next((shapes / "test/down").iterdir())
    for argv in (["list", str(run)], ["eval", str(run)], ["predict", str(run), str(image)], ["report", str(run)]):
        assert main(argv) == 0
    assert "has the same metrics" in capsys.readouterr().out
    page = (run / "report.html").read_text()
    assert "Train loss" in page and "Validation loss" not in page
    assert ("12 images left out of a first fit" in page) == ("Validation accuracy" in page) == has_first_fit
    assert main(["eval", str(run), "split=val"]) == 2
    assert capsys.readouterr().err == "tlcli eval: split=val: the run has no val images\n"


@pytest.mark.parametrize(("words", "kept"), [((), 2), (("early_stop=1",), 0)])
def test_few_validation_images_do_not_select_unless_asked(train, small: None, monkeypatch, words, kept, tiny) -> None:
    worse = iter(Scores(0.9 - 0.1 * epoch, 0.5, 1.0) for epoch in range(9))
    monkeypatch.setattr(tlcli.train, "scores", lambda predictions: next(worse))
    run = train("freeze=head", *tiny, *(words or ("dataset.val_fraction=0.1",)))
    record = read_json(run / "run.json")
    assert (record["best"]["epoch"], record["n_val"], record["calibration"]["n"]) == (kept, 6, 6)
    assert max(row["epoch"] for row in RunDir(run).metrics() if row["split"] == "train") == (1 if words else 2)
    assert ("the last epoch is kept, since fewer than" in (run / "run.log").read_text()) == (not words)
    assert "val_fraction: 0.1" in (run / "config.yaml").read_text()


@pytest.mark.slow
def test_the_final_weights_are_on_the_line_from_the_probe_to_the_last_epoch(train, small: None) -> None:
    run = train("freeze=head", "interpolate=0.5")
    untrained = train("freeze=head", "interpolate=1", "optimizer.lr=1e-12")
    files = run / "checkpoints/best", run / "checkpoints/last", untrained / "checkpoints/last"
    half, end, start = (read_tensors(file.with_suffix(".safetensors"))[0]["classifier.weight"] for file in files)
    assert not torch.equal(start, end)
    assert torch.allclose(half, (start + end) / 2, atol=1e-6)


@pytest.mark.parametrize(
    ("own", "split"), [("dataset.val_fraction=0.2", "validation"), ("interpolate=1", "features for the unknown score")]
)
def test_weights_that_the_last_step_ruins_are_an_error(own, split, small: None, tmp_path, capsys, shapes) -> None:
    words = ("dataset=imagefolder", f"dataset.root='{shapes}'", "image.size=32", "epochs=1", "freeze=none", *TINY)
    words += (own, "batch_size=64", "optimizer.lr=1e30", f"hydra.run.dir='{tmp_path}'")
    assert main(["train", *words]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"the outputs of the network are not finite ({split}): try a smaller optimizer.lr" in error
    assert not RunDir(tmp_path).test_file.exists()


@pytest.fixture
def trial(
    spec: Compose, shapes: Path, tiny: tuple[str, ...], tmp_path: Path, no_plots: None, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., RunDir]:
    """trial("a"): a run that a search tries, which chooses half of the way; `resumes`: that of this name continues."""

    def choose(predictions: Sequence[Predictions], inputs: Inputs, reporter: Reporter) -> None:
        assert len({p.logits.numpy().tobytes() for p in predictions}) == 4, "one for each share"
        inputs.decisions = structs.replace(inputs.decisions, interpolate=0.5)

    def train(name: str, *words: str, resumes: bool = False) -> RunDir:
        data = ("dataset=imagefolder", f"dataset.root={shapes}", "dataset.val_fraction=0.2", "image.size=32")
        own, run = spec(*data, *tiny, "freeze=last_stages", "epochs=2", *words), RunDir(tmp_path / name)
        if not resumes:
            run.start(command="", overrides=[], config="")
        state = read_state(run) if resumes else None
        tlcli.train.train(own, run, Reporter(), session_for(own.cache), state, is_trial=True)
        return run

    monkeypatch.setattr(tlcli.train, "choose_share", choose)
    monkeypatch.setattr("tlcli.data.dataset.MIN_VALIDATION_IMAGES", 200)
    return train


@pytest.mark.slow
def test_a_trial_ends_at_the_share_that_its_validation_images_choose(trial: Callable[..., RunDir]) -> None:
    runs = trial("chosen"), trial("given", "interpolate=0.5")
    chosen, given = (read_tensors(run.best_checkpoint)[0] for run in runs)
    assert all(torch.equal(tensor, given[name]) for name, tensor in chosen.items())
    assert runs[0].info["best"] == runs[1].info["best"]
    assert runs[0].info["decisions"]["interpolate"] == 0.5 and not runs[0].test_file.exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("owner", "name"), [(tlcli.train, "choose_share"), (Recorder, "log_inputs"), (checkpointing, "write_tensors")]
)
def test_a_trial_that_is_interrupted_at_its_share_takes_it_once(
    owner: object, name: str, trial: Callable[..., RunDir], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any) -> None:
        do(*args)
        has_chosen = {
            "choose_share": lambda: True,
            "log_inputs": lambda: args[0]._inputs.decisions.interpolate is not None,
            "write_tensors": lambda: "interpolate" in args[2],
        }
        if has_chosen[name]():
            raise KeyboardInterrupt

    whole, do = trial("whole"), getattr(owner, name)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(owner, name, interrupted)
        trial("parts")
    parts = trial("parts", resumes=True)
    one, other = (read_tensors(run.best_checkpoint)[0] for run in (whole, parts))
    assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())
