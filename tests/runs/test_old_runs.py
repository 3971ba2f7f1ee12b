"""A run of 0.1.0 is readable by every command and as initial weights: run_of_0_1/ is what that release wrote."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torchvision.models import resnet18

from tests.cli.conftest import Tlcli, root_logger, tlcli  # noqa: F401 - fixtures
from tlcli.runs.run_dir import open_run


@pytest.fixture
def old(tmp_path: Path) -> str:
    """Copy the text files of the run, with weights as that release stored them: without a checksum."""
    folder = Path(shutil.copytree(Path(__file__).with_name("run_of_0_1"), tmp_path / "old"))
    info = json.loads((folder / "run.json").read_text())
    names = ("tlcli", "backbone", "backbone_kind", "classes", "preprocessing")
    metadata = {**{name: info[name] for name in names}, "epoch": 1}
    torch.manual_seed(0)
    (folder / "checkpoints").mkdir()
    weights = resnet18(num_classes=10).state_dict()
    save_file(weights, folder / "checkpoints/best.safetensors", metadata={"tlcli": json.dumps(metadata)})
    Image.new("L", (8, 8), 90).save(tmp_path / "image.png")
    return "old"


def test_the_reader_gives_all_of_its_files(old: str, tmp_path: Path) -> None:
    run = open_run(tmp_path / old)
    assert (run.info["tlcli"], run.test()["n"], run.config()["freeze"]["kind"]) == ("0.1.0", 30, "none")
    assert [row["split"] for row in run.metrics()] == ["train", "val", "test"]


def test_every_command_reads_it(old: str, tlcli: Tlcli, tmp_path: Path) -> None:  # noqa: F811
    (entry,) = json.loads(tlcli("list", old, "--format", "json").out)
    assert (entry["status"], entry["data"], entry["val"], entry["test"]) == ("done", "digits", 0.1, 0.1)
    shutil.copytree(tmp_path / old, tmp_path / "copy")
    compared = tlcli("compare", old, "copy")
    assert (compared.code, compared.out.count("  0.0346 to 0.2562  ")) == (0, 2), compared.err
    assert "has no test_predictions.safetensors" in compared.out
    predicted = tlcli("predict", old, "image.png", "--format", "jsonl")
    assert predicted.code == 0, predicted.err
    answer = json.loads(predicted.out.splitlines()[0])
    assert answer["prediction"] in "0123456789"
    assert tlcli("report", old).code == 0
    evaluated = tlcli("eval", old, "--format", "json")
    assert evaluated.code == 0, evaluated.err
    assert json.loads(evaluated.out)["n"] == 30
    assert (tmp_path / old / "eval-1/eval.json").is_file()
    resumed = tlcli("train", "--resume", old)
    assert "nothing to resume" in resumed.out + resumed.err or "backbone.weights=" in resumed.out + resumed.err


@pytest.mark.slow
def test_export_and_a_new_run_take_its_weights(old: str, tlcli: Tlcli) -> None:  # noqa: F811
    assert tlcli("export", old, "--to", "timm").code == 0
    words = ["backbone=resnet18", f"backbone.weights={old}", "image.size=32", "epochs=1", "cache.mode=off"]
    done = tlcli("train", *words, "dataset.train_per_class=4", "dataset.test_per_class=2", "freeze=head")
    assert done.code == 0, done.err
