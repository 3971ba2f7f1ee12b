"""A finished run on images: on its own test set, as it was tested, or on those of another data set."""

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml  # type: ignore[import-untyped]
from msgspec import structs
from torch import nn

from tlcli.data.source import Split
from tlcli.device import DTYPES, prepare
from tlcli.engine.calibration import calibration_report
from tlcli.engine.evaluate import evaluate
from tlcli.engine.formats import Decisions, recorded_decisions
from tlcli.engine.metrics import Predictions, test_report
from tlcli.engine.replay import plan_replay
from tlcli.engine.session import Session, session_for
from tlcli.errors import BadImagesError, TlcliError, UsageError
from tlcli.models.build import tensors_to_reinit
from tlcli.models.classifier import Classifier, Head
from tlcli.models.weights import read_metadata
from tlcli.reporter import Reporter
from tlcli.runs.load import LoadedRun, load_run
from tlcli.runs.predictions import SplitPredictions, read_predictions, write_predictions
from tlcli.runs.run_dir import RunDir, read_json, write_json
from tlcli.specs import DatasetSpec, ManifestSpec, Precision, TorchvisionDatasetSpec, TrainSpec
from tlcli.text import to_plain
from tlcli.transfer.contract import apply_freeze

SPLITS = ("test", "val", "train")


@dataclass(frozen=True)
class Asked:
    """What is evaluated: a run's checkpoint (`best` or `last`) on a split (None: test, or what there is of one).

    `trained` is the run's own spec, `spec` the same with overrides on it.
    """

    run: Path
    checkpoint: str
    split: str | None
    spec: TrainSpec
    trained: TrainSpec

    @property
    def formats_are_own(self) -> bool:
        """Whether arithmetic is to be as in the run: the user named no other number format."""
        asked, own = self.spec.device, self.trained.device
        return (asked.precision, asked.channels_last) == (own.precision, own.channels_last)


@dataclass(frozen=True, eq=False)
class Images:
    """The images that are evaluated, labelled by the run's classes, and in words which these are. `role`: their split;
    `own`: whether the run's own; `spec`: what they were loaded by."""

    spec: DatasetSpec
    split: Split
    role: str
    own: bool
    words: str
    bad_files: tuple[tuple[str, str], ...]


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What came of it. `report` is what eval.json holds, `folder` where that is; `same` says whether test.json has the
    same figures, and is None where it is about other images or weights."""

    report: Mapping[str, Any]
    folder: Path
    words: str
    same: bool | None
    bad_files: tuple[tuple[str, str], ...]


def evaluate_run(asked: Asked, reporter: Reporter) -> Evaluation:
    """Evaluate, and write a new directory eval-N in the run's. Nothing that is there already is changed.

    Raises UsageError for what cannot be evaluated: no such checkpoint, split or class; TlcliError where it fails.
    """
    loaded = load_run(asked.run, asked.checkpoint)
    spec = _as_trained(asked.spec, loaded)
    accelerator = prepare(spec.device)
    session = session_for(spec.cache)
    images = _images(asked, loaded, spec, session, reporter)
    formats, why_other = _formats(asked, loaded.info, accelerator)
    if why_other:
        reporter.note(why_other)
    model = _as_built(loaded, spec)
    session.use(model)
    model.network.to(accelerator)
    contract = apply_freeze(spec.freeze, model)
    replay = plan_replay(images.split, model, contract, spec, accelerator, session, formats)
    found = evaluate(model.network, replay.open(reporter), replay.device, reporter, images.role)
    report = _report(found, loaded, images)
    folder = _write(RunDir(loaded.path), report, found, loaded, images)
    return Evaluation(report, folder, images.words, _same_as_test(report, loaded, asked, images), images.bad_files)


# -- the network, as it was tested


def _as_trained(spec: TrainSpec, loaded: LoadedRun) -> TrainSpec:
    """The spec with the images that the run's network takes, whatever the data set would suggest."""
    own = loaded.preprocessing
    image = structs.replace(spec.image, size=own.size, fit=own.fit, mean=own.mean, std=own.std)
    return structs.replace(spec, image=image)


def _as_built(loaded: LoadedRun, spec: TrainSpec) -> Classifier:
    """The classifier as it was when the run cut it: what was pretrained decides which BatchNorm kept its statistics."""
    model = loaded.classifier
    for module in model.network.modules():
        if isinstance(module, Head):
            module.dropout = spec.backbone.dropout
    random = tensors_to_reinit(spec.backbone.reinit, model.architecture) | model.stages[-1].tensors
    names = frozenset(name for name in _tensor_names(model.network) if name not in random)
    return replace(model, pretrained=frozenset() if spec.backbone.weights == "none" else names)


def _tensor_names(network: nn.Module) -> Sequence[str]:
    return list(network.state_dict())


def _formats(asked: Asked, info: Mapping[str, Any], accelerator: torch.device) -> tuple[Decisions, str | None]:
    """The formats that the run was tested in; where they cannot be had or are not wanted, others, and why."""
    formats, there = recorded_decisions(info), info.get("device")
    if formats is None or there is None:
        return _safe(asked.spec, accelerator), "run.json does not say in which number format the run was tested"
    if there != accelerator.type:
        return _safe(asked.spec, accelerator), f"tested on {there}, evaluated here on {accelerator.type}"
    if not asked.formats_are_own and asked.spec.device.precision is not Precision.auto:
        return _safe(asked.spec, accelerator), f"tested in {str(formats.eval_dtype).removeprefix('torch.')}"
    return formats, None


def _safe(spec: TrainSpec, accelerator: torch.device) -> Decisions:
    """The precision that was asked for, float32 where none was, on live images."""
    dtype = DTYPES.get(spec.device.precision, torch.float32)
    plain = spec.device.channels_last is False or accelerator.type == "mps"
    layout = torch.contiguous_format if plain else torch.channels_last
    return Decisions(dtype, dtype, layout, frozenset(), compiled=False)


# -- the images

KEPT = ("on_bad", "ram_gb", "test_per_class", "classes")
"""What a user may change about the run's own data set: what is in which split stays."""


def _images(asked: Asked, loaded: LoadedRun, spec: TrainSpec, session: Session, reporter: Reporter) -> Images:
    """The run's own split, or that of another data set."""
    wanted, trained = spec.dataset, asked.trained.dataset
    if _identity(wanted) == _identity(trained):
        return _own(asked, loaded, _own_spec(trained, wanted), session, reporter)
    if moved := _moved(asked, loaded, wanted, session, reporter):
        return _own(asked, loaded, moved, session, reporter, ": the same images in another place")
    found = session.evaluated(wanted, asked.split, spec.seed, reporter)
    which = "all of it" if found.role == "all" else f"its {found.role} split"
    if asked.split is None and found.role not in ("test", "all"):
        which += f", as it has no {'test' if found.role == 'val' else 'test or val'} split"
    split = remap_labels(found.split, found.classes, loaded.classes, _where(wanted))
    return Images(wanted, split, found.role, False, which, found.bad_files)


def _own(
    asked: Asked, loaded: LoadedRun, spec: DatasetSpec, session: Session, reporter: Reporter, more: str = ""
) -> Images:
    data = session.dataset(spec, asked.trained.seed, reporter)
    role = asked.split or "test"
    split: Split = getattr(data, role)
    if role == "test" and spec.test_per_class == asked.trained.dataset.test_per_class:
        new = len(set(_keys(split)).difference(_test_keys(loaded) or _keys(split)))
        if new:
            reporter.note(
                f"the data set has changed since the run: {new:,} of {len(split):,} test images are others than those "
                "that it was tested on, and it may have been trained on them"
            )
    split = remap_labels(split, data.classes, loaded.classes, _where(spec))
    return Images(spec, split, role, True, f"the run's own {role} split{more}", data.bad_files)


def _moved(
    asked: Asked, loaded: LoadedRun, wanted: DatasetSpec, session: Session, reporter: Reporter
) -> DatasetSpec | None:
    """The run's own data set where it is in another place now: then its training images stay out of the test."""
    before, trained = _test_keys(loaded), asked.trained.dataset
    if before is None or type(wanted) is not type(trained):
        return None
    place: dict[str, Any] = {"root": wanted.root} | ({"file": wanted.file} if isinstance(wanted, ManifestSpec) else {})
    spec = _own_spec(structs.replace(trained, **place), wanted)
    try:
        data = session.dataset(spec, asked.trained.seed, reporter)
    except (UsageError, BadImagesError):  # nothing that could be trained on
        return None
    return spec if _keys(data.test) == before else None


def _own_spec(trained: DatasetSpec, wanted: DatasetSpec) -> DatasetSpec:
    """The data set as it was for training, but for what a user may change about reading it."""
    changed: dict[str, Any] = {name: getattr(wanted, name) for name in KEPT}
    offline: dict[str, Any] = (
        {"download": False} if isinstance(trained, TorchvisionDatasetSpec) else {}
    )  # that is for whoever asks for it
    return structs.replace(trained, **changed, **offline)


def _test_keys(loaded: LoadedRun) -> list[str] | None:
    """The keys of the images that the run was tested on, where it kept them."""
    file = RunDir(loaded.path).test_predictions
    return list(read_predictions(file).keys) if file.is_file() else None


def _keys(split: Split) -> list[str]:
    return [split.key(i) for i in range(len(split))]


def _identity(spec: DatasetSpec) -> tuple[object, ...]:
    """What tells one data set from another: its kind and place, and what torchvision is to make of it."""
    arguments = [getattr(spec, name, None) for name in ("class_name", "train", "val", "test")]
    places = [getattr(spec, name, None) for name in ("root", "file")]
    return (spec.kind, spec.name, *arguments, *(place and Path(place).expanduser().resolve() for place in places))


def _where(spec: DatasetSpec) -> str:
    """What a user calls this data set."""
    place = spec.file if isinstance(spec, ManifestSpec) else spec.root
    return spec.name if place is None else f"{spec.name} {place}"


def remap_labels(split: Split, theirs: Sequence[str], ours: Sequence[str], where: str) -> Split:
    """The split with labels that are places in the run's classes, by name. Raises UsageError for classes that the run
    does not have."""
    present = np.unique(split.labels)
    if unknown := [theirs[i] for i in present if theirs[i] not in ours]:
        folded = {name.casefold(): name for name in ours}
        words = [f"{u!r}" + _same_but_case(folded.get(u.casefold())) for u in unknown]
        more = f" and {len(words) - 10} more" if len(words) > 10 else ""
        known = ", ".join(ours[:10]) + (f" and {len(ours) - 10} more" if len(ours) > 10 else "")
        raise UsageError(
            f"{where}: has classes that the run does not know: {', '.join(words[:10])}{more}. "
            f"The run's classes: {known}; dataset.classes=[...] keeps those of a data set that it is to be tested on"
        )
    place = np.array([ours.index(name) if name in ours else -1 for name in theirs], dtype=np.int64)
    return Split(split.images, split.indices, place[split.labels])


def _same_but_case(name: str | None) -> str:
    return f" (did you mean {name!r}?)" if name else ""


# -- the result


def _report(found: Predictions, loaded: LoadedRun, images: Images) -> dict[str, Any]:
    """The contents of eval.json: those of test.json, and what was evaluated."""
    file, spec = _checkpoint_file(loaded), images.spec
    return {
        **test_report(found, loaded.classes),
        "calibration": calibration_report(found.logits, found.labels, loaded.temperature),
        "checkpoint": file.relative_to(loaded.path).as_posix(),
        "epoch": read_metadata(file).get("epoch"),
        "dataset": {"name": spec.name, "root": spec.root, "own": images.own}
        | ({"file": spec.file} if isinstance(spec, ManifestSpec) else {}),
        "split": images.role,
        "n_bad_files": len(images.bad_files),
    }


def _checkpoint_file(loaded: LoadedRun) -> Path:
    run = RunDir(loaded.path)
    return run.best_checkpoint if loaded.checkpoint == "best" else run.last_checkpoint


def _same_as_test(report: Mapping[str, Any], loaded: LoadedRun, asked: Asked, images: Images) -> bool | None:
    """Whether test.json has these figures, where it is about the same images and weights."""
    file, own = RunDir(loaded.path).test_file, asked.trained.dataset
    as_tested = images.own and images.role == "test" and loaded.checkpoint == "best"
    if (images.spec.test_per_class, images.spec.classes) != (own.test_per_class, own.classes):
        as_tested = False
    if not (as_tested and file.is_file()):
        return None
    before = read_json(file)
    return all(before.get(key) == report[key] for key in ("n", "accuracy", "loss", "macro_f1", "confusion"))


def _write(run: RunDir, report: Mapping[str, Any], found: Predictions, loaded: LoadedRun, images: Images) -> Path:
    """A new directory eval-N, which has everything from the moment that it is there."""
    try:
        draft = Path(tempfile.mkdtemp(prefix=".eval-", dir=run.path))
    except OSError as error:
        raise TlcliError(f"{run.path}: cannot be written to ({error.strerror}); eval puts eval-N there") from error
    try:
        rows = SplitPredictions.of(images.split, found.logits, found.labels, loaded.classes)
        write_predictions(draft / "predictions.safetensors", rows)
        write_json(draft / "eval.json", report)
        config = yaml.safe_dump({"dataset": to_plain(images.spec)}, sort_keys=False, allow_unicode=True)
        (draft / "config.yaml").write_text(config, encoding="utf-8")
        draft.chmod(run.path.stat().st_mode)  # mkdtemp makes it for its owner alone
        return _in_free_place(draft, run.path)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def _in_free_place(draft: Path, folder: Path) -> Path:
    """Rename a directory to the first of eval-1, eval-2, ... that is free; two processes never get the same."""
    for n in count(1):
        wanted = folder / f"eval-{n}"
        if wanted.exists():
            continue
        try:
            return draft.rename(wanted)
        except OSError:
            if not wanted.exists():  # else somebody else's came in between: a directory with files in it stays
                raise
    raise AssertionError("unreachable")
