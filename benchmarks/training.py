"""S4, training the whole network: python -m benchmarks.training DATA [--small]

Images per second with batches of 32 (4 in the tutorial) at 224 px, metrics included, over the epochs after the first.
tlcli and the tuned loop decode small images once, before the first epoch; the tutorial and timm decode them in each
epoch. The baselines train BatchNorm on each batch, so tlcli does too (`freeze.bn_stats=update`): the same arithmetic
everywhere. ResNet-18 starts from random weights; speed does not depend on them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks import baselines
from benchmarks.figures import Measure, Rounds, at_least, interleaved, quickest, ratios, table
from benchmarks.images import subset
from benchmarks.run import BACKBONES, alone, out_folder, parser, publish, publish_measures, tlcli_train


@dataclass(frozen=True)
class Settings:
    """Sizes of the measurement. `train`, `val`, `test`: images per class (of ten); `images`: images of a baseline."""

    size: int = 224
    batch: int = 32
    train: int = 64  # 640 images: whole batches
    val: int = 2
    test: int = 2
    epochs: int = 3
    images: int = 512
    tutorial_images: int = 200
    rounds: int = 3


SMALL = Settings(size=32, batch=8, train=4, val=2, test=2, epochs=2, images=16, tutorial_images=16, rounds=1)
BARS = {"resnet18": 2.3, "efficientnet_lite0": 2.5}
TUTORIAL, BARE, KEPT, TIMM, OURS = "tutorial", "tuned loop", "tuned loop, memory kept", "timm's train.py", "tlcli"


def timers_of(model: str, root: Path, out: Path, settings: Settings) -> dict[str, Callable[[], float]]:
    """Return the timers of one network, in images per second."""
    common = {"model": model, "folder": str(root / "train"), "size": settings.size}
    batches = {**common, "images": settings.images, "batch": settings.batch}
    runs = iter(range(settings.rounds))

    def speed(baseline: Callable[..., dict[str, object]], **arguments: object) -> float:
        return float(alone(baseline, **arguments)["images_per_second"])

    return {
        TUTORIAL: lambda: speed(baselines.tutorial_training, images=settings.tutorial_images, **common),
        BARE: lambda: speed(baselines.bare_training, keep_memory=False, **batches),
        OURS: lambda: tlcli_speed(model, root, out / f"{model}_{next(runs)}", settings),
        KEPT: lambda: speed(baselines.bare_training, keep_memory=True, **batches),
        TIMM: lambda: speed(baselines.timm_training, **batches),
    }


def tlcli_speed(model: str, root: Path, out: Path, settings: Settings) -> float:
    """Return images per second of tlcli."""
    words = ("dataset=imagefolder", f"dataset.root='{root}'", f"image.size={settings.size}", "augment=none")
    words += ("freeze=none", "freeze.head_init=random", "freeze.bn_stats=update", f"batch_size={settings.batch}")
    return tlcli_train(out, *BACKBONES[model], *words, f"epochs={settings.epochs}").training_speed()


def measures_of(model: str, seen: Rounds) -> list[Measure]:
    """Return the bars of these rounds. The faster of the two tuned loops counts."""
    bare = quickest(seen, [BARE, KEPT])
    return [
        at_least(f"S4 training, {model}, over the tutorial script", BARS[model], ratios(seen[OURS], seen[TUTORIAL])),
        at_least(f"S4 training, {model}, of the {bare}", 0.95, ratios(seen[OURS], seen[bare])),
    ]


def main(data: Path, out: Path, *, small: bool = False) -> list[Measure]:
    """Measure both networks, print the table of speeds, and return the bars."""
    settings = SMALL if small else Settings()
    root = subset(data / "cifar10", out / "images", train=settings.train, val=settings.val, test=settings.test)
    seen = {m: interleaved(timers_of(m, root, out, settings), settings.rounds) for m in BACKBONES}
    rows = [[model, *row] for model, rounds in seen.items() for row in table(rounds)]
    publish("training", ["network", "what", "images per second, median", "range"], rows, out, seen)
    measures = [measure for model, rounds in seen.items() for measure in measures_of(model, rounds)]
    return publish_measures("training_measures", measures, out)


if __name__ == "__main__":
    given = parser(__doc__).parse_args()
    main(given.data, out_folder(given.out, "training"), small=given.small)
