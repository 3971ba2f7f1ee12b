"""A finished run on images: on its own test split, as it was tested, or on those of another dataset."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml  # type: ignore[import-untyped]
from msgspec import structs

from tlcli.data.dataset import Dataset
from tlcli.data.images import Split
from tlcli.data.sources import ManifestSpec
from tlcli.device import DTYPES, setup_process
from tlcli.engine.activations import Workload
from tlcli.engine.decisions import Decisions, follow, recorded_decisions
from tlcli.engine.inputs import Inputs
from tlcli.engine.metrics import Predictions, calibration_report, evaluate, test_report
from tlcli.engine.session import Session, session_for
from tlcli.errors import BadImagesError, UsageError
from tlcli.models.build import tensors_to_reinit
from tlcli.models.classifier import Classifier, Head
from tlcli.models.tensorfile import read_tensors
from tlcli.reporter import Reporter
from tlcli.runs.load import LoadedRun, load_run
from tlcli.runs.run_dir import (
    RunDir,
    SplitPredictions,
    confusion_matrix,
    read_predictions,
    stored_confusion,
    write_json,
    write_predictions,
)
from tlcli.specs import DatasetSpec, Precision, TrainSpec
from tlcli.text import join_limited, to_plain
from tlcli.transfer.contract import apply_freeze

OVERRIDABLE_KEYS = ("on_bad", "ram_gb", "test_per_class", "classes")
"""What a user may change about the run's own dataset: the assignment of images to splits stays."""
COMPARED_METRICS = ("n", "accuracy", "loss", "macro_f1")


@dataclass(frozen=True)
class EvaluationRequest:
    """A run's checkpoint (`best` or `last`) and a split (None: test, or else what the dataset has).

    `trained` is the run's own spec, `spec` the same with overrides.
    """

    run: Path
    checkpoint: str
    split_name: str | None
    spec: TrainSpec
    trained: TrainSpec


@dataclass(frozen=True, eq=False)
class EvaluationImages:
    """The images to evaluate, labeled by the run's classes. `is_own`: they are a split of the run's own dataset."""

    spec: DatasetSpec
    split: Split
    split_name: str
    is_own: bool
    description: str
    bad_files: tuple[tuple[str, str], ...]


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The result. `report` is the contents of eval.json in `folder`; `same` says if test.json has the same metrics, and
    is None if that is about other images or weights."""

    report: Mapping[str, Any]
    folder: Path
    description: str
    same: bool | None
    bad_files: tuple[tuple[str, str], ...]


def evaluate_run(request: EvaluationRequest, reporter: Reporter) -> Evaluation:
    """Evaluate, and write a new directory eval-N in the run's; existing files are not changed.

    Raises UsageError if there is no such checkpoint, split or class, and TlcliError if the evaluation fails.
    """
    loaded = load_run(request.run, request.checkpoint)
    own = loaded.preprocessing  # whatever size another dataset suggests
    image = structs.replace(request.spec.image, size=own.size, fit=own.fit, mean=own.mean, std=own.std)
    spec, trained = (
        structs.replace(s, dataset=structs.replace(s.dataset, range=own.range)) for s in (request.spec, request.trained)
    )
    spec = structs.replace(spec, image=image)
    request = replace(request, spec=spec, trained=trained)
    accelerator = setup_process(spec.device)
    session = session_for(spec.cache)
    images = _find_images(request, loaded, session, reporter)
    classifier = _as_trained(loaded, spec)
    session.set_model(classifier)
    classifier.network.to(accelerator)
    contract = apply_freeze(spec.freeze, classifier)
    data = Dataset(
        spec.dataset.name, classifier.classes, *(images.split,) * 3, notes=(), bad_files=(), value_range=own.range
    )
    workload = Workload(data, classifier, contract, spec, accelerator, session)
    decisions = follow(_tested_decisions(request, loaded.info, accelerator, reporter), workload, reporter, ["test"])
    inputs = Inputs(decisions, workload, ["test"])
    inputs.device.place(classifier.network)
    loader = inputs.open("test", reporter)
    inputs.device.compile_if_set(inputs.trained_network)
    predictions = evaluate(classifier.network, loader, inputs.device, reporter, images.split_name)
    report = _report(predictions, loaded, images)

    def write(folder: Path) -> None:
        rows = SplitPredictions.of(images.split, predictions.logits, predictions.labels, loaded.classes)
        write_predictions(folder / "predictions.safetensors", rows)
        write_json(folder / "eval.json", report)
        config = yaml.safe_dump({"dataset": to_plain(images.spec)}, sort_keys=False, allow_unicode=True)
        (folder / "config.yaml").write_text(config, encoding="utf-8")

    folder = RunDir(loaded.path).add_evaluation(write)
    same = _has_same_metrics(report, loaded, request, images)
    return Evaluation(report, folder, images.description, same, images.bad_files)


def _as_trained(loaded: LoadedRun, spec: TrainSpec) -> Classifier:
    """Return the classifier as it was cut in training: its pretrained tensors decide which BatchNorm is frozen."""
    classifier = loaded.classifier
    for module in classifier.network.modules():
        if isinstance(module, Head):
            module.dropout = spec.backbone.dropout
    head = classifier.stages[-1].tensors
    random = tensors_to_reinit(spec.backbone.reinit, classifier.architecture) | head
    names = frozenset(classifier.network.state_dict()) - random
    return replace(classifier, pretrained=frozenset() if spec.backbone.weights == "none" else names)


def _tested_decisions(
    request: EvaluationRequest, info: Mapping[str, Any], accelerator: torch.device, reporter: Reporter
) -> Decisions:
    """Return the decisions that the run was tested with; others, and a note, if they are unknown or not wanted."""
    recorded, device = recorded_decisions(info), request.spec.device
    is_own = (device.precision, device.channels_last) == (
        request.trained.device.precision,
        request.trained.device.channels_last,
    )
    if recorded is None or info.get("device") is None:
        reason = "run.json does not record the precision of the test"
    elif info["device"] != accelerator.type:
        reason = f"tested on {info['device']}, evaluated here on {accelerator.type}"
    elif not is_own and device.precision is not Precision.auto:
        reason = f"tested in {str(recorded.eval_dtype).removeprefix('torch.')}"
    else:
        return recorded
    reporter.note(reason)
    dtype = DTYPES.get(device.precision, torch.float32)
    is_contiguous = device.channels_last is False or accelerator.type == "mps"
    layout = torch.contiguous_format if is_contiguous else torch.channels_last
    return Decisions(dtype, dtype, layout, None, None, frozenset(), frozenset(), {"evaluation": reason})


# -- the images


def _find_images(
    request: EvaluationRequest, loaded: LoadedRun, session: Session, reporter: Reporter
) -> EvaluationImages:
    """Return the run's own split, or that of another dataset."""
    wanted, trained, seed = request.spec.dataset, request.trained.dataset, request.trained.seed
    file = RunDir(loaded.path).test_predictions
    tested = list(read_predictions(file).keys) if file.is_file() else None
    changed: dict[str, Any] = {name: getattr(wanted, name) for name in OVERRIDABLE_KEYS}
    spec, data, addition = structs.replace(trained.offline(), **changed), None, ""  # it does not download unless asked
    if _identity(wanted) == _identity(trained):
        data = session.dataset(spec, seed, reporter)
    elif tested is not None and type(wanted) is type(trained):  # the run's own, if it has moved
        location: dict[str, Any] = {name: getattr(wanted, name) for name in ("root", "file") if hasattr(wanted, name)}
        spec, addition = structs.replace(spec, **location), ": the same images in another folder"
        with suppress(UsageError, BadImagesError):  # nothing that could be trained on
            moved = session.dataset(spec, seed, reporter)
            data = moved if [moved.test.key(i) for i in range(len(moved.test))] == tested else None
    if data is None:
        found = session.load_evaluation_split(wanted, request.split_name, request.spec.seed, reporter)
        description = "all of it" if found.split_name == "all" else f"its {found.split_name} split"
        if request.split_name is None and found.split_name not in ("test", "all"):
            description += f", as it has no {'test' if found.split_name == 'val' else 'test or val'} split"
        split = remap_labels(found.split, found.classes, loaded.classes, _name(wanted))
        return EvaluationImages(wanted, split, found.split_name, False, description, found.bad_files)
    split_name = request.split_name or "test"
    split = getattr(data, split_name)
    new = len({split.key(i) for i in range(len(split))}.difference(tested or ()))
    if tested and new and split_name == "test" and spec.test_per_class == trained.test_per_class:
        reporter.note(
            f"the dataset has changed since the run: {new:,} of {len(split):,} test images are not those that it "
            "was tested on, and it may have been trained on them"
        )
    split = remap_labels(split, data.classes, loaded.classes, _name(spec))
    description = f"the run's own {split_name} split{addition}"
    return EvaluationImages(spec, split, split_name, True, description, data.bad_files)


def _identity(spec: DatasetSpec) -> tuple[object, ...]:
    """Return what distinguishes two datasets: kind, location, and torchvision's arguments."""
    arguments = [getattr(spec, name, None) for name in ("class_name", "train", "val", "test")]
    locations = [getattr(spec, name, None) for name in ("root", "file")]
    return (spec.kind, spec.name, *arguments, *(path and Path(path).expanduser().resolve() for path in locations))


def _name(spec: DatasetSpec) -> str:
    location = spec.file if isinstance(spec, ManifestSpec) else spec.root
    return spec.name if location is None else f"{spec.name} {location}"


def remap_labels(split: Split, names: Sequence[str], run_classes: Sequence[str], where: str) -> Split:
    """Return the split with labels that index the run's classes, matched by name.

    Raises UsageError for classes that the run does not have.
    """
    unknown = [names[i] for i in np.unique(split.labels) if names[i] not in run_classes]
    if unknown:
        by_folded = {name.casefold(): name for name in run_classes}
        similar = {name: by_folded.get(name.casefold()) for name in unknown}
        shown = [repr(name) + (f" (did you mean {similar[name]!r}?)" if similar[name] else "") for name in unknown]
        raise UsageError(
            f"{where}: has classes that the run does not have: {join_limited(shown, 10)}. The run's classes: "
            f"{join_limited(run_classes, 10)}; dataset.classes=[...] selects the classes to evaluate"
        )
    index = {name: i for i, name in enumerate(run_classes)}
    label_of = np.array([index.get(name, -1) for name in names], dtype=np.int64)
    return Split(split.images, split.indices, label_of[split.labels])


# -- the result


def _report(predictions: Predictions, loaded: LoadedRun, images: EvaluationImages) -> dict[str, Any]:
    """Return the contents of eval.json: those of test.json, and what was evaluated."""
    run, spec = RunDir(loaded.path), images.spec
    file = run.best_checkpoint if loaded.checkpoint == "best" else run.last_checkpoint
    dataset = {"name": spec.name, "root": spec.root, "own": images.is_own}
    return {
        **(report := test_report(predictions, loaded.classes)),
        "confusion": stored_confusion(report["confusion"]),
        "calibration": calibration_report(predictions.logits, predictions.labels, loaded.temperature),
        "checkpoint": file.relative_to(loaded.path).as_posix(),
        "epoch": read_tensors(file)[1].get("epoch"),
        "dataset": {**dataset, "file": spec.file} if isinstance(spec, ManifestSpec) else dataset,
        "split": images.split_name,
        "n_bad_files": len(images.bad_files),
    }


def _has_same_metrics(
    report: Mapping[str, Any], loaded: LoadedRun, request: EvaluationRequest, images: EvaluationImages
) -> bool | None:
    """Return True if test.json has these metrics; None if it is about other images or weights."""
    test, own = RunDir(loaded.path).test(), request.trained.dataset
    is_test = images.is_own and images.split_name == "test" and loaded.checkpoint == "best"
    if (
        not test
        or not is_test
        or (images.spec.test_per_class, images.spec.classes) != (own.test_per_class, own.classes)
    ):
        return None
    tested, found = confusion_matrix(test), confusion_matrix(report)
    if tested is None or found is None or not np.array_equal(tested, found):
        return False
    return all(test.get(name) == report[name] for name in COMPARED_METRICS)
