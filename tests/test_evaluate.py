"""`eval` gives what the run's own test gave, matches classes by name, and writes beside what is there."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from msgspec import structs
from PIL import Image

from tests.conftest import TINY, Notes, finish, make_folder
from tlcli.cli.compose import load_spec
from tlcli.data.dataset import load_evaluation_split
from tlcli.errors import TlcliError, UsageError
from tlcli.evaluate import Evaluation, _identity, _with_labels_of, evaluate_run
from tlcli.predict import Predictor
from tlcli.reporter import Reporter
from tlcli.runs.load import load_run
from tlcli.runs.run_dir import RunDir, read_json, read_predictions
from tlcli.specs import Tta
from tlcli.store import Store, cache_dir


@pytest.fixture
def run(trained: Callable[..., Path], tmp_path: Path) -> Path:
    """Copy a finished run, to write into it."""
    return Path(shutil.copytree(trained("head", "auto"), tmp_path / "run"))


def evaluated(
    run: Path, *overrides: str, split: str | None = None, checkpoint: str = "best", reporter: Reporter | None = None
) -> Evaluation:
    own = load_spec(RunDir(run))
    spec = load_spec(RunDir(run), overrides) if overrides else own
    return evaluate_run(run, checkpoint, split, spec, own, reporter or Reporter())


def files_of(run: Path) -> dict[str, bytes]:
    return {p.relative_to(run).as_posix(): p.read_bytes() for p in run.rglob("*") if p.is_file()}


@pytest.mark.slow
def test_the_test_of_a_run_that_may_go_on_is_not_stored(run: Path) -> None:
    """Its best weights may be others later, and then the test would be taken for theirs."""
    (run / "test.json").unlink()
    for status in ("running", "interrupted", "done"):
        RunDir(run).update(status=status)
        evaluated(run)
        assert (run / "test.json").exists() == (status == "done")


@pytest.mark.parametrize(
    ("freeze", "activations"),
    [
        ("head", "cold"),
        pytest.param("none", "warm", marks=pytest.mark.slow),
        pytest.param("head", "warm", marks=pytest.mark.slow),
        pytest.param("stage", "warm", marks=pytest.mark.slow),
        pytest.param("stage", "cold", marks=pytest.mark.slow),
    ],
)
def test_it_reproduces_the_test_to_the_last_digit(trained, freeze, activations, tmp_path, monkeypatch) -> None:
    run = Path(shutil.copytree(trained(freeze, "auto"), tmp_path / "run"))
    before = files_of(run)
    was_cached = "test" in read_json(run / "run.json")["cache"]["entries"]
    assert was_cached == (freeze != "none")  # else the test would not see both ways
    if activations == "cold":
        monkeypatch.setenv("TLCLI_CACHE", str(tmp_path / "cold"))
    result = evaluated(run)
    report, test = read_json(result.folder / "eval.json"), read_json(run / "test.json")
    assert {key: report[key] for key in test} == test
    assert (result.same, result.folder) == (True, run / "eval-1")
    files = (result.folder / "predictions.safetensors", run / "test_predictions.safetensors")
    ours, tested = map(read_predictions, files)
    assert torch.equal(ours.logits, tested.logits)
    assert (ours.names, ours.classes) == (tested.names, tested.classes)
    after = files_of(run)
    assert {name: after[name] for name in before} == before


def mirrored(folder: Path, out: Path, *, symmetric: bool) -> Path:
    """Copy the images of test/ as their mirror images, or as images that are their own mirror image."""
    for path in sorted((folder / "test").glob("*/*.png")):
        pixels = np.asarray(Image.open(path))
        half = pixels.shape[1] // 2
        pixels = np.concatenate([pixels[:, :half], pixels[:, :half][:, ::-1]], 1) if symmetric else pixels[:, ::-1]
        (out / "test" / path.parent.name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(out / "test" / path.parent.name / path.name)
    return out


@pytest.mark.slow
def test_tta_flip_is_the_mean_over_each_image_and_its_mirror_image(trained, shapes, tmp_path) -> None:
    run = Path(shutil.copytree(trained("head", "fp32"), tmp_path / "run"))
    plain, mirror, both = (
        read_predictions(evaluated(run, *words).folder / "predictions.safetensors").logits
        for words in ((), (f"dataset.root='{mirrored(shapes, tmp_path / 'mirror', symmetric=False)}'",), ("tta=flip",))
    )
    assert torch.allclose(both, (plain + mirror) / 2, atol=1e-5)
    assert not torch.allclose(both, plain, atol=1e-3)
    own = f"dataset.root='{mirrored(shapes, tmp_path / 'symmetric', symmetric=True)}'"
    results = [evaluated(run, own, *words) for words in ((), ("tta=flip",))]
    one, other = (read_predictions(result.folder / "predictions.safetensors").logits for result in results)
    assert torch.allclose(one, other, atol=1e-5)
    assert [result.report["tta"] for result in results] == ["none", "flip"]


@pytest.mark.slow
def test_a_run_that_was_tested_with_tta_is_evaluated_and_predicted_with_it(shapes: Path, tmp_path: Path) -> None:
    words = ("dataset=imagefolder", f"dataset.root='{shapes}'", "image.size=32", "epochs=1", "freeze=head", "tta=flip")
    run = finish(tmp_path / "run", *words, "device.precision=fp32")
    assert evaluated(run).same is True
    assert evaluated(run, "tta=none").same is None
    tested, loaded = read_predictions(RunDir(run).test_predictions), load_run(run)
    probabilities = torch.softmax(tested.logits.double() / loaded.temperature, dim=1)
    for words, same in (({}, True), ({"tta": Tta.none}, False)):
        predictor = Predictor(loaded, torch.device("cpu"), Store(cache_dir()), **words)
        found = [dict(prediction.top) for prediction in predictor.predict(tested.names)]
        rows = torch.tensor([[row[name] for name in loaded.classes] for row in found], dtype=torch.float64)
        assert torch.allclose(rows, probabilities, atol=1e-5) is same


def test_it_follows_the_decisions_of_the_run(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tlcli.device.cpu_has_bfloat16", lambda: True)  # others compute it, too, only slowly
    info = read_json(run / "run.json")
    other = "bfloat16" if info["decisions"]["eval_precision"] == "float32" else "float32"
    loss = evaluated(run).report["loss"]
    changed = {**info["decisions"], "train_precision": other, "eval_precision": other}
    (run / "run.json").write_text(json.dumps({**info, "decisions": changed}))
    found = evaluated(run)
    assert found.report["loss"] != loss
    assert found.same is False


@pytest.mark.slow
def test_each_evaluation_has_a_directory_of_its_own(run: Path) -> None:
    (run / "eval-1").mkdir()  # the user's, and empty
    (run / "eval-2").write_text("notes")
    folders = [evaluated(run, split=split).folder for split in ("test", "val", "train")]
    assert [folder.name for folder in folders] == ["eval-3", "eval-4", "eval-5"]
    assert not list((run / "eval-1").iterdir()) and not list(run.glob(".eval-*"))
    info, reports = read_json(run / "run.json"), [read_json(folder / "eval.json") for folder in folders]
    assert [(r["split"], r["n"]) for r in reports] == [(s, info[f"n_{s}"]) for s in ("test", "val", "train")]
    assert sorted(p.name for p in folders[0].iterdir()) == ["config.yaml", "eval.json", "predictions.safetensors"]


@pytest.mark.slow
def test_other_images_or_weights_are_no_repetition(run: Path) -> None:
    few, last = evaluated(run, "dataset.test_per_class=2"), evaluated(run, checkpoint="last")
    assert (few.report["n"], few.same) == (6, None)
    assert (last.report["checkpoint"], last.same) == ("checkpoints/last.safetensors", None)


# -- other datasets


def test_a_subset_of_the_classes_is_matched_by_name(run: Path, shapes: Path, tmp_path: Path) -> None:
    subset = ("down", "checks")
    for name in subset:
        shutil.copytree(shapes / "test" / name, tmp_path / "few" / name)
    tested = read_predictions(run / "test_predictions.safetensors")
    is_right = (tested.logits.argmax(dim=1) == tested.labels).tolist()
    right = [is_right[i] for i, key in enumerate(tested.keys) if key.split("/")[1] in subset]
    result = evaluated(run, "dataset=imagefolder", f"dataset.root={tmp_path / 'few'}")
    assert result.report["n"] == len(right)
    assert result.report["accuracy"] == sum(right) / len(right)
    assert result.report["classes"] == ["across", "checks", "down"]
    assert result.report["per_class"]["across"]["support"] == 0
    assert result.description == "all of it"
    rows = read_predictions(result.folder / "predictions.safetensors")
    assert {rows.classes[label] for label in rows.labels.tolist()} == set(subset)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("folders", "split", "description"),
    [
        ({"train": {"across": 2, "wasps": 2}, "test": {"across": 3}}, "test", "its test split"),
        ({"train": {"across": 2}, "val": {"across": 3}}, "val", "its val split, as it has no test split"),
    ],
)
def test_the_split_of_another_dataset(run: Path, tmp_path: Path, folders, split: str, description: str) -> None:
    """Classes that are not evaluated may be unknown; a split that does not exist is an error."""
    for name, counts in folders.items():
        make_folder(tmp_path / "other" / name, counts)
    words = ("dataset=imagefolder", f"dataset.root={tmp_path / 'other'}")
    found = evaluated(run, *words)
    assert (found.report["n"], found.report["split"], found.description) == (3, split, description)
    absent = "val" if split == "test" else "test"
    with pytest.raises(UsageError, match=f"split={absent}: imagefolder has no such split"):
        evaluated(run, *words, split=absent)


def test_a_class_of_another_spelling_is_suggested(spec: Callable[..., Any], tmp_path: Path) -> None:
    make_folder(tmp_path, {"cafe\u0301": 1, "down": 1})
    data = spec("dataset=imagefolder", f"dataset.root='{tmp_path}'").dataset
    images = load_evaluation_split(data, None, seed=0, reporter=Reporter(), store=Store(cache_dir()))
    with pytest.raises(UsageError, match="did you mean 'caf\u00e9'"):
        _with_labels_of(("caf\u00e9", "down"), images, data)


def test_a_home_directory_that_does_not_exist_is_a_usage_error(run: Path) -> None:
    with pytest.raises(UsageError, match="~nobody-at-all/x: no such home directory"):
        evaluated(run, "dataset=cifar10", "dataset.root='~nobody-at-all/x'")


@pytest.fixture
def unsplit(tmp_path: Path) -> Path:
    return trained_unsplit(tmp_path)


def trained_unsplit(folder: Path, *own: str) -> Path:
    """Return a run on a folder without splits, with sampled test images."""
    make_folder(folder / "photos", {"across": 10, "down": 10})
    words = [f"dataset.root='{folder / 'photos'}'", "image.size=32", "epochs=1", "freeze=head", "device.workers=0"]
    return finish(folder / "unsplit", "dataset=imagefolder", *TINY, *words, *own)


@pytest.mark.slow
def test_a_dataset_that_has_moved_is_still_the_runs_own(unsplit: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").rename(tmp_path / "elsewhere")
    result = evaluated(unsplit, f"dataset.root={tmp_path / 'elsewhere'}", "dataset.name=other")
    assert result.same is True
    assert result.description == "the run's own test split: images of the same names in another folder"
    fewer = evaluated(unsplit, f"dataset.root={tmp_path / 'elsewhere'}", "dataset.test_per_class=1")
    assert (fewer.description, fewer.report["n"]) == (result.description, 2)
    shutil.copy(tmp_path / "elsewhere/across/000.png", tmp_path / "elsewhere/across/a.png")
    reporter = Notes()  # another image, so that the split is another one
    grown = evaluated(unsplit, f"dataset.root={tmp_path / 'elsewhere'}", reporter=reporter)
    assert grown.description == "all of it"
    assert any("have the paths of images that validated or tested the run" in note for note in reporter.notes)
    make_folder(tmp_path / "new", {"left": 3, "down": 4})
    with pytest.raises(UsageError, match="'left'"):
        evaluated(unsplit, f"dataset.root={tmp_path / 'new'}")


@pytest.mark.slow
def test_more_images_in_a_folder_of_test_images_are_a_test_without_a_note(run: Path, shapes: Path, tmp_path: Path):
    shutil.copytree(shapes, tmp_path / "elsewhere")
    image = next((tmp_path / "elsewhere/test/down").iterdir())
    shutil.copy(image, image.with_name(f"another{image.suffix}"))
    reporter = Notes()
    assert evaluated(run, f"dataset.root={tmp_path / 'elsewhere'}", reporter=reporter).description == "its test split"
    assert not [note for note in reporter.notes if "no test of it" in note]


@pytest.mark.slow
def test_a_note_says_that_the_dataset_has_grown(unsplit: Path, tmp_path: Path) -> None:
    for i in range(10):
        shutil.copy(tmp_path / "photos/across/000.png", tmp_path / f"photos/across/a{i}.png")
    reporter = Notes()
    assert evaluated(unsplit, reporter=reporter).same is False
    assert any("the dataset has changed since the run" in note for note in reporter.notes)


@pytest.mark.slow
def test_images_that_trained_an_untested_run_are_not_stored_as_its_test(tmp_path: Path) -> None:
    run = trained_unsplit(tmp_path, "dataset.val_fraction=0.3")
    for file in (RunDir(run).test_file, RunDir(run).test_predictions):
        file.unlink()
    for i in range(10):
        shutil.copy(tmp_path / "photos/across/000.png", tmp_path / f"photos/across/a{i}.png")
    reporter = Notes()
    assert evaluated(run, reporter=reporter).same is None
    assert any("have the paths of images that validated the run" in note for note in reporter.notes)
    assert not RunDir(run).test_file.exists()


@pytest.mark.parametrize(
    ("trained", "wanted", "same"),
    [
        ({"dataset": "cifar10"}, {"dataset": "cifar100"}, False),
        ({"dataset": "cifar10"}, {"dataset": "cifar10"}, True),
        ({"dataset": "parquet"}, {"dataset": "parquet", "dataset.label_column": "fixed"}, False),
        ({"dataset": "parquet"}, {"dataset": "parquet", "dataset.image_column": "photo"}, False),
    ],
)
def test_datasets_at_one_place_differ_in_more_than_their_place(trained, wanted, same: bool, spec) -> None:
    one, other = (spec(*(f"{key}={value}" for key, value in words.items())).dataset for words in (trained, wanted))
    assert (_identity(structs.replace(one, root="data")) == _identity(structs.replace(other, root="data"))) is same


def test_a_failure_leaves_nothing_behind(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run / "checkpoints/last.safetensors").write_bytes(b"no weights")
    before = files_of(run)
    with pytest.raises(UsageError, match="damaged"):
        evaluated(run, checkpoint="last")

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tlcli.evaluate.write_json", full)
    with pytest.raises(OSError, match="No space"):
        evaluated(run)
    assert files_of(run) == before
    assert not list(run.glob("*eval*"))


def test_files_that_do_not_decode_are_listed(run: Path, shapes: Path, tmp_path: Path) -> None:
    shutil.copytree(shapes / "test", tmp_path / "photos")
    (tmp_path / "photos/down/bad.png").write_bytes(b"no image")
    result = evaluated(run, f"dataset.root='{tmp_path / 'photos'}'", "dataset.on_bad=skip")
    assert result.report["n_bad_files"] == 1
    assert "down/bad.png" in (result.folder / "bad_files.csv").read_text()


def test_a_read_only_run_is_refused_before_images_are_read(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: access(path, mode) and not (path == run and mode == os.W_OK))
    monkeypatch.setattr("tlcli.evaluate.predict_split", lambda *args: pytest.fail("images were read"))
    with pytest.raises(TlcliError, match="run: not writable; eval writes its results there"):
        evaluated(run)
