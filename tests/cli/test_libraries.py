"""The garbage collector leaves imported objects alone, and otherwise continues as before."""

import gc
import sys
from importlib import import_module
from pathlib import Path

import pytest

from tlcli.cli import fast_imports


def test_only_imported_objects_are_frozen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "heavy_module.py").write_text("made = [[] for _ in range(1000)]\n")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        with fast_imports():
            assert not gc.isenabled()
            made = import_module("heavy_module").made
        assert gc.isenabled()
        with pytest.raises(ValueError, match="oops"), fast_imports():
            garbage = [[] for _ in range(1000)]
            raise ValueError("oops")
        assert gc.isenabled()
        tracked = {id(item) for item in gc.get_objects()}
        assert not any(id(item) in tracked for item in made)
        assert all(id(item) in tracked for item in garbage)
    finally:
        sys.modules.pop("heavy_module", None)
        gc.unfreeze()
