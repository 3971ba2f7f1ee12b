"""Metadata of a safetensors file is data: read as far as it is what it should be, and refused otherwise."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tlcli.errors import UsageError
from tlcli.models.build import read_weights
from tlcli.models.tensorfile import CHECKSUM
from tlcli.runs.load import load_run
from tlcli.runs.run_dir import RunDir

DEEP = "[" * 100_000

Facts = dict[str, Any]


def say(file: Path, text: str) -> None:
    save_file(load_file(file), file, metadata={"tlcli": text})


def change(file: Path, how: Callable[[Facts], object]) -> None:
    """Change the metadata and leave out its checksum, as an attacker would."""
    with safe_open(file, framework="pt") as content:
        facts: Facts = json.loads(content.metadata()["tlcli"])
    del facts[CHECKSUM]
    how(facts)
    say(file, json.dumps(facts))


def preprocessing(**values: Any) -> Callable[[Facts], object]:
    return lambda facts: facts["preprocessing"].update(values)


@pytest.mark.parametrize(
    "text",
    [DEEP, '{"classes": ["a"', '{"classes": ' + "9" * 5000 + "}", "[]", "{}"],
    ids=["deep", "cut short", "a number with too many digits", "a list", "nothing in it"],
)
def test_a_run_whose_checkpoint_says_nothing_sensible_is_refused(text: str, run: RunDir) -> None:
    say(run.best_checkpoint, text)
    with pytest.raises(UsageError, match=r"^[^\n]*best\.safetensors: [^\n]{,900}$"):
        load_run(run.path)


WRONG: dict[str, Callable[[Facts], object]] = {
    "no classes": lambda facts: facts.pop("classes"),
    "classes are a word": lambda facts: facts.update(classes="abc"),
    "classes are numbers": lambda facts: facts.update(classes=[1, 2, 3]),
    "a class twice": lambda facts: facts.update(classes=["a", "a", "b"]),
    "too many classes": lambda facts: facts.update(classes=[str(n) for n in range(1000)]),
    "no preprocessing": lambda facts: facts.pop("preprocessing"),
    "preprocessing is a list": lambda facts: facts.update(preprocessing=[]),
    "size 0": preprocessing(size=0),
    "a size no memory holds": preprocessing(size=10**9),
    "a size with too many digits": preprocessing(size=10**400),
    "size infinite": preprocessing(size=float("inf")),
    "size a word": preprocessing(size="32"),
    "fit unknown": preprocessing(fit="__import__('os')"),
    "two means": preprocessing(mean=[0.5, 0.5]),
    "mean not a number": preprocessing(mean=[float("nan"), 0, 0]),
    "std zero": preprocessing(std=[0, 0, 0]),
    "std huge": preprocessing(std=[10**400, 1, 1]),
    "a range of words": preprocessing(range=["a", "b"]),
    "a descending range": preprocessing(range=[2, 1]),
    "a huge range": preprocessing(range=[0, 1e300]),
    "backbone unknown": lambda facts: facts.update(backbone="os.system"),
    "backbone from a hub": lambda facts: facts.update(backbone="hf-hub:somebody/something"),
    "backbone of another kind": lambda facts: facts.update(backbone_kind="__builtins__"),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_a_value_that_cannot_be_is_refused(wrong: Callable[[Facts], object], run: RunDir, monkeypatch) -> None:
    monkeypatch.setattr("socket.socket.connect", lambda *args: pytest.fail("it asked the network"))
    change(run.best_checkpoint, wrong)
    with pytest.raises(UsageError) as caught:
        load_run(run.path)
    assert str(run.path) in str(caught.value) or "backbone" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("name", ["classes are a word", "a class twice", "size infinite", "two means", "std zero"])
def test_weights_to_start_from_are_judged_alike(name: str, run: RunDir) -> None:
    change(run.best_checkpoint, WRONG[name])
    with pytest.raises(UsageError, match="metadata is damaged"):
        read_weights(run.best_checkpoint)


def test_a_header_that_claims_more_than_there_is_takes_no_memory(tmp_path: Path) -> None:
    """Eight bytes of length, JSON of that length, and tensors behind it: all of it is checked by safetensors."""
    for name, content in {
        "length": (2**63).to_bytes(8, "little") + b"{}",
        "offsets": header({"w": {"dtype": "F32", "shape": [10**15], "data_offsets": [0, 4 * 10**15]}}),
        "shape": header({"w": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 0]}}),
        "dtype": header({"w": {"dtype": "OBJECT", "shape": [1], "data_offsets": [0, 4]}}) + bytes(4),
        "deep": (len(DEEP)).to_bytes(8, "little") + DEEP.encode(),
    }.items():
        (tmp_path / f"{name}.safetensors").write_bytes(content)
        with pytest.raises(UsageError, match=name):
            read_weights(tmp_path / f"{name}.safetensors")


def header(value: Facts) -> bytes:
    text = json.dumps(value).encode()
    return len(text).to_bytes(8, "little") + text


def test_metadata_of_third_parties_is_not_read(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(2)}, tmp_path / "w.safetensors", metadata={"format": DEEP})
    assert read_weights(tmp_path / "w.safetensors").classes is None
