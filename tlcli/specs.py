"""The schema of a config: one class per option of each group, with the type and range of each key.

A default lives in its YAML file under conf/. The command line converts the composed YAML to a TrainSpec once; nothing
below it sees anything else. This module, and those of the options, import neither torch nor omegaconf.
"""

import math
from collections.abc import Iterator, Mapping
from enum import EnumMeta, StrEnum
from importlib import import_module
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin

from msgspec import Meta, Struct, ValidationError, convert, defstruct
from msgspec.structs import asdict, fields

from tlcli.errors import UsageError

VAL_FRACTION = 0.1  # of the training images, if dataset.val_fraction is null and something needs validation images
HOMES = {
    "dataset": "tlcli.data.sources",
    "backbone": "tlcli.models.backbones",
    "optimizer": "tlcli.engine.optimizers",
    "scheduler": "tlcli.engine.schedule",
    "augment": "tlcli.data.augment",
    "freeze": "tlcli.transfer.freeze",
    "logger": "tlcli.runs.loggers",
}  # module with the options of each group
EVALUATION_KEYS = ("on_bad", "verify", "ram_gb", "test_per_class", "classes")  # of a run's dataset: its splits stay
_options: dict[str, dict[str, Any]] = {group: {} for group in HOMES}
T = TypeVar("T", bound=type[Any])

Positive = Annotated[float, Meta(gt=0)]
NotNegative = Annotated[float, Meta(ge=0)]
Count = Annotated[int, Meta(ge=1)]
CountOrZero = Annotated[int, Meta(ge=0)]
ImageSize = Annotated[int, Meta(ge=8)]  # in pixels
Fraction = Annotated[float, Meta(ge=0, le=1)]
FractionBelowOne = Annotated[float, Meta(ge=0, lt=1)]
FractionAboveZero = Annotated[float, Meta(gt=0, le=1)]
OpenFraction = Annotated[float, Meta(gt=0, lt=1)]
NonEmpty = Annotated[str, Meta(min_length=1)]
Float32 = Annotated[float, Meta(ge=-3e38, le=3e38)]

Fit = StrEnum("Fit", ["squash", "crop", "pad"])  # conversion of an image to a square
OnBad = StrEnum("OnBad", ["error", "skip"])  # treatment of files that do not decode
BnStats = StrEnum("BnStats", ["auto", "frozen", "update"])  # BatchNorm statistics in trainable layers
HeadInit = StrEnum("HeadInit", ["random", "probe"])  # initial weights of the head
Accelerator = StrEnum("Accelerator", ["auto", "cpu", "cuda", "mps"])  # device that computes
Precision = StrEnum("Precision", ["auto", "fp32", "bf16", "fp16"])  # dtype of the passes; weights stay float32
KeepBest = StrEnum("KeepBest", ["accuracy", "macro_f1", "loss"])  # validation metric that selects the best epoch
ClassWeights = StrEnum("ClassWeights", ["none", "balanced"])  # weight of each class in the training loss
CacheMode = StrEnum("CacheMode", ["auto", "off", "require"])  # use of the cache for the frozen layers' output
CacheDtype = StrEnum("CacheDtype", ["auto", "fp32", "bf16"])  # dtype of cached output
Tta = StrEnum("Tta", ["none", "flip"])  # test-time augmentation: images that predictions are averaged over
Sampler = StrEnum("Sampler", ["shuffle", "balanced"])  # training images of an epoch
Verify = StrEnum("Verify", ["changed", "full"])  # image files that are read for the fingerprint of a dataset


class Spec(Struct, frozen=True, forbid_unknown_fields=True):
    """Immutable values of a config."""


class OptionSpec(Spec, frozen=True, tag_field="kind"):
    """One option of a config group. Its tag, `kind`, says which of the group's classes it is."""

    group: ClassVar[str]

    @property
    def kind(self) -> str:
        return str(self.__struct_config__.tag)


def option(cls: T) -> T:
    """Register a class as an option of its group, under its tag."""
    _options[cls.group][cls.__struct_config__.tag] = cls
    return cls


def options(group: str) -> dict[str, Any]:
    """Return the class of each `kind` of a group."""
    import_module(HOMES[group])
    return _options[group]


class DatasetSpec(OptionSpec, frozen=True):
    """Keys of all datasets: splitting, reducing and checking."""

    group: ClassVar[str] = "dataset"
    name: str
    root: NonEmpty | None
    val_fraction: OpenFraction | None
    test_fraction: OpenFraction
    train_per_class: Annotated[int, Meta(ge=2)] | None
    test_per_class: Count | None
    on_bad: OnBad
    verify: Verify
    ram_gb: NotNegative
    classes: tuple[str, ...] | None
    range: tuple[Float32, Float32] | Literal["auto"] | None
    image_size: ImageSize | None
    flip: Fraction
    min_crop: FractionAboveZero

    def __post_init__(self) -> None:
        if isinstance(self.range, tuple):
            require_ascending("range", self.range)
            if self.range[0] == self.range[1]:
                raise ValueError(f"range={list(self.range)} is empty")

    @property
    def title(self) -> str:
        """The name, and the last part of the root if there is one."""
        return f"{self.name} {Path(self.root).name}" if self.root else self.name

    def check(self, *, for_training: bool = True) -> None:
        """Raise UsageError for mistakes that show without decoding; evaluation needs no training images."""
        raise NotImplementedError

    def load(self, reporter: Any, *, for_training: bool = True) -> Any:
        """Return the classes and splits, a `tlcli.data.images.Source`, before anything is decoded."""
        raise NotImplementedError

    def offline(self) -> "DatasetSpec":
        """Return the spec with which nothing is downloaded."""
        return self

    def without_bad_classes(self) -> tuple["DatasetSpec", list[str]]:
        """Return the spec without class folders that prevent training, and the problems that they have."""
        return self, []


class BackboneSpec(OptionSpec, frozen=True):
    """Base class of the kinds of backbones, which are in models/backbones.py."""

    group: ClassVar[str] = "backbone"
    name: str
    weights: str
    reinit: tuple[str, ...]
    size: ImageSize | None
    dropout: FractionBelowOne
    imagenet_top1: Annotated[float, Meta(ge=0, le=100)] | None
    license: str | None

    is_packaged: ClassVar[bool] = False  # True if the published weights are a package: nothing is downloaded

    def build(self, n_classes: int, size: int | None = None) -> Any:
        """Return a Classifier with random weights for images of `size` pixels (None: its own). Raises UsageError."""
        raise NotImplementedError

    @classmethod
    def is_local(cls, name: str) -> bool:
        """Return True if the published weights of a backbone of this kind are on this machine."""
        raise NotImplementedError

    def published(self, classifier: Any, n_classes: int, size: int) -> tuple[str, dict[str, Any]]:
        """Return the published weights: where they are from, and tensors by name."""
        raise NotImplementedError


class FreezeSpec(OptionSpec, frozen=True):
    """Base class of the freeze strategies, which are in transfer/freeze.py."""

    group: ClassVar[str] = "freeze"
    bn_stats: BnStats
    head_init: HeadInit

    part: ClassVar[str]  # the part of the network that trains, as a phrase for reports
    interpolates: ClassVar[bool] = True  # False if what is between initial and trained parameters is of no use

    def trainable(self, classifier: Any) -> frozenset[str]:
        """Return the names of the parameters that train, with the head's. Raise UsageError for an unknown part."""
        raise NotImplementedError

    @classmethod
    def variants(cls, own: "FreezeSpec", classifier: Any) -> Iterator["FreezeSpec"]:
        """Yield the variants that `tlcli inspect` shows: `own`, that of the config, or one without options."""
        if isinstance(own, cls):
            yield own
        elif len(fields(cls)) == len(fields(FreezeSpec)):
            yield cls(bn_stats=own.bn_stats, head_init=own.head_init)

    @property
    def label(self) -> str:
        """The kind with its number: `last_stages n=2`."""
        numbers = [f"{f.name}={value}" for f in fields(self) if type(value := getattr(self, f.name)) is int]
        return " ".join([self.kind, *numbers])


class OptimizerSpec(OptionSpec, frozen=True):
    """Keys of all optimizers: the learning rates of the parameter groups."""

    group: ClassVar[str] = "optimizer"
    lr: Positive
    weight_decay: NotNegative
    head_lr_mult: Positive
    layer_decay: FractionAboveZero
    decay_norm_and_bias: bool

    def build(self, groups: list[dict[str, Any]]) -> Any:
        """Return the torch optimizer over these groups (transfer.contract.parameter_groups)."""
        raise NotImplementedError


class SchedulerSpec(OptionSpec, frozen=True):
    """Keys of all schedulers: a linear warmup over a fraction of all steps."""

    group: ClassVar[str] = "scheduler"
    warmup: FractionBelowOne

    reads_validation: ClassVar[bool] = False  # True if the learning rate depends on the validation loss

    def during_warmup(self, step: int, steps: int) -> float:
        """Return the factor on lr at a step (0-based) of the warmup's `steps`."""
        return (step + 1) / (steps + 1)

    def after_warmup(self, progress: float, epoch: int) -> float:
        """Return the factor on lr after the warmup; progress in 0..1, epoch 0-based."""
        return 1.0


class AugmentSpec(OptionSpec, frozen=True):
    """Keys of all augmentations: random erasing (Zhong et al. 2020), and what mixes the images of a batch.

    With `mixup` (Zhang et al. 2018) and `cutmix` (Yun et al. 2019) above 0, half of the batches have each, as in timm.
    """

    group: ClassVar[str] = "augment"
    erasing: Fraction
    mixup: NotNegative
    cutmix: NotNegative

    @property
    def mixes(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0

    def build(self, preprocessing: Any) -> Any:
        """Return the `tlcli.data.batches.Augmentation`; None if images are as in evaluation."""
        raise NotImplementedError

    def mixer(self, n_classes: int) -> Any:
        """Return what turns images (B, 3, S, S) and labels (B) into mixed images and class shares (B, classes)."""
        raise NotImplementedError


class LoggerSpec(OptionSpec, frozen=True):
    """An experiment tracker that the run is also written to."""

    group: ClassVar[str] = "logger"


class ImageSpec(Spec, frozen=True):
    """Preprocessing of images for the network."""

    size: ImageSize | None
    fit: Fit | None
    train_size: ImageSize | None
    mean: tuple[float, float, float] | None
    std: tuple[Positive, Positive, Positive] | None


class CacheSpec(Spec, frozen=True):
    """Caching of the frozen layers' output; `max_gb` of disk, `ram_gb` of memory."""

    mode: CacheMode
    views: CountOrZero | None
    dtype: CacheDtype
    max_gb: NotNegative
    ram_gb: NotNegative


class DeviceSpec(Spec, frozen=True):
    """The device, and how it computes."""

    kind: Accelerator
    processes: Count
    precision: Precision
    channels_last: bool | None
    compile: bool | None
    workers: CountOrZero | None
    threads: Count | None
    deterministic: bool


class CheckpointSpec(Spec, frozen=True):
    """Minutes between writes of the training state, and whether a finished run keeps it."""

    every_minutes: Positive
    keep_state: bool


class TrainSpec(Spec, frozen=True):
    """One training run."""

    dataset: DatasetSpec
    backbone: BackboneSpec
    freeze: FreezeSpec
    optimizer: OptimizerSpec
    scheduler: SchedulerSpec
    augment: AugmentSpec
    device: DeviceSpec
    logger: LoggerSpec
    image: ImageSpec
    cache: CacheSpec
    checkpoint: CheckpointSpec
    epochs: Count | None
    min_epochs: Count
    min_steps: Count
    batch_size: Count
    accumulate: Count
    seed: Annotated[int, Meta(ge=0, lt=2**32)]
    folds: Annotated[int, Meta(ge=2)] | None
    fold: CountOrZero | None
    interpolate: FractionAboveZero | None
    fits: Count | None
    tta: Tta
    label_smoothing: FractionBelowOne
    class_weights: ClassWeights
    sampler: Sampler
    l2sp: NotNegative
    ema: FractionBelowOne | None
    clip_grad: Positive | None
    early_stop: Count | None
    keep_best: KeepBest
    log_every: Count | None
    name: str
    out: NonEmpty

    @property
    def own_folds(self) -> int:
        """The folds that the run trains before its refit on all images; 0 for none, and for a fold itself."""
        return 0 if self.folds is None or self.fold is not None else self.folds

    @property
    def no_average(self) -> str | None:
        """The first setting with which weights of several fits cannot be averaged."""
        reasons = {
            f"freeze={self.freeze.kind}": not self.freeze.interpolates,
            f"freeze.bn_stats={self.freeze.bn_stats}": self.freeze.bn_stats is BnStats.update,
            f"ema={self.ema}": self.ema is not None,
            f"early_stop={self.early_stop}": self.early_stop is not None,
            f"scheduler={self.scheduler.kind}": self.scheduler.reads_validation,
        }
        return next((word for word, holds in reasons.items() if holds), None)

    def __post_init__(self) -> None:
        folds, processes, interpolate = self.folds, self.device.processes, self.interpolate or 1
        if self.fold is not None and self.fold >= (folds or 0):
            raise UsageError(f"fold={self.fold}: {f'must be below folds={folds}' if folds else 'give folds=N, too'}")
        if folds and (self.early_stop is not None or self.scheduler.reads_validation):
            key = "scheduler=plateau" if self.early_stop is None else f"early_stop={self.early_stop}"
            raise UsageError(f"{key}: the refit of folds={folds} has no validation images; leave one out")
        if folds and processes > 1:
            raise UsageError(f"device.processes={processes} does not work with folds; leave one out")
        if processes > self.batch_size:
            raise UsageError(f"device.processes={processes} is more than batch_size={self.batch_size}: raise it")
        if folds and (fraction := self.dataset.val_fraction):
            raise UsageError(f"dataset.val_fraction={fraction} has no effect with folds={folds}; leave one out")
        if not self.freeze.interpolates and interpolate < 1:
            raise UsageError(f"interpolate={interpolate} does not work with freeze={self.freeze.kind}; leave one out")
        if (self.fits or 1) > 1 and (word := self.no_average):
            raise UsageError(f"fits={self.fits} does not work with {word}; leave one out")
        if self.sampler is Sampler.balanced and self.class_weights is ClassWeights.balanced:
            raise UsageError("sampler=balanced and class_weights=balanced correct for rare classes twice: give one")
        if self.tta is Tta.flip and self.dataset.flip == 0:
            raise UsageError("tta=flip: with dataset.flip=0 a mirrored image is another image; leave one out")


def spec_from(values: Any) -> TrainSpec:
    """Return the spec with these values, as JSON or YAML has them. Raise msgspec.ValidationError, or UsageError."""
    groups = {group: Union[tuple(options(group).values())] for group in HOMES}  # noqa: UP007
    types = [(field.name, groups.get(field.name, field.type)) for field in fields(TrainSpec)]
    schema = defstruct("Config", types, forbid_unknown_fields=True)
    return TrainSpec(**asdict(convert(values, schema, strict=False)))


def require_ascending(key: str, bounds: tuple[float, float]) -> None:
    """Raise ValueError if the lower bound is above the upper bound."""
    if bounds[0] > bounds[1]:
        raise ValueError(f"{key}=[{bounds[0]:g},{bounds[1]:g}] has a lower bound above the upper bound")


def parse_image_stats(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return size, fit, mean and std of a network's input from a file of unknown origin; or KeyError, or ValueError."""
    try:
        size = convert(data["size"], Annotated[int, Meta(ge=1, le=16_384)])  # the largest takes 3 GB as float32
        mean, std = (convert(data[key], tuple[float, float, float]) for key in ("mean", "std"))
    except ValidationError as exc:
        raise ValueError(str(exc)) from exc
    if not all(map(math.isfinite, mean + std)) or min(std) <= 0:
        raise ValueError(f"mean={mean} and std={std} must be finite, and std above 0")
    return {"size": size, "fit": Fit(data["fit"]), "mean": mean, "std": std}


def classes_of(part: str) -> dict[str, type[Spec]]:
    """Return the classes that hold the keys of a part of the config ("" is the top level), by kind in a group."""
    if part in HOMES:
        return options(part)
    kind = next((f.type for f in fields(TrainSpec) if f.name == part), TrainSpec if part == "" else None)
    return {part: kind} if isinstance(kind, type) and issubclass(kind, Spec) else {}


def all_keys() -> dict[str, None]:
    """Return the full name of every key that some config can have, in order."""
    own = [f.name for f in fields(TrainSpec)]
    return dict.fromkeys(
        [*own, *(f"{part}.{f.name}" for part in own for cls in classes_of(part).values() for f in fields(cls))]
    )


def leaf_types(key: str) -> list[Any]:
    """Return the types that a key's values and their items can have; empty for an unknown key."""
    part, _, name = key.rpartition(".")
    waiting = [f.type for cls in classes_of(part).values() for f in fields(cls) if f.name == name]
    leaves: list[Any] = []
    for hint in waiting:  # which grows
        if get_origin(hint) is Annotated:
            waiting.append(get_args(hint)[0])
        elif get_origin(hint) in (Union, UnionType, tuple, dict):
            inner = get_args(hint)[get_origin(hint) is dict :]  # the keys of a dict are no values
            waiting += [item for item in inner if item is not ...]
        elif hint not in leaves:
            leaves.append(hint)
    return leaves


def choices(key: str) -> list[str]:
    """Return the words that a key's values are chosen from, if they are."""
    words: list[str] = []
    for hint in leaf_types(key):
        words += map(str, hint) if isinstance(hint, EnumMeta) else get_args(hint) if get_origin(hint) is Literal else ()
    return words
