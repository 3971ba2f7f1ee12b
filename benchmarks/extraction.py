"""S3, extraction: python -m benchmarks.extraction DATA [--small]

Images per second that tlcli passes through a frozen network on a cold cache, decoding included, against the limit that
the matrix product sets (ResNet-18; measured in every round) and against the tutorial script's evaluation loop.
ResNet-18 starts from random weights; speed does not depend on them.

The run records the speed of the pass itself. Small images are decoded before it, once per run, so the time that Pillow
takes to decode as many in one process is added before the bars are computed. Compilation is excluded if the run
compiles; the wall time of the whole phase, with compilation and writing the cache, has its own row.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks import baselines, limits
from benchmarks.figures import Measure, Rounds, at_least, interleaved, ratios, table
from benchmarks.images import subset
from benchmarks.run import BACKBONES, Result, alone, out_folder, parser, publish, publish_measures, tlcli_train


@dataclass(frozen=True)
class Settings:
    """Sizes of the measurement. `train`, `val`, `test`: images per class (of ten)."""

    size: int = 224
    train: int = 200
    val: int = 10
    test: int = 10
    tutorial_images: int = 400
    matrix: int = limits.SIZE
    rounds: int = 3


SMALL = Settings(size=32, train=4, val=2, test=2, tutorial_images=16, matrix=128, rounds=1)
BARS = {"resnet18": 2.2, "efficientnet_lite0": 4.0}
LIMIT, TUTORIAL = "limit of the bfloat16 matrix product", "tutorial's evaluation"
DECODING, PASS, PHASE = "decoding alone", "tlcli, the pass alone", "tlcli, the whole phase"
OURS = "tlcli, the pass and decoding"


def rounds_of(model: str, root: Path, out: Path, settings: Settings) -> Rounds:
    """Return images per second of each, by round."""
    runs: list[Result] = []
    train = str(root / "train")

    def one_pass() -> float:
        words = ("dataset=imagefolder", f"dataset.root='{root}'", f"image.size={settings.size}", "freeze=head")
        words += ("epochs=1", "cache.mode=require")
        runs.append(tlcli_train(out / f"{model}_{len(runs)}", *BACKBONES[model], *words))
        return float(runs[-1].facts["extraction"]["images_per_second"])

    def tutorial() -> float:
        arguments = {"model": model, "folder": train, "size": settings.size, "images": settings.tutorial_images}
        return float(alone(baselines.tutorial_evaluation, **arguments)["images_per_second"])

    def decoding() -> float:
        return float(alone(baselines.decoding, folder=train)["images_per_second"])

    def limit() -> float:
        gflops = alone(limits.matrix_gflops, size=settings.matrix)["bfloat16"]
        return float(gflops) / limits.forward_gflop(settings.size)

    timers: dict[str, Callable[[], float]] = {TUTORIAL: tutorial, PASS: one_pass, DECODING: decoding}
    seen = interleaved({LIMIT: limit, **timers} if model == "resnet18" else timers, settings.rounds)
    phase = [run.facts["extraction"]["images"] / run.phases("extract") for run in runs]
    ours = [1 / (1 / a + 1 / b) for a, b in zip(seen[PASS], seen[DECODING], strict=True)]  # one after the other
    return {**seen, OURS: ours, PHASE: phase}


def measures_of(model: str, seen: Rounds) -> list[Measure]:
    """Return the bars of these rounds."""
    found = [at_least(f"S3 extraction, {model}, over the {TUTORIAL}", BARS[model], ratios(seen[OURS], seen[TUTORIAL]))]
    if LIMIT in seen:
        found.insert(0, at_least(f"S3 extraction, {model}, of the {LIMIT}", 0.85, ratios(seen[OURS], seen[LIMIT])))
    return found


def main(data: Path, out: Path, *, small: bool = False) -> list[Measure]:
    """Measure both networks, print the table of speeds, and return the bars."""
    settings = SMALL if small else Settings()
    root = subset(data / "cifar10", out / "images", train=settings.train, val=settings.val, test=settings.test)
    seen = {model: rounds_of(model, root, out, settings) for model in BACKBONES}
    rows = [[model, *row] for model, rounds in seen.items() for row in table(rounds)]
    publish("extraction", ["network", "what", "images per second, median", "range"], rows, out, seen)
    measures = [measure for model, rounds in seen.items() for measure in measures_of(model, rounds)]
    return publish_measures("extraction_measures", measures, out)


if __name__ == "__main__":
    given = parser(__doc__).parse_args()
    main(given.data, out_folder(given.out, "extraction"), small=given.small)
