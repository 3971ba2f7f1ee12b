"""`predict` says of a file what the run's own test said of it, in order, however the images come."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.conftest import finish
from tlcli.errors import UsageError
from tlcli.predict import Prediction, Predictor, choose_format
from tlcli.runs.load import LoadedRun, load_run
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


def test_a_format_that_the_machine_lacks_is_float32_or_an_error(
    trained: Callable[..., LoadedRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained("none", "bf16")
    monkeypatch.setattr("tlcli.predict.cpu_has_bfloat16", lambda: False)
    assert choose_format(run, CPU, Precision.auto).dtype == torch.float32
    assert choose_format(run, CPU, Precision.bf16).dtype == torch.bfloat16
    with pytest.raises(UsageError, match="fp16 needs a GPU"):
        choose_format(run, CPU, Precision.fp16)
