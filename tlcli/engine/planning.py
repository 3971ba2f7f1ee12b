"""What decides between cached activations and live images, and in which number formats.

Nothing is computed for all images here: one small batch runs through the network, as often as it takes to time it.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from tlcli.data.augment import make_augmentation
from tlcli.data.batches import ImageBatches
from tlcli.data.dataset import Dataset, Split
from tlcli.device import Device, auto_workers, machine_name
from tlcli.engine.activations import SplitActivations, View, activations_key, merge_splits
from tlcli.engine.extraction import Extractor
from tlcli.engine.gradients import is_plain_linear
from tlcli.engine.inputs import CachedFeed, InputPlan, LiveFeeds, preprocessing_for
from tlcli.engine.numerics import SAMPLE, Autotuner, ComputeFormat, candidates, forward_step, training_step
from tlcli.engine.session import Session
from tlcli.errors import UsageError
from tlcli.models.classifier import Classifier
from tlcli.specs import CacheMode, TrainSpec
from tlcli.text import size_text
from tlcli.transfer.contract import FreezeContract
from tlcli.transfer.cut import Cut, NoCut, split_frozen

SMALL = 64 * 1024
"""Bytes an image up to which activations are kept without reckoning: the next run reads them."""
READ, WRITE = 1e-9, 2e-9
"""Seconds a byte that reading and writing activations is taken to cost: 1 and 0.5 GB/s, a slow SSD."""


def plan_inputs(
    data: Dataset,
    model: Classifier,
    contract: FreezeContract,
    spec: TrainSpec,
    accelerator: torch.device,
    session: Session,
    *,
    needs_probe: bool,
) -> InputPlan:
    """Decide for each split whether it is read live or from cached activations, and in which number formats.

    Raises UsageError where cache.mode=require cannot be followed.
    """
    return Planner(data, model, contract, spec, accelerator, session, needs_probe).plan()


class Planner:
    """The decisions behind an InputPlan, in the order in which they are made."""

    def __init__(
        self,
        data: Dataset,
        model: Classifier,
        contract: FreezeContract,
        spec: TrainSpec,
        accelerator: torch.device,
        session: Session,
        needs_probe: bool,
    ) -> None:
        self.data, self.model, self.contract, self.spec = data, model, contract, spec
        self.accelerator, self.session, self.store = accelerator, session, session.store
        self.needs_probe = needs_probe
        self._pending = 0  # bytes of activations that this run is going to write
        self.preprocessing = preprocessing_for(spec, model)
        self.workers = spec.device.workers if spec.device.workers is not None else auto_workers(accelerator)
        self.options = candidates(spec.device, accelerator)
        contract.train_mode()  # the cut looks at the modes, and a training step is measured in them
        trains = sorted(name for name, p in model.network.named_parameters() if p.requires_grad)
        self.quickest = Autotuner(
            self.store,
            accelerator,
            backbone=f"{spec.backbone.kind}/{spec.backbone.name}",
            size=self.preprocessing.size,
            trains=hashlib.sha256(" ".join(trains).encode()).hexdigest(),
        )
        self.sample = torch.rand(min(SAMPLE, max(2, spec.batch_size)), 3, *[self.preprocessing.size] * 2)
        self.cut = self._cut("frozen", None)
        self.augments = make_augmentation(spec.augment, self.preprocessing) is not None

    def plan(self) -> InputPlan:
        """Train first: it decides on the memory format; then what evaluation reads."""
        extractor, sources = None, {}
        why_live = self._why_train_cannot_be_cached()
        if why_live is None:
            assert isinstance(self.cut, Cut)
            extractor = self._extractor(self.cut, self._measured_extraction(self.cut))
            sources = self._train_sources(extractor)
            why_live = self._why_not_worth(extractor, sources)
        if why_live is not None and self.spec.cache.mode is CacheMode.require:
            raise UsageError(f"cache.mode=require: {why_live}")
        if why_live is None:
            assert extractor is not None
            device = self._device(self._measured_suffix(extractor), extractor.numerics)
            cached = self._feeds(sources, device.train_dtype)
            cached |= self._feeds(self._test_source(extractor), device.train_dtype)
        else:
            device, evaluation = self._measured_live()
            cached = self._features(evaluation)
            if isinstance(self.cut, Cut):
                extractor = self._extractor(self.cut, evaluation)
                found = self._val_source(extractor) | self._test_source(extractor)
                cached |= self._feeds(found, device.eval_dtype)
        self._expect(cached)
        return self._result(device, why_live, cached)

    def _cut(self, name: str, trainable: frozenset[str] | None) -> Cut | NoCut:
        """The cut of the network as it trains, or (with `trainable`) as it is before it trains."""
        if self.spec.cache.mode is CacheMode.off:
            return NoCut("cache.mode=off")
        size, network = self.preprocessing.size, self.model.network
        key = ("cut", name, size, repr(self.spec.freeze) if trainable is None else trainable)
        return self.session.once(key, lambda: split_frozen(network, size, trainable))

    def _extractor(self, cut: Cut, numerics: ComputeFormat) -> Extractor:
        """What runs the prefix of a cut over images; one for each cut and format, in all runs of the process."""
        machine = machine_name(self.accelerator)
        note = f"{self.spec.backbone.name} {cut.at} {self.preprocessing} {numerics.words} {machine} {torch.__version__}"
        arguments = (
            cut.prefix,
            self.preprocessing,
            self.accelerator,
            numerics,
            self.spec.cache.dtype,
            self.store,
            hashlib.sha256(note.encode()).hexdigest()[:32],
        )
        key = ("extractor", id(cut), numerics.words, self.preprocessing, self.spec.cache.dtype)
        return self.session.once(key, lambda: Extractor(*arguments))

    # -- numbers

    def _measured_extraction(self, cut: Cut) -> ComputeFormat:
        """The format for the prefix, over which the images run once."""
        inputs = (self.sample,)
        make = lambda option: forward_step(cut.prefix, inputs, self.accelerator, option)  # noqa: E731
        return self.quickest.of(self.options, len(self.sample), f"extraction up to {cut.at}", make, even_one=True)

    def _measured_suffix(self, extractor: Extractor) -> ComputeFormat:
        """The format for training on activations, in the memory format of the extraction."""
        assert isinstance(self.cut, Cut)
        cut, network = self.cut, self.model.network
        if self._bare_head(cut) is not None:  # so little work that no format is quicker than float32
            return replace(
                extractor.numerics, dtype=self.options[0].dtype, images_per_second=None, why="a linear layer"
            )
        inputs = tuple(torch.rand(len(self.sample), *shape) for shape in cut.shapes)
        make = lambda option: training_step(cut.suffix, network, inputs, self.accelerator, option)  # noqa: E731
        same = [option for option in self.options if option.memory_format == extractor.numerics.memory_format]
        return self.quickest.of(same, len(self.sample), f"training from {cut.at}", make)

    def _measured_live(self) -> tuple[Device, ComputeFormat]:
        """Formats for training the whole network on images, and for evaluating it in the same memory format."""
        network, inputs = self.model.network, (self.sample,)
        train = self.quickest.of(
            self.options,
            len(self.sample),
            "training",
            lambda option: training_step(network, network, inputs, self.accelerator, option),
        )
        same = [option for option in self.options if option.memory_format == train.memory_format]
        evaluation = self.quickest.of(
            same,
            len(self.sample),
            "evaluation",
            lambda option: forward_step(network, inputs, self.accelerator, option),
            even_one=True,  # the speed of the frozen part is taken to be this one
        )
        return self._device(train, evaluation), evaluation

    def _device(self, train: ComputeFormat, evaluation: ComputeFormat) -> Device:
        self.measured = (train, evaluation)
        return Device(
            accelerator=self.accelerator,
            train_dtype=train.dtype,
            eval_dtype=evaluation.dtype,
            memory_format=evaluation.memory_format,
            compile=self.spec.device.compile,
            workers=self.workers,
        )

    # -- activations

    def _activations(
        self, cut: Cut, extractor: Extractor, split: Split, name: str, view: View | None
    ) -> SplitActivations:
        """The activations of a split at a cut, as they are or augmented."""
        spec, numerics, columns = self.spec, extractor.numerics, extractor.columns()
        batches = ImageBatches(
            split,
            self.preprocessing,
            batch_size=extractor.batch_size,
            workers=self.workers,
            augmentation=make_augmentation(spec.augment, self.preprocessing) if view else None,
            seed=spec.seed,
            pin_memory=self.accelerator.type == "cuda",
        )
        key = activations_key(
            prefix_digest=self.session.once(("digest", id(cut)), cut.digest),
            preprocessing=self.preprocessing,
            images=split.fingerprint(),
            view=view,
            dtype=numerics.dtype,
            columns=columns,
            device_kind=self.accelerator.type,
        )
        facts = {
            "dataset": f"{spec.dataset.name} {Path(spec.dataset.root).name}"
            if spec.dataset.root
            else spec.dataset.name,
            "split": name,
            "backbone": spec.backbone.name,
            "at": cut.at,
            "image": f"{self.preprocessing.size} px, {self.preprocessing.fit.value}",
            "view": view.number if view else None,
            "dtype": numerics.words,
        }
        return SplitActivations(self.store, batches, extractor, key, columns, view, facts)

    def _train_sources(self, extractor: Extractor) -> "Sources":
        """Where train, probe and val come from when training reads activations: as they are, or train as its views."""
        assert isinstance(self.cut, Cut)
        spec, train = self.spec, self.data.train
        if not self.augments:
            found = self._plain_sources(extractor, with_train=True)
            return {**found, "train": found["probe"]}
        found = self._plain_sources(extractor, with_train=self.needs_probe)
        views = [View(number, spec.seed, spec.augment) for number in range(spec.cache.views or 0)]
        found["train"] = tuple(self._activations(self.cut, extractor, train, "train", view) for view in views), train
        return found

    def _plain_sources(self, extractor: Extractor, *, with_train: bool) -> "Sources":
        """val, and train for the probe, as evaluation sees them: together where they are of the same images."""
        assert isinstance(self.cut, Cut)
        train, val = self.data.train, self.data.val
        if with_train and train.images is val.images:
            pool = merge_splits([train, val])
            both = (self._activations(self.cut, extractor, pool, "train+val", None),), pool
            return {"probe": both, "val": both}
        found: Sources = {"val": ((self._activations(self.cut, extractor, val, "val", None),), val)}
        if with_train:
            found["probe"] = (self._activations(self.cut, extractor, train, "train", None),), train
        return found

    def _val_source(self, extractor: Extractor) -> "Sources":
        """val, where training is live and activations are still worth it."""
        found = self._plain_sources(extractor, with_train=False)
        return found if self._is_worth(extractor, found["val"][0][0], self.spec.epochs + 1) else {}

    def _test_source(self, extractor: Extractor) -> "Sources":
        """test, which one run reads once: for the runs to come, where that is cheap."""
        assert isinstance(self.cut, Cut)
        source = self._activations(self.cut, extractor, self.data.test, "test", None)
        return {"test": ((source,), self.data.test)} if self._is_worth(extractor, source, 1) else {}

    def _features(self, evaluation: ComputeFormat) -> dict[str, CachedFeed]:
        """The probe's features, where what trains has too little in front of it: cut at the head for that alone."""
        cut = self._cut("features", self.model.head_parameters()) if self.needs_probe else NoCut("no probe")
        if not isinstance(cut, Cut):
            return {}
        extractor = self._extractor(cut, evaluation)
        source = self._activations(cut, extractor, self.data.train, "train", None)
        if not self._is_worth(extractor, source, 1):
            return {}
        return self._feeds({"probe": ((source,), self.data.train)}, evaluation.dtype, cut)

    def _feeds(self, sources: "Sources", dtype: torch.dtype, cut: Cut | None = None) -> dict[str, CachedFeed]:
        """How the loop reads these sources, through the suffix of the cut in this format."""
        cut = cut or self.cut  # type: ignore[assignment]
        assert isinstance(cut, Cut)
        splits = {"train": self.data.train, "probe": self.data.train, "val": self.data.val, "test": self.data.test}
        return {
            role: CachedFeed(
                sources=activations,
                pool=pool,
                split=splits[role],
                network=cut.suffix,
                head=self._bare_head(cut),
                dtype=dtype,
                batch_size=self.spec.batch_size,
                seed=self.spec.seed,
                tables=self.session.tables,
            )
            for role, (activations, pool) in sources.items()
        }

    def _bare_head(self, cut: Cut) -> nn.Linear | None:
        """The head where the suffix of a cut is it and no more: what crosses the cut is what enters it."""
        names = self.model.architecture.head
        head = self.model.network.get_submodule(names[0])
        if len(names) == 1 and cut.at == names[0] and isinstance(head, nn.Linear) and is_plain_linear(head):
            return head if cut.shapes == ((head.in_features,),) else None
        return None

    def _expect(self, cached: Mapping[str, CachedFeed]) -> None:
        """Tell the extractors what they are going to run."""
        for source in unique(cached):
            if not source.filled:
                source.extractor.expect(len(source))

    # -- decisions

    def _why_train_cannot_be_cached(self) -> str | None:
        """Why training reads live images whatever that costs; None where it could read activations."""
        if isinstance(self.cut, NoCut):
            return self.cut.why
        if self.augments and self.spec.cache.views is None:
            return (
                f"augment={self.spec.augment.kind} changes training images anew each epoch "
                f"(cache.views=8 keeps 8 views of each)"
            )
        return None

    def _why_not_worth(self, extractor: Extractor, sources: "Sources") -> str | None:
        """Why live images are the better choice by time or room; None where activations are."""
        spec = self.spec
        missing = {a.key: a for activations, _ in sources.values() for a in activations if not a.filled}
        nbytes = sum(source.nbytes for source in missing.values())
        why = self.store.no_room_reason(nbytes) if missing else None
        self._pending = nbytes if why is None else 0
        row = sum(column.nbytes for column in extractor.columns())
        if why is not None or not missing or row <= SMALL or spec.cache.mode is CacheMode.require:
            return why
        images = sum(len(source) for source in missing.values())
        reads = len(self.data.train) * (spec.epochs + self.needs_probe) + len(self.data.val) * (spec.epochs + 1)
        cached, live = self._seconds(extractor, images, reads, row)
        if cached < live:
            return None
        self._pending = 0
        return (
            f"{size_text(row)} an image: the frozen part would take about {live:.0f} s in all, "
            f"and {cached:.0f} s with {size_text(nbytes)} of activations"
        )

    def _is_worth(self, extractor: Extractor, source: SplitActivations, passes: int) -> bool:
        """Whether a split that is only evaluated is better read from activations."""
        if source.filled:
            return True
        if self.store.no_room_reason(self._pending + source.nbytes) is not None:
            return False
        row = sum(column.nbytes for column in extractor.columns())
        cached, live = self._seconds(extractor, len(source), passes * len(source), row)
        worth = row <= SMALL or cached < live
        self._pending += source.nbytes if worth else 0
        return worth

    def _seconds(self, extractor: Extractor, images: int, reads: int, row: int) -> tuple[float, float]:
        """About how long the frozen part takes with activations of so many images, and live, for so many reads."""
        an_image = 1 / (extractor.numerics.images_per_second or 1.0)
        return images * (an_image + row * WRITE) + reads * row * READ, reads * an_image

    # -- words

    def _result(self, device: Device, why_live: str | None, cached: dict[str, CachedFeed]) -> InputPlan:
        train, evaluation = self.measured
        at = self.cut.at if isinstance(self.cut, Cut) else None
        return InputPlan(
            device=device,
            preprocessing=self.preprocessing,
            line=self._line(why_live, cached),
            facts={
                "used": why_live is None,
                "key": cached["train"].sources[0].key if why_live is None else None,
                "why": why_live or f"what comes before {at} is frozen",
                "at": at,
                "entries": {role: [source.key for source in feed.sources] for role, feed in cached.items()},
            },
            numerics={"training": train.why, "evaluation": evaluation.why},
            live=LiveFeeds(self.data, self.model.network, self.spec, self.preprocessing, device),
            cached=cached,
        )

    def _line(self, why_live: str | None, cached: Mapping[str, CachedFeed]) -> str:
        """What is read from where, and what it costs, in one line."""
        live = None if why_live is None else f"training is live: {why_live}"
        if not cached:
            return live or ""
        sources = unique(cached)
        missing = [source for source in sources if not source.filled]
        roles = "" if live is None else f" ({', '.join(cached)})"
        if not missing:
            nbytes, images = sum(s.nbytes for s in sources), sum(len(s) for s in sources)
            words = f"read from cache{roles}: {images:,} rows, {size_text(nbytes)}"
        else:
            nbytes, images = sum(s.nbytes for s in missing), sum(len(s) for s in missing)
            words = f"computed once and cached{roles}: {images:,} rows, {size_text(nbytes)}{_about(missing)}"
        return words if live is None else f"{words}; {live}"


def _about(missing: Sequence[SplitActivations]) -> str:
    """`, about 12 s`; nothing where no speed is known."""
    speeds = [source.extractor.numerics.images_per_second for source in missing]
    if None in speeds:
        return ""
    return f", about {sum(len(source) / speed for source, speed in zip(missing, speeds, strict=True) if speed):.0f} s"


Sources = dict[str, tuple[tuple[SplitActivations, ...], Split]]
"""By role (train, probe, val, test): the activations, one for each view, and the images that they are of."""


def unique(cached: Mapping[str, CachedFeed]) -> list[SplitActivations]:
    """Each of the activations once; several roles may read the same."""
    return list({source.key: source for feed in cached.values() for source in feed.sources}.values())
