"""`tlcli predict` over a folder: python -m benchmarks.prediction DATA [--small]

EfficientNet-Lite0 on images of CIFAR-10, against timm's inference.py with --amp --channels-last, and tlcli's own
extraction. predict is timed as a whole process over all images, less one over a single image. timm's script is timed
from the moment that its network is made.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks import baselines
from benchmarks.figures import Measure, Rounds, at_least, interleaved, ratios, table
from benchmarks.images import count, subset
from benchmarks.run import alone, out_folder, parser, publish, publish_measures, tlcli_train, whole_process

MODEL = "efficientnet_lite0"
PREDICT, TIMM, EXTRACTION = "`tlcli predict`", "timm's inference.py", "tlcli's extraction"


@dataclass(frozen=True)
class Settings:
    """Sizes of the measurement. `train`: images per class (of ten), which are predicted too."""

    size: int = 224
    batch: int = 256  # of timm's script
    train: int = 500
    test: int = 10
    rounds: int = 1


SMALL = Settings(size=32, batch=8, train=6, test=2)


def rates(root: Path, out: Path, settings: Settings) -> Rounds:
    """Return images per second of each, by round."""
    words = ("dataset=imagefolder", f"dataset.root='{root}'", f"image.size={settings.size}", "freeze=head", "epochs=1")
    run = tlcli_train(out / "run", *words)
    folder, images = root / "train", count(root / "train")
    one = next(path for path in sorted(folder.rglob("*")) if path.is_file())

    def seconds(path: Path) -> float:
        command = [sys.executable, "-m", "tlcli", "predict", str(run.run), str(path), "--format", "csv"]
        return whole_process(command, {"TLCLI_CACHE": str(out / "cache")}).seconds

    seconds(one)  # dtypes are measured once and remembered
    script = {"model": MODEL, "folder": str(folder), "size": settings.size, "batch": settings.batch}
    timers = {
        PREDICT: lambda: (images - 1) / (seconds(folder) - seconds(one)),
        TIMM: lambda: float(alone(baselines.timm_inference, **script)["images_per_second"]),
        EXTRACTION: lambda: float(run.facts["extraction"]["images_per_second"]),
    }
    return interleaved(timers, settings.rounds)


def main(data: Path, out: Path, *, small: bool = False) -> list[Measure]:
    """Measure, print the table of rates, and return the bars."""
    settings = SMALL if small else Settings()
    root = subset(data / "cifar10", out / "images", train=settings.train, test=settings.test)
    seen = rates(root, out, settings)
    header = [f"{10 * settings.train:,} images", "images per second, median", "range"]
    publish("prediction", header, table(seen), out, {"images_per_second": seen})
    measures = [
        at_least("predict over timm's inference.py, images per second", 2, ratios(seen[PREDICT], seen[TIMM])),
        at_least("predict, of tlcli's extraction", 0.8, ratios(seen[PREDICT], seen[EXTRACTION])),
    ]
    return publish_measures("prediction_measures", measures, out)


if __name__ == "__main__":
    given = parser(__doc__).parse_args()
    main(given.data, out_folder(given.out, "prediction"), small=given.small)
