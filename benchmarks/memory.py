"""S8, memory: python -m benchmarks.memory DATA [--small] [--backbone resnet18]

Peak resident memory of a frozen run on all 50,000 training images of CIFAR-10 at 224 px with an empty cache, as the
kernel records it (ru_maxrss): pages of mapped files count too.
"""

from dataclasses import dataclass
from pathlib import Path

from benchmarks.figures import Measure, at_most
from benchmarks.images import subset
from benchmarks.run import BACKBONES, out_folder, parser, publish, publish_measures, tlcli_train

BACKBONE = "efficientnet_lite0"


@dataclass(frozen=True)
class Settings:
    """Sizes of the measurement. `train`, `test`: images per class; None: all."""

    size: int = 224
    train: int | None = None
    test: int = 10
    epochs: int = 2


SMALL = Settings(size=32, train=4, test=2)


def main(data: Path, out: Path, *, small: bool = False, backbone: str = BACKBONE) -> list[Measure]:
    """Measure one frozen run with a cold cache, print its memory and time, and return the bar."""
    settings, root = SMALL if small else Settings(), data / "cifar10"
    if settings.train is not None:
        root = subset(root, out / "images", train=settings.train, test=settings.test)
    words = ("dataset=imagefolder", f"dataset.root='{root}'", f"dataset.test_per_class={settings.test}")
    words += (f"image.size={settings.size}", "freeze=head", f"epochs={settings.epochs}", "cache.mode=require")
    result = tlcli_train(out / "run", *BACKBONES[backbone], *words)
    images = result.facts["n_train"] + result.facts["n_val"]
    row = [backbone, f"{images:,}", f"{result.peak_gb:.2f} GB", f"{result.seconds:.0f} s"]
    figures = {"peak_gb": result.peak_gb, "seconds": result.seconds, "phases": result.facts["seconds"]}
    publish("memory", ["network", "images", "peak resident memory", "whole process"], [row], out, figures)
    measures = [at_most(f"S8 peak resident memory, {images:,} images frozen, {backbone}", 2.5, [result.peak_gb], " GB")]
    return publish_measures("memory_measures", measures, out)


if __name__ == "__main__":
    command = parser(__doc__)
    command.add_argument("--backbone", choices=BACKBONES, default=BACKBONE)
    given = command.parse_args()
    main(given.data, out_folder(given.out, "memory"), small=given.small, backbone=given.backbone)
