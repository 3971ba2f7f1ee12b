"""Cache entries that are filled in shards: a plan, what a shard does anywhere, and the entries made of all shards.

The plan has what a run decides before it extracts. A shard reads the plan, its part of the list of images, and these
images, and computes their rows with the code of a run. Its bounds are multiples of the batch, so that the batches are
those of a run.
"""

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from msgspec import Struct, convert, structs, to_builtins

from tlcli.data.dataset import Dataset
from tlcli.data.decode import ValueRange
from tlcli.data.images import ConcatSplits, ImageFiles, ImageSource, MemoryBudget, Split
from tlcli.device import setup_process
from tlcli.engine.activations import load_workload
from tlcli.engine.decisions import Decisions, device_with
from tlcli.engine.inputs import Inputs
from tlcli.engine.session import Session
from tlcli.errors import TlcliError, UsageError
from tlcli.files import atomic_write
from tlcli.ray_tasks import ray_cluster, run_tasks
from tlcli.reporter import Reporter
from tlcli.specs import Accelerator, TrainSpec, spec_from
from tlcli.store import Store
from tlcli.transfer.cut import Cut

MAX_RETRIES = 3  # of a shard whose Ray worker was killed


class PlannedEntry(Struct, frozen=True):
    """An entry: `images` is the fingerprint of its images, `root` their folder if they are plain files.

    Shard i has the rows from bounds[i] to bounds[i + 1].
    """

    key: str
    split: str
    view: int | None
    images: str
    root: str | None
    bounds: tuple[int, ...]

    @property
    def shard_keys(self) -> dict[int, str]:
        """The key of each shard that has rows."""
        texts = {i: f"{self.key} {a} {b}" for i, (a, b) in enumerate(pairwise(self.bounds)) if a < b}
        return {i: hashlib.sha256(text.encode()).hexdigest() for i, text in texts.items()}


class Plan(Struct, frozen=True):
    """What all shards share; `spec` has absolute paths, the chosen image size and the kind of device."""

    spec: dict[str, Any]
    shards: int
    decisions: Decisions
    classes: tuple[str, ...]
    value_range: ValueRange | None
    entries: tuple[PlannedEntry, ...]


def plan_file(store: Store, spec: TrainSpec, shards: int) -> Path:
    """Return the file of the plan of a spec, whose paths are absolute, for this number of shards."""
    text = json.dumps([to_builtins(spec), shards], sort_keys=True)
    return store.plans / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"


def read_plan(file: Path) -> Plan:
    """Return the plan in a file. Raise UsageError if there is none."""
    try:
        return convert(json.loads(file.read_bytes()), Plan)
    except (OSError, ValueError) as error:
        missing = f"{file.parent} has no plan of these overrides and this number of shards"
        remedy = "`tlcli cache fill` with the same words and --shards, in the same folder, writes it"
        raise UsageError(f"{missing}: {remedy}") from error


def write_plan(spec: TrainSpec, shards: int, session: Session, reporter: Reporter) -> Inputs:
    """Load the data, decide as a run with cache.mode=require does, and write the plan; return the inputs of the run.

    Raise UsageError if training cannot read activations, or if there is no room for them.
    """
    from tlcli.train import NewRun, load_inputs  # here: a shard has no time for what training imports

    inputs = load_inputs(spec, session, reporter, NewRun())
    store, workload = session.store, inputs.workload
    file, entries = plan_file(store, spec, shards), list[PlannedEntry]()
    for source in inputs.sources():
        split, n_batches = source.batches.split, len(source.batches)
        bounds = [min(len(split), i * n_batches // shards * source.batches.batch_size) for i in range(shards + 1)]
        root = str(split.images.root.absolute()) if type(split.images) is ImageFiles else None
        name, images = str(source.metadata["split"]), split.fingerprint()
        entry = PlannedEntry(source.key, name, source.view, images, root, tuple(bounds))
        entries.append(entry)
        digests = split.images.digests(split.indices, reporter)
        for shard, key in entry.shard_keys.items():
            rows = slice(bounds[shard], bounds[shard + 1])
            keys = [split.key(i) for i in range(rows.start, rows.stop)]
            atomic_write(store.plans / f"{key}.json", json.dumps([keys, digests[rows].tobytes().hex()]).encode())
    planned, wholes = {key for entry in entries for key in entry.shard_keys.values()}, {entry.key for entry in entries}
    lists = set[str]()
    with suppress(UsageError):
        before = read_plan(file).entries  # of images that may have changed since
        wholes |= {entry.key for entry in before}
        lists = {key for entry in before for key in entry.shard_keys.values()} - planned
    parts = [part for part in store.entries() if part.metadata.get("part_of") in wholes]
    outdated = [part for part in parts if part.key not in planned]  # of other images, or of another number of shards
    missing = {source.key: source.nbytes for source in inputs.sources() if not source.filled}
    # space that is used already: by shards that will be removed, or that need not be computed
    present = sum(part.nbytes for part in parts if part.key not in planned or part.metadata["part_of"] in missing)
    if missing and (reason := store.no_room_reason(sum(missing.values()) + max(missing.values()) - present)):
        raise UsageError(f"the shards, and the largest entry beside them, have no room: {reason}")
    for key in lists | {part.key for part in outdated}:
        _remove_shard(store, key)
    if outdated:
        reporter.note(f"{len(outdated)} shards of another plan for these images were removed")
    device = structs.replace(spec.device, kind=Accelerator(workload.accelerator.type))
    values, data = to_builtins(structs.replace(workload.spec, device=device)), workload.data
    plan = Plan(values, shards, inputs.decisions, data.classes, data.value_range, tuple(entries))
    atomic_write(file, json.dumps(to_builtins(plan)).encode())
    return inputs


def fill_shard(file: Path, shard: int, max_gb: float, reporter: Reporter | None = None) -> tuple[int, float]:
    """Compute the rows of one shard that the store of a plan does not have; return their number and the seconds.

    Raise TlcliError if an image has changed since the plan was written, or if rows computed here would differ.
    """
    began, count, plan, session = time.perf_counter(), 0, read_plan(file), _session(file.parent.parent, max_gb)
    spec, store, option = spec_from(plan.spec), session.store, plan.decisions.eval_format
    for entry in plan.entries:
        key = entry.shard_keys.get(shard)
        if key is None or store.find(entry.key, verify=False):
            continue
        if store.find(key) is None:
            split = _images_of(plan, entry, shard, store)
            empty = split.take(np.arange(0))
            data = Dataset(spec.dataset.name, plan.classes, split, empty, empty, (), (), plan.value_range)
            workload = load_workload(spec, data, setup_process(spec.device), session)
            workload = workload if entry.view is None else workload.for_training
            device_with(workload, plan.decisions.train_dtype, option).place(workload.classifier.network)
            cut = workload.cut
            assert isinstance(cut, Cut)
            source = workload.activations(cut, option, split, entry.split, entry.view, entry.images)
            if source.key != entry.key:
                others = "the weights, the device or the versions of torch, torchvision, timm or Pillow"
                remedy = "use the same ones, or write the plan again with --shards"
                raise TlcliError(f"shard {shard}/{plan.shards}: {others} are not those of the plan: {remedy}")
            batches = replace(source.batches, first=entry.bounds[shard])
            metadata = {**source.metadata, "part_of": entry.key, "shard": f"shard {shard}/{plan.shards}"}
            extractor = workload.extractor(cut, option, compiled=bool(plan.decisions.compiled))
            replace(source, key=key, batches=batches, metadata=metadata).entry(reporter or Reporter(), extractor)
            count += len(split)
    return count, time.perf_counter() - began


def run_shards(
    file: Path, todo: Sequence[int], store: Store, reporter: Reporter, *, on_ray: bool
) -> Iterator[tuple[int, Any]]:
    """Yield each shard with the result of `fill_shard`, here or as tasks of Ray; there, the exception if it failed."""
    device = read_plan(file).spec["device"]
    if not on_ray or not todo:
        yield from ((shard, fill_shard(file, shard, store.max_gb, reporter)) for shard in todo)
        return
    with ray_cluster() as nodes:
        cpus = device["threads"] or min(torch.get_num_threads(), max(1, *nodes))
        arguments, gpus = [(file, shard, store.max_gb) for shard in todo], float(device["kind"] == "cuda")
        for i, result in run_tasks(fill_shard, arguments, reporter, cpus=cpus, gpus=gpus, retries=MAX_RETRIES):
            yield todo[i], result


@cache
def _session(root: Path, max_gb: float) -> Session:
    """Return the session of all shards of a process, which load and compile the network once."""
    return Session(Store(root, max_gb), 0)


def _images_of(plan: Plan, entry: PlannedEntry, shard: int, store: Store) -> Split:
    """Return the images of a shard of an entry, without labels. Raise TlcliError if one has changed."""
    listing = store.plans / f"{entry.shard_keys[shard]}.json"
    try:
        keys, digests = json.loads(listing.read_bytes())
    except (OSError, ValueError) as error:
        raise TlcliError(f"{listing}: cannot be read; write the plan again with --shards") from error
    images: ImageSource = ImageFiles(Path(entry.root or ""), keys, plan.value_range)
    indices = np.arange(len(keys))
    if entry.root is None:
        splits, wanted = _splits(json.dumps(plan.spec)), set(keys)
        for split in splits.values():
            if isinstance(split.images, ImageFiles):
                split.images.value_range = plan.value_range
        images = ConcatSplits(splits)
        places = {key: i for i in range(len(images)) if (key := images.key(i)) in wanted}
        if lost := wanted - places.keys():
            raise TlcliError(f"{min(lost)}: no such image, but the plan has it; write it again with --shards")
        indices = np.array([places[key] for key in keys])
    images.memory = MemoryBudget(0)  # it decodes in threads, and keeps nothing
    if images.digests(indices, Reporter()).tobytes().hex() != digests:
        changed = f"images from {keys[0]} to {keys[-1]} have changed since the plan was written"
        raise TlcliError(f"shard {shard}: {changed}: write it again with --shards")
    return Split(images, indices, np.zeros_like(indices))


@cache
def _splits(spec: str) -> Mapping[str, Split]:
    """Return the splits of a dataset that is not in plain files, of which no image is read."""
    splits: Mapping[str, Split] = spec_from(json.loads(spec)).dataset.offline().load(Reporter()).splits
    return splits


def complete(plan: Plan, store: Store) -> list[int]:
    """Join the shards of each entry that has all of them, and remove these; return the missing shards."""
    missing, present = set[int](), {entry.key for entry in store.entries()}
    for entry in plan.entries:
        keys, lost = entry.shard_keys, set[int]()
        with store.lock_for_write(entry.key, lambda: None):
            if store.find(entry.key, verify=False) is None:
                lost = {shard for shard, key in keys.items() if key not in present}
                found = {} if lost else {shard: store.find(key) for shard, key in keys.items()}
                lost |= {shard for shard, part in found.items() if part is None}
                if not lost:
                    parts = [part for part in found.values() if part is not None]
                    metadata = {k: v for k, v in parts[0].metadata.items() if k not in ("part_of", "shard")}
                    columns = parts[0].columns
                    numbers = range(len(columns))
                    rows = ([np.memmap(part.file(i), np.uint8, "r").data for i in numbers] for part in parts)
                    store.write(entry.key, entry.bounds[-1], columns, metadata, rows)
            for key in () if lost else keys.values():
                _remove_shard(store, key)
        missing |= lost
    return sorted(missing)


def _remove_shard(store: Store, key: str) -> None:
    with suppress(OSError):
        (store.plans / f"{key}.json").unlink(missing_ok=True)
        store.remove(key)
