"""`predict` says of a file what the run's own test said of it, in order, however the images come."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.conftest import finish
from tlcli.data.listing import MissingPath
from tlcli.device import cpu_has_bfloat16
from tlcli.predict import Prediction, Predictor, choose_format
from tlcli.runs.load import LoadedRun, load_run
from tlcli.runs.run_dir import RunDir, read_predictions
from tlcli.specs import Precision
from tlcli.store import Store, cache_dir

CPU = torch.device("cpu")
RUNS = {
    "head": ("freeze=head",),
    "stage": ("freeze=last_stages", "freeze.n=1", "augment=none", "cache.mode=require"),
    "none": ("freeze=none",),
}


@pytest.fixture(scope="module")
def trained(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., LoadedRun]:
    """trained("head", "fp32"): a finished run in this number format, the same one for all tests."""

    @cache
    def made(freeze: str, precision: str) -> Path:
        words = ["dataset=imagefolder", f"dataset.root='{shapes}'", "image.size=32", "epochs=1"]
        words += ["backbone=resnet18", "backbone.weights=none", f"device.precision={precision}", "device=cpu"]
        return finish(tmp_path_factory.mktemp("runs") / "run", *words, *RUNS[freeze])

    return lambda freeze, precision: load_run(made(freeze, precision))


def predictor(run: LoadedRun, **options: object) -> Predictor:
    return Predictor(run, CPU, Store(cache_dir()), **options)  # type: ignore[arg-type]


def probabilities(answers: list[Prediction], classes: tuple[str, ...]) -> Tensor:
    return torch.tensor([[dict(answer.top)[name] for name in classes] for answer in answers], dtype=torch.float64)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
@pytest.mark.parametrize(
    "precision, freeze",
    [
        ("fp32", "head"),
        pytest.param("bf16", "stage", marks=pytest.mark.slow),
        pytest.param("bf16", "none", marks=pytest.mark.slow),
        pytest.param("fp32", "stage", marks=pytest.mark.slow),
        pytest.param("fp32", "none", marks=pytest.mark.slow),
        pytest.param("bf16", "head", marks=pytest.mark.slow),
    ],
)
def test_it_is_the_runs_own_test(
    trained: Callable[..., LoadedRun], precision: str, freeze: str, batch_size: int
) -> None:
    if precision == "bf16" and not cpu_has_bfloat16():
        pytest.skip("no bfloat16 here")
    run = trained(freeze, precision)
    run = replace(run, temperature=1.7)
    tested = read_predictions(RunDir(run.path).test_predictions)
    n = 6 if batch_size == 1 else len(tested.names)
    wanted = torch.softmax(tested.logits[:n].double() / 1.7, dim=1)
    answers = list(predictor(run, batch_size=batch_size).predict(tested.names[:n]))
    found = probabilities(answers, run.classes)
    assert [answer.path for answer in answers] == list(tested.names[:n])
    assert [answer.top[0][0] for answer in answers] == [run.classes[i] for i in wanted.argmax(dim=1)]
    assert (found - wanted).abs().max() < 1e-5


@pytest.mark.slow
def test_float32_is_at_hand_for_a_run_in_another_format(trained: Callable[..., LoadedRun]) -> None:
    run = trained("none", "bf16")
    names = read_predictions(RunDir(run.path).test_predictions).names
    answers = list(predictor(run, precision=Precision.fp32).predict(names))
    again = load_run(run.path)
    for answer in answers:
        assert dict(answer.top) == pytest.approx(dict(again.predict(answer.path)), abs=1e-5)


def test_what_is_bad_is_answered_in_its_place(trained: Callable[..., LoadedRun], shapes: Path, tmp_path: Path) -> None:
    good = str(shapes / "test/checks/000.png")
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"not one")
    missing = ["missing.png", MissingPath("x*", "no file matches"), "a\0b"]
    answers = list(predictor(trained("head", "fp32"), batch_size=2).predict([str(bad), good, *missing, good]))
    assert [answer.path for answer in answers] == [str(bad), good, "missing.png", "x*", "a\0b", good]
    assert [a.error for a in answers[:4]] == ["not an image", None, "no such file or directory", "no file matches"]
    assert answers[4].error
    assert dict(answers[1].top) == pytest.approx(dict(answers[5].top))
    values = [value for _, value in answers[1].top]
    assert len(values) == 3 and values == sorted(values, reverse=True)


def test_a_stream_is_read_only_a_little_ahead(trained: Callable[..., LoadedRun], shapes: Path) -> None:
    taken = 0

    def endless() -> Iterator[str]:
        nonlocal taken
        while True:
            taken += 1
            yield str(shapes / "test/down/000.png")

    answers = predictor(trained("head", "fp32"), batch_size=4).predict(endless())
    for _ in range(40):
        next(answers)
    assert 40 <= taken <= 40 + 4 * 4
    answers.close()  # type: ignore[attr-defined]


def test_a_format_that_the_machine_lacks_is_float32(
    trained: Callable[..., LoadedRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained("head", "fp32")
    run = replace(run, info={**run.info, "decisions": {**run.info["decisions"], "eval_precision": "bfloat16"}})
    monkeypatch.setattr("tlcli.predict.cpu_has_bfloat16", lambda: False)
    assert choose_format(run, CPU, Precision.auto).dtype == torch.float32
    assert choose_format(run, CPU, Precision.bf16).dtype == torch.bfloat16
