"""The size and the fit of images: as given, or the cheapest of those that a probe cannot tell from the best. A ranking
scores each backbone by a probe, and chooses the fastest of those that the images cannot tell apart."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from msgspec import structs
from PIL import Image

from tests.conftest import Compose
from tlcli.device import allowed_formats
from tlcli.engine import costs, ranking
from tlcli.engine.activations import Workload
from tlcli.engine.ranking import Score, choose, choose_image, image_sizes
from tlcli.engine.session import Session
from tlcli.errors import UsageError
from tlcli.reporter import Reporter
from tlcli.specs import Accelerator, DeviceSpec, Precision
from tlcli.store import Store
from tlcli.train import NewRun, load_inputs
from tlcli.transfer.probe import CrossValidation, choose_penalty

DEVICE = DeviceSpec(Accelerator.cpu, 1, Precision.fp32, True, False, 0, None, False)


@pytest.fixture
def workload(spec: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """workload("image.size=128", side=(40, 60)): of a folder of 24 images of this height and width."""

    def make(*words: str, side: tuple[int, int] = (40, 40)) -> Workload:
        random, root = np.random.default_rng(0), tmp_path / f"images-{side[0]}-{side[1]}"
        for split, n in (("train", 12), ("test", 2)):
            for name in "ab":
                folder = root / split / name
                folder.mkdir(parents=True, exist_ok=True)
                for i in range(n):
                    pixels = random.integers(0, 255, (*side, 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(folder / f"{i}.png")
        own = spec("dataset=imagefolder", f"dataset.root={root}", "cache.mode=off", *words)
        monkeypatch.setattr(NewRun, "complete_spec", lambda self, workload, reporter: (own, None))
        return load_inputs(own, Session(Store(tmp_path / "cache"), 10**9), Reporter(), NewRun()).workload

    return make


def cross_validation(n_right: int, n: int = 100) -> CrossValidation:
    """Return that of a probe with a loss of 0.2 for images that it gets right, and 1 for others."""
    correct = np.arange(n) < n_right
    return CrossValidation(0.1, 5, correct, np.where(correct, 0.2, 1.0))


@pytest.fixture
def probed(monkeypatch: pytest.MonkeyPatch):
    """probed({(128, "crop"): 50, ...}): probes get so many of 100 images right. Return the list of those compared."""

    def use(right: dict[tuple[int, str], int]) -> list[tuple[int, str]]:
        seen: list[tuple[int, str]] = []

        def result(workload: Workload, image, reporter: Reporter) -> CrossValidation:
            seen.append((image.size, str(image.fit)))
            return cross_validation(right[seen[-1]])

        monkeypatch.setattr(ranking, "cross_validate_probe", result)
        return seen

    return use


@pytest.mark.parametrize(
    ("own", "sizes"), [(224, (160, 192)), (240, (192, 224)), (260, (192, 224)), (384, (288, 320)), (64, (64, 64))]
)
def test_training_is_at_five_sevenths_of_the_size_and_evaluation_between(own: int, sizes, workload) -> None:
    given = workload()
    given = replace(given, classifier=replace(given.classifier, size=own))
    assert image_sizes(given) == sizes
    image, reason = choose_image(given, Reporter())
    assert (image.train_size or image.size, image.size, image.fit, reason) == (*sizes, "crop", None)


@pytest.mark.parametrize(
    ("words", "sizes"),
    [
        (("image.size=96",), (96, 96)),
        (("image.size=96", "image.train_size=64"), (64, 96)),
        (("image.train_size=192",), (192, 192)),
        (("image.train_size=256",), (256, 224)),
        (("dataset.image_size=64",), (64, 64)),
        (("backbone.weights=none",), (224, 224)),
    ],
)
def test_sizes_that_are_given_and_those_of_a_dataset_or_of_own_weights_are_used(words, sizes, workload) -> None:
    image, _ = choose_image(workload(*words), Reporter())
    assert (image.train_size or image.size, image.size) == sizes == image_sizes(workload(*words))


@pytest.mark.parametrize(("own", "train_size", "size"), [(240, 200, 224), (240, 230, 230), (250, 232, 250)])
def test_evaluation_is_between_the_size_of_training_and_that_of_the_weights(own, train_size, size, workload) -> None:
    given = workload(f"image.train_size={train_size}")
    given = replace(given, classifier=replace(given.classifier, size=own))
    assert image_sizes(given) == (train_size, size)


@pytest.mark.parametrize(("right", "fit"), [((50, 50, 50), "crop"), ((50, 53, 50), "crop"), ((50, 60, 62), "squash")])
def test_another_fit_must_lower_the_loss_by_two_standard_errors(right, fit: str, workload, probed) -> None:
    fits = ("crop", "squash", "pad")
    seen = probed({(192, f): n for f, n in zip(fits, right, strict=True)})
    image, reason = choose_image(workload(side=(40, 60)), Reporter())
    assert (image.size, image.train_size, image.fit) == (192, 160, fit)
    assert seen == [(192, f) for f in fits]
    losses = [f"{f} {1 - 0.008 * n:.3f}" for f, n in zip(fits, right, strict=True)]
    assert f"at 192 px: {', '.join(losses)};" in str(reason)


@pytest.mark.parametrize(
    ("words", "size", "fit"),
    [
        (("image.size=96", "image.fit=pad"), 96, "pad"),
        (("dataset.image_size=64",), 64, "crop"),
        (("backbone.weights=none",), 224, "crop"),
    ],
)
def test_nothing_is_compared_if_nothing_is_open_or_a_probe_says_nothing(words, size, fit, workload, probed) -> None:
    seen = probed({})
    image, reason = choose_image(workload(*words), Reporter())
    assert (image.size, image.fit, reason, seen) == (size, fit, None, [])


@pytest.mark.slow
def test_a_network_with_a_table_of_positions_keeps_its_size(workload) -> None:
    own = workload("backbone=timm", "backbone.name=vit_tiny_patch16_224", "backbone.weights=none")
    assert [ranking.takes_size(own, size) for size in (160, 224)] == [False, False]
    assert ranking.takes_size(workload(), 160)


def test_a_session_chooses_once(workload, probed) -> None:
    seen = probed({(192, fit): 50 for fit in ("crop", "squash", "pad")})
    own = workload(side=(40, 60))
    assert choose_image(own, Reporter()) == choose_image(own, Reporter())
    assert len(seen) == 3


# -- backbones


def scored(n_right: int, seconds: float, n: int = 100) -> Score:
    return Score("name", 224, 160, cross_validation(n_right, n), 1000, 50.0, seconds)


def test_the_error_is_that_of_a_share() -> None:
    assert scored(80, 1).standard_error == pytest.approx(0.04)


def test_the_sample_has_the_images_of_a_class_even_if_another_one_has_few(workload, monkeypatch) -> None:
    def probe(workload: Workload, image, reporter: Reporter, max_images: int) -> CrossValidation | None:
        labels = torch.from_numpy(workload.data.train.labels)
        return choose_penalty(torch.randn(len(labels), 4), labels, 0, max_images)

    own = workload("image.size=32")
    many, few = (np.flatnonzero(own.data.train.labels == i) for i in range(2))
    monkeypatch.setattr(ranking, "cross_validate_probe", probe)
    monkeypatch.setattr(ranking, "expected_seconds", lambda *args: (10.0, 50.0, DEVICE))

    def score(n_few: int) -> Score:
        train = own.data.train.take(np.concatenate([many, few[:n_few]]))
        monkeypatch.setattr(ranking, "new_workload", lambda *args: replace(own, data=replace(own.data, train=train)))
        return next(ranking.score("name", own.spec, [], (50, 2000), own.session, Reporter()))

    assert len(score(5).probe.correct) == len(many) + 5
    with pytest.raises(UsageError, match="needs 5 training images in each of two classes"):
        score(4)


@pytest.mark.parametrize(("own", "sizes"), [(224, [(160, 192), (224, 224)]), (128, [(96, 128)])])
def test_the_size_of_the_weights_is_scored_unless_it_is_that_of_a_run(own: int, sizes, workload, monkeypatch) -> None:
    given = workload()
    given = replace(given, classifier=replace(given.classifier, size=own))
    monkeypatch.setattr(ranking, "new_workload", lambda *args: given)
    monkeypatch.setattr(ranking, "expected_seconds", lambda *args: (10.0, 50.0, DEVICE))
    monkeypatch.setattr(ranking, "cross_validate_probe", lambda *args: cross_validation(50))
    scores = ranking.score("name", given.spec, [], (50, 2000), given.session, Reporter())
    assert [(score.train_size, score.size) for score in scores] == sizes


def test_a_size_at_which_a_run_takes_too_long_ends_the_scores_of_a_backbone(workload, monkeypatch) -> None:
    given, measured = workload(), []
    monkeypatch.setattr(ranking, "new_workload", lambda *args: given)
    monkeypatch.setattr(
        ranking, "expected_seconds", lambda given, size, *args: measured.append(size) or (10.0, 50.0, DEVICE)
    )
    assert list(ranking.score("name", given.spec, [], (50, 2000), given.session, Reporter(), 9.0)) == []
    assert measured == [192], "224 px, the size of the weights, take longer"


@pytest.mark.parametrize("sizes", [[], [32, 64]])
def test_formats_are_compared_at_the_first_size_of_a_backbone(sizes: list[int], workload, monkeypatch) -> None:
    given, devices = workload(), []
    monkeypatch.setattr(ranking, "new_workload", lambda spec, *rest: replace(given, spec=spec))
    monkeypatch.setattr(
        ranking, "expected_seconds", lambda given, *rest: devices.append(given.spec.device) or (10.0, 50.0, DEVICE)
    )
    monkeypatch.setattr(ranking, "cross_validate_probe", lambda *args: cross_validation(50))
    assert len(list(ranking.score("name", given.spec, sizes, (50, 2000), given.session, Reporter()))) == 2
    assert devices == [given.spec.device, DEVICE]


def test_the_device_of_an_expected_time_allows_the_fastest_format_alone(workload) -> None:
    given = workload("image.size=32")
    _, _, device = ranking.expected_seconds(given, 32, 32)
    assert len(allowed_formats(device, torch.device("cpu"))) == 1


def test_training_on_images_is_not_measured_if_a_run_would_read_activations(workload, monkeypatch) -> None:
    given = workload("image.size=32", "cache.mode=auto", "freeze=head")
    monkeypatch.setattr(costs, "measure_network", None)
    seconds, images_per_second, device = ranking.expected_seconds(given, 32, 32)
    assert seconds > 0
    assert images_per_second is not None
    assert images_per_second > 0
    assert len(allowed_formats(device, torch.device("cpu"))) == 1


def test_the_expected_time_of_a_run_with_folds_is_that_of_all_fits(workload) -> None:
    given = workload("image.size=32")
    seconds = [
        ranking.expected_seconds(replace(given, spec=structs.replace(given.spec, folds=folds, fold=fold)), 32, 32)[0]
        for folds, fold in ((None, None), (4, None), (4, 0))
    ]
    assert seconds[1:] == pytest.approx([5 * seconds[0], seconds[0]], rel=0.5)  # steps are timed each time


def test_scores_tie_if_the_images_that_differ_are_within_a_standard_error() -> None:
    best, mixed = scored(90, 100).probe, scored(90, 10).probe
    assert not best.beats(scored(89, 10).probe)
    assert best.beats(scored(88, 10).probe), "two images, of which none the other way"
    mixed.correct[:4] = False  # four worse, against 2 better
    mixed.correct[90:92] = True
    assert not best.beats(mixed)
    assert not scored(50, 1).probe.beats(best), "a better one ties with any"


def test_the_fastest_of_those_that_tie_is_chosen() -> None:
    slow, fast, worse = scored(90, 100), scored(89, 10), scored(80, 1)
    assert choose([slow, fast, worse]) is fast
    assert choose([slow, worse]) is slow
