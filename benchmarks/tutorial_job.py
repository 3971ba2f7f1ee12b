"""S6, the tutorial's job end to end: python -m benchmarks.tutorial_job DATA [--small]

The classic script at its full settings (224 px, batches of 4, two epochs, then the test), whole process, against
`tlcli train experiment=cifar10_fast`, whole process, on the same images of CIFAR-10 and from the same weights (those of
EfficientNet-Lite0, which come as a package). Both are run in full; the subset is what makes that affordable.

The recipe differs from the script: 128 px instead of 224, only the last two stages train, batches of 32. The test
images are the same, and tlcli takes its validation images from the script's training images.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import baselines
from benchmarks.figures import Measure, Rounds, at_least, interleaved, ratios, spread
from benchmarks.images import subset
from benchmarks.run import alone, out_folder, parser, publish, publish_measures, tlcli_train

MODEL = "efficientnet_lite0"
SCRIPT, OURS = "the tutorial's script", "`tlcli train experiment=cifar10_fast`"


@dataclass(frozen=True)
class Settings:
    """Sizes of the measurement. `train`, `test`: images per class (of ten)."""

    size: int = 224  # of the script; the recipe has another
    train: int = 500
    test: int = 100
    trial_images: int = 80
    rounds: int = 1
    recipe: tuple[str, ...] = ()


SMALL = Settings(size=32, train=4, test=2, trial_images=16, recipe=("image.size=32", "epochs=1"))


def jobs(root: Path, out: Path, settings: Settings) -> tuple[Rounds, Rounds]:
    """Return seconds and accuracy of both, by round."""
    accuracy: Rounds = {SCRIPT: [], OURS: []}
    common: dict[str, Any] = {"model": MODEL, "size": settings.size}
    trial = alone(baselines.tutorial_training, folder=str(root / "train"), images=settings.trial_images, **common)

    def script() -> float:
        result = alone(baselines.tutorial_job, root=str(root), workers=trial["workers"], **common)
        accuracy[SCRIPT].append(result["accuracy"])
        return float(result["process_seconds"])

    def ours() -> float:
        words = ("dataset.train_per_class=null", "dataset.test_per_class=null", *settings.recipe)
        data = ("experiment=cifar10_fast", "dataset=imagefolder", f"dataset.root='{root}'")
        result = tlcli_train(out / f"tlcli_{len(accuracy[OURS])}", *data, *words)
        accuracy[OURS].append(result.test["accuracy"])
        return result.seconds

    timers: dict[str, Callable[[], float]] = {OURS: ours, SCRIPT: script}
    return interleaved(timers, settings.rounds), accuracy


def measures_of(seconds: Rounds, accuracy: Rounds) -> list[Measure]:
    """Return the bars of these rounds."""
    gain = [100 * (ours - theirs) for ours, theirs in zip(accuracy[OURS], accuracy[SCRIPT], strict=True)]
    job = "S6 the tutorial's job, time of its script over `cifar10_fast` (128 px, two stages)"
    return [
        at_least(job, 20, ratios(seconds[SCRIPT], seconds[OURS])),
        at_least("S6 test accuracy, `cifar10_fast` less the script", 0, gain, " points"),
    ]


def main(data: Path, out: Path, *, small: bool = False) -> list[Measure]:
    """Measure both, print the table of seconds and accuracies, and return the bars."""
    settings = SMALL if small else Settings()
    root = subset(data / "cifar10", out / "images", train=settings.train, test=settings.test)
    seconds, accuracy = jobs(root, out, settings)
    rows = [[name, spread(seconds[name], " s"), spread(accuracy[name])] for name in (SCRIPT, OURS)]
    figures = {"seconds": seconds, "accuracy": accuracy}
    header = [f"{10 * settings.train:,} training images", "whole process", f"accuracy on {10 * settings.test:,}"]
    publish("tutorial_job", header, rows, out, figures)
    measures = measures_of(seconds, accuracy)
    return publish_measures("tutorial_job_measures", measures, out)


if __name__ == "__main__":
    given = parser(__doc__).parse_args()
    main(given.data, out_folder(given.out, "tutorial_job"), small=given.small)
