"""The cache while many runs are at it: each image is computed once, and all of them give the same."""

from pathlib import Path

import pytest

from tests.conftest import TINY
from tests.faults.programs import program
from tlcli.runs.run_dir import read_json

WORDS = (
    *("dataset=imagefolder", "image.size=32", "epochs=1", "freeze=head", "freeze.head_init=random"),
    *("device.precision=fp32", "device.channels_last=true", "device.workers=0", *TINY),
)


@pytest.mark.slow
def test_eight_runs_fill_a_cold_cache_once_and_are_one_and_the_same(shapes: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    codes = program("filling", tmp_path, 8, *WORDS, f"dataset.root='{shapes}'", TLCLI_CACHE=str(cache))
    runs = [tmp_path / str(number) for number in range(8)]
    assert codes == [0] * 8, [run.with_suffix(".log").read_text() for run in runs]
    computed = [read_json(run / "run.json")["extraction"] for run in runs]
    assert sum(facts["images"] for facts in computed if facts) == 60 + 24  # train and val, test: each once
    assert len(list((cache / "activations").iterdir())) == 2
    assert len({(run / "checkpoints/last.safetensors").read_bytes() for run in runs}) == 1
    assert len({(run / "test.json").read_bytes() for run in runs}) == 1
