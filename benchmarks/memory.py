"""S8, memory: python -m benchmarks.memory DATA [--small] [--backbone resnet18]

Peak resident memory of a frozen run on all 50,000 training images of CIFAR-10 at 224 px with an empty cache, as the
kernel records it (ru_maxrss): pages of mapped files count too.
"""

from dataclasses import dataclass
from pathlib import Path

from benchmarks.figures import Measure, at_most
from benchmarks.images import subset
from benchmarks.run import BACKBONES, Result, out_folder, parser, publish, publish_measures, tlcli_train

BACKBONE = "efficientnet_lite0"


@dataclass(frozen=True)
class Settings:
    """Sizes of the measurement. `train`, `test`: images per class; None: all."""

    size: int = 224
    train: int | None = None
    test: int = 10
    epochs: int = 2


SMALL = Settings(size=32, train=4, test=2)


def frozen_run(data: Path, out: Path, settings: Settings, backbone: str) -> Result:
    """Return a frozen run with a cold cache."""
    source = data / "cifar10"
    n = settings.train
    root = source if n is None else subset(source, out / "images", train=n, test=settings.test)
    return tlcli_train(
        out / "run",
        *BACKBONES[backbone],
        "dataset=imagefolder",
        f"dataset.root='{root}'",
        f"dataset.test_per_class={settings.test}",
        f"image.size={settings.size}",
        "freeze=head",
        f"epochs={settings.epochs}",
        "cache.mode=require",
    )


def main(data: Path, out: Path, *, small: bool = False, backbone: str = BACKBONE) -> list[Measure]:
    """Measure one run, print its memory and time, and return the bar."""
    result = frozen_run(data, out, SMALL if small else Settings(), backbone)
    images = result.facts["n_train"] + result.facts["n_val"]
    row = [backbone, f"{images:,}", f"{result.peak_gb:.2f} GB", f"{result.seconds:.0f} s"]
    figures = {"peak_gb": result.peak_gb, "seconds": result.seconds, "phases": result.facts["seconds"]}
    publish("memory", ["network", "images", "peak resident memory", "whole process"], [row], out, figures)
    measures = [at_most(f"S8 peak resident memory, {images:,} images frozen, {backbone}", 2.5, [result.peak_gb], " GB")]
    publish_measures("memory_measures", measures, out)
    return measures


if __name__ == "__main__":
    command = parser(__doc__)
    command.add_argument("--backbone", choices=BACKBONES, default=BACKBONE)
    given = command.parse_args()
    main(given.data, out_folder(given.out, "memory"), small=given.small, backbone=given.backbone)
