"""Activations: the output of the frozen prefix per image, computed once and read from then on."""

import hashlib
import json
import time
from collections import deque
from collections.abc import Collection, Hashable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from msgspec import structs
from torch import Tensor, nn

from tlcli.data.batches import Augmentation, ImageBatches, Preprocessing
from tlcli.data.dataset import Dataset
from tlcli.data.decode import decoder
from tlcli.data.images import Split
from tlcli.device import DTYPE_NAMES, ComputeFormat, auto_workers, machine_name
from tlcli.engine.extraction import BATCH, Extractor
from tlcli.engine.schedule import number_of_epochs
from tlcli.engine.session import Session
from tlcli.errors import TlcliError
from tlcli.models.classifier import Classifier, Float32Linear, Head
from tlcli.ranks import ALONE, Ranks
from tlcli.reporter import Reporter
from tlcli.specs import CacheMode, Sampler, TrainSpec
from tlcli.store import CacheEntry, Store
from tlcli.text import to_plain
from tlcli.transfer.contract import FreezeContract, apply_freeze, linear_head
from tlcli.transfer.cut import Cut, NoCut, Splitter

MAX_FIRST_FIT = 1000  # training images: with 500 a first fit gained nothing in accuracy, and it doubles the time
FITS = 2  # after a first fit
VIEWS = 8  # of each of few training images, if it is read at least as often


@dataclass(eq=False)
class SplitActivations:
    """The rows of one split, in its order: in the store, or extracted into it on first use."""

    store: Store
    batches: ImageBatches
    extractor: Extractor
    key: str
    view: int | None  # number of the augmented view of each image; None: the images as they are
    metadata: Mapping[str, Any]
    extraction: dict[str, Any] | None = None  # images, seconds and formats, if it was extracted here
    found: CacheEntry | None = None

    def __len__(self) -> int:
        return len(self.batches.split)

    @property
    def row_bytes(self) -> int:
        return sum(column.nbytes for column in self.extractor.columns)

    @property
    def nbytes(self) -> int:
        return len(self) * self.row_bytes

    @property
    def filled(self) -> bool:
        return self.store.find(self.key, verify=False) is not None  # by a quick check

    def entry(self, reporter: Reporter, extractor: Extractor) -> CacheEntry:
        """Return the entry, extracted by all ranks if missing or damaged. Raise OSError if it cannot be written."""
        ranks, error = self.batches.ranks, None
        ranks.check_same("images or weights", self.key)
        with ExitStack() as held:
            if ranks.is_main:
                self.found = self.store.find(self.key)
                if self.found is None:
                    waiting = lambda: reporter.note("activations: another process computes them, waiting")  # noqa: E731
                    try:
                        held.enter_context(self.store.lock_for_write(self.key, waiting))
                    except OSError as exc:  # a full disk, which all ranks must know
                        error = [exc.errno, exc.strerror or str(exc)]
                    self.found = self.store.find(self.key)
            if error := ranks.broadcast(error):
                raise OSError(*error)
            if not ranks.broadcast(self.found is not None):
                self._extract(extractor, reporter)
        self.found = self.found or self.store.find(self.key)
        if self.found is None:
            missing = f"process {ranks.rank} does not find the activations that process 0 has written"
            raise TlcliError(f"{missing}: all processes of a run must use the same cache (TLCLI_CACHE)")
        return self.found

    def _extract(self, extractor: Extractor, reporter: Reporter) -> None:
        start = time.perf_counter()
        extractor.prepare(reporter)
        compile_seconds = time.perf_counter() - start
        label = f"activations of {self.metadata['split']}" + (f", view {self.view}" if self.view else "")
        with reporter.track(label, len(self)) as advance:
            images, error = (x for x, _ in self.batches.in_order(view=self.view)), None
            ranks, size = self.batches.ranks, self.batches.batch_size

            def rows() -> Iterator[list[memoryview]]:
                for start in range(0, len(self), size * ranks.size):  # one batch of each rank
                    n = min(size * ranks.size, len(self) - start)
                    try:
                        own = next(map(extractor, images), ())  # of the last images a rank may have none
                    except OSError as exc:  # not of the cache, without which a run could go on
                        raise TlcliError(f"images cannot be read: {exc.strerror or exc}") from exc
                    parts = [part.reshape(len(part), -1).view(torch.uint8) for part in own]
                    yield [memoryview(ranks.collect(part, n, size).numpy()) for part in parts]  # type: ignore[arg-type]
                    advance(n)

            batches = rows()
            metadata = {**self.metadata, "computed": extractor.reason}
            if ranks.is_main:
                try:
                    self.found = self.store.write(self.key, len(self), extractor.columns, metadata, batches)
                except OSError as exc:
                    if ranks.size == 1:
                        raise
                    error = [exc.errno, exc.strerror or str(exc)]
            deque(batches, 0)  # on other ranks, and what is left if rank 0 cannot write
            if error := ranks.broadcast(error):
                raise OSError(*error)
        self.extraction = {
            "images": len(self),
            "seconds": time.perf_counter() - start,
            "compile_seconds": compile_seconds,
            "dtype": DTYPE_NAMES[extractor.compute_format.dtype],
            "memory_format": str(extractor.compute_format.memory_format).removeprefix("torch."),
            "why": extractor.reason,
        }


@dataclass(frozen=True)
class CachedSplit:
    """A split that is read from activations at a cut."""

    workload: "Workload"  # with the size of these images
    cut: Cut
    views: tuple[SplitActivations, ...]  # one if not augmented
    rows: Tensor  # of the views that belong to the split


def image_size(spec: TrainSpec) -> int | None:
    """Return the size in pixels that the user or the dataset names; None: the backbone's own."""
    return spec.image.size or spec.dataset.image_size


@dataclass(frozen=True, eq=False)
class Workload:
    """Data, network and machine of a run. Splits are train, train_eval (train as evaluation sees it), val and test."""

    data: Dataset
    classifier: Classifier
    contract: FreezeContract
    spec: TrainSpec
    accelerator: torch.device
    session: Session
    needs_probe: bool = False  # the head starts from a linear probe on train_eval
    ranks: Ranks = ALONE
    stored_views: int | None = None  # `views` of a run that is resumed, 0 for None; None: a new run
    _activations: dict[Hashable, SplitActivations] = field(default_factory=dict, init=False)

    @cached_property
    def preprocessing(self) -> Preprocessing:
        """How images become the network's input: by the spec and the data's range, else as its weights expect."""
        image, own = self.spec.image, self.classifier
        size, mean, std = image_size(self.spec) or own.size, image.mean or own.mean, image.std or own.std
        return Preprocessing(size, image.fit or own.fit, mean, std, self.data.value_range)

    @property
    def train_size(self) -> int:
        """The size in pixels of training images; those that are not augmented are preprocessed as in evaluation."""
        return (self.spec.image.train_size if self.augments else None) or self.preprocessing.size

    @cached_property
    def for_training(self) -> "Workload":
        """The same, in which all images have the size of augmented training images."""
        if not self.augments or self.train_size == self.preprocessing.size:
            return self
        image = structs.replace(self.spec.image, size=self.train_size)
        return replace(self, spec=structs.replace(self.spec, image=image))

    @cached_property
    def views(self) -> int | None:
        """The stored views of each augmented training image, one per epoch in turn; None: each epoch has its own."""
        spec = self.spec
        given = spec.cache.views if self.stored_views is None else self.stored_views
        if given is not None:
            return given or None
        augmentation = spec.augment.build(self.preprocessing)
        only_crops = augmentation is not None and augmentation.transforms is None and not spec.augment.mixes
        # folds are to train as their refit does
        n = len(self.data.train) + (len(self.data.val) if spec.folds else 0)
        n_reads = number_of_epochs(spec, n) * (self.fits + self.has_first_fit)
        if not only_crops or n > MAX_FIRST_FIT or n_reads < VIEWS:
            return None
        return VIEWS if isinstance(self.for_training.cut, Cut) else None

    def batches(self, split: Split, batch_size: int, augmentation: Augmentation | None) -> ImageBatches:
        return ImageBatches(
            split,
            self.preprocessing,
            batch_size=batch_size,
            workers=self.workers,
            augmentation=augmentation,
            seed=self.spec.seed,
            balanced=self.spec.sampler is Sampler.balanced,
            pin_memory=self.accelerator.type == "cuda",
            ranks=self.ranks,
        )

    @property
    def workers(self) -> int:
        workers = self.spec.device.workers
        return auto_workers(self.accelerator) // self.ranks.size if workers is None else workers

    @property
    def epochs(self) -> int:
        """The epochs of all fits."""
        return self.fits * self.epochs_per_fit

    @property
    def epochs_per_fit(self) -> int:
        return number_of_epochs(self.spec, len(self.data.train))

    @cached_property
    def fits(self) -> int:
        """The trainings from the same start whose weights are averaged; statistics of BatchNorm cannot be."""
        can_average = self.has_first_fit and self.spec.no_average is None and not self.contract.updated_norms()
        return self.spec.fits or (FITS if can_average else 1)

    @property
    def has_first_fit(self) -> bool:
        """True if a fit without some images decides how far the final weights are from the initial ones."""
        spec, data = self.spec, self.data
        if len(data.val) or spec.folds or spec.interpolate or not self.interpolates:
            return False
        return len(data.train) <= MAX_FIRST_FIT and min(data.train.class_counts(len(data.classes))) >= 2

    @cached_property
    def first_fit(self) -> "Workload | None":
        """The same without a fifth of the training images, which are its val; None if there is no first fit."""
        if not self.has_first_fit:
            return None
        cache = structs.replace(self.spec.cache, views=self.views or 0)
        spec = structs.replace(self.spec, epochs=self.epochs_per_fit, fits=1, cache=cache)
        return replace(self, data=self.data.without_fifth(spec.seed), spec=spec)

    @property
    def interpolates(self) -> bool:
        """True if weights on the way to the trained ones are of use."""
        return bool(self.classifier.pretrained) and self.spec.freeze.interpolates

    @property
    def compares_shares(self) -> bool:
        """True for a fold whose predictions are used to choose how far the final weights of the refit are."""
        return self.spec.fold is not None and self.spec.interpolate is None and self.interpolates

    @property
    def chooses_share(self) -> bool:
        """True if val, which selects no epoch, can be used to choose how far the final weights are."""
        has_val = len(self.data.val) > 0 and not self.selects_epoch
        return has_val and self.spec.fold is None and self.spec.interpolate is None and self.interpolates

    @property
    def selects_epoch(self) -> bool:
        """True if validation selects the epoch that is kept; else the last one is, as always of averaged fits."""
        spec, data = self.spec, self.data
        if spec.fold is not None or (spec.fits or 1) > 1:  # selected on a fold, its predictions would be too good
            return False
        return data.can_select or (spec.early_stop is not None and len(data.val) > 0)

    @property
    def augments(self) -> bool:
        """True if training images differ from what evaluation sees."""
        return self.spec.augment.build(self.preprocessing) is not None

    def split(self, split_name: str) -> Split:
        split: Split = getattr(self.data, split_name.removesuffix("_eval"))
        return split

    @property
    def cut(self) -> Cut | NoCut:
        """The cut for training. It sets the network to the modes of training, whatever they were."""
        self.contract.train_mode()  # the cut depends on the modes in which the network trains
        return self._cut(None)

    @property
    def features_cut(self) -> Cut | NoCut:
        """The cut at the head, for the features of a probe before training."""
        return self._cut(self.classifier.head_parameters())

    def _cut(self, trainable: frozenset[str] | None) -> Cut | NoCut:
        if self.spec.cache.mode is CacheMode.off:
            return NoCut("cache.mode=off")
        if not self.spec.freeze.interpolates:  # a copy of a layer loses its weight when updates are added or merged
            return NoCut("a network with low-rank updates is not cut")
        network, size = self.classifier.network, self.preprocessing.size
        key = trainable or repr(self.spec.freeze)
        splitter = self.session.get_or_create(("splitter", key), lambda: Splitter(network, trainable))
        return self.session.get_or_create(("cut", size, key), lambda: splitter.split(size))

    def plain_head(self, cut: Cut) -> nn.Linear | None:
        """Return the head if the suffix of the cut is one plain linear layer and nothing else."""
        head = linear_head(self.classifier)
        # a subclass may do more, and dropout may be in the head or, in timm's networks, before it
        is_plain = type(head) in (Float32Linear, Head) and not self.spec.backbone.dropout
        if head is None or not is_plain or cut.suffix_start != self.classifier.head[0]:
            return None
        return head if cut.shapes == ((head.in_features,),) else None

    def extractor(self, cut: Cut, option: ComputeFormat, *, compiled: bool = False) -> Extractor:
        """Return the extractor of the prefix of a cut, which all jobs of the process share."""
        name, stored, session = f"{self.spec.backbone.name} {cut.suffix_start}", self.spec.cache.dtype, self.session
        batch_size = option.batch_size or BATCH[self.accelerator.type]
        may_compile = self.spec.device.compile is not False
        own = (self.preprocessing, stored, may_compile, compiled)
        key = ("extractor", id(cut), option.description, batch_size, *own)
        arguments = (name, cut.prefix, self.preprocessing, self.accelerator, option, session.store)
        return session.get_or_create(key, lambda: Extractor(*arguments, stored, may_compile, compiled))

    def cached_split(self, split_name: str, cached: Collection[str], option: ComputeFormat) -> CachedSplit:
        """Return where the rows of a split are if the splits in `cached` are read from activations of this format."""
        data, workload, views = self.data, self, list[int | None]([None])
        pool = split = self.split(split_name)
        label = split_name.removesuffix("_eval")
        reads_both = {"train", "train_eval"} <= set(cached) or (split_name == "train_eval" and data.folds is not None)
        if split_name == "train" and self.augments:
            workload, views = self.for_training, list(range(min(self.views or 0, self.epochs)))  # no epoch reads more
            # images that a small set holds out may be trained on later: by another fold, or by a refit
            is_small = len(data.train) + len(data.val) <= MAX_FIRST_FIT
            reads_both = data.folds is not None or (self.spec.cache.views is None and is_small)
        # if training reads images, train_eval serves the probe alone
        cut = self.features_cut if split_name == "train_eval" and "train" not in cached else workload.cut
        assert isinstance(cut, Cut)
        if split_name != "test" and reads_both and data.train.images is data.val.images:
            splits, label = (data.train, data.val), "train+val"  # also for other folds, or a val split of another seed
            indices, positions = np.unique(np.concatenate([s.indices for s in splits]), return_index=True)
            pool = Split(pool.images, indices, np.concatenate([s.labels for s in splits])[positions])
        found = [workload.activations(cut, option, pool, label, view) for view in views]
        return CachedSplit(workload, cut, tuple(found), torch.from_numpy(np.searchsorted(pool.indices, split.indices)))

    def activations(
        self, cut: Cut, option: ComputeFormat, pool: Split, label: str, view: int | None, images: str | None = None
    ) -> SplitActivations:
        """Return the activations of images at a cut; `images` is their fingerprint if it is known."""
        spec, preprocessing, extractor = self.spec, self.preprocessing, self.extractor(cut, option)
        memo = (id(extractor), label, view)
        if memo in self._activations:
            return self._activations[memo]
        augmentation = None if view is None else spec.augment.build(preprocessing)
        batches = self.batches(pool, extractor.batch_size, augmentation)
        augmented = {"kind": spec.augment.kind, "number": view, "seed": spec.seed, "augment": spec.augment}
        ingredients = {  # all that the values depend on, so that an entry is right or is not found
            "prefix": self.session.get_or_create(("digest", id(cut)), cut.digest),
            "preprocessing": preprocessing.to_json(),
            "images": images or pool.fingerprint(),
            "decoder": decoder(),
            "rows": 1,  # version: increase it with the rules by which an image becomes a row
            "view": None if view is None else to_plain(augmented),
            "format": extractor.compute_format.description,
            "columns": [asdict(column) for column in extractor.columns],
            "device": self.accelerator.type,
            "versions": {name: version(name) for name in ("torch", "torchvision", "timm", "Pillow")},
        }
        if self.accelerator.type == "cpu" and spec.device.threads is not None:
            ingredients["threads"] = spec.device.threads  # kernels may round by it
        key = hashlib.sha256(json.dumps(ingredients, sort_keys=True).encode()).hexdigest()
        metadata = {
            "dataset": spec.dataset.title,
            "split": label,
            "backbone": spec.backbone.name,
            "at": cut.suffix_start,
            "image": f"{preprocessing.size} px, {preprocessing.fit.value}",
            "view": view,
            "dtype": extractor.compute_format.description,
        }
        self._activations[memo] = SplitActivations(self.session.store, batches, extractor, key, view, metadata)
        return self._activations[memo]


def load_workload(spec: TrainSpec, data: Dataset, accelerator: torch.device, session: Session) -> Workload:
    """Return the work of a run on these images, with its network as it is before training and what is frozen."""
    computing = (accelerator.type, machine_name(accelerator), spec.device.compile)
    classifier = session.model(spec.backbone, data.classes, size=image_size(spec), seed=spec.seed, computing=computing)
    classifier.network.to(accelerator)
    return Workload(data, classifier, apply_freeze(spec.freeze, classifier), spec, accelerator, session)
