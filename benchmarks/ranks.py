"""Several processes: python -m benchmarks.ranks DATA [--small]

Images per second of two processes with one thread each, against one process with one thread and with two: training the
whole of EfficientNet-Lite0 with batches of 32 at 224 px, over the epochs after the first, and extraction on a cold
cache. Two separate runs at once, which exchange nothing, show what two cores give at most. Formats are fixed, so that
all compute the same. It needs a machine with two idle cores.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from benchmarks.figures import Measure, Rounds, at_least, interleaved, ratios, spread, table
from benchmarks.images import subset
from benchmarks.run import BACKBONES, out_folder, parser, publish, publish_measures, tlcli_train


@dataclass(frozen=True)
class Settings:
    """Sizes of the measurement. `train`, `val`, `test`: images per class (of ten)."""

    size: int = 224
    batch: int = 32
    train: int = 62  # with val whole batches for each process
    val: int = 2
    extracted: int = 192  # as train, without val
    test: int = 32
    epochs: int = 3
    rounds: int = 3


SMALL = Settings(size=32, batch=8, train=4, extracted=6, test=2, epochs=2, rounds=1)
RANKS, ONE, TWO = "two processes, one thread each", "one process, one thread", "one process, two threads"
SEPARATE = "two separate runs at once, one thread each, together"
WORDS = {RANKS: ("device.processes=2", "device.threads=1"), ONE: ("device.threads=1",), TWO: ("device.threads=2",)}
FORMATS = ("device.precision=fp32", "device.channels_last=true", "device.compile=false")
RECIPE = ("augment=none", "freeze.head_init=random")


def speed(kind: str, how: str, root: Path, out: Path, settings: Settings) -> float:
    """Return the images per second of `training` or `extraction`."""
    if how == SEPARATE:
        with ThreadPoolExecutor(2) as pool:
            return sum(pool.map(lambda i: speed(kind, ONE, root, Path(f"{out}_{i}"), settings), range(2)))
    words = ("dataset=imagefolder", f"dataset.root='{root}'", f"image.size={settings.size}")
    own = ("freeze=none", "cache.mode=off", f"epochs={settings.epochs}", f"batch_size={settings.batch}")
    if kind == "extraction":
        own = ("freeze=head", "cache.mode=require", "epochs=1", "interpolate=1")
    result = tlcli_train(out, *BACKBONES["efficientnet_lite0"], *words, *FORMATS, *RECIPE, *own, *WORDS[how])
    if kind == "extraction":
        return float(result.facts["extraction"]["images_per_second"])
    return result.training_speed()


def rounds_of(kind: str, root: Path, out: Path, settings: Settings) -> Rounds:
    """Return images per second of each way to run, by round."""
    runs, ways = count(), (*WORDS, SEPARATE)

    def timer(how: str) -> Callable[[], float]:
        return lambda: speed(kind, how, root, out / f"{kind}_{next(runs)}", settings)

    return interleaved({how: timer(how) for how in ways}, settings.rounds)


def main(data: Path, out: Path, *, small: bool = False) -> list[Measure]:
    """Measure training and extraction, print the table of speeds, and return the bars."""
    settings = SMALL if small else Settings()
    seen = {}
    for kind, splits in (
        ("training", {"train": settings.train, "val": settings.val, "test": settings.test}),
        ("extraction", {"train": settings.extracted, "test": settings.test}),
    ):
        root = subset(data / "cifar10", out / f"images of {kind}", **splits)
        seen[kind] = rounds_of(kind, root, out, settings)
    rows = [[kind, *row] for kind, rounds in seen.items() for row in table(rounds)]
    publish("ranks", ["what", "how", "images per second, median", "range"], rows, out, seen)
    measures = [
        at_least(f"{kind}, {RANKS}, over {other}", bar, ratios(rounds[RANKS], rounds[other]))
        for kind, rounds in seen.items()
        for other, bar in ((ONE, 1.8), (TWO, 1.0))
    ]
    for kind, rounds in seen.items():
        most = ratios(rounds[SEPARATE], rounds[ONE])
        print(f"{kind}: {SEPARATE}, over {ONE}: {spread(most, 'x')}")
    return publish_measures("ranks_measures", measures, out)


if __name__ == "__main__":
    given = parser(__doc__).parse_args()
    main(given.data, out_folder(given.out, "ranks"), small=given.small)
