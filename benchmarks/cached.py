"""S1, S2 and S5, the savings of the activation cache: python -m benchmarks.cached DATA [--small]

S1: a sweep of 12 heads of 20 epochs each that starts with an empty cache, whole process, over one pass of the same
images by tlcli's own extraction (the phase `extract` of another run that starts with an empty cache). Twelve uncached
jobs would take hours: they are estimated from the second epoch of a `cache.mode=off` run on fewer images, training and
validation each scaled to the number of images, times epochs and jobs; start and test are left out of the estimate.
S2: one more job of 20 epochs on the cache that the sweep has filled, against scikit-learn's LogisticRegression on the
same features, stored by an earlier process too.
S5: the head and the last stage, 10 epochs, whole process: an empty cache against `cache.mode=off`.

ResNet-18 at 224 px from random weights, on which speed does not depend; BatchNorm keeps its statistics, as it does
with pretrained ones. The pass is over train, val and a small test set: all that the sweep needs.
"""

from dataclasses import dataclass
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks import baselines
from benchmarks.figures import Measure, Rounds, at_least, at_most, interleaved, ratios, table
from benchmarks.images import count, subset
from benchmarks.run import (
    BACKBONES,
    Result,
    alone,
    out_folder,
    parser,
    publish,
    publish_measures,
    tlcli_sweep,
    tlcli_train,
)


@dataclass(frozen=True)
class Settings:
    """Sizes of the measurement. Images per class (of ten): full set, uncached run, S5."""

    model: str = "resnet18"
    size: int = 224
    train: int = 500
    val: int = 50
    uncached: int = 50
    stage: int = 100
    test: int = 5
    grid: tuple[str, ...] = (
        "optimizer.lr=1e-3,3e-3,1e-2",
        "optimizer.weight_decay=0.0,0.01",
        "label_smoothing=0.0,0.1",
    )
    epochs: int = 20
    stage_epochs: int = 10
    rounds: int = 3

    @property
    def jobs(self) -> int:
        """Return the number of configurations of the grid."""
        return prod(axis.count(",") + 1 for axis in self.grid)


SMALL = Settings(size=32, train=4, val=2, uncached=4, stage=4, test=2, epochs=2, stage_epochs=2, rounds=1)

PASS, SWEEP, UNCACHED = "one pass, s", "sweep, whole process, s", "uncached jobs, estimated, s"
JOB, JOB_TRAIN, BY_HAND = (
    "further job, whole process, s",
    "its training, s",
    "stored features by hand, whole process, s",
)
CACHED, LIVE = "last stage, cached, whole process, s", "last stage, uncached, whole process, s"


class Bench:
    """The runs of one benchmark, each with its own name."""

    def __init__(self, data: Path, out: Path, settings: Settings, caches: Path) -> None:
        self.settings, self._out, self._caches = settings, out, caches
        source, s = data / "cifar10", settings
        self.full = subset(source, out / "full", train=s.train, val=s.val, test=s.test)
        self.few = subset(source, out / "few", train=s.uncached, val=s.test, test=s.test)
        self.stage = subset(source, out / "stage", train=s.stage, val=max(1, s.stage // 10), test=s.test)
        self._runs = 0
        self._sweeps = 0

    def one_pass(self) -> float:
        """Return seconds of the phase `extract` of a run with an empty cache."""
        return self._train(self.full, "freeze=head", "epochs=1", "cache.mode=require").phases("extract")

    def sweep(self) -> float:
        """Return seconds of a whole sweep that starts with an empty cache; all its jobs must use the cache."""
        self._sweeps += 1
        words = self._words(self.full, "freeze=head", f"epochs={self.settings.epochs}", "cache.mode=require")
        jobs, seconds = tlcli_sweep(self._name("sweep"), *words, *self.settings.grid, cache=self._cache())
        if len(jobs) != self.settings.jobs or not all(job.facts["cache"]["used"] for job in jobs):
            raise RuntimeError("the sweep did not train every head on the cache")
        return seconds

    def further_job(self) -> Result:
        """Return a run on the cache that the last sweep filled."""
        words = ("freeze=head", f"epochs={self.settings.epochs}", "optimizer.lr=2e-3", "cache.mode=require")
        return self._train(self.full, *words, cache=self._cache())

    def uncached_jobs(self) -> float:
        """Estimate the seconds of the sweep's jobs without a cache from the second epoch of a smaller run."""
        words = ("freeze=head", "freeze.head_init=random", "epochs=2", "augment=none", "cache.mode=off")
        result = self._train(self.few, *words)
        train, val = result.epochs("train")[-1]["images_per_second"], result.epochs("val")[-1]["images_per_second"]
        epoch = count(self.full / "train") / train + count(self.full / "val") / val
        return self.settings.jobs * self.settings.epochs * epoch

    def last_stage(self, mode: str) -> float:
        """Return seconds of a whole process that trains the last stage."""
        words = ("freeze=last_stages", "freeze.n=1", "freeze.bn_stats=frozen", "augment=none", f"cache.mode={mode}")
        return self._train(self.stage, *words, f"epochs={self.settings.stage_epochs}").seconds

    def by_hand(self) -> float:
        """Return seconds of a whole process that fits a logistic regression on features stored by an earlier one."""
        file = self._out / "features.npz"
        arguments = {"model": self.settings.model, "root": str(self.full), "size": self.settings.size}
        if not file.exists():
            alone(baselines.features_by_hand, **arguments, file=str(file))
        return float(alone(baselines.features_by_hand, **arguments, file=str(file))["process_seconds"])

    def _train(self, root: Path, *words: str, cache: Path | None = None) -> Result:
        return tlcli_train(self._name("run"), *self._words(root, *words), cache=cache)

    def _words(self, root: Path, *words: str) -> tuple[str, ...]:
        data = ("dataset=imagefolder", f"dataset.root='{root}'", f"image.size={self.settings.size}")
        return (*BACKBONES[self.settings.model], *data, *words)

    def _name(self, kind: str) -> Path:
        self._runs += 1
        return self._out / f"{kind}_{self._runs}"

    def _cache(self) -> Path:
        return self._caches / str(self._sweeps)


def measures_of(seen: Rounds, settings: Settings) -> list[Measure]:
    """Return the bars of these rounds."""
    jobs, epochs = settings.jobs, settings.epochs
    share = [100 * ratio for ratio in ratios(seen[JOB_TRAIN], seen[PASS])]
    return [
        at_most(f"S1 sweep of {jobs} heads, {epochs} epochs each, over one pass", 1.5, ratios(seen[SWEEP], seen[PASS])),
        at_least(f"S1 {jobs} uncached jobs (estimated) over the sweep", 100, ratios(seen[UNCACHED], seen[SWEEP])),
        at_most(f"S2 a further job of {epochs} epochs, whole process", 8, seen[JOB], " s"),
        at_most("S2 its training part, of extraction", 2, share, " %"),
        at_least("S5 `freeze=last_stages freeze.n=1`, uncached over cached", 3, ratios(seen[LIVE], seen[CACHED])),
    ]


def main(data: Path, out: Path, *, small: bool = False) -> list[Measure]:
    """Measure everything in rounds, print the table of seconds, and return the bars."""
    settings = SMALL if small else Settings()
    with TemporaryDirectory(prefix="activations_") as caches:
        seen = rounds_of(Bench(data, out, settings, Path(caches)))
    publish("cached", ["what", "median", "range"], table(seen), out, seen)
    measures = measures_of(seen, settings)
    return publish_measures("cached_measures", measures, out)


def rounds_of(bench: Bench) -> Rounds:
    """Return seconds by round. A sweep is followed by the job that reads its cache."""
    jobs: list[Result] = []

    def sweep_then_job() -> float:
        seconds = bench.sweep()
        jobs.append(bench.further_job())
        return seconds

    timers = {
        PASS: bench.one_pass,
        SWEEP: sweep_then_job,
        UNCACHED: bench.uncached_jobs,
        BY_HAND: bench.by_hand,
        CACHED: lambda: bench.last_stage("require"),
        LIVE: lambda: bench.last_stage("off"),
    }
    seen = interleaved(timers, bench.settings.rounds)
    return {**seen, JOB: [job.seconds for job in jobs], JOB_TRAIN: [job.phases("train") for job in jobs]}


if __name__ == "__main__":
    given = parser(__doc__).parse_args()
    main(given.data, out_folder(given.out, "cached"), small=given.small)
