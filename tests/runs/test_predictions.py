"""Predictions of a split on disk: what was written is read, and a damaged file is named."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tlcli.errors import UsageError
from tlcli.models.tensorfile import read_tensors, write_tensors
from tlcli.runs.run_dir import SplitPredictions, read_predictions, write_predictions
from tlcli.text import Names

SOME = SplitPredictions(
    logits=torch.tensor([[0.5, -1.0], [2.0, 3.25], [0.0, 1e-8]]),
    labels=torch.tensor([0, 1, 1]),
    classes=("ants", "b\N{LATIN SMALL LETTER E WITH ACUTE}es"),
    keys=Names(["ants/0.jpg", "bees/\udcff.jpg", "bees/2.jpg"]),
    root="/data/",
)


@pytest.mark.parametrize("version", ["0.12", "now"])
def test_what_was_written_is_read(tmp_path: Path, version: str) -> None:
    file = tmp_path / "test_predictions.safetensors"
    write_predictions(file, SOME)
    if version == "0.12":
        names = {"classes": SOME.classes, "keys": list(SOME.keys), "names": SOME.names}
        write_tensors(file, {"logits": SOME.logits, "labels": SOME.labels}, names)
    found = read_predictions(file)
    assert torch.equal(found.logits, SOME.logits) and torch.equal(found.labels, SOME.labels)
    assert (found.classes, list(found.keys)) == (SOME.classes, list(SOME.keys))
    assert found.names == ["/data/ants/0.jpg", "/data/bees/\udcff.jpg", "/data/bees/2.jpg"]
    assert load_file(file)["logits"].dtype == torch.float32  # plain safetensors, for programs without tlcli
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


@pytest.mark.parametrize("ends", [[10, 20, 29], [10, 9, 30], [-1, 20, 30], []])
def test_ends_of_other_keys_are_damage(tmp_path: Path, ends: list[int]) -> None:
    file = tmp_path / "p.safetensors"
    write_predictions(file, SOME)
    tensors, metadata = read_tensors(file)
    write_tensors(file, tensors | {"key_ends": torch.tensor(ends, dtype=torch.int64)}, metadata)
    with pytest.raises(UsageError, match=r"p\.safetensors: damaged.*ends of names"):
        read_predictions(file)


def test_a_missing_or_truncated_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "p.safetensors"
    with pytest.raises(UsageError, match=r"p\.safetensors: no such file"):
        read_predictions(file)
    write_predictions(file, SOME)
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(UsageError, match=r"p\.safetensors: damaged"):
        read_predictions(file)
