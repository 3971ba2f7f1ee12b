"""A finished run on images: on its own test split, as it was tested, or on those of another dataset."""

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml  # type: ignore[import-untyped]
from msgspec import structs

from tlcli.data.dataset import Dataset, EvaluationSplit, load_dataset, load_evaluation_split
from tlcli.data.images import Split
from tlcli.data.listing import same_spelling
from tlcli.device import DTYPE_NAMES, DTYPES, setup_process
from tlcli.engine.activations import Workload
from tlcli.engine.decisions import Decisions, follow, recorded_decisions
from tlcli.engine.inputs import Inputs
from tlcli.engine.metrics import Predictions, compute_report, evaluate
from tlcli.engine.session import Session, session_for
from tlcli.errors import BadImagesError, TlcliError, UsageError
from tlcli.files import expand_user, resolve_links
from tlcli.models.build import tensors_to_reinit
from tlcli.reporter import Reporter
from tlcli.runs import leaderboard
from tlcli.runs.load import LoadedRun, load_run
from tlcli.runs.run_dir import (
    RunDir,
    SplitPredictions,
    read_predictions,
    stored_confusion,
    write_json,
    write_predictions,
)
from tlcli.specs import EVALUATION_KEYS, DatasetSpec, DeviceSpec, Precision, TrainSpec
from tlcli.text import join_limited, to_plain
from tlcli.transfer.contract import apply_freeze
from tlcli.transfer.cut import Cut


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The result of an evaluation."""

    report: Mapping[str, Any]  # the contents of eval.json
    folder: Path
    description: str  # of the images
    same: bool | None  # test.json has the same metrics; None if they are of other images or weights


@dataclass(frozen=True, eq=False)
class SplitResult:
    """The predictions of a run's network for a split, which may be of another dataset."""

    predictions: Predictions
    images: EvaluationSplit
    dataset: DatasetSpec
    is_own: bool
    description: str

    @property
    def named_predictions(self) -> SplitPredictions:
        """The predictions with the names of the images."""
        return SplitPredictions.of(self.images.split, self.predictions, self.images.classes)


def predict_split(
    loaded: LoadedRun, split_name: str | None, spec: TrainSpec, trained: TrainSpec, session: Session, reporter: Reporter
) -> SplitResult:
    """Evaluate the network of a run on a split as it was tested; arguments as in `evaluate_run`."""
    own = loaded.preprocessing  # whatever size another dataset suggests
    spec, trained = (structs.replace(s, dataset=structs.replace(s.dataset, range=own.range)) for s in (spec, trained))
    image = structs.replace(spec.image, size=own.size, fit=own.fit, mean=own.mean, std=own.std)
    spec = structs.replace(spec, image=image)
    accelerator = setup_process(spec.device)
    session.forget_model()
    dataset, images, description, is_own = _find_images(loaded, split_name, spec, trained, session, reporter)
    classifier = loaded.classifier
    # as the network was cut in training: its pretrained tensors decide which BatchNorm is frozen
    random = tensors_to_reinit(spec.backbone.reinit, classifier) | classifier.stages[-1].tensors
    names = frozenset(classifier.network.state_dict()) - random
    classifier = replace(classifier, pretrained=frozenset() if spec.backbone.weights == "none" else names)
    network = classifier.network.to(accelerator)
    contract, splits = apply_freeze(spec.freeze, classifier), (images.split,) * 3
    data = Dataset(spec.dataset.name, loaded.classes, *splits, notes=(), bad_files=(), value_range=own.range)
    workload = Workload(data, classifier, contract, spec, accelerator, session)
    tested = _tested_decisions(loaded.info, workload, trained.device, reporter)
    inputs = Inputs(follow(tested, workload, reporter, ["test"]), workload, ["test"])
    inputs.device.place(network)
    loader = inputs.open("test", reporter)
    if inputs.device.compile:
        cut = workload.for_training.cut if "train" in inputs.decisions.cached else None
        (cut.suffix if isinstance(cut, Cut) else network).compile()  # the module that training compiled
    predictions = evaluate(network, loader, inputs.device, reporter, images.split_name)
    return SplitResult(predictions, images, dataset, is_own, description)


def add_test(path: Path, spec: TrainSpec, session: Session, reporter: Reporter) -> None:
    """Test a run that was trained without a test, and add test.json to it."""
    loaded = load_run(path)
    result = predict_split(loaded, "test", spec, spec, session, reporter)
    run = RunDir(loaded.path)
    run.write_test(_report(loaded, result), result.named_predictions)
    leaderboard.update(run)


def _report(loaded: LoadedRun, result: SplitResult) -> dict[str, Any]:
    report = compute_report(result.predictions, loaded.classes, loaded.temperature)
    return {
        **report,
        "confusion": stored_confusion(report["confusion"]),
        "checkpoint": f"checkpoints/{loaded.checkpoint}.safetensors",
        "epoch": loaded.epoch,
    }


def evaluate_run(
    path: Path, checkpoint: str, split_name: str | None, spec: TrainSpec, trained: TrainSpec, reporter: Reporter
) -> Evaluation:
    """Evaluate a run, and write a new directory eval-N in the run's; existing files are not changed.

    `split_name` None: test, or a split that the dataset has. `trained` is the spec of the run, `spec` that with
    overrides. A run without test.json, such as a trial of a search, gets it.
    """
    loaded, session = load_run(path, checkpoint), session_for(spec.cache)
    if not os.access(loaded.path, os.W_OK):  # known before the images are read
        raise TlcliError(f"{loaded.path}: not writable; eval writes its results there")
    result = predict_split(loaded, split_name, spec, trained, session, reporter)
    images, dataset, run = result.images, result.dataset, RunDir(loaded.path)
    report = _report(loaded, result)
    data = {key: getattr(dataset, key) for key in ("name", "root", "file") if hasattr(dataset, key)}
    full_report = report | {
        "dataset": {**data, "own": result.is_own},
        "split": images.split_name,
        "tta": spec.tta.value,
        "n_bad_files": len(images.bad_files),
    }

    def write(folder: Path) -> None:
        write_predictions(folder / "predictions.safetensors", result.named_predictions)
        write_json(folder / "eval.json", full_report)
        config = yaml.safe_dump({"dataset": to_plain(dataset)}, sort_keys=False, allow_unicode=True)
        (folder / "config.yaml").write_text(config, encoding="utf-8")
        RunDir(folder).write_bad_files(images.bad_files)

    is_test = result.is_own and images.split_name == "test" and checkpoint == "best" and spec.tta is trained.tta
    same, limits = None, [(s.test_per_class, s.classes) for s in (dataset, trained.dataset)]
    if is_test and limits[0] == limits[1]:
        is_over = run.info.get("status") not in ("running", "interrupted")  # else its best weights may change
        if is_over and not run.test_file.exists():
            run.write_test(report, result.named_predictions)
            leaderboard.update(run)
        test = run.test()
        same = all(test.get(name) == report[name] for name in ("n", "accuracy", "loss", "macro_f1")) if test else None
    return Evaluation(full_report, run.add_evaluation(write), result.description, same)


def _tested_decisions(info: Mapping[str, Any], workload: Workload, own: DeviceSpec, reporter: Reporter) -> Decisions:
    """Return the decisions that the run was tested with; others, and a note, if they are unknown or not wanted."""
    recorded, device, accelerator = recorded_decisions(info), workload.spec.device, workload.accelerator
    is_own = (device.precision, device.channels_last) == (own.precision, own.channels_last)
    if recorded is None or info.get("device") is None:
        reason = "run.json does not record the precision of the test"
    elif info["device"] != accelerator.type:
        reason = f"tested on {info['device']}, evaluated here on {accelerator.type}"
    elif not is_own and device.precision is not Precision.auto:
        reason = f"tested in {recorded.eval_precision}"
    else:
        return recorded
    reporter.note(reason)
    precision: Any = DTYPE_NAMES[DTYPES.get(device.precision, torch.float32)]
    return Decisions(
        train_precision=precision,
        eval_precision=precision,
        channels_last=device.channels_last is not False and accelerator.type != "mps",
        reasons={"evaluation": reason},
    )


def _find_images(
    loaded: LoadedRun, split_name: str | None, spec: TrainSpec, trained: TrainSpec, session: Session, reporter: Reporter
) -> tuple[DatasetSpec, EvaluationSplit, str, bool]:
    """Return the images, labeled by the run's classes, with a description; and if they are of the run's own dataset."""
    wanted, own = spec.dataset, trained.dataset
    file = RunDir(loaded.path).test_predictions
    tested = read_predictions(file).keys if file.is_file() else None
    changed: dict[str, Any] = {name: getattr(wanted, name) for name in EVALUATION_KEYS}
    dataset, data, addition, n_known = structs.replace(own.offline(), **changed), None, "", 0
    names = [name for name in ("root", "file") if hasattr(wanted, name) and hasattr(own, name)]
    location: dict[str, Any] = {name: getattr(wanted, name) for name in names}
    may_have_moved = _identity(structs.replace(own, **location)) == _identity(wanted)
    if _identity(wanted) == _identity(own):  # offline, since it does not download unless asked
        data = session.dataset(dataset, trained.seed, reporter, trained.folds, trained.fold)
    elif tested is not None and may_have_moved:
        everything = structs.replace(own.offline(), **location)
        dataset, addition = structs.replace(dataset, **location), ": images of the same names in another folder"
        with suppress(UsageError, BadImagesError):  # nothing that could be trained on
            whole = load_dataset(everything, seed=trained.seed, reporter=reporter, store=session.store, decode=False)
            if _keys(whole.test).issuperset(tested):  # else do not read all of it
                moved = session.dataset(dataset, trained.seed, reporter, trained.folds, trained.fold)
                data = moved if _keys(moved.test).issubset(tested) else None
    if data is not None:
        split_name = split_name or "test"
        split: Split = getattr(data, split_name)
        if not len(split):
            raise UsageError(f"split={split_name}: the run has no {split_name} images")
        if split_name == "test" and tested is None:
            n_known = _note_known_images(loaded, split, (), reporter)
        elif split_name == "test" and tested and dataset.test_per_class == own.test_per_class:
            new = len(_keys(split).difference(tested))
            some = f"{new:,} of {len(split):,} test images are others, and it may have been trained on them"
            if new:
                reporter.note(f"the dataset has changed since the run: {some}")
        images = EvaluationSplit(data.classes, split_name, split, data.bad_files)
        description = f"the run's own {split_name} split{addition}{' as it is now' if n_known else ''}"
    else:
        dataset = wanted
        images = load_evaluation_split(dataset, split_name, seed=trained.seed, reporter=reporter, store=session.store)
        if tested is None or (may_have_moved and images.split_name != "test"):
            n_known = _note_known_images(loaded, images.split, tested or (), reporter)
        description = "all of it" if images.split_name == "all" else f"its {images.split_name} split"
        if split_name is None and images.split_name not in ("test", "all"):
            description += f", as it has no {'test' if images.split_name == 'val' else 'test or val'} split"
    return dataset, _with_labels_of(loaded.classes, images, dataset), description, data is not None and not n_known


def _keys(split: Split) -> set[str]:
    return {split.key(i) for i in range(len(split))}


def _note_known_images(loaded: LoadedRun, split: Split, tested: Sequence[str], reporter: Reporter) -> int:
    """Print a note if images have the keys of those that trained (with folds), validated or tested a run.

    Return how many do.
    """
    file = RunDir(loaded.path).val_predictions
    validated = read_predictions(file).keys if file.is_file() else ()
    if n := len(_keys(split).intersection([*validated, *tested])):
        use = "trained" if loaded.info.get("cross_validation") else "validated"
        use += " or tested" if tested else ""
        some = f"{n:,} of the {len(split):,} images have the paths of images that {use} the run"
        reporter.note(f"{some}: if they are the same, others may have trained it, and this is no test of it")
    return n


def _identity(spec: DatasetSpec) -> tuple[object, ...]:
    """Return what distinguishes two datasets: kind, location, splits, columns, and torchvision's class."""
    names = ("class_name", "train", "val", "test", "image_column", "label_column")
    arguments = [getattr(spec, name, None) for name in names]
    locations = [getattr(spec, name, None) for name in ("root", "file")]
    return (spec.kind, *arguments, *(path and resolve_links(expand_user(path)) for path in locations))


def _with_labels_of(run_classes: Sequence[str], images: EvaluationSplit, spec: DatasetSpec) -> EvaluationSplit:
    """Return the images with labels that index the run's classes, matched by name, or raise UsageError."""
    split, names = images.split, images.classes
    if unknown := [names[i] for i in np.unique(split.labels) if names[i] not in run_classes]:
        similar = {same_spelling(name): f" (did you mean {name!r}?)" for name in run_classes}
        shown = [repr(name) + similar.get(same_spelling(name), "") for name in unknown]
        place = f"{spec.name} {getattr(spec, 'file', None) or spec.root or ''}"
        reason = f"has classes that the run ({join_limited(run_classes, 10)}) does not have: {join_limited(shown, 10)}"
        raise UsageError(f"{place}: {reason}; name the classes to evaluate: dataset.classes=[...]")
    label_of = [run_classes.index(name) if name in run_classes else -1 for name in names]
    labels = np.array(label_of, dtype=np.int64)[split.labels]
    return replace(images, classes=tuple(run_classes), split=Split(split.images, split.indices, labels))
