"""The benchmarks run: on small data here, at full size by hand."""

import json
from pathlib import Path

import pytest

from benchmarks import accuracy, run, source_target, startup
from tests.conftest import make_folder

pytestmark = pytest.mark.slow
SMALL = ("image.size=32", "epochs=1", "dataset.train_per_class=8", "dataset.test_per_class=4")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data folder as the benchmarks expect it, with twelve images a class."""
    classes = dict.fromkeys(f"{source_target.SOURCE},{source_target.TARGET}".split(","), 12)
    for name, splits, counts in (
        ("cifar10", ("train", "test"), classes),
        ("hymenoptera", ("train", "val"), {"ants": 12, "bees": 12}),
    ):
        for split in splits:
            make_folder(tmp_path / name / split, counts)
    return tmp_path


@pytest.mark.parametrize("benchmark", [accuracy, source_target])
def test_benchmark_prints_its_table(
    benchmark, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def small(out: Path, *overrides: str) -> run.Result:
        kept = [word for word in overrides if word.split("=")[0] not in {s.split("=")[0] for s in SMALL}]
        return run.tlcli_train(out, *kept, *SMALL)

    monkeypatch.setattr(benchmark, "tlcli_train", small)
    benchmark.main(data)
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(table) == 6  # header, rule, four rows


def test_startup_prints_its_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(startup, "ROUNDS", 1)
    startup.main()
    assert "`tlcli --help`" in capsys.readouterr().out


def test_what_is_published_can_be_read_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run.publish("t", ["a", "b"], [["1", "2"]], tmp_path)
    assert json.loads((tmp_path / "t.json").read_text())["rows"] == [{"a": "1", "b": "2"}]
    assert "| 1 | 2 |" in capsys.readouterr().out
