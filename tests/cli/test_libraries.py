"""What is imported is left alone by the garbage collector, which else continues as before."""

import gc
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from tlcli.cli import fast_imports


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    yield
    gc.unfreeze()
    gc.enable()


def test_only_what_is_imported_is_frozen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"heavy_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text("made = [[] for _ in range(1000)]\n")
    monkeypatch.syspath_prepend(tmp_path)
    with fast_imports():
        assert not gc.isenabled()
        made = import_module(name).made
    sys.modules.pop(name)
    assert gc.isenabled()
    assert gc.get_freeze_count() >= len(made)
    tracked = {id(item) for item in gc.get_objects()}
    assert not any(id(item) in tracked for item in made)
    with fast_imports():
        garbage = [[] for _ in range(1000)]
    tracked = {id(item) for item in gc.get_objects()}
    assert all(id(item) in tracked for item in garbage)


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_is_as_before_after_an_error(enabled: bool) -> None:
    if not enabled:
        gc.disable()
    with pytest.raises(ValueError, match="oops"), fast_imports():
        raise ValueError("oops")
    assert gc.isenabled() == enabled
