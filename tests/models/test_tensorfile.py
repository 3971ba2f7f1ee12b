"""A file of tensors comes back as it was written, or not at all."""

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tlcli.errors import TlcliError
from tlcli.models.tensorfile import read_tensors, write_tensors

TENSORS = {
    "weight": torch.arange(12.0).reshape(3, 4).t(),
    "half": torch.ones(3, dtype=torch.bfloat16),
    "count": torch.tensor(7),
    "none": torch.zeros(0, 5),
    "map": torch.randn(1, 2, 3, 3).contiguous(memory_format=torch.channels_last),
}
FACTS = {"classes": ["ä", "<b>"], "best": 0.1 + 0.2, "rate": float("inf"), "nested": {"a": [1, None, True]}}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "x.safetensors"
    write_tensors(path, TENSORS, FACTS)
    return path


def test_tensors_and_facts_come_back(file: Path) -> None:
    tensors, facts = read_tensors(file)
    assert (facts, tensors.keys()) == (FACTS, TENSORS.keys())
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)


def test_a_flipped_bit_anywhere_is_found(file: Path) -> None:
    """In the header, the facts or the data: another content is never taken for the one that was written."""
    content, draw = file.read_bytes(), random.Random(0)
    for place in draw.sample(range(len(content)), min(len(content), 600)):
        spoilt = bytearray(content)
        spoilt[place] ^= 1 << draw.randrange(8)
        file.write_bytes(spoilt)
        try:
            tensors, facts = read_tensors(file)
        except TlcliError:
            continue
        # the key of the checksum may be hit, or that of all facts: then it is a file of an older release, or of others
        assert {key: facts.get(key) for key in FACTS} == FACTS or not facts
        assert all(torch.equal(tensors[name], tensor) for name, tensor in TENSORS.items())


def test_files_of_older_releases_are_read(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "old.safetensors", metadata={"tlcli": '{"epoch": 3}'})
    assert read_tensors(tmp_path / "old.safetensors")[1] == {"epoch": 3}
