"""A cache that is read-only, full, no directory, or taken away: the run goes on, and one line says what is live."""

import io
import os
import re
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import TINY, slow
from tests.faults.programs import UNSHARE, can_mount
from tlcli.cli import main
from tlcli.engine.session import Session
from tlcli.runs.recorder import Recorder
from tlcli.runs.run_dir import read_json
from tlcli.store import Store

ROOT = Path(__file__).parents[2]
WORDS = (
    *("dataset=imagefolder", "image.size=32", "epochs=1", "freeze=head", "device.precision=fp32"),
    *("device.channels_last=true", "device.workers=0", *TINY),
)


@dataclass(frozen=True)
class Ended:
    """The end of a run, whose `lines` are printed ones, unwrapped."""

    code: int
    out: Path
    lines: list[str]

    @property
    def test(self) -> Any:
        return read_json(self.out / "test.json")

    def is_as(self, other: "Ended") -> bool:
        """Return whether it came to the same but for rounding, which activations differ by from live images."""
        one, two = self.test, other.test
        return one["confusion"] == two["confusion"] and one["loss"] == pytest.approx(two["loss"], rel=1e-3, abs=1e-4)

    def about_the_cache(self) -> list[str]:
        return [line for line in self.lines if re.search(r"activations|read-only|No space|TLCLI_CACHE", line)]


def run(cache: Path, shapes: Path, *overrides: str, out: Path | None = None) -> Ended:
    """Run one epoch on the shapes at 32 px with this cache."""
    out = out or cache.with_name("run")
    shown = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(shown), redirect_stderr(shown):
        patch.setattr(Recorder, "_plot", lambda *args: None)
        patch.setenv("TLCLI_CACHE", str(cache))
        code = main(["train", f"hydra.run.dir='{out}'", f"dataset.root='{shapes}'", *WORDS, *overrides])
    return Ended(code, out, re.sub(r"\n +", " ", shown.getvalue()).splitlines())


@pytest.fixture(scope="module")
def live(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """Return the run without a cache."""
    return run(tmp_path_factory.mktemp("live") / "unused", shapes, "cache.mode=off")


@pytest.mark.parametrize("path", ["file", *slow("file/cache", "link")])
def test_a_cache_that_cannot_be_a_folder_means_uncached_and_one_line(path: str, live: Ended, shapes, tmp_path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "file" / "nowhere")
    ended = run(tmp_path / path, shapes, out=tmp_path / "run")
    assert ended.code == 0
    (line,) = ended.about_the_cache()
    assert line.startswith(f"activations: training reads images: {tmp_path / path} cannot be written")
    assert (tmp_path / "file").read_text() == "mine"
    assert ended.test == live.test


@pytest.mark.parametrize("times", [1, *slow(99)])
def test_an_entry_that_is_removed_when_it_was_found_is_filled_once_more_or_means_uncached(
    times: int, live: Ended, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, removed, store = Session.tensors, [], Store(tmp_path / "cache")

    def after_removal(self: Session, entry: Any) -> Any:
        if len(removed) < times:
            removed.append(entry.key)
            store.remove(entry.key)
        return opened(self, entry)

    monkeypatch.setattr(Session, "tensors", after_removal)
    ended = run(tmp_path / "cache", shapes, "cache.ram_gb=0")
    assert ended.code == 0
    assert ended.is_as(live)
    assert len([line for line in ended.lines if "reading images instead" in line]) == (times > 1)
    assert (removed[0] in [entry.key for entry in store.entries()]) == (times == 1)


def mounted(options: str, cache: Path, out: Path, shapes: Path, *overrides: str) -> Ended:
    """Run in a process with the cache on its own file system."""
    words = [f"hydra.run.dir='{out}'", f"dataset.root='{shapes}'", *WORDS, *overrides]
    script = f'{options} && exec "$0" -m tlcli train "$@"'
    done = subprocess.run(
        [*UNSHARE, "bash", "-c", script, sys.executable, *words],
        cwd=ROOT,
        env={**os.environ, "TLCLI_CACHE": str(cache)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return Ended(done.returncode, out, re.sub(r"\n +", " ", done.stdout).splitlines())


@pytest.mark.slow
@pytest.mark.skipif(not can_mount(), reason="no mounts of one's own here")
def test_a_read_only_cache_is_read_and_where_it_lacks_something_training_is_live(shapes: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    read_only = f"mount --bind '{cache}' '{cache}' && mount -o remount,bind,ro '{cache}'"
    empty = mounted(read_only, cache, tmp_path / "empty", shapes)
    assert empty.code == 0, empty.lines
    (line,) = empty.about_the_cache()
    assert line == f"activations: training reads images: {cache} cannot be written (Read-only file system)"
    assert list(cache.iterdir()) == []
    filled = mounted("true", cache, tmp_path / "filled", shapes)
    again = mounted(read_only, cache, tmp_path / "again", shapes)
    assert again.code == 0, again.lines
    assert [line.split(":")[1] for line in again.about_the_cache()] == [" read from cache"]
    assert again.is_as(filled)
    assert empty.is_as(filled)
