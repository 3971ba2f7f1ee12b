"""How well backbones suit a set of images, before anything is trained: a linear probe on the features of a sample."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import inf, sqrt

from msgspec import structs

from tlcli.data.dataset import limit_per_class
from tlcli.device import setup_process
from tlcli.engine.activations import Workload, image_size, load_workload
from tlcli.engine.image_choice import candidate_sizes, cross_validate_probe
from tlcli.engine.numerics import measure_extraction, measure_network, measure_suffix
from tlcli.engine.session import Session
from tlcli.errors import UsageError
from tlcli.models.classifier import count
from tlcli.reporter import Reporter
from tlcli.specs import Fit, TrainSpec
from tlcli.transfer.contract import linear_head
from tlcli.transfer.cut import Cut
from tlcli.transfer.probe import CrossValidation


@dataclass(frozen=True, eq=False)
class Score:
    """A backbone at one image size. `seconds` are those of a run, estimated from the speed of a few steps."""

    backbone: str  # as on the command line
    size: int
    train_size: int
    probe: CrossValidation
    parameters: int
    images_per_second: float | None  # of evaluation
    seconds: float | None

    @property
    def standard_error(self) -> float:
        return sqrt(self.probe.accuracy * (1 - self.probe.accuracy) / len(self.probe.correct))

    def ties_with(self, other: "Score") -> bool:
        """Return True unless the images that only `other` classifies right are more by over one standard error."""
        own, theirs = self.probe.correct, other.probe.correct
        worse, better = (theirs & ~own).sum(), (own & ~theirs).sum()
        return bool(worse - better <= sqrt(worse + better))


def new_workload(spec: TrainSpec, session: Session, reporter: Reporter) -> Workload:
    """Return the data and the network of a run that has not started."""
    accelerator = setup_process(spec.device)
    data = session.dataset(spec.dataset, spec.seed, reporter)
    return replace(load_workload(spec, data, accelerator, session), needs_probe=True)


def expected_seconds(workload: Workload, size: int, train_size: int) -> tuple[float | None, float | None]:
    """Return the seconds of a run at these image sizes, and images per second of evaluation, from a few steps."""
    spec, data = workload.spec, workload.data
    image = structs.replace(spec.image, size=size, fit=spec.image.fit or Fit.crop, train_size=train_size)
    run = replace(workload, spec=structs.replace(spec, image=image))
    train, evaluation = (form.images_per_second for form in measure_network(run))
    fits = [run] if run.first_fit is None else [run, run.first_fit]
    is_head = spec.freeze.kind == "head" and not run.augments  # the features are stored, and a step takes no time
    n_trained = 0 if is_head else sum(fit.epochs * len(fit.data.train) for fit in fits)
    n_evaluated = len(data.train) + (1 if is_head else run.epochs) * len(data.val) + len(data.test)  # of the probe, too
    seconds, cut = 0.0, run.for_training.cut
    if run.augments and run.views and isinstance(cut, Cut):
        extraction = measure_extraction(run.for_training, cut)
        seconds = run.views * len(data.train) / (extraction.images_per_second or inf)
        train = measure_suffix(run.for_training, cut, extraction).images_per_second
    return (seconds + n_trained / train + n_evaluated / evaluation if train and evaluation else None), evaluation


def score(
    backbone: str,
    spec: TrainSpec,
    sizes: Sequence[int],
    limits: tuple[int, int],
    session: Session,
    reporter: Reporter,
    max_seconds: float | None = None,
) -> Iterator[Score]:
    """Yield the scores of a backbone at these image sizes; without any, at those of `candidate_sizes`.

    The probe is cross-validated on a sample of the training images, of which `limits` are the most per class and in
    all. A size at which a run would take more than `max_seconds` is left out. Raise UsageError if images are too few.
    """
    workload = new_workload(spec, session, reporter)
    data, classifier = workload.data, workload.classifier
    if linear_head(classifier) is None:
        raise UsageError(f"backbone={backbone}: its head is not one linear layer, so that no probe can rank it")
    per_class = min(limits[0], max(2, limits[1] // len(data.classes)))
    sample = replace(data, train=limit_per_class(data.train, data.classes, per_class, spec.seed, "rank"))
    own = list(sizes) or ([size] if (size := image_size(spec)) else candidate_sizes(workload))
    for size in own:
        train_size = spec.image.train_size or (size if sizes else own[0])
        seconds, evaluation = expected_seconds(workload, size, train_size)
        if max_seconds is not None and (seconds or 0) > max_seconds:
            continue
        image = structs.replace(spec.image, size=size, fit=spec.image.fit or Fit.crop, train_size=train_size)
        probe = cross_validate_probe(replace(workload, data=sample), image, reporter, len(sample.train))
        if probe is None:
            raise UsageError("rank: fewer than two classes have two training images each; there is nothing to compare")
        n_parameters = count(classifier.network.parameters())
        yield Score(backbone, size, train_size, probe, n_parameters, evaluation, seconds)


def choose(scores: Sequence[Score]) -> Score:
    """Return the fastest to train of those that tie with the most accurate one."""
    best = max(scores, key=lambda s: s.probe.accuracy)
    return min((s for s in scores if s.ties_with(best)), key=lambda s: (s.seconds or 0.0, -s.probe.accuracy))
