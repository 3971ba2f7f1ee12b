"""Choose the size and the fit of images that the config leaves open, by how well a linear probe does with each."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from math import sqrt

import torch
from msgspec import structs

from tlcli.data.dataset import limit_per_class
from tlcli.engine.activations import Workload, image_size
from tlcli.engine.decisions import Decisions
from tlcli.engine.inputs import Inputs
from tlcli.engine.metrics import features
from tlcli.errors import UsageError
from tlcli.models.classifier import eval_mode
from tlcli.reporter import Reporter
from tlcli.specs import Fit, ImageSpec
from tlcli.transfer.contract import linear_head
from tlcli.transfer.cut import Cut
from tlcli.transfer.probe import CrossValidation, choose_penalty

SHARE, STEP = 5 / 7, 32  # of the backbone's size: 160 of 224 pixels, half of its FLOPs
MAX_IMAGES, MIN_PER_CLASS = 300, 3  # of the sample


def choose_image(workload: Workload, reporter: Reporter) -> tuple[ImageSpec, str | None]:
    """Return the size and the fit of a new run's images, and the comparison if the training images chose them.

    Training uses a size below the backbone's, in half the time: random crops enlarge what they show (Touvron et al.
    2019). For evaluation a probe is cross-validated on a sample with each fit (images may all be squares), then at the
    backbone's size. Another fit than a central crop, and the larger size, is taken if its accuracy is higher by more
    than one standard error of the difference: the same images classified twice. Features are in float32, so that the
    same images give the same choice on every machine. A choice is made once per session and seed. Raise UsageError if
    the network does not take image.train_size.
    """
    spec, classifier = workload.spec, workload.classifier
    image, size = spec.image, image_size(spec) or classifier.size
    given = structs.replace(image, size=size, fit=image.fit or Fit.crop)
    train_size = image.train_size or size
    if train_size != size and not takes_size(workload, train_size):
        raise UsageError(f"image.train_size={train_size}: {classifier.name} takes images of {size} px only")
    is_published = spec.backbone.weights == "default" and bool(classifier.pretrained)
    n = MAX_IMAGES // len(workload.data.classes)
    if given == image or not is_published or n < MIN_PER_CLASS or linear_head(classifier) is None:
        return given, None
    key = ("image", spec.dataset, image, spec.folds)  # for this model, which has the seed
    return workload.session.get_or_create(key, lambda: _compare(workload, given, n, reporter))


def _compare(workload: Workload, given: ImageSpec, per_class: int, reporter: Reporter) -> tuple[ImageSpec, str | None]:
    spec, data = workload.spec, workload.data
    sample = limit_per_class(data.train, data.classes, per_class, spec.seed, "image")
    alone = replace(workload, data=replace(data, train=sample))
    sizes: Sequence[int | None] = [given.size] if image_size(spec) else candidate_sizes(workload)
    fits = [given.fit]
    if spec.image.fit is None and any(len(set(sample.read(i).shape[:2])) > 1 for i in range(len(sample))):
        fits = [Fit.crop, Fit.squash, Fit.pad]
    chosen = structs.replace(given, size=sizes[0], fit=fits[0])
    best = cross_validate_probe(alone, chosen, reporter) if len(sizes) + len(fits) > 2 else None
    if best is None:
        return given, None
    accuracies = [f"{chosen.size} px {chosen.fit} {best.accuracy:.3f}"]
    for key, value in [*(("fit", fit) for fit in fits[1:]), *(("size", size) for size in sizes[1:])]:
        image = structs.replace(chosen, **{key: value})
        other = cross_validate_probe(alone, image, reporter)
        assert other is not None
        accuracies.append(f"{image.size} px {image.fit} {other.accuracy:.3f}")
        gains, losses = int((other.correct & ~best.correct).sum()), int((best.correct & ~other.correct).sum())
        if gains - losses > sqrt(gains + losses):
            chosen, best = image, other
    if chosen.train_size is None:
        chosen = structs.replace(chosen, train_size=sizes[0])
    compared = f"probes on {len(sample)} images, {best.folds}-fold: {', '.join(accuracies)}"
    return chosen, f"{compared}; higher by less than a standard error counts as equal"


def candidate_sizes(workload: Workload) -> list[int]:
    """Return the sizes that are compared for evaluation: one below the backbone's, if it takes that, and its own."""
    size = workload.classifier.size
    smaller = round(SHARE * size / STEP) * STEP
    return [smaller, size] if 0 < smaller < size and takes_size(workload, smaller) else [size]


def takes_size(workload: Workload, size: int) -> bool:
    """Return True if the network takes images of this size; some transformers have one table of positions."""
    network = workload.classifier.network
    if getattr(network, "pretrained_cfg", {}).get("fixed_input_size"):  # timm's; it may compute, with wrong positions
        return False
    with eval_mode(network), torch.inference_mode(), suppress(Exception):
        network(torch.zeros(1, 3, size, size, device=workload.accelerator))
        return True
    return False


def cross_validate_probe(
    workload: Workload, image: ImageSpec, reporter: Reporter, max_images: int | None = None
) -> CrossValidation | None:
    """Return the cross-validation of a probe on the training images, preprocessed so; None if they are too few."""
    spec = structs.replace(workload.spec, image=image)
    workload = replace(workload, spec=spec)
    head, device = linear_head(workload.classifier), workload.accelerator.type
    assert head is not None
    decisions = Decisions(train_precision="float32", eval_precision="float32", channels_last=device != "mps")
    if isinstance(workload.features_cut, Cut) and spec.cache.max_gb > 0:
        decisions = structs.replace(decisions, cached=frozenset({"train_eval"}))
    inputs = Inputs(decisions, workload)
    label = f"features at {image.size} px, {image.fit}"
    loader = inputs.open("train_eval", reporter)
    x, predictions = features(workload.classifier.network, head, loader, inputs.device, reporter, label)
    return choose_penalty(x, predictions.labels, spec.seed, max_images)
