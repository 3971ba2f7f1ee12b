"""Predictions of a split on disk: what was written is read, and a damaged file is named."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tlcli.errors import UsageError
from tlcli.runs import run_dir
from tlcli.runs.run_dir import SplitPredictions, read_predictions, write_predictions

SOME = SplitPredictions(
    logits=torch.tensor([[0.5, -1.0], [2.0, 3.25], [0.0, 1e-8]]),
    labels=torch.tensor([0, 1, 1]),
    classes=("ants", "b\N{LATIN SMALL LETTER E WITH ACUTE}es"),
    keys=("ants/0.jpg", "bees/\udcff.jpg", "bees/2.jpg"),
    names=("/data/ants/0.jpg", "/data/bees/\udcff.jpg", "/data/bees/2.jpg"),
)


@pytest.mark.parametrize("limit", [10, 1000])
def test_what_was_written_is_read(tmp_path: Path, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_dir, "MAX_METADATA_CHARS", limit)
    file = tmp_path / "test_predictions.safetensors"
    write_predictions(file, SOME)
    found = read_predictions(file)
    assert torch.equal(found.logits, SOME.logits) and torch.equal(found.labels, SOME.labels)
    assert (found.classes, found.keys) == (SOME.classes, SOME.keys)
    assert found.names == (SOME.names if limit == 1000 else SOME.keys)  # too many names are left out
    assert load_file(file)["logits"].dtype == torch.float32  # plain safetensors, for programs without tlcli
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_a_missing_or_truncated_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "p.safetensors"
    with pytest.raises(UsageError, match=r"p\.safetensors: no such file"):
        read_predictions(file)
    write_predictions(file, SOME)
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(UsageError, match=r"p\.safetensors: damaged"):
        read_predictions(file)
