"""`tlcli eval`: its words, what it prints, and its errors before anything is computed."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Tlcli
from tests.runs.test_compare import make_run
from tlcli.cli.completion import candidates
from tlcli.evaluate import Evaluation


@pytest.fixture
def run(tmp_path: Path, tlcli: Tlcli) -> Path:
    path = make_run(tmp_path / "run", [0, 1], [0, 1])
    path.joinpath("config.yaml").write_text("seed: 3\n")
    return path


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Record evaluation requests instead of evaluating."""
    seen: list[Any] = []
    classes = ["ants", "bees", "\x1b[31mred"]
    own = {"precision": 0.5, "recall": 0.25, "f1": 0.3333, "support": 4}
    report = {
        "accuracy": 0.5, "accuracy_ci95": [0.3, 0.7], "top5": None, "loss": 0.25, "macro_f1": 0.4, "n": 8,
        "per_class": {"ants": own, "bees": own, classes[2]: {**own, "support": 0}},
        "confusion": [[1, 3, 0], [3, 1, 0], [0, 0, 0]], "classes": classes,
        "calibration": {"temperature": 1.5, "ece_before": 0.2, "ece_after": 0.1, "bins": 15},
        "checkpoint": "checkpoints/best.safetensors", "epoch": 2,
        "dataset": {"name": "imagefolder", "root": "/photos", "own": True}, "split": "test", "n_bad_files": 0,
        "tta": "none",
    }  # fmt: skip

    def evaluate_run(*asked: Any) -> Any:
        seen.append(asked)
        return Evaluation(report, asked[0] / "eval-1", "the run's own test split", True)

    monkeypatch.setattr("tlcli.evaluate.evaluate_run", evaluate_run)
    return seen


def test_the_figures_are_shown(tlcli: Tlcli, run: Path, asked: list[Any]) -> None:
    done = tlcli("eval", "split=val", str(run), "dataset=digits", "checkpoint=last")
    assert done.code == 0, done.err
    path, checkpoint, split, spec, trained, _ = asked[0]
    assert (path, checkpoint, split) == (run, "last", "val")
    assert spec.dataset.name == "digits"
    assert (spec.seed, trained.seed) == (3, 3)
    for words in (
        "8 images: the run's own test split",
        "0.5000, 95 % interval 0.3000 to 0.7000",
        "0.1000 with the run's temperature 1.5 (0.2000 without)",
        "has the same metrics",
        "run/eval-1",
        "ants",
    ):
        assert words in done.out
    assert "red" not in done.out  # neither an image of it nor taken for anything


def test_json_is_the_report_and_nothing_else(tlcli: Tlcli, run: Path, asked: list[Any]) -> None:
    done = tlcli("eval", "--format=json", str(run))
    found = json.loads(done.out)
    assert (found["accuracy"], found["folder"]) == (0.5, str(run / "eval-1"))


def test_errors_come_without_torch(tlcli: Tlcli, run: Path) -> None:
    done = tlcli("eval", str(run), "dataset.rot=x")
    assert (done.code, "Did you mean 'dataset.root'?" in done.err) == (2, True)
    done = tlcli("eval", str(run), "dataset=imagefolder", "dataset.root=nowhere")
    assert (done.code, "nowhere: no such folder" in done.err) == (2, True)
    done = tlcli("eval", str(run), "device.processes=2")
    assert (done.code, "only `tlcli train` runs in several processes" in done.err) == (2, True)


def test_help_and_completion(tlcli: Tlcli, tmp_path: Path) -> None:
    done = tlcli("eval", "--help")
    assert (done.code, done.out.count("  tlcli eval ")) == (0, 2)
    make_run(tmp_path / "outputs/2026-01-02/10-00-00", [0, 1], [0, 1])
    make_run(tmp_path / "outputs/2026-01-03/10-00-00", [0, 1], [0, 1])
    assert candidates("tlcli eval o") == ["outputs/2026-01-03/10-00-00 ", "outputs/2026-01-02/10-00-00 "]
    assert candidates("tlcli eval x sp") == ["split=test ", "split=val ", "split=train "]
    assert "dataset=imagefolder " in candidates("tlcli eval x dataset=")
    assert candidates("tlcli eval x ep") == [], "a key of train that eval does not take"


def test_images_of_a_run_without_flips_are_not_mirrored(run: Path, tlcli: Tlcli, asked: list[Any]) -> None:
    (run / "config.yaml").write_text("dataset: {kind: imagefolder, name: imagefolder, root: signs, flip: 0}\n")
    ended = tlcli("eval", str(run), "dataset=imagefolder", "dataset.root=new", "tta=flip")
    assert ended.code == 2 and f"tta=flip: {run} was trained with dataset.flip=0" in ended.err
    assert asked == []


def test_a_run_of_several_processes_is_evaluated_in_one(run: Path, tlcli: Tlcli, asked: list[Any]) -> None:
    (run / "config.yaml").write_text("seed: 3\ndevice: {kind: auto, processes: 2}\n")
    assert tlcli("eval", str(run), "cache.mode=off").code == 0
