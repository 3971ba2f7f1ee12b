"""What is imported is left alone by the garbage collector, which else goes on as before."""

import gc
import sys
from importlib import import_module
from pathlib import Path

import pytest

from tlcli.cli import fast_imports


@pytest.fixture(autouse=True)
def as_before():
    """Nothing of these tests stays frozen."""
    yield
    gc.unfreeze()
    gc.enable()


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of one that was not imported before; it has a thousand lists."""
    name = f"heavy_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text("made = [[] for _ in range(1000)]\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield name
    sys.modules.pop(name, None)


def test_what_is_imported_is_not_looked_through(module: str) -> None:
    with fast_imports():
        assert not gc.isenabled()
        made = import_module(module).made
    assert gc.isenabled()
    assert gc.get_freeze_count() >= len(made)
    looked_at = {id(one) for one in gc.get_objects()}
    assert not any(id(one) in looked_at for one in made)


def test_without_an_import_garbage_stays_garbage() -> None:
    with fast_imports():
        made = [[] for _ in range(1000)]
    looked_at = {id(one) for one in gc.get_objects()}
    assert all(id(one) in looked_at for one in made)


def test_the_collector_goes_on_after_an_error() -> None:
    with pytest.raises(ValueError, match="oops"), fast_imports():
        raise ValueError("oops")
    assert gc.isenabled()


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    with fast_imports():
        pass
    assert not gc.isenabled()
