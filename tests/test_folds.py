"""tlcli train folds=N: runs over folds, the result of all of them, and a refit on all images."""

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec import structs

from tests.conftest import finish, make_folder
from tests.faults.runs_alike import differences
from tests.faults.test_resume import Killed, stopped_after
from tlcli.cli import main
from tlcli.cli.compose import load_spec
from tlcli.data.dataset import load_dataset
from tlcli.data.images import Split
from tlcli.engine.first_fit import SHARES
from tlcli.engine.inputs import Inputs
from tlcli.engine.metrics import Predictions
from tlcli.errors import TlcliError
from tlcli.models.tensorfile import read_tensors
from tlcli.reporter import Reporter
from tlcli.runs import checkpointing
from tlcli.runs.cross_validation import cross_validate
from tlcli.runs.report import sweep_view
from tlcli.runs.run_dir import RunDir, SplitPredictions, confusion_matrix, read_json, read_predictions

K, PARTS = 3, ("fold-0", "fold-1", "fold-2", "best")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with train/, val/ and test/, in which two images of train and val are the same."""
    root = tmp_path_factory.mktemp("folds") / "images"
    for split, n in (("train", 9), ("val", 4), ("test", 3)):
        make_folder(root / split, {"across": n, "checks": n}, seed=n)
    shutil.copy(root / "train/across/000.png", root / "val/across/001.png")
    return root


@pytest.fixture(scope="module")
def words(images: Path, tiny: tuple[str, ...]) -> list[str]:
    words = ["dataset=imagefolder", f"dataset.root='{images}'", "image.size=32", "epochs=2", "batch_size=8", "seed=3"]
    return [*words, *tiny, "freeze=head", "device.precision=fp32", "device.channels_last=true"]


@pytest.fixture(scope="module", autouse=True)
def half() -> Iterator[None]:
    """Choose the weights at half of the way from the initial to the trained ones."""

    def choose(predictions: Sequence[Predictions], inputs: Inputs, reporter: Reporter) -> int:
        inputs.decisions = structs.replace(inputs.decisions, interpolate=0.5)
        return SHARES.index(0.5)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tlcli.train.choose_share", choose)
        yield


@pytest.fixture(scope="module")
def crossed(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a finished run over three folds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TLCLI_CACHE", str(tmp_path_factory.mktemp("cold")))
        return finish(tmp_path_factory.mktemp("crossed") / "run", *words, f"folds={K}")


def infos(folder: Path) -> dict[str, dict[str, Any]]:
    return {part: read_json(folder / part / "run.json") for part in PARTS}


def held_out(folder: Path) -> list[SplitPredictions]:
    return [read_predictions(folder / f"fold-{i}/val_predictions.safetensors") for i in range(K)]


def test_each_image_is_held_out_once_and_the_refit_has_all_predictions(crossed: Path) -> None:
    folds, best = held_out(crossed), RunDir(crossed / "best")
    shares = [read_tensors(crossed / f"fold-{i}/val_shares.safetensors")[0]["logits"] for i in range(K)]
    assert all(torch.equal(logits[0], fold.logits) for logits, fold in zip(shares, folds, strict=True))
    folds = [replace(fold, logits=logits[SHARES.index(0.5)]) for fold, logits in zip(folds, shares, strict=True)]
    pooled = read_predictions(best.val_predictions)
    assert sorted(key for fold in folds for key in fold.keys) == sorted(pooled.keys)
    rows = {key: row for fold in folds for key, row in zip(fold.keys, fold.logits, strict=True)}
    assert all(torch.equal(rows[key], row) for key, row in zip(pooled.keys, pooled.logits, strict=True))
    assert any({"train/across/000.png", "val/across/001.png"} <= set(fold.keys) for fold in folds)
    is_right = torch.cat([fold.logits.argmax(dim=1) == fold.labels for fold in folds])
    record = best.info["cross_validation"]
    assert record["accuracy"] == best.info["best"]["accuracy"] == pytest.approx(is_right.double().mean().item())
    assert (record["folds"], record["n"], best.info["calibration"]["n"]) == (K, 26, 26)
    right = [(fold.logits.argmax(dim=1) == fold.labels).double().mean().item() for fold in folds]
    assert record["fold_accuracies"] == right
    at = [read_tensors(crossed / part / "checkpoints/best.safetensors")[1].get("interpolate") for part in PARTS]
    assert at == [None] * K + [0.5]
    matrix = confusion_matrix({**record, "classes": best.info["classes"]})
    assert matrix is not None and (matrix.sum(), matrix.trace()) == (26, is_right.sum())
    assert record["accuracy_ci95"][0] <= record["accuracy"] <= record["accuracy_ci95"][1]


def test_the_last_epoch_of_each_part_is_kept_and_the_refit_alone_is_tested(crossed: Path) -> None:
    info = infos(crossed)
    assert [info[part]["best"]["epoch"] for part in PARTS] == [2] * 4
    sizes = [[info[part][f"n_{split}"] for split in ("train", "val", "test")] for part in PARTS]
    assert [sum(size) for size in sizes] == [26, 26, 26, 26 + 6] and sizes[-1] == [26, 0, 6]
    assert [(crossed / part / "test.json").exists() for part in PARTS] == [False] * K + [True]


def test_a_frozen_network_runs_once_over_the_images(crossed: Path) -> None:
    extracted = [info["extraction"] and info["extraction"]["images"] for info in infos(crossed).values()]
    assert extracted == [26, None, None, 6]


def test_a_fold_alone_is_what_it_is_in_its_folder(crossed: Path, words: list[str], tmp_path: Path) -> None:
    alone = finish(tmp_path / "alone", *words, f"folds={K}", "fold=1")
    for file in ("checkpoints/best.safetensors", "val_predictions.safetensors"):
        (a, _), (b, _) = read_tensors(alone / file), read_tensors(crossed / "fold-1" / file)
        assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slow
def test_labels_that_changed_since_the_folds_were_trained_are_an_error(crossed: Path) -> None:
    spec = load_spec(RunDir(crossed / "best"))
    data = load_dataset(spec.dataset, seed=spec.seed, reporter=Reporter(), folds=K)
    pool, run = data.train, RunDir(crossed / "best")
    cross_validate(run, K, data, lambda pools: 0)
    with pytest.raises(TlcliError, match="labels have changed since the folds were trained"):
        cross_validate(run, K, replace(data, train=Split(pool.images, pool.indices, 1 - pool.labels)), lambda pools: 0)


@pytest.mark.slow
def test_commands_show_the_refit_for_its_folds(crossed: Path, tmp_path, capsys) -> None:
    folder = Path(shutil.copytree(crossed, tmp_path / "run"))
    jobs = read_json(folder / "sweep.json")["jobs"]
    assert {job["name"]: job["rank"] for job in jobs} == {"best": 1, "fold-0": None, "fold-1": None, "fold-2": None}
    assert main(["list", str(folder), "--format", "json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)
    accuracy = read_json(folder / "best/run.json")["cross_validation"]["accuracy"]
    assert (entry["kind"], entry["path"], entry["val"]) == ("run", str(folder / "best"), accuracy)
    for part in ("", *PARTS):
        assert main(["report", str(folder / part)]) == 0
    seconds = {job["name"]: job["seconds"] for job in jobs}
    assert sweep_view(folder, folder)["seconds"] == seconds["best"] > seconds["fold-0"]
    page = (folder / "best/report.html").read_text()
    assert "Cross-validation" in page and "approximate" in page and "held-out images by true class" in page
    assert "Cross-validation" not in (folder / "fold-0/report.html").read_text()
    assert main(["eval", str(folder / "best")]) == 0
    assert main(["eval", str(folder / "fold-0"), "split=val"]) == 0
    assert "the run's own val split" in capsys.readouterr().out
    for argv, error in (
        (["eval", str(folder / "fold-0")], "split=test: the run has no test images"),
        (["eval", str(folder / "best"), "split=val"], "split=val: the run has no val images"),
        (["compare", str(folder / "best"), str(folder / "fold-0")], "has no test.json"),
        (["train", "--resume", str(folder / "best")], ""),
    ):
        assert main(argv) == 2
        captured = capsys.readouterr().err
        assert error in captured and captured.count("\n") == 1
    assert main(["train", "--resume", str(folder)]) == 0
    assert "nothing to resume" in capsys.readouterr().out


@pytest.mark.slow
def test_without_a_test_split_nothing_is_held_out_for_it(images: Path, words, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("TLCLI_CACHE", str(tmp_path / "cold"))
    one_stage = ("freeze=last_stages", "freeze.n=1", "augment=basic")  # trains on images, from a probe on activations
    run = finish(tmp_path / "run", *words, *one_stage, f"dataset.root='{images / 'train'}'", "folds=2", "epochs=1")
    out = capsys.readouterr().out
    assert "fold 1 of 2" in out and "fold 2 of 2" in out and out.count(" for all folds and the refit\n") == 1
    assert out.count("test       no test split") == 1 and "(approximate: folds share training images)" in out
    extracted = [read_json(run / part / "run.json")["extraction"] for part in ("fold-0", "fold-1", "best")]
    assert [entry and entry["images"] for entry in extracted] == [18 + 9, 9, None]  # of the probe, once; of each val
    info = read_json(run / "best/run.json")
    assert (info["n_train"], info["n_test"], info["cross_validation"]["n"]) == (18, 0, 18)
    assert not (run / "best/test.json").exists()
    shutil.copytree(run, tmp_path / "copy")
    assert main(["compare", str(run), str(tmp_path / "copy/best")]) == 0
    out = capsys.readouterr().out
    assert "cross-validated accuracy" in out and "The folds of both were tested on 18 images of the same names" in out
    assert main(["report", str(run / "best")]) == 0
    assert "cross-validated accuracy; not tested" in (run / "best/report.html").read_text()
    shutil.copytree(images / "train", tmp_path / "moved")
    assert main(["eval", str(run / "best"), f"dataset.root='{tmp_path / 'moved'}'"]) == 0
    assert "18 of the 18 images have the paths of images that trained the run" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("part", [1, K])
def test_an_interrupted_run_over_folds_goes_on_to_the_same_end(
    part: int, crossed: Path, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, no_plots: None
) -> None:
    monkeypatch.setattr(checkpointing, "MAX_TIME_SHARE", 1e9)
    out = tmp_path / "run"
    steps = [-(-info["n_train"] // 8) * 2 for info in infos(crossed).values()]
    with stopped_after(sum(steps[:part]) + 3, KeyboardInterrupt):
        assert main(["train", f"hydra.run.dir='{out}'", *words, f"folds={K}"]) == 130
    assert f"tlcli train --resume {out}\n" in capsys.readouterr().err
    assert read_json(out / "best/run.json")["status"] == "interrupted"
    done = [(out / f"fold-{i}/run.json").read_bytes() for i in range(part)]
    with stopped_after(2, Killed), pytest.raises(Killed):
        main(["train", "--resume", str(out)])
    assert main(["train", "--resume", str(out)]) == 0
    assert [(out / f"fold-{i}/run.json").read_bytes() for i in range(part)] == done
    assert list(differences(crossed / "best", out / "best")) == []
    assert [job["status"] for job in read_json(out / "sweep.json")["jobs"]] == ["done"] * 4
