"""Choices before training by linear probes on the features of a sample: the backbone, the size and fit of images."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from math import ceil, sqrt

import torch
from msgspec import structs

from tlcli.data.dataset import limit_per_class
from tlcli.device import DTYPES, setup_process
from tlcli.engine.activations import Workload, image_size, load_workload
from tlcli.engine.costs import estimate_cost
from tlcli.engine.decisions import Decisions
from tlcli.engine.inputs import Inputs
from tlcli.engine.metrics import features
from tlcli.engine.numerics import measure_evaluation
from tlcli.engine.session import Session
from tlcli.errors import UsageError
from tlcli.models.classifier import count, eval_mode
from tlcli.reporter import Reporter
from tlcli.specs import DeviceSpec, Fit, ImageSpec, TrainSpec
from tlcli.transfer.contract import linear_head
from tlcli.transfer.cut import Cut
from tlcli.transfer.freeze import HeadSpec
from tlcli.transfer.graph import full_precision
from tlcli.transfer.probe import FOLDS, CrossValidation, choose_penalty

SHARE, STEP = 5 / 7, 32  # of the size of the weights: 160 of 224 pixels, half of its FLOPs
MAX_IMAGES, MIN_PER_CLASS = 300, 3  # of the sample


def choose_image(workload: Workload, reporter: Reporter) -> tuple[ImageSpec, str | None]:
    """Return the sizes and the fit of a new run's images, and the comparison if the training images chose the fit.

    If not all are squares, a probe is cross-validated on a sample with each fit. Another one than a central crop must
    lower the loss. Features are in float32: the same images give the same choice on every machine. Raise UsageError if
    the network does not take image.train_size.
    """
    spec, image = workload.spec, workload.spec.image
    train_size, size = image_sizes(workload)
    given = structs.replace(image, size=size, fit=image.fit or workload.classifier.fit)
    if train_size != size:
        given = structs.replace(given, train_size=train_size)
    if image.fit is not None or not _has_choice(workload):
        return given, None
    key = ("image", spec.dataset, image, spec.folds)  # for this model, which has the seed
    return workload.session.get_or_create(key, lambda: _choose_fit(workload, given, reporter))


def _choose_fit(workload: Workload, given: ImageSpec, reporter: Reporter) -> tuple[ImageSpec, str | None]:
    data, seed = workload.data, workload.spec.seed
    sample = limit_per_class(data.train, data.classes, MAX_IMAGES // len(data.classes), seed, "image")
    if all(len(set(sample.read(i).shape[:2])) == 1 for i in range(len(sample))):
        return given, None
    alone, results = replace(workload, data=replace(data, train=sample)), list[str]()
    chosen, best = given, None
    for fit in (Fit.crop, Fit.squash, Fit.pad):
        image = structs.replace(given, fit=fit)
        probe = cross_validate_probe(alone, image, reporter)
        if probe is None:  # too few images
            return given, None
        results.append(f"{fit} {probe.losses.mean():.3f}")
        if best is None or probe.has_lower_loss(best):
            chosen, best = image, probe
    compared = f"loss of probes on {len(sample)} images at {given.size} px: {', '.join(results)}"
    return chosen, f"{compared}; lower by less than two standard errors counts as equal"


def image_sizes(workload: Workload) -> tuple[int, int]:
    """Return the sizes of images in training and in evaluation, as given, or for published weights by two rules.

    Training is at 5/7 of the size of the weights, and evaluation between both: random crops enlarge what they show
    (Touvron et al. 2019). Sizes that the network does not take are not chosen, and an error if they are given.
    """
    image, size = workload.spec.image, image_size(workload.spec)
    own = size or workload.classifier.size
    check_train_size(workload, own, image.train_size or own)
    smaller = image.train_size or ceil(SHARE * own / STEP) * STEP
    between = max(smaller, min(round((smaller + own) / 2 / STEP) * STEP, own))
    is_open = size is None and smaller < own and _has_choice(workload)
    if is_open and takes_size(workload, smaller) and takes_size(workload, between):
        return smaller, between
    return image.train_size or own, own


def _has_choice(workload: Workload) -> bool:
    """Return True if a run may choose size and fit: with published weights, a linear head and images for a probe."""
    spec, classifier = workload.spec, workload.classifier
    is_published = spec.backbone.weights == "default" and bool(classifier.pretrained)
    n_per_class = MAX_IMAGES // len(workload.data.classes)
    return is_published and n_per_class >= MIN_PER_CLASS and linear_head(classifier) is not None


def takes_size(workload: Workload, size: int) -> bool:
    """Return True if the network takes images of this size; some transformers have one table of positions."""
    network = workload.classifier.network
    if getattr(network, "pretrained_cfg", {}).get("fixed_input_size"):  # timm's; it may compute, with wrong positions
        return False
    with eval_mode(network), torch.inference_mode(), suppress(Exception):
        network(torch.zeros(1, 3, size, size, device=workload.accelerator))
        return True
    return False


def check_train_size(workload: Workload, size: int, train_size: int) -> None:
    """Raise UsageError if a network for images of one size cannot train on those of another."""
    if train_size != size and not takes_size(workload, train_size):
        name = workload.classifier.name
        raise UsageError(f"image.train_size={train_size}: {name} takes images of {size} px only")


def cross_validate_probe(
    workload: Workload, image: ImageSpec, reporter: Reporter, max_images: int | None = None
) -> CrossValidation | None:
    """Return the cross-validation of a probe on the training images, preprocessed so; None if they are too few."""
    spec = structs.replace(workload.spec, image=image)
    workload = replace(workload, spec=spec)
    channels_last = workload.accelerator.type != "mps"
    decisions = Decisions(train_precision="float32", eval_precision="float32", channels_last=channels_last)
    if isinstance(workload.features_cut, Cut) and spec.cache.max_gb > 0:
        decisions = structs.replace(decisions, cached=frozenset({"train_eval"}))
    inputs = Inputs(decisions, workload)
    label = f"features at {image.size} px, {image.fit}"
    with full_precision(workload.classifier.network):
        x, predictions = features(inputs, inputs.open("train_eval", reporter), reporter, label)
    return choose_penalty(x, predictions.labels, spec.seed, max_images)


@dataclass(frozen=True, eq=False)
class Score:
    """A backbone at one image size. `seconds` are those of a run, estimated from the speed of a few steps."""

    backbone: str  # as on the command line
    size: int
    train_size: int
    probe: CrossValidation
    parameters: int
    images_per_second: float | None  # of evaluation
    seconds: float

    @property
    def standard_error(self) -> float:
        return sqrt(self.probe.accuracy * (1 - self.probe.accuracy) / len(self.probe.correct))


def new_workload(spec: TrainSpec, session: Session, reporter: Reporter) -> Workload:
    """Return the data and the network of a run that has not started."""
    accelerator = setup_process(spec.device)
    data = session.dataset(spec.dataset, spec.seed, reporter, spec.folds)
    return replace(load_workload(spec, data, accelerator, session), needs_probe=True)


def expected_seconds(workload: Workload, size: int, train_size: int) -> tuple[float, float | None, DeviceSpec]:
    """Return the seconds of a run at these image sizes and images per second of evaluation, from a few steps.

    A run with folds trains once per fold, then the refit, unless freeze=head: then one pass over the images counts. The
    device is that of the run, restricted to the fastest format: of training the network, or of its cached part.
    """
    image = structs.replace(workload.spec.image, size=size, train_size=train_size)
    run = replace(workload, spec=structs.replace(workload.spec, image=image))
    cost, fastest = estimate_cost(run, also_untaken=False)
    seconds, evaluation = float(cost["total"]), measure_evaluation(run, fastest.memory_format)
    if not isinstance(run.spec.freeze, HeadSpec):
        seconds *= run.spec.own_folds + 1
    precision = next(name for name, dtype in DTYPES.items() if dtype == fastest.dtype)
    channels_last = fastest.memory_format == torch.channels_last
    device = structs.replace(run.spec.device, precision=precision, channels_last=channels_last)
    return seconds, evaluation.images_per_second, device


def score(
    backbone: str,
    spec: TrainSpec,
    sizes: Sequence[int],
    limits: tuple[int, int],
    session: Session,
    reporter: Reporter,
    max_seconds: float | None = None,
) -> Iterator[Score]:
    """Yield the scores of a backbone at these image sizes; without any, at those of a run, then at that of its weights.

    The probe is cross-validated on a sample of the training images, of which `limits` are the most per class and in
    all. It ends at a size at which a run would take more than `max_seconds`. The format that is fastest at the first
    size is that of all. Raise UsageError if images are too few.
    """
    workload = new_workload(spec, session, reporter)
    data, classifier = workload.data, workload.classifier
    if linear_head(classifier) is None:
        raise UsageError(f"backbone={backbone}: its head is not one linear layer, so that no probe can rank it")
    per_class = max(2, min(limits[0], limits[1] // len(data.classes)))
    sample = replace(data, train=limit_per_class(data.train, data.classes, per_class, spec.seed, "rank"))
    pairs = [(spec.image.train_size or size, size) for size in sizes]
    if not sizes:
        pairs, own = [image_sizes(workload)], image_size(spec) or classifier.size
        if pairs[0][1] != own:
            pairs.append((spec.image.train_size or own, own))
    for train_size, size in pairs:
        image = structs.replace(spec.image, size=size)
        if sizes:  # a table of positions is for one size
            workload = new_workload(structs.replace(spec, image=image), session, reporter)
            check_train_size(workload, size, train_size)
        seconds, evaluation, device = expected_seconds(workload, size, train_size)
        if max_seconds is not None and seconds > max_seconds:
            return  # the size of the weights is larger
        image = structs.replace(image, fit=image.fit or classifier.fit, train_size=train_size)
        probe = cross_validate_probe(replace(workload, data=sample), image, reporter, per_class * len(data.classes))
        if probe is None:
            raise UsageError(f"rank: a cross-validation needs {FOLDS} training images in each of two classes; add some")
        n_parameters = count(classifier.network.parameters())
        yield Score(backbone, size, train_size, probe, n_parameters, evaluation, seconds)
        spec = structs.replace(spec, device=device)  # at other sizes the same format is the fastest, as a rule
        workload = replace(workload, spec=structs.replace(workload.spec, device=device))


def best_of(scores: Sequence[Score]) -> list[Score]:
    """Return the most accurate one and those that tie with it."""
    best = max(scores, key=lambda s: s.probe.accuracy)
    return [s for s in scores if not best.probe.beats(s.probe)]


def choose(scores: Sequence[Score]) -> Score:
    """Return the fastest to train of those that tie with the most accurate one."""
    return min(best_of(scores), key=lambda s: (s.seconds, -s.probe.accuracy))
