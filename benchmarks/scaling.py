"""S7, time as the data grows: python -m benchmarks.scaling DATA [--small]

A frozen run on 1,000, 2,000, 4,000 and 8,000 images (train and val together) with an empty cache: seconds of the phases
extract, probe, train and validate, an image. What is the same for any number of images is left out: the start of the
process, loading the model, and compilation where the run compiles. The test set, which is extracted too, is the same
small one throughout, and its images count. ResNet-18 at 224 px from random weights, on which speed does not depend.
"""

from dataclasses import dataclass
from pathlib import Path

from benchmarks.figures import Measure, Rounds, at_most, interleaved, table
from benchmarks.images import subset
from benchmarks.run import BACKBONES, out_folder, parser, publish, publish_measures, tlcli_train


@dataclass(frozen=True)
class Settings:
    """How much is measured. `images`: in all, of ten classes; `test`: a class."""

    model: str = "resnet18"
    size: int = 224
    images: tuple[int, ...] = (1000, 2000, 4000, 8000)
    test: int = 5
    rounds: int = 2


SMALL = Settings(size=32, images=(40, 80), test=2, rounds=1)


def cost(root: Path, out: Path, settings: Settings) -> float:
    """Milliseconds an image."""
    words = ("dataset=imagefolder", f"dataset.root='{root}'", f"image.size={settings.size}", "freeze=head")
    result = tlcli_train(out, *BACKBONES[settings.model], *words, "cache.mode=require")
    images = sum(result.facts[f"n_{split}"] for split in ("train", "val", "test"))
    seconds = result.phases("extract", "probe", "train", "validate") - result.facts["extraction"]["compile_seconds"]
    return 1000 * seconds / images


def costs(data: Path, out: Path, settings: Settings) -> Rounds:
    """Milliseconds an image for each number of images, round by round."""
    runs = iter(range(settings.rounds * len(settings.images)))

    def timer(n: int) -> float:
        root = subset(data / "cifar10", out / f"images_{n}", train=n // 10, test=settings.test)
        return cost(root, out / f"run_{next(runs)}", settings)

    return interleaved({f"{n:,} images": lambda n=n: timer(n) for n in settings.images}, settings.rounds)


def excess(seen: Rounds) -> list[float]:
    """How much more the dearest image costs than the cheapest, in per cent, round by round."""
    return [100 * (max(turn) / min(turn) - 1) for turn in zip(*seen.values(), strict=True)]


def main(data: Path, out: Path, *, small: bool = False) -> list[Measure]:
    """All sizes; the table of costs, and what the bar says."""
    settings = SMALL if small else Settings()
    seen = costs(data, out, settings)
    publish("scaling", ["data", "milliseconds an image, median", "range"], table(seen), out, seen)
    low, high = settings.images[0], settings.images[-1]
    measures = [at_most(f"S7 cost an image, {low:,} to {high:,} images: dearest over cheapest", 10, excess(seen), " %")]
    publish_measures("scaling_measures", measures, out)
    return measures


if __name__ == "__main__":
    given = parser(__doc__).parse_args()
    main(given.data, out_folder(given.out, "scaling"), small=given.small)
