"""The benchmarks run: on small data here, at full size by hand."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import (
    accuracy,
    baselines,
    cached,
    extraction,
    limits,
    memory,
    photographs,
    prediction,
    run,
    scaling,
    source_target,
    training,
    tutorial_job,
)
from tests.conftest import Compose, make_folder

pytestmark = pytest.mark.slow


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Make a data folder for the benchmarks, with twelve images per class."""
    classes = dict.fromkeys(f"{source_target.SOURCE},{source_target.TARGET}".split(","), 12)
    for name, splits, counts in (
        ("cifar10", ("train", "test"), classes),
        ("hymenoptera", ("train", "val"), {"ants": 12, "bees": 12}),
    ):
        for split in splits:
            make_folder(tmp_path / name / split, counts)
    return tmp_path


@pytest.mark.parametrize("benchmark", [accuracy, source_target])
def test_tables_of_accuracy_have_a_row_per_run(
    benchmark, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], spec: Compose
) -> None:
    seen = []

    def stand_in(out: Path, *overrides: str) -> run.Result:
        seen.append(spec(*overrides))
        return run.Result(out, {"accuracy": len(seen) / 10, "accuracy_ci95": [0.0, 1.0], "n": 8}, 1.0)

    monkeypatch.setattr(benchmark, "tlcli_train", stand_in)
    benchmark.main(Path("data"))
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")][2:]
    assert [row.split(" | ")[1] for row in rows] == [
        f"{number / 10:.3f} (0.000 to 1.000)" for number in range(1, len(seen) + 1)
    ][-4:]


PARTS = {extraction: 2, training: 2, cached: 5, tutorial_job: 2, scaling: 1, memory: 1, prediction: 2, photographs: 2}


@pytest.mark.parametrize(("benchmark", "rows"), PARTS.items())
def test_part_of_the_suite_measures_its_bars(
    benchmark, rows: int, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if benchmark in (extraction, training):  # one network of two, and a sixth of the sweep: each run is a process
        monkeypatch.setattr(benchmark, "BACKBONES", {"resnet18": run.BACKBONES["resnet18"]})
    monkeypatch.setattr(cached, "SMALL", replace(cached.SMALL, grid=("optimizer.lr=1e-3,3e-3",)))
    measures = benchmark.main(data, tmp_path / "out", small=True)
    assert len(measures) == rows
    assert all(math.isfinite(value) for measure in measures for value in measure.seen)
    name = benchmark.__name__.split(".")[1]
    written = json.loads((tmp_path / "out" / f"{name}_measures.json").read_text())
    assert [row["measure"] for row in written["rows"]] == [measure.what for measure in measures]


def test_bare_loop_and_tutorial_see_the_same_images(tmp_path: Path) -> None:
    make_folder(tmp_path, {"a": 2, "b": 2})
    x, y = baselines.in_memory(str(tmp_path))
    batch = baselines.network_input(x, 32)  # their own size: no resizing
    data = baselines.tutorial_data(str(tmp_path), 32)
    assert torch.allclose(batch, torch.stack([image for image, _ in data]), atol=1e-5)
    assert y.tolist() == [label for _, label in data]


def test_limits_count_the_work_of_a_forward_pass() -> None:
    assert limits.forward_gflop(224) == pytest.approx(3.6, rel=0.02)  # He et al. 2016: 1.8 billion multiply-adds
    assert min(limits.matrix_gflops(64, repeats=1).values()) > 0
