"""The check of a data set, part by part; what is found is plain data for the summary, the files and the pictures."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from msgspec import structs
from torch import Tensor

from tlcli.checking.labels import LabelCheck, check_labels
from tlcli.data.dataset import Dataset
from tlcli.data.duplicates import same_content
from tlcli.data.headers import Header, headers
from tlcli.data.layout import Layout, survey, usable
from tlcli.data.near import coefficients, joined, near_pairs, thumbnail
from tlcli.data.threads import map_in_threads
from tlcli.data.together import ConcatSplits
from tlcli.device import prepare
from tlcli.engine.activations import Workload, image_size
from tlcli.engine.decisions import decide
from tlcli.engine.evaluate import features
from tlcli.engine.inputs import Inputs
from tlcli.engine.session import Session
from tlcli.models.backbones import build_architecture
from tlcli.models.classifier import Classifier
from tlcli.reporter import Reporter
from tlcli.specs import AugmentNoneSpec, HeadInit, ImageFolderSpec, OnBad, TrainSpec
from tlcli.transfer.contract import apply_freeze
from tlcli.transfer.freeze import HeadSpec
from tlcli.transfer.probe import linear_head


@dataclass(frozen=True, eq=False)
class Alike:
    """Positions of images that are one picture; `similarity` is the least of the pairs that join them, at most 1."""

    members: tuple[int, ...]
    similarity: float


@dataclass(eq=False)
class Findings:
    """What was found. Groups of `exact` have the same content; those of `near` are alike, copies included. `labels` is
    None where `why_no_labels` says why. `size` is that of the network's input; `seconds` are by part."""

    spec: TrainSpec
    data: Dataset
    images: ConcatSplits
    size: int
    layout: Layout | None = None
    headers: Sequence[Header] = ()
    exact: Sequence[Sequence[int]] = ()
    near: Sequence[Alike] = ()
    not_compared: int = 0
    labels: LabelCheck | None = None
    why_no_labels: str | None = None
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The data set's name, and that of its folder where it has one."""
        root = self.spec.dataset.root
        return f"{self.data.name} {Path(root).name}" if root else self.data.name

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Adds the time spent within to this part's."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - start, 3)


def check_data(spec: TrainSpec, reporter: Reporter, session: Session, *, quick: bool) -> Findings:
    """Look at every image of the data set of a spec. `quick` leaves out what runs a network: the labels.

    Nothing of the data is changed. Raises UsageError where the data cannot be used at all.
    """
    start = time.perf_counter()
    accelerator = prepare(spec.device)
    layout = survey(spec.dataset) if isinstance(spec.dataset, ImageFolderSpec) else None
    spec = _as_checked(spec, layout)
    data = session.dataset(spec.dataset, spec.seed, reporter)
    images = ConcatSplits({"train": data.train, "val": data.val, "test": data.test})
    found = Findings(spec, data, images, _input_size(spec, len(data.classes)), layout)
    found.seconds["reading"] = round(time.perf_counter() - start, 3)
    with found.part("exact duplicates"):
        found.exact = same_content(images, reporter)
    with found.part("headers"):
        found.headers = list(headers(images, reporter))
    with found.part("near duplicates"):
        found.near, found.not_compared = _alike(images, found.exact, reporter)
    if quick:
        found.why_no_labels = "left out (--quick)"
    else:
        _check_labels(found, accelerator, reporter, session)
    return found


def _as_checked(spec: TrainSpec, layout: Layout | None) -> TrainSpec:
    """The spec whose features are those that training a head alone would read, without bad files and classes that stop
    training."""
    dataset = spec.dataset
    if isinstance(dataset, ImageFolderSpec) and layout is not None:
        dataset = usable(dataset, layout)
    return structs.replace(
        spec,
        dataset=structs.replace(dataset, on_bad=OnBad.skip),
        freeze=HeadSpec(bn_stats=spec.freeze.bn_stats, head_init=HeadInit.random),
        augment=AugmentNoneSpec(erasing=0.0),
    )


def _input_size(spec: TrainSpec, n_classes: int) -> int:
    """The side of what the network takes, in pixels."""
    own = image_size(spec)
    return own or build_architecture(spec.backbone, n_classes, None).size


def _alike(images: ConcatSplits, exact: Sequence[Sequence[int]], reporter: Reporter) -> tuple[list[Alike], int]:
    """Groups of near duplicates, and how many images could not be compared. Of exact copies one is looked at."""
    copies = {group[0]: group for group in exact}
    repeated = {i for group in exact for i in group[1:]}
    looked_at = [i for i in range(len(images)) if i not in repeated]
    small = {}
    with reporter.track("comparing", len(looked_at)) as done:
        made = map_in_threads(lambda i: thumbnail(images.read(i)), looked_at, 16)
        for i, one in zip(looked_at, made, strict=True):
            if one is not None:
                small[i] = one
            done(1)
    if not small:
        return [], len(looked_at)
    positions = list(small)
    thumbnails = np.stack(list(small.values()))
    found = coefficients(thumbnails)
    pairs = {(positions[i], positions[j]): cosine for i, j, cosine in near_pairs(thumbnails, found)}
    least: dict[int, float] = {}
    for (i, _), cosine in pairs.items():
        least[i] = min(cosine, least.get(i, 1.0))
    groups = [
        Alike(
            tuple(sorted(k for i in group for k in copies.get(i, [i]))),
            min(1.0, *(least.get(i, 1.0) for i in group)),
        )
        for group in joined(pairs)
    ]
    plain = int((~found.any(axis=1)).sum())
    return groups, len(looked_at) - len(small) + plain


def _check_labels(found: Findings, accelerator: torch.device, reporter: Reporter, session: Session) -> None:
    """Features of all images through the cache of activations, and a probe on them."""
    spec, data = found.spec, found.data
    with found.part("features"):
        model = session.model(spec.backbone, data.classes, size=image_size(spec), seed=spec.seed)
        found.notes += [] if model.pretrained else ["the features are of random weights: they tell little about labels"]
        seen = _features(found, model, accelerator, reporter, session)
    if seen is None:
        found.why_no_labels = "this network's head is not one linear layer, so there are no features for a probe"
        return
    with found.part("labels"), reporter.track("labels", len(found.images)) as done:
        together = joined(
            (group[0], i) for group in [*found.exact, *(one.members for one in found.near)] for i in group[1:]
        )
        found.labels = check_labels(seen, found.images.labels, len(data.classes), together, seed=spec.seed, done=done)


def _features(
    found: Findings, model: Classifier, accelerator: torch.device, reporter: Reporter, session: Session
) -> Tensor | None:
    """What enters the head for each image, in order; None where the head is no single layer."""
    spec, head = found.spec, linear_head(model)
    if head is None:
        return None
    model.network.to(accelerator)
    contract = apply_freeze(spec.freeze, model)
    workload = Workload(found.data, model, contract, spec, accelerator, session, needs_probe=True)
    inputs = Inputs(decide(workload), workload)
    inputs.device.place(model.network)
    loaders = [inputs.open(name, reporter) for name in ("train_eval", "val", "test")]
    return torch.cat(
        [features(model.network, head, loader, inputs.device, reporter, "features")[0] for loader in loaders]
    )
