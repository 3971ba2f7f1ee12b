"""A first fit says how much of the change of the weights to keep, and leaves no trace in the network."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from tests.conftest import Compose, make_folder, slow
from tlcli.engine import first_fit
from tlcli.engine.inputs import Inputs
from tlcli.engine.metrics import Predictions, evaluate
from tlcli.engine.session import Session
from tlcli.errors import UsageError
from tlcli.models.tensorfile import write_tensors
from tlcli.reporter import Reporter
from tlcli.runs.checkpointing import image_fingerprints
from tlcli.runs.resume_state import ResumeState
from tlcli.store import Store
from tlcli.train import NewRun, load_inputs


@pytest.fixture
def load(spec: Compose, shapes: Path, tiny: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """load("epochs=1"): 60 training images of three classes at 32 px, none of them held out."""
    monkeypatch.setattr("tlcli.data.dataset.MIN_VALIDATION_IMAGES", 200)
    base = ("dataset=imagefolder", f"dataset.root={shapes}", "image.size=32", "image.fit=crop", "epochs=1", *tiny)

    def make(*words: str, start: NewRun | ResumeState | None = None) -> Inputs:
        session = Session(Store(tmp_path / "cache", 1.0), 10**9)
        return load_inputs(spec(*base, *words), session, Reporter(), start or NewRun())

    return make


def tensors(inputs: Inputs) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in inputs.workload.classifier.network.state_dict().items()}


@pytest.mark.parametrize("words", [*slow("freeze=last_stages"), "freeze=head"])  # uncached, and cached
def test_the_network_is_as_before_and_the_images_left_out_are_a_fifth_of_each_class(
    load, words, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = load(words)
    before, whole, part = tensors(inputs), inputs.workload, inputs.workload.first_fit
    choose_share = first_fit.choose_share

    def choose(*args: Any) -> int:
        assert not all(torch.equal(tensor, before[name]) for name, tensor in tensors(inputs).items())
        return choose_share(*args)

    monkeypatch.setattr(first_fit, "choose_share", choose)
    predictions = first_fit.run_first_fit(inputs, part, Reporter())
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors(inputs).items())
    assert part.data.val.class_counts(3) == (4, 4, 4) and part.data.train.class_counts(3) == (16, 16, 16)
    assert sorted([*part.data.train.indices, *part.data.val.indices]) == sorted(whole.data.train.indices)
    assert predictions.labels.tolist() == part.data.val.labels.tolist()
    assert inputs.decisions.interpolate in first_fit.SHARES
    assert "loss of 12 images left out" in inputs.decisions.reasons["weights"]
    inputs.open("train_eval", Reporter())
    assert [entry.rows for entry in whole.session.store.entries()] == [60], "one pass over the images"


@pytest.mark.parametrize(
    ("margins", "share"),
    [
        ([[1, 1, 1], [1, 1, 1], [1, 1, 1], [1, 1, 1]], 1.0),
        ([[1, 1, 1], [1, 1, 2], [1, 1, 9], [0, 0, 0]], 1.0),  # better for one image only: within a standard error
        ([[1, 1, 1], [2, 2, 2], [3, 3, 3], [2, 2, 2]], 0.7),
        ([[1, 1, 1], [2, 2, 2], [3, 3, 3], [4, 4, 5]], 0.5),
    ],
)
def test_the_share_of_lowest_loss_is_taken_if_it_gains_more_than_a_standard_error(
    load, monkeypatch: pytest.MonkeyPatch, margins: Sequence[Sequence[float]], share: float
) -> None:
    labels, results = torch.tensor([0, 1, 2]), iter(margins)

    def evaluate(*args: object) -> Predictions:
        return Predictions(torch.diag(torch.tensor(next(results), dtype=torch.float32)), labels)

    inputs = load("freeze=head")
    monkeypatch.setattr(first_fit, "fit_head", lambda *args: True)
    monkeypatch.setattr(first_fit, "evaluate", evaluate)
    predictions = first_fit.run_first_fit(inputs, inputs.workload.first_fit, Reporter())
    assert inputs.decisions.interpolate == share
    assert predictions.logits.diagonal().tolist() == list(margins[first_fit.SHARES.index(share)])


@pytest.mark.slow
def test_there_is_none_with_validation_images_a_given_share_or_random_weights(load) -> None:
    assert load().workload.first_fit is not None
    for words in ("dataset.val_fraction=0.1", "interpolate=1", "interpolate=0.7", "backbone.weights=none"):
        assert load(words).workload.first_fit is None, words


@pytest.mark.slow
def test_after_it_the_weights_of_two_fits_are_averaged(load) -> None:
    workload = load("epochs=3").workload
    assert (workload.fits, workload.epochs, workload.first_fit.epochs) == (2, 6, 3)
    updates = "backbone.reinit=[blocks.4]"  # statistics of BatchNorm, which were not loaded
    for words in (("fits=1",), ("interpolate=1",), ("ema=0.9",), ("freeze.bn_stats=update",), (updates,)):
        assert load(*words, "epochs=3").workload.epochs == 3, words
    with pytest.raises(UsageError, match=r"^fits=2: \d+ BatchNorm layers update statistics, .* leave fits out$"):
        load(updates, "fits=2")
    assert load("interpolate=1", "fits=4", "epochs=3").workload.epochs == 12


@pytest.mark.slow
def test_the_mean_of_several_fits_is_kept_whatever_validation_says_of_their_epochs(load, monkeypatch) -> None:
    monkeypatch.setattr("tlcli.data.dataset.MIN_VALIDATION_IMAGES", 1)
    held_out = ("dataset.val_fraction=0.2", "epochs=2")
    assert load("freeze=head", *held_out).workload.selects_epoch
    assert not load("freeze=head", *held_out, "fits=2").workload.selects_epoch


@pytest.mark.slow
def test_its_fits_share_stored_views_that_are_read_often_enough(load) -> None:
    words = ("freeze=last_stages", "epochs=6", "image.train_size=48")
    inputs = load(*words)
    whole, part, option = inputs.workload, inputs.workload.first_fit, inputs.decisions.eval_format
    assert (whole.views, part.views, inputs.decisions.views) == (8, 8, 8)
    own, shared = (workload.cached_split("train", inputs.decisions.cached, option) for workload in (whole, part))
    assert [view.key for view in own.views[:6]] == [view.key for view in shared.views], "as many as it has epochs"
    assert {view.batches.preprocessing.size for view in own.views} == {48}
    assert torch.equal(own.rows, torch.arange(60))
    assert shared.rows.tolist() == [whole.data.train.indices.tolist().index(i) for i in part.data.train.indices]
    without = [("epochs=2",), ("cache.views=0",), ("augment=trivial",), ("augment.mixup=0.2",), ("freeze=none",)]
    for others in (*without, ("cache.mode=off",)):
        inputs = load(*words, *others)
        assert (inputs.workload.views, inputs.decisions.views) == (None, None), others
        assert "train" not in inputs.decisions.cached


def start_of(begun: Inputs) -> ResumeState:
    """Return the start of a run that goes on with what it has decided, in another number of processes."""
    info = {"preprocessing": begun.workload.preprocessing.to_json()}
    state = {"machine": {"processes": 2}, "images": image_fingerprints(begun.workload.data)}
    return ResumeState(Mock(info=info), state, begun.decisions, None)


@pytest.mark.slow
def test_a_run_on_all_images_shares_the_stored_views_of_a_trial_also_of_one_that_was_resumed(load) -> None:
    words = ("freeze=last_stages", "epochs=16", "image.train_size=48")
    whole, trial = load(*words), load(*words, "dataset.val_fraction=0.2")
    runs = [whole, trial, load(*words, "dataset.val_fraction=0.2", start=start_of(trial))]
    splits = [run.workload.cached_split("train", run.decisions.cached, run.decisions.eval_format) for run in runs]
    first, *others = [[view.key for view in split.views] for split in splits]
    assert len(first) == 8 and others == [first, first]
    assert [len(split.rows) for split in splits] == [60, 48, 48]


@pytest.mark.slow
def test_a_resumed_run_has_as_many_stored_views_as_it_recorded_whatever_its_epochs_are_now(load) -> None:
    words = ("freeze=last_stages", "dataset.val_fraction=0.2")
    few, many = load(*words, "epochs=7"), load(*words, "epochs=8")
    assert (few.workload.views, many.workload.views) == (None, 8)
    resumed = [load(*words, f"epochs={epochs}", start=start_of(begun)) for begun, epochs in ((few, 8), (many, 7))]
    assert [run.workload.views for run in resumed] == [None, 8]


@pytest.mark.parametrize(("most", "expected"), [(60, True), (59, False)])
def test_there_is_none_for_large_sets(load, monkeypatch: pytest.MonkeyPatch, most: int, expected: bool) -> None:
    monkeypatch.setattr("tlcli.engine.activations.MAX_FIRST_FIT", most)
    assert (load().workload.first_fit is not None) == expected


@pytest.fixture
def known(load, tmp_path: Path) -> dict[str, Tensor]:
    """Write a run in tmp_path/run, with a probe for the classes `across` and `checks`; return its tensors."""
    inputs = load("freeze=head", "dataset.classes=[across,checks]")
    first_fit.fit_head(inputs, Reporter())
    state, classifier = tensors(inputs), inputs.workload.classifier
    state["classifier.weight"] += 5  # in all rows, which changes no prediction
    image = {"size": 32, "fit": "crop", "mean": classifier.mean, "std": classifier.std}
    metadata = {"backbone": classifier.name, "classes": ["across", "checks"], "preprocessing": image}
    write_tensors(tmp_path / "run/checkpoints/best.safetensors", state, metadata)
    return state


def test_rows_of_known_classes_stay_and_new_ones_fit_to_them(load, known: dict[str, Tensor], tmp_path: Path) -> None:
    inputs = load("freeze=head", f"backbone.weights={tmp_path}/run")
    assert first_fit.fit_head(inputs, Reporter())
    assert "rows of 1 new classes are its" in inputs.decisions.reasons["probe"]
    state, network = tensors(inputs), inputs.workload.classifier.network
    for name in ("classifier.weight", "classifier.bias"):
        assert torch.equal(state[name][:2], known[name]) and len(state[name]) == 3
    predictions = evaluate(network, inputs.open("train_eval", Reporter()), inputs.device, Reporter(), "")
    for label in range(3):
        of_class = predictions.labels == label
        assert (predictions.predicted[of_class] == label).double().mean() > 0.6  # chance is 0.33


def test_a_class_without_images_is_an_error_that_offers_dataset_classes(load, known, tmp_path: Path) -> None:
    words = (f"dataset.root={tmp_path}/more", f"backbone.weights={tmp_path}/run")
    make_folder(tmp_path / "more/train", {"across": 5, "down": 5})
    make_folder(tmp_path / "more/test", {"across": 2, "down": 2})
    with pytest.raises(UsageError, match=r"more: has no images of 'checks', which .*/run knows: .* dataset\.classes="):
        load("freeze=head", *words)
    chosen = load("freeze=head", "dataset.classes=[across,down]", *words)
    assert chosen.workload.classifier.known_rows == (0,)
    other = load("freeze=last_stages", f"backbone.weights={tmp_path}/run")  # transfer to another task
    first_fit.fit_head(other, Reporter())
    assert not torch.equal(tensors(other)["classifier.bias"][:2], known["classifier.bias"])
