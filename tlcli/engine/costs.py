"""The expected cost of training on this machine, from the speed of a few steps; no weight is changed."""

import os
import time
from dataclasses import replace
from math import inf
from typing import Any

import torch
from msgspec import structs
from torch.optim.swa_utils import update_bn

from tlcli.data.batches import epoch_order
from tlcli.data.dataset import load_dataset, without_bad
from tlcli.device import ComputeFormat, setup_process
from tlcli.engine.activations import Workload, image_size
from tlcli.engine.decisions import device_with, not_worthwhile_reason, uncacheable_reason
from tlcli.engine.numerics import measure_extraction, measure_network, measure_suffix, training_speed
from tlcli.engine.session import session_for
from tlcli.engine.unknown import MIN_IMAGES
from tlcli.errors import UsageError
from tlcli.models.build import build_model
from tlcli.models.classifier import count
from tlcli.reporter import Reporter
from tlcli.specs import AugmentSpec, HeadInit, TrainSpec, options
from tlcli.transfer.contract import apply_freeze, freeze_table
from tlcli.transfer.cut import Cut
from tlcli.transfer.freeze import HeadSpec

Formats = tuple[ComputeFormat, ComputeFormat]

SAMPLE_IMAGES = 64  # decoded, which tells how long decoding takes
BATCH_NORM_IMAGES = 8  # of which the statistics of random weights are


def inspect(spec: TrainSpec, head_augment: AugmentSpec, reporter: Reporter) -> dict[str, Any]:
    """Return the JSON of `tlcli inspect`: the stages of the network and the cost of each freeze strategy on the data.

    `head_augment` is the augmentation of freeze=head. Raises UsageError, and BadImagesError of the sample.
    """
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    accelerator, session = setup_process(spec.device), session_for(spec.cache)
    data = load_dataset(spec.dataset.offline(), seed=spec.seed, reporter=reporter, decode=False)
    backbone = spec.backbone
    is_random = backbone.weights == "default" and not backbone.is_packaged  # no download: time does not depend on them
    if is_random:
        backbone = structs.replace(backbone, weights="none", reinit=())
    classifier = build_model(backbone, data.classes, size=image_size(spec), seed=spec.seed)
    if is_random:  # counted as pretrained: BatchNorm layers keep pretrained statistics
        classifier = replace(classifier, pretrained=frozenset(classifier.network.state_dict()))
    classifier.network.to(accelerator)

    sample, start = data.train.take(epoch_order(len(data.train), spec.seed, 1)[:SAMPLE_IMAGES]), time.perf_counter()
    sample = without_bad({"train": sample}, spec.dataset, reporter, None)[0]["train"]
    if not len(sample):
        none = f"no image of a sample of {SAMPLE_IMAGES} decodes"
        raise UsageError(f"{spec.dataset.name}: {none}; see `tlcli data check`")
    decode_seconds = (time.perf_counter() - start) / len(sample)
    # raises UsageError if the network has no such stage
    workload = Workload(data, classifier, apply_freeze(spec.freeze, classifier), spec, accelerator, session)
    preprocessing = workload.preprocessing
    if is_random:  # without statistics signals vanish, and processors are many times slower with such small numbers
        images = [preprocessing.apply(sample.read(i)) for i in range(min(BATCH_NORM_IMAGES, len(sample)))]
        update_bn([preprocessing.normalize(torch.stack(images).to(accelerator))], classifier.network.eval())

    variants = [v for strategy in options("freeze").values() for v in strategy.variants(spec.freeze, classifier)]
    strategies, formats = list[dict[str, Any]](), None
    with reporter.track("measuring", len(variants), "strategies") as advance:
        for freeze in reversed(variants):  # the whole network first: its formats are used for the others
            augment = head_augment if isinstance(freeze, HeadSpec) else spec.augment
            needs_probe = freeze.head_init is HeadInit.probe and bool(classifier.pretrained)
            contract, own = apply_freeze(freeze, classifier), structs.replace(spec, freeze=freeze, augment=augment)
            variant = replace(workload, contract=contract, spec=own, needs_probe=needs_probe)
            formats = formats or measure_network(variant)
            strategies.insert(0, estimate_cost(variant, formats, decode_seconds)[0])
            advance(1)
    assert formats is not None
    sizes = {row.name: row.parameters for row in freeze_table(spec.optimizer, classifier)}
    return {
        "backbone": classifier.name,
        "dataset": spec.dataset.title,
        "classes": len(data.classes),
        "images": {"train": len(data.train), "val": len(data.val), "test": len(data.test)},
        "size": preprocessing.size,
        "epochs": workload.epochs,
        "batch_size": spec.batch_size,
        "device": device_with(workload, formats[0].dtype, formats[1]).description,
        "cores": os.cpu_count() or 1,
        "load": load,  # before the measurements
        "stages": [{"name": k, "parameters": n, "share": n / sum(sizes.values())} for k, n in sizes.items()],
        "strategies": strategies,
    }


def estimate_cost(
    workload: Workload, formats: Formats | None = None, decode_seconds: float = 0.0, *, also_untaken: bool = True
) -> tuple[dict[str, Any], ComputeFormat]:
    """Return the expected cost of a workload's strategy, in seconds, and the fastest format of the way that it takes.

    That is the format of its cached part, or of training on images. `formats` are those of `measure_network`, which is
    called without them if a run would read images.

    `first_pass` is the extraction of all images, decoding included. `cached_epoch` (on activations) and `live_epoch`
    (on images) include validation. `takes` is the way that a run chooses, cached or live, and `total` its seconds with
    an empty cache. If the network cannot be cut, the cached values are None; `why_live` is the reason for live. Without
    `also_untaken`, values of the way that is not taken may be None, too.
    """
    data, sized = workload.data, workload.for_training
    is_random = workload.augments and workload.views is None  # known without a cut, which takes seconds
    reason = "new views" if is_random and not also_untaken else uncacheable_reason(workload)
    n_train, n_val, n_test = len(data.train), len(data.val), len(data.test)
    n_once = n_test + min(n_train, MIN_IMAGES) + (n_train if workload.needs_probe else 0)  # and of the unknown score

    def epoch_and_run(train: float | None, evaluation: float | None) -> tuple[float, float]:
        trained, evaluated = 1 / (train or inf), 1 / (evaluation or inf)
        epoch = n_train * trained + n_val * evaluated
        first_fit = part.epochs * len(part.data.train) * trained if (part := workload.first_fit) else 0.0
        return epoch, workload.epochs * epoch + first_fit + n_once * evaluated

    decoding, total, live_epoch = decode_seconds * (n_train + n_val + n_test), None, None
    cached: dict[str, Any] = dict.fromkeys(("at", "row_bytes", "cache_bytes", "first_pass", "cached_epoch"))
    if (also_untaken or reason is None) and isinstance(cut := sized.cut, Cut):
        fastest = prefix_format = measure_extraction(sized, cut)
        extractor = sized.extractor(cut, prefix_format)
        n_rows, row_bytes = n_train + n_val + n_test, sum(column.nbytes for column in extractor.columns)
        if workload.augments and workload.views is not None:
            n_rows += n_train * (min(workload.views, workload.epochs) + workload.needs_probe - 1)
        train = training_speed(sized, measure_suffix(sized, cut, prefix_format), cut)
        cached_epoch, total = epoch_and_run(train, train)  # a step of evaluation takes at most that of training
        first_pass = decoding + extractor.estimate_seconds(n_rows, prefix_format.images_per_second or inf)
        total, reason = total + first_pass, reason or not_worthwhile_reason(workload, prefix_format, n_rows, row_bytes)
        cached |= {"at": cut.suffix_start, "first_pass": first_pass, "cached_epoch": cached_epoch}
        cached |= {"row_bytes": row_bytes, "cache_bytes": row_bytes * n_rows}
    if also_untaken or reason:
        training, evaluation = formats or measure_network(workload)
        live_epoch, live_run = epoch_and_run(training_speed(workload, training), evaluation.images_per_second)
        if reason:
            total, fastest = live_run + decoding, training
    cost = {
        "freeze": workload.spec.freeze.label,
        "trainable": count(p for p in workload.classifier.network.parameters() if p.requires_grad),
        **cached,
        "live_epoch": live_epoch,
        "takes": "live" if reason else "cached",
        "why_live": reason,
        "total": total,
    }
    return cost, fastest
