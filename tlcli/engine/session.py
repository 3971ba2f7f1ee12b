"""State shared by the jobs of one command, loaded once per sweep: images, weights, cuts and cached tensors."""

import copy
import warnings
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import numpy as np
import torch

from tlcli.data.dataset import Dataset, load_dataset
from tlcli.engine.loaders import ActivationTensors
from tlcli.models.build import build_model
from tlcli.models.classifier import Classifier
from tlcli.reporter import Reporter
from tlcli.specs import BackboneSpec, CacheSpec, DatasetSpec
from tlcli.store import CacheEntry, Store, cache_dir, release_entries
from tlcli.transfer.lora import remove_low_rank

T = TypeVar("T")


class Session:
    """Holds the latest dataset, model and cuts for the next job, and at most `ram_bytes` of cached tensors."""

    def __init__(self, store: Store, ram_bytes: int) -> None:
        self.store, self.ram_bytes, self._free_bytes = store, ram_bytes, ram_bytes
        self._in_memory: dict[str, ActivationTensors] = {}
        self._read = set[str]()  # keys of entries that the present job has read
        self._dataset: tuple[object, Dataset] | None = None
        self._model: tuple[object, Classifier, dict[str, Any]] | None = None  # key, classifier, initial weights
        self._made: dict[Hashable, Any] = {}  # for this model

    def dataset(
        self, spec: DatasetSpec, seed: int, reporter: Reporter, folds: int | None = None, fold: int | None = None
    ) -> Dataset:
        """Return the dataset of this spec and seed, in folds; with the images of the previous job if it had it."""
        key = (spec, seed, folds)
        if self._dataset is None or self._dataset[0] != key:
            self._dataset = None  # frees the previous images before the next ones are read
            self._dataset = key, load_dataset(spec, seed=seed, reporter=reporter, store=self.store, folds=folds)
        return self._dataset[1] if fold is None else self._dataset[1].without_fold(fold)

    def model(
        self, spec: BackboneSpec, classes: tuple[str, ...], *, size: int | None, seed: int, computing: Hashable = None
    ) -> Classifier:
        """Return `build_model`'s classifier with its initial weights, that of a previous job that computes alike."""
        key = (spec, classes, size, seed, computing)
        if self._model is None or self._model[0] != key:
            self._model, self._made = None, {}
            classifier = build_model(spec, classes, size=size, seed=seed)
            self._model = key, classifier, copy.deepcopy(classifier.network.state_dict())
        else:
            remove_low_rank(self._model[1].network)
            self._model[1].network.load_state_dict(self._model[2])
        return self._model[1]

    def forget_model(self) -> None:
        """Drop the model and what was made for it, for another network or one with other modules."""
        self._model, self._made = None, {}

    def tensors(self, entry: CacheEntry) -> ActivationTensors:
        """Return the tensors of an entry, each (rows, ...), read-only unless they fit into memory.

        Raise FileNotFoundError if the entry was just removed.
        """
        self._read.add(entry.key)
        if entry.key in self._in_memory:
            return self._in_memory[entry.key]
        tensors: ActivationTensors = ()
        for i, column in enumerate(entry.columns):
            with warnings.catch_warnings(action="ignore"):  # nobody writes to it
                # read-only: of what can be written Linux maps no more than the memory
                flat = torch.from_numpy(np.memmap(entry.file(i), np.uint8, mode="r"))
            tensors += (flat.view(getattr(torch, column.dtype)).view(entry.rows, *column.shape),)
        if entry.nbytes <= self._free_bytes:  # else they stay mapped
            self._free_bytes -= entry.nbytes
            tensors = self._in_memory[entry.key] = tuple(t.clone() for t in tensors)
        return tensors

    def start_job(self) -> None:
        """Release entries on disk, which a job holds again if it finds them, and tensors that the last did not read."""
        release_entries()
        for key in self._in_memory.keys() - self._read:
            self._free_bytes += sum(t.nbytes for t in self._in_memory.pop(key))
        self._read.clear()

    def get_or_create(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return the result of `make` for the current model, called once per key."""
        if key not in self._made:
            self._made[key] = make()
        made: T = self._made[key]
        return made


def session_for(spec: CacheSpec, previous: Session | None = None) -> Session:
    """Return the session of the previous job, or a new one if the cache is another."""
    store, ram_bytes = Store(cache_dir(), spec.max_gb), int(spec.ram_gb * 1e9)
    if previous is not None and (previous.store, previous.ram_bytes) == (store, ram_bytes):
        previous.start_job()
        return previous
    return Session(store, ram_bytes)
