"""The fastest dtype and memory format on this machine: a few steps of each are measured, and the choice is stored.

Rules of thumb fail: what is faster on one processor with bfloat16 arithmetic is slower on the next.
"""

import copy
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from tlcli.device import ComputeFormat, allowed_formats, autocast, machine_name, synchronize
from tlcli.engine.activations import Workload
from tlcli.engine.gradients import fast_depthwise_backward
from tlcli.errors import is_out_of_memory
from tlcli.transfer.cut import Cut

# images per measured step: enough to tell the formats apart in a second or two; a GPU waits for fewer
MEASURE_BATCH_SIZE = {"cpu": 8, "mps": 32, "cuda": 64}
FEW_IMAGES = 8  # if these do not fit in memory
MIN_SPEEDUP = 1.1  # of a format that is chosen before an earlier one: similar ones must not change between runs
MEASURE_SECONDS = 0.15  # of steps, after which a format has been measured enough in a round
BATCH_SECONDS = 1.0  # of steps of whole batches, which tell how long a run takes
ROUNDS = 2  # in which formats take turns: another program may disturb one of them
NOTES = "numerics"  # name of the store's notes on choices


def measure_extraction(workload: Workload, cut: Cut) -> ComputeFormat:
    """Return the fastest format of the prefix, with its speed."""
    return _fastest(workload, cut)


def measure_suffix(workload: Workload, cut: Cut, extraction: ComputeFormat) -> ComputeFormat:
    """Return the fastest format of training on activations, in the memory format of the extraction."""
    if workload.plain_head(cut) is not None:  # so little work that no dtype is faster than float32
        return replace(extraction, dtype=torch.float32, images_per_second=None, reason="a linear layer")
    return _fastest(workload, cut, extraction.memory_format, trains=True)


def measure_network(workload: Workload) -> tuple[ComputeFormat, ComputeFormat]:
    """Return the fastest formats of training the whole network on images and, in the same layout, of evaluating it."""
    workload.contract.train_mode()  # a training step is measured in the modes of training
    train = _fastest(workload, trains=True)
    return train, measure_evaluation(workload, train.memory_format)


def measure_evaluation(workload: Workload, layout: torch.memory_format) -> ComputeFormat:
    """Return the fastest format of evaluating the network in this layout."""
    return _fastest(workload, layout=layout)


def training_speed(workload: Workload, option: ComputeFormat, cut: Cut | None = None) -> float | None:
    """Return the images per second of training in a format, with whole batches, which take less time per image.

    Training is on images, or on activations at a cut; then it is None if that takes next to no time.
    """
    if cut is not None and workload.plain_head(cut) is not None:
        return None
    try:
        return _fastest(workload, cut, trains=True, only=option).images_per_second
    except Exception as error:
        if is_out_of_memory(error):  # a run would fail, too, but others are to be compared
            return option.images_per_second
        raise


def _fastest(
    workload: Workload,
    cut: Cut | None = None,
    layout: torch.memory_format | None = None,
    *,
    trains: bool = False,
    only: ComputeFormat | None = None,
    limit: int | None = None,
) -> ComputeFormat:
    """Return the fastest format of training or evaluating the network on images, or of the part of it at a cut.

    A stored measurement is used again, so that a result does not depend on a race. With `only`, this format alone is
    measured, on whole batches; otherwise steps have at most `limit` images.
    """
    module, what = workload.classifier.network, "training" if trains else "evaluation"
    shapes: Sequence[tuple[int, ...]] = [(3, *[workload.train_size if trains else workload.preprocessing.size] * 2)]
    if cut is not None and trains:
        module, what, shapes = cut.suffix, f"training from {cut.suffix_start}", cut.shapes
    elif cut is not None:
        module, what = cut.prefix, f"extraction up to {cut.suffix_start}"
    options = [only] if only else allowed_formats(workload.spec.device, workload.accelerator)
    options = [option for option in options if layout in (None, option.memory_format)]
    limit = limit or (len(workload.data.train) if only else MEASURE_BATCH_SIZE[workload.accelerator.type])
    images, generator = min(limit, max(2, workload.spec.batch_size)), torch.Generator()
    inputs = tuple(torch.rand(images, *shape, generator=generator.manual_seed(0)) for shape in shapes)
    names = [option.description for option in options]
    trainable = sorted(name for name, p in workload.classifier.network.named_parameters() if p.requires_grad)
    subject = {
        "backbone": f"{workload.spec.backbone.kind}/{workload.spec.backbone.name}",
        "shape": list(shapes[0]),
        "trains": hashlib.sha256(" ".join(trainable).encode()).hexdigest(),
        "machine": machine_name(workload.accelerator),
        "torch": torch.__version__,
        "what": what,
        "options": names,
        "images": images,
    }
    key = hashlib.sha256(json.dumps(subject, sort_keys=True).encode()).hexdigest()[:32]
    store = workload.session.store
    speeds, origin = store.read_notes(NOTES).get(key), "measured before"
    if not isinstance(speeds, dict) or speeds.keys() != set(names):
        speeds, origin = dict.fromkeys(names, 0.0), "measured"
        for name, option in [*zip(names, options, strict=True)] * (ROUNDS if len(options) > 1 else 1):
            enough = BATCH_SECONDS if only else MEASURE_SECONDS
            seconds = None
            try:
                seconds = _measure(workload, option, module, inputs, enough, trains=trains)
            except Exception as error:
                if only or images <= FEW_IMAGES or not is_out_of_memory(error):
                    raise
            if seconds is None:  # outside of the block above, in which the error holds the memory
                return _fastest(workload, cut, layout, trains=trains, limit=FEW_IMAGES)
            speeds[name] = max(speeds[name], round(images / seconds, 2))
        store.add_note(NOTES, key, speeds)
    fastest = max(speeds.values())
    chosen = next(option for option in options if speeds[option.description] * MIN_SPEEDUP >= fastest)
    reason = f"{origin}: {', '.join(f'{name} {speeds[name]:.0f}' for name in names)} images/s"
    if len(options) == 1:
        reason = "the only choice here"
    return replace(chosen, images_per_second=speeds[chosen.description], reason=reason)


def _measure(
    workload: Workload,
    option: ComputeFormat,
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    limit: float,
    *,
    trains: bool,
) -> float:
    """Return the seconds of the shortest of a few steps after a first one: of six, or of those in `limit` seconds."""
    accelerator, layout = workload.accelerator, option.memory_format
    module, network = copy.deepcopy((module, workload.classifier.network if trains else module))
    network.to(device=accelerator, memory_format=layout)  # type: ignore[call-overload]
    x = tuple(t.to(accelerator, memory_format=layout) if t.ndim == 4 else t.to(accelerator) for t in inputs)
    if not trains:
        module.eval()
    times: list[float] = []
    while len(times) < 6 and sum(times[1:]) <= limit:
        start = time.perf_counter()
        mode = fast_depthwise_backward(accelerator, option.dtype) if trains else torch.inference_mode()
        with torch.random.fork_rng(devices=[]), autocast(accelerator, option.dtype), mode:
            logits = module(*x)
        if trains:
            torch.autograd.backward(logits.float().logsumexp(dim=1).sum())
            network.zero_grad(set_to_none=True)
        synchronize(accelerator)
        times.append(time.perf_counter() - start)
    return min(times[1:])
