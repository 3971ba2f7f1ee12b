"""`predict` says of a file what the run's own test said of it, in order, however the images come."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.conftest import slow
from tlcli.device import cpu_has_bfloat16
from tlcli.predict import Predictor, _pipeline, _UncutNetwork, choose_format
from tlcli.runs.load import LoadedRun, load_run
from tlcli.runs.run_dir import RunDir, read_predictions
from tlcli.specs import Precision, Tta
from tlcli.store import Store, cache_dir

CPU = torch.device("cpu")


@pytest.fixture
def run(trained: Callable[..., Path]) -> LoadedRun:
    return load_run(trained("head", "fp32"))


def predictor(run: LoadedRun, **options: object) -> Predictor:
    return Predictor(run, CPU, Store(cache_dir()), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "precision, freeze, batch_size",
    [
        *(("fp32", "head", size) for size in (1, 64)),
        *(
            pytest.param(precision, freeze, size, marks=pytest.mark.slow)
            for precision, freeze in (("bf16", "stage"), ("bf16", "none"), ("fp32", "stage"), ("bf16", "head"))
            for size in (1, 7, 64)
        ),
    ],
)
def test_it_is_the_runs_own_test(trained: Callable[..., Path], precision: str, freeze: str, batch_size: int) -> None:
    if precision == "bf16" and not cpu_has_bfloat16():
        pytest.skip("this CPU has no bfloat16")
    run = replace(load_run(trained(freeze, precision)), temperature=1.7)
    tested = read_predictions(RunDir(run.path).test_predictions)
    n = 6 if batch_size == 1 else len(tested.names)
    expected = torch.softmax(tested.logits[:n].double() / 1.7, dim=1)
    predictions = list(predictor(run, batch_size=batch_size).predict(tested.names[:n]))
    assert [prediction.path for prediction in predictions] == tested.names[:n]
    assert [prediction.top[0][0] for prediction in predictions] == [run.classes[i] for i in expected.argmax(dim=1)]
    for prediction, row in zip(predictions, expected.tolist(), strict=True):
        assert dict(prediction.top) == pytest.approx(dict(zip(run.classes, row, strict=True)), abs=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(not cpu_has_bfloat16(), reason="this CPU has no bfloat16")
def test_mirror_images_were_tested_by_the_uncut_network(trained: Callable[..., Path]) -> None:
    run = load_run(trained("stage", "bf16"))
    for tta in Tta:
        own = replace(run, info={**run.info, "tta": tta.value})
        prefix = _pipeline(own, Precision.auto, torch.bfloat16)[0]
        assert isinstance(prefix, _UncutNetwork) == (tta is Tta.flip)


@pytest.mark.slow
def test_float32_is_available_for_a_run_in_another_format(trained: Callable[..., Path]) -> None:
    run = load_run(trained("none", "bf16"))
    names = read_predictions(RunDir(run.path).test_predictions).names
    predictions, again = list(predictor(run, precision=Precision.fp32).predict(names)), load_run(run.path)
    for prediction in predictions:
        assert dict(prediction.top) == pytest.approx(dict(again.predict(prediction.path)), abs=1e-5)


def test_a_stream_is_read_only_a_little_ahead(run: LoadedRun, shapes: Path) -> None:
    taken = 0

    def endless() -> Iterator[str]:
        nonlocal taken
        while True:
            taken += 1
            yield str(shapes / "test/down/000.png")

    answers = predictor(run, batch_size=4).predict(endless())
    for _ in range(40):
        next(answers)
    assert 40 <= taken <= 40 + 4 * 4
    answers.close()  # type: ignore[attr-defined]


def test_a_format_that_the_machine_lacks_is_float32(run: LoadedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run = replace(run, info={**run.info, "decisions": {**run.info["decisions"], "eval_precision": "bfloat16"}})
    monkeypatch.setattr("tlcli.predict.cpu_has_bfloat16", lambda: False)
    assert choose_format(run, CPU, Precision.auto).dtype == torch.float32
    assert choose_format(run, CPU, Precision.bf16).dtype == torch.bfloat16


@pytest.mark.parametrize("how", ["head fp32", *slow("none fp32", "stage bf16", "none bf16")])
def test_images_held_out_have_the_unknown_score_of_the_run(trained: Callable[..., Path], how: str) -> None:
    """Each way to divide the network finds the features; if it is divided at the head, they are those of the head."""
    strategy, precision = how.split()
    if precision == "bf16" and not cpu_has_bfloat16():
        pytest.skip("this CPU has no bfloat16")
    run = trained(strategy, precision)
    stored = read_predictions(RunDir(run).val_predictions)
    loaded = load_run(run)
    assert loaded.unknown is not None and stored.unknown is not None
    assert loaded.unknown.layer == ("classifier" if strategy == "head" else "conv_head")
    predictions = predictor(loaded, batch_size=7).predict(stored.names)
    found = torch.tensor([p.unknown_score for p in predictions], dtype=torch.float64)
    torch.testing.assert_close(found, stored.unknown, rtol=0, atol=1e-3 if precision == "fp32" else 0.5)
