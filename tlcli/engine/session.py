"""What the jobs of one command share, so that a sweep pays for it once: images, weights, cuts and cached tensors."""

import copy
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from tlcli.data.dataset import Dataset, EvaluationSplit, load_dataset, load_evaluation_split
from tlcli.device import machine_name
from tlcli.engine.loaders import ActivationTensors
from tlcli.models.build import build_model
from tlcli.models.classifier import Classifier
from tlcli.reporter import Reporter
from tlcli.specs import BackboneSpec, CacheSpec, DatasetSpec, DeviceSpec
from tlcli.store import CacheEntry, Store, cache_dir

T = TypeVar("T")


class ActivationReader:
    """Opens entries as tensors: in memory while they fit in `ram_bytes`, else mapped from their files, of which the
    system caches as much as it has room for. Tensors in memory stay for the next job of the process."""

    def __init__(self, ram_bytes: int) -> None:
        self._free_bytes = ram_bytes
        self._in_memory: dict[str, ActivationTensors] = {}

    def open(self, entry: CacheEntry) -> ActivationTensors:
        """Return the tensors of an entry, each (rows, ...). Raises FileNotFoundError if the entry was just removed."""
        if entry.key in self._in_memory:
            return self._in_memory[entry.key]
        tensors = tuple(_mapped(entry, i) for i in range(len(entry.columns)))
        if entry.nbytes <= self._free_bytes:
            self._free_bytes -= entry.nbytes
            tensors = self._in_memory[entry.key] = tuple(t.clone() for t in tensors)
        return tensors


def _mapped(entry: CacheEntry, i: int) -> Tensor:
    column = entry.columns[i]
    dtype: torch.dtype = getattr(torch, column.dtype)
    shape = (entry.rows, *column.shape)
    try:
        flat = torch.from_file(str(entry.file(i)), shared=False, size=torch.Size(shape).numel(), dtype=dtype)
    except RuntimeError:
        entry.file(i).stat()  # raises FileNotFoundError if that is the reason
        raise
    return flat.view(shape)


@dataclass
class _Model:
    key: object
    classifier: Classifier
    initial_weights: Mapping[str, Any]
    made: dict[Hashable, Any] = field(default_factory=dict)


class Session:
    """Holds the latest dataset, model and cuts, and gives them to the next job if it asks for the same.

    Args:
        ram_bytes: of memory for cached tensors.
    """

    def __init__(self, store: Store, ram_bytes: int) -> None:
        self.store = store
        self.ram_bytes = ram_bytes
        self.reader = ActivationReader(ram_bytes)
        self._dataset: tuple[object, Dataset] | None = None
        self._model: _Model | None = None

    def dataset(self, spec: DatasetSpec, seed: int, reporter: Reporter) -> Dataset:
        """Return the dataset of this spec and seed; that of the previous job if it had the same."""
        key = (spec, seed)
        if self._dataset is None or self._dataset[0] != key:
            self._dataset = None  # frees the previous images before the next ones are read
            self._dataset = key, load_dataset(spec, seed=seed, reporter=reporter, store=self.store)
        return self._dataset[1]

    def load_evaluation_split(
        self, spec: DatasetSpec, split_name: str | None, seed: int, reporter: Reporter
    ) -> EvaluationSplit:
        """Return a split of a dataset that is not trained on, as `load_evaluation_split` gives it."""
        return load_evaluation_split(spec, split_name, seed=seed, reporter=reporter, store=self.store)

    def model(
        self, spec: BackboneSpec, classes: tuple[str, ...], *, size: int | None, seed: int, computing: Hashable = None
    ) -> Classifier:
        """Return `build_model`'s classifier with its initial weights; that of the previous job if it is the same.

        `computing` says where and how it computes (device, threads, compiled or not): a job inherits neither a compiled
        network nor an extractor from a job that computes differently.
        """
        key = (spec, classes, size, seed, computing)
        if self._model is None or self._model.key != key:
            self._model = None
            classifier = build_model(spec, classes, size=size, seed=seed)
            self._model = _Model(key, classifier, copy.deepcopy(classifier.network.state_dict()))
        else:
            self._model.classifier.network.load_state_dict(self._model.initial_weights)
        return self._model.classifier

    def set_model(self, classifier: Classifier) -> None:
        """Take a classifier that was made elsewhere as the current model."""
        self._model = _Model(object(), classifier, {})

    def get_or_create(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return the result of `make` for the current model, called once per key."""
        assert self._model is not None
        if key not in self._model.made:
            self._model.made[key] = make()
        made: T = self._model.made[key]
        return made


def compute_key(spec: DeviceSpec, accelerator: torch.device) -> Hashable:
    """Return where and how a job computes, for `Session.model`."""
    return accelerator.type, machine_name(accelerator), spec.compile


def session_for(spec: CacheSpec, previous: Session | None = None) -> Session:
    """Return the session of the previous job, or a new one if the cache is another."""
    store, ram_bytes = Store(cache_dir(), spec.max_gb), int(spec.ram_gb * 1e9)
    if previous is not None:
        before = previous.store
        if (before.root, before.max_gb, previous.ram_bytes) == (store.root, store.max_gb, ram_bytes):
            return previous
    return Session(store, ram_bytes)
