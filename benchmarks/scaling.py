"""S7, time as the data grows: python -m benchmarks.scaling DATA [--small]

A frozen run on 1,000, 2,000, 4,000 and 8,000 images (train and val) with an empty cache: seconds per image of the
phases extract, probe, train and validate. Constant costs are excluded: process start, loading the model, and
compilation if the run compiles. The same small test split is extracted in each run, and its images count. ResNet-18 at
224 px from random weights; speed does not depend on them.
"""

from dataclasses import dataclass
from pathlib import Path

from benchmarks.figures import Measure, Rounds, at_most, interleaved, table
from benchmarks.images import subset
from benchmarks.run import BACKBONES, out_folder, parser, publish, publish_measures, tlcli_train


@dataclass(frozen=True)
class Settings:
    """Sizes of the measurement. `images`: in total, of ten classes; `test`: per class."""

    model: str = "resnet18"
    size: int = 224
    images: tuple[int, ...] = (1000, 2000, 4000, 8000)
    test: int = 5
    rounds: int = 2


SMALL = Settings(size=32, images=(40, 80), test=2, rounds=1)


def costs(data: Path, out: Path, settings: Settings) -> Rounds:
    """Return milliseconds per image for each number of images, by round."""
    runs = iter(range(settings.rounds * len(settings.images)))

    def timer(n: int) -> float:
        root = subset(data / "cifar10", out / f"images_{n}", train=n // 10, test=settings.test)
        words = ("dataset=imagefolder", f"dataset.root='{root}'", f"image.size={settings.size}", "freeze=head")
        result = tlcli_train(out / f"run_{next(runs)}", *BACKBONES[settings.model], *words, "cache.mode=require")
        images = sum(result.facts[f"n_{split}"] for split in ("train", "val", "test"))
        seconds = result.phases("extract", "probe", "train", "validate")
        return 1000 * (seconds - result.facts["extraction"]["compile_seconds"]) / images

    return interleaved({f"{n:,} images": lambda n=n: timer(n) for n in settings.images}, settings.rounds)


def main(data: Path, out: Path, *, small: bool = False) -> list[Measure]:
    """Measure all sizes, print the table of costs, and return the bar."""
    settings = SMALL if small else Settings()
    seen = costs(data, out, settings)
    publish("scaling", ["data", "milliseconds per image, median", "range"], table(seen), out, seen)
    low, high = settings.images[0], settings.images[-1]
    excess = [100 * (max(turn) / min(turn) - 1) for turn in zip(*seen.values(), strict=True)]
    measures = [at_most(f"S7 cost per image, {low:,} to {high:,} images: most over least expensive", 10, excess, " %")]
    return publish_measures("scaling_measures", measures, out)


if __name__ == "__main__":
    given = parser(__doc__).parse_args()
    main(given.data, out_folder(given.out, "scaling"), small=given.small)
