"""Runs that were moved, copied, made read-only, written by a newer tlcli, or are none: eval, predict, list, report."""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Ended, Tlcli
from tests.faults.refusals import tree, untouched
from tlcli.runs.run_dir import RunDir


@pytest.fixture
def run(trained: Callable[..., Path], tmp_path: Path) -> Path:
    """Move a copy of the run to this folder."""
    return Path(shutil.copytree(trained("head", "fp32"), tmp_path / "run"))


def answers(ended: Ended) -> list[Any]:
    return [json.loads(line) for line in ended.out.splitlines()]


@pytest.mark.parametrize("name", ["=1+1", "n\u00e9w\nline"])
def test_a_run_is_the_same_in_another_place(name: str, run: Path, shapes: Path, tlcli: Tlcli, tmp_path: Path) -> None:
    image = str(shapes / "test/checks/000.png")
    before = answers(tlcli("predict", str(run), image))
    place = tmp_path / "other" / name
    place.parent.mkdir()
    if "w" in name:
        run.rename(place)
    else:
        place.symlink_to(run)
    with untouched(tmp_path), untouched(shapes):
        assert answers(tlcli("predict", str(place), image)) == before
        (entry,) = json.loads(tlcli("list", "other", "--format", "json").out)
    assert (entry["path"], entry["status"]) == (str(Path("other", name)), "done")


def test_a_moved_run_is_evaluated_and_reported(run: Path, shapes: Path, tlcli: Tlcli, tmp_path: Path) -> None:
    moved = run.rename(tmp_path / "moved")
    before = tree(moved)
    with untouched(shapes):
        ended = tlcli("eval", "moved", "--format", "json")
        assert tlcli("report", "moved").code == 0
    assert ended.code == 0, ended.err
    report, test = json.loads(ended.out), RunDir(moved).test()
    assert all(report[key] == test[key] for key in ("accuracy", "loss", "n", "confusion"))
    after = tree(moved)
    assert {path: after.get(path) for path in before} == before
    new = {Path(path).relative_to(moved).parts[0] for path in after.keys() - before.keys()}
    assert new == {"eval-1", "report.html"}


@pytest.fixture
def read_only(run: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return the run on a read-only file system; for root, who may write anywhere, the calls are made to fail."""

    def fails(*args: Any, **kwargs: Any) -> Any:
        raise OSError(errno.EROFS, "Read-only file system", str(run))

    if os.geteuid() == 0:
        opened = Path.open

        def reads(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            return fails() if run in self.absolute().parents and mode[0] != "r" else opened(self, mode, *args, **kwargs)

        monkeypatch.setattr(Path, "open", reads)
        monkeypatch.setattr(tempfile, "mkdtemp", fails)
    else:
        run.chmod(0o555)
    yield run
    run.chmod(0o755)


@pytest.mark.slow
def test_a_read_only_run_can_be_looked_at(read_only: Path, shapes: Path, tlcli: Tlcli, tmp_path: Path) -> None:
    with untouched(tmp_path):
        assert tlcli("predict", "run", str(shapes / "test/checks/000.png")).code == 0
        assert tlcli("list", "run").code == 0
        evaluated, reported = tlcli("eval", "run"), tlcli("report", "run")
    assert (evaluated.code, reported.code) == (1, 1)
    assert "run: not writable" in evaluated.err and "run/report.html: cannot write (" in reported.err
    assert evaluated.err.count("\n") == reported.err.count("\n") == 1
    assert tlcli("report", "run", "--output", str(tmp_path / "r.html")).code == 0


@pytest.mark.parametrize("version", [2, 0, "1", None])
def test_a_run_of_another_schema_is_left_alone(version: Any, tlcli: Tlcli, tmp_path: Path) -> None:
    for name in ("run", "run2"):
        run = RunDir(tmp_path / name)
        run.start(command="tlcli train", overrides=[], config="seed: 1\n")
        run.update(schema_version=version, tlcli="9.9.9", best={"new": "shape"})
    commands = ("eval run", "predict run x.png", "export run --to timm", "compare run run2")
    with untouched(tmp_path):
        refusals = [tlcli(*command.split()) for command in commands]
        assert "running" in tlcli("list", "run").out
    for ended in refusals:
        assert ended.code == 2
        assert f"run.json: schema_version {version!r} was written by another tlcli (9.9.9); this one" in ended.err
        assert ended.err.count("\n") == 1
    assert tlcli("report", "run").code == 0


@pytest.mark.parametrize(
    "content",
    [b'{"schema_version": 1, "sta', b"\xff\xfe", b"[" * 100_000, b'{"schema_version": ' + b"9" * 5000 + b"}"],
    ids=["cut", "no UTF-8", "too deep", "a number of 5,000 digits"],
)
def test_a_damaged_record_is_one_line(content: bytes, tlcli: Tlcli, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_bytes(content)
    with untouched(tmp_path):
        listed = tlcli("list", "run")
        refusals = [tlcli("eval", "run"), tlcli("predict", "run", "x.png"), tlcli("report", "run")]
    assert listed.code == 0
    assert "damaged" in listed.out
    for ended in refusals:
        assert (ended.code, ended.err.count("\n")) == (2, 1)
        assert "run.json: " in ended.err and len(ended.err) < 400


def test_pipes_and_devices_in_a_run_are_not_read(tlcli: Tlcli, tmp_path: Path) -> None:
    sound = RunDir(tmp_path / "outputs" / "sound")
    sound.start(command="tlcli train", overrides=[], config="seed: 1\n")
    sound.end("done")
    os.mkfifo(sound.test_file)
    os.mkfifo(sound.metrics_file)
    for name, make in {"pipe": os.mkfifo, "device": lambda path: path.symlink_to("/dev/zero")}.items():
        (tmp_path / "outputs" / name).mkdir()
        make(tmp_path / "outputs" / name / "run.json")
    with untouched(tmp_path):
        listed = tlcli("list", "outputs", "--format", "json")
        refusals = [tlcli(word, f"outputs/{name}") for word in ("eval", "report") for name in ("pipe", "device")]
    assert {entry["status"] for entry in json.loads(listed.out)} == {"done", "damaged"}
    assert len(json.loads(listed.out)) == 3
    assert all(one.code in (1, 2) and one.err.count("\n") == 1 for one in refusals)
    assert tlcli("report", "outputs/sound").code == 0


@pytest.mark.parametrize("command", ["eval", "predict", "report", "list", "compare", "data"])
def test_names_that_no_folder_can_have(command: str, tlcli: Tlcli, tmp_path: Path) -> None:
    (tmp_path / "circle").symlink_to("circle")
    for name in ("x" * 300, "circle", "x/" * 3000):
        words = {"predict": (name, "a.png"), "compare": (name, "b"), "data": ("check", name)}
        with untouched(tmp_path):
            ended = tlcli(command, *words.get(command, (name,)))
        assert (ended.code, ended.err.count("\n")) == (2, 1), ended.err
