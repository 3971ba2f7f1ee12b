"""The cache while many processes are at it, and while they are killed: one fill, no wrong row, nothing left behind."""

from pathlib import Path

import pytest

from tests.faults.programs import program, scale
from tlcli.runs.run_dir import read_json

WORDS = (
    *("dataset=imagefolder", "image.size=32", "epochs=1", "freeze=head", "freeze.head_init=random"),
    *("device.precision=fp32", "device.channels_last=true", "device.workers=0"),
)


def test_of_sixteen_processes_on_a_cold_cache_one_fills_and_none_reads_a_wrong_row(tmp_path: Path) -> None:
    rounds = program("filling", "cold", tmp_path, 16, scale(1, 100))
    for seen in rounds:
        assert len(seen) == 16
        assert sum(one["filled"] for one in seen) == 1
        assert sum(one["wrong"] for one in seen) == 0


def test_a_writer_that_is_killed_leaves_nothing_that_disturbs_the_next_one(tmp_path: Path) -> None:
    found = program("filling", "killed", tmp_path)
    assert len(found) == 12
    assert all(one == [-9, True, 0, [], []] for one in found), found


@pytest.mark.slow
def test_eight_runs_fill_a_cold_cache_once_and_are_one_and_the_same(shapes: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    codes = program(
        "filling", "runs", tmp_path, 8, *WORDS, f"dataset.root='{shapes}'", TLCLI_CACHE=str(cache)
    )  # fmt: skip
    runs = [tmp_path / str(number) for number in range(8)]
    assert codes == [0] * 8, [run.with_suffix(".log").read_text() for run in runs]
    computed = [read_json(run / "run.json")["extraction"] for run in runs]
    assert sum(facts["images"] for facts in computed if facts) == 60 + 24  # train and val, test: each once
    assert len(list((cache / "activations").iterdir())) == 2
    assert len({(run / "checkpoints/last.safetensors").read_bytes() for run in runs}) == 1
    assert len({(run / "test.json").read_bytes() for run in runs}) == 1
