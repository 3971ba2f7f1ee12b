"""The command line in this process, in an empty folder, with a stand-in for training."""

import logging
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tlcli.cli import main
from tlcli.reporter import Reporter
from tlcli.runs.run_dir import RunDir, write_json
from tlcli.specs import TrainSpec

Train = Callable[[TrainSpec, RunDir, Reporter], float | None]


@dataclass(frozen=True)
class Ended:
    """Exit code and output of a command line."""

    code: int
    out: str
    err: str


Tlcli = Callable[..., Ended]


@pytest.fixture
def root_logger() -> Iterator[None]:
    """Undo the logging setup of some of Hydra's flags."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
def tlcli(monkeypatch, tmp_path, capsys, root_logger: None) -> Callable[..., Ended]:
    """Run one command line in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*argv: str) -> Ended:
        capsys.readouterr()
        code = main(argv)
        return Ended(code, *capsys.readouterr())

    return run


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> Callable[[Train], None]:
    """Put a function in the place of tlcli.train.train."""

    def put(train: Train) -> None:
        module: Any = types.ModuleType("tlcli.train")
        module.train = lambda spec, run, reporter, *others, **options: train(spec, run, reporter)
        monkeypatch.setitem(sys.modules, "tlcli.train", module)

    return put


def finished(spec: TrainSpec, run: RunDir, reporter: Reporter) -> float:
    """Replace training by a stand-in whose validation accuracy falls with the seed."""
    accuracy = 0.9 - spec.seed / 100
    best = {"epoch": 1, "accuracy": accuracy, "macro_f1": accuracy, "loss": 1 - accuracy}
    run.update(best=best, keep_best=spec.keep_best.value, seconds={"train": 1.0, "test": 0.5})
    write_json(run.test_file, {"accuracy": accuracy - 0.01, "accuracy_ci95": [accuracy - 0.05, accuracy + 0.05]})
    return accuracy


def runs_in(folder: Path) -> list[RunDir]:
    """Return the runs under a folder."""
    return [RunDir(path.parent) for path in sorted(folder.rglob("run.json"))]
