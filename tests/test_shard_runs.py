"""Runs on tar archives and parquet files: training, folds, ranks, resuming, and what other commands make of them."""

import csv
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.conftest import finish
from tests.data.samples import pack_parquet, pack_tar
from tests.faults.refusals import untouched
from tests.faults.runs_alike import differences
from tests.faults.test_resume import stopped_after
from tests.processes import train_in_ranks
from tlcli.cli import main
from tlcli.data import parquet
from tlcli.models.tensorfile import read_tensors
from tlcli.runs import checkpointing
from tlcli.runs.run_dir import RunDir, read_json, read_predictions

SMALL = ("image.size=32", "epochs=2", "batch_size=8", "optimizer.lr=0.005")
SMALL += ("device.precision=fp32", "device.channels_last=true", "freeze.head_init=random")
LIVE = ("freeze=last_stages", "freeze.n=1", "cache.mode=off")
Sets = dict[str, tuple[str, ...]]


@pytest.fixture(scope="module")
def sets(shapes: Path, tiny: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Sets:
    """Return the overrides that name a network, and the shapes as a folder, as archives or as parquet files of 12 row
    groups."""
    root = tmp_path_factory.mktemp("sets")
    for split in ("train", "test"):
        for i in range(2):
            pack_tar(shapes / split, root / f"webdataset/{split}-{i}.tar", slice(i, None, 2))
            pack_parquet(shapes / split, root / f"parquet/{split}-{i}.parquet", slice(i, None, 2), rows_per_group=5)
    places = {"imagefolder": shapes, **{kind: root / kind for kind in ("webdataset", "parquet")}}
    return {kind: (*tiny, f"dataset={kind}", f"dataset.root='{place}'") for kind, place in places.items()}


@pytest.fixture(autouse=True)
def small_buffers(sets: Sets, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the buffer hold a few row groups, and write the state after each epoch."""
    monkeypatch.setattr(parquet, "BUFFER_BYTES", 25_000)
    monkeypatch.setattr(checkpointing, "MAX_TIME_SHARE", 1e9)


def unlike(one: Path, other: Path) -> list[str]:
    """Return the differences of two runs, apart from the names of images in predictions."""
    runs = [RunDir(one), RunDir(other)]
    for name in ("val_predictions", "test_predictions"):
        files = [getattr(run, name) for run in runs]
        if files[0].exists():
            found = [read_predictions(file) for file in files]
            assert all(torch.equal(getattr(found[0], key), getattr(found[1], key)) for key in ("logits", "labels"))
    return [line for line in differences(one, other) if "predictions: " not in line]


@pytest.mark.slow
@pytest.mark.parametrize(
    "own",
    [("freeze=head",), (*LIVE, "device.workers=2"), ("freeze=head", "sampler=balanced", "dataset.train_per_class=12")],
)
@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on a machine with one core
def test_a_run_on_archives_is_that_on_folders(own: tuple[str, ...], sets: Sets, tmp_path: Path) -> None:
    runs = [finish(tmp_path / kind, *sets[kind], *SMALL, *own) for kind in ("imagefolder", "webdataset")]
    assert unlike(*runs) == []
    keys = read_predictions(RunDir(runs[1]).test_predictions).keys
    assert keys[0] == "test-0.tar across/000.png" and len(keys) == 24


@pytest.mark.slow
def test_folds_of_archives_are_those_of_folders(sets: Sets, tmp_path: Path) -> None:
    words = (*SMALL, "freeze=head", "folds=3")
    runs = [finish(tmp_path / kind, *sets[kind], *words) for kind in ("imagefolder", "webdataset", "parquet")]
    assert unlike(runs[0] / "best", runs[1] / "best") == []
    for i in range(3):
        one, other = (read_tensors(RunDir(run / f"fold-{i}").last_checkpoint)[0] for run in runs[:2])
        assert all(torch.equal(one[name], other[name]) for name in one)
    held_out = [read_predictions(RunDir(runs[2] / f"fold-{i}").val_predictions).keys for i in range(3)]
    assert len({key for keys in held_out for key in keys}) == 60


@pytest.mark.slow
@pytest.mark.parametrize("own", [LIVE, ("freeze=head",)])
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_a_run_on_parquet_goes_on_exactly(own: tuple[str, ...], sets: Sets, tmp_path: Path) -> None:
    words = (*sets["parquet"], *SMALL, *own)
    whole = finish(tmp_path / "whole", *words)
    with stopped_after(11, KeyboardInterrupt):
        assert main(["train", f"hydra.run.dir='{tmp_path / 'stopped'}'", *words, "device.workers=2"]) == 130
    assert main(["train", "--resume", str(tmp_path / "stopped")]) == 0
    assert list(differences(whole, tmp_path / "stopped")) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["webdataset", "parquet"])
def test_two_ranks_read_the_same_batches(kind: str, sets: Sets, tmp_path: Path) -> None:
    runs = tmp_path / "one", tmp_path / "two"
    for size, run in enumerate(runs, 1):
        code, text = train_in_ranks(size, [f"hydra.run.dir='{run}'", *sets[kind], *SMALL, *LIVE], tmp_path)
        assert code == 0, text
    one, two = (read_tensors(RunDir(run).last_checkpoint)[0] for run in runs)
    assert all(torch.allclose(one[name], two[name], rtol=1e-3, atol=1e-4) for name in one)
    predictions = [read_predictions(RunDir(run).test_predictions) for run in runs]
    assert list(predictions[0].keys) == list(predictions[1].keys)


@pytest.fixture(scope="module", params=["webdataset", "parquet"])
def run(request: pytest.FixtureRequest, sets: Sets, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Train on shards for an epoch."""
    yield finish(
        tmp_path_factory.mktemp("run") / request.param, *sets[request.param], *SMALL, "freeze=head", "epochs=1"
    )


@pytest.mark.slow
def test_other_commands_read_the_images_of_a_run(run: Path, sets: Sets, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(run)]) == 0
    assert "the run's own test split" in capsys.readouterr().out
    assert main(["eval", str(run), *sets["imagefolder"][-2:], "split=test"]) == 0
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert page.count("data:image/jpeg") > 5 and "are not where they were" not in page
    assert main(["list", str(run.parent)]) == 0
    assert run.name in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["webdataset", "parquet"])
def test_data_check_names_images_in_shards(kind: str, shapes: Path, tmp_path: Path) -> None:
    form = {"webdataset": ("tar", pack_tar), "parquet": ("parquet", pack_parquet)}[kind]
    for split in ("train", "test"):
        form[1](shapes / split, tmp_path / f"set/{split}.{form[0]}")
    form[1](shapes / "train", tmp_path / f"set/test-more.{form[0]}", slice(0, 3))
    words = [f"dataset={kind}", f"dataset.root='{tmp_path / 'set'}'", "--quick", "--output", str(tmp_path / "found")]
    with untouched(tmp_path / "set"):
        assert main(["data", "check", *words]) == 0
    summary = read_json(tmp_path / "found/summary.json")
    assert summary["exact"]["test_in_train_or_val"] == 3
    with (tmp_path / "found/duplicates.csv").open(newline="") as stream:
        files = [Path(row["file"]).name for row in csv.DictReader(stream)]
    named = {"webdataset": "000.png", "parquet": "test-more.parquet row 0"}[kind]
    assert len(files) == 6 and named in files
