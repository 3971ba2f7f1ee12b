"""What the runs of one command share, so that a sweep pays for it once: images, weights, cuts and cached tensors."""

import copy
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from tlcli.data.dataset import Dataset, Evaluated, load_dataset, load_whole
from tlcli.engine.activations import Tables
from tlcli.models.build import build_model
from tlcli.models.classifier import Classifier
from tlcli.reporter import Reporter
from tlcli.specs import BackboneSpec, CacheSpec, DatasetSpec
from tlcli.store import Store, cache_dir

T = TypeVar("T")
SOUND = "images"
"""Of the notes on which images decode."""


class Session:
    """Holds the latest data set, model and cuts, and hands them to the next run where it asks for the same.

    Args:
        ram_bytes: of memory for cached tensors.
    """

    def __init__(self, store: Store, ram_bytes: int) -> None:
        self.store = store
        self.ram_bytes = ram_bytes
        self.tables = Tables(ram_bytes)
        self._dataset: tuple[object, Dataset] | None = None
        self._model: _Model | None = None

    def dataset(self, spec: DatasetSpec, seed: int, reporter: Reporter) -> Dataset:
        """The data set of this spec and seed; from the run before where that had the same."""
        asked = (spec, seed)
        if self._dataset is None or self._dataset[0] != asked:
            self._dataset = None  # the images of the last one leave memory before the next ones come
            self._dataset = asked, load_dataset(spec, seed=seed, reporter=reporter, sound=_Sound(self.store))
        return self._dataset[1]

    def evaluated(self, spec: DatasetSpec, wanted: str | None, seed: int, reporter: Reporter) -> Evaluated:
        """A split of a data set that is not trained on, as `load_whole` gives it."""
        return load_whole(spec, wanted, seed=seed, reporter=reporter, sound=_Sound(self.store))

    def model(self, spec: BackboneSpec, classes: tuple[str, ...], *, size: int | None, seed: int) -> Classifier:
        """A classifier as `build_model` gives it: that of the run before with its first weights, if it is the same."""
        asked = (spec, classes, size, seed)
        if self._model is None or self._model.asked != asked:
            self._model = None
            classifier = build_model(spec, classes, size=size, seed=seed)
            self._model = _Model(asked, classifier, copy.deepcopy(classifier.network.state_dict()))
        else:
            self._model.classifier.network.load_state_dict(self._model.first_weights)
        return self._model.classifier

    def use(self, classifier: Classifier) -> None:
        """Take a classifier that was made elsewhere as the present model."""
        self._model = _Model(object(), classifier, {})

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` gives for the present model, made once for each key."""
        assert self._model is not None
        if key not in self._model.made:
            self._model.made[key] = make()
        found: T = self._model.made[key]
        return found


def session_for(spec: CacheSpec, before: Session | None = None) -> Session:
    """The session of the run before, or a new one where the cache is another."""
    store, ram_bytes = Store(cache_dir(), spec.max_gb), int(spec.ram_gb * 1e9)
    fits = before is not None and (before.store.root, before.store.max_gb, before.ram_bytes)
    return before if before and fits == (store.root, store.max_gb, ram_bytes) else Session(store, ram_bytes)


@dataclass
class _Model:
    asked: object
    classifier: Classifier
    first_weights: Mapping[str, Any]
    made: dict[Hashable, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Sound:
    """Notes on which images were found to decode, and why the others do not, by the fingerprint of all."""

    store: Store

    def known(self, fingerprint: str) -> dict[str, str] | None:
        """{key: reason} of those that do not decode; None where these images were never looked at."""
        found = self.store.read_notes(SOUND).get(fingerprint)
        return {str(k): str(v) for k, v in found.items()} if isinstance(found, dict) else None

    def record(self, fingerprint: str, bad: dict[str, str]) -> None:
        self.store.add_note(SOUND, fingerprint, bad)
