"""tlcli and its commands as processes see them."""

import gc
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import tlcli as package
from tests.runs.test_index import make_run
from tlcli.cli import COMMANDS, fast_imports

ROOT = Path(package.__file__).parents[1]


def python(*argv: str, cwd: Path, stdout: int = subprocess.PIPE) -> "subprocess.CompletedProcess[str]":
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
    return subprocess.run([sys.executable, *argv], cwd=cwd, env=env, stdout=stdout, stderr=subprocess.PIPE, text=True)


ABSENT: dict[str, set[str]] = {
    "--help": {"torch", "hydra", "omegaconf", "rich", "yaml", "numpy"},
    "train --help": {"torch", "hydra", "omegaconf", "rich", "yaml", "numpy"},
    "completion query 'tlcli train '": {"torch", "hydra", "omegaconf", "rich", "numpy"},
    "list .": {"torch", "hydra", "omegaconf", "rich.table", "numpy", "matplotlib"},
    "predict --help": {"torch", "hydra", "omegaconf"},
    "inspect --help": {"torch", "hydra", "omegaconf"},
    "train --cfg job": {"torch", "torchvision", "timm", "sklearn", "matplotlib"},
    "train epochs=0": {"torch", "torchvision", "timm", "sklearn", "matplotlib"},
}


def test_a_command_imports_no_more_than_it_needs(tmp_path: Path) -> None:
    """One process runs them one after the other, the lightest first."""
    make_run(tmp_path / "run")
    code = f"import shlex, sys; from tlcli.cli import main\nfor line, absent in {ABSENT}.items():\n"
    code += "    main(shlex.split(line)); assert not absent & sys.modules.keys(), (line, absent & sys.modules.keys())"
    done = python("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_module_and_exit_code(tmp_path: Path) -> None:
    assert python("-m", "tlcli", "--version", cwd=tmp_path).stdout == f"tlcli {package.__version__}\n"
    assert python("-m", "tlcli", "trian", cwd=tmp_path).returncode == 2


def test_help_names_every_command(tlcli) -> None:
    ended = tlcli("--help")
    assert ended.code == 0
    assert all(f"  {command}" in ended.out for command in COMMANDS)
    assert max(map(len, ended.out.splitlines())) <= 80
    assert ended == tlcli() == tlcli("-h") == tlcli("help")


@pytest.mark.parametrize(
    ("argv", "shown"),
    [
        (("--cfg", "job", "epochs=7"), "epochs: 7"),
        (("--info", "defaults-tree"), "optimizer"),
        (("--hydra-help",), "--multirun"),
        (("--cfg", "hydra"), "sweeper"),
    ],
)
def test_flags_of_hydra_print_and_write_nothing(argv, shown: str, tlcli, tmp_path: Path) -> None:
    ended = tlcli("train", *argv)
    assert ended.code == 0
    assert shown in ended.out
    assert ("hydra" in ended.out) == ("job" not in argv)
    assert not list(tmp_path.iterdir())


def test_closed_pipe_is_no_traceback(tmp_path: Path) -> None:
    """The reader of stdout is gone before the first byte."""
    read, write = os.pipe()
    os.close(read)
    done = python("-m", "tlcli", "train", "--help", cwd=tmp_path, stdout=write)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


def test_closed_streams_are_as_good_as_none(tmp_path: Path) -> None:
    code = "import sys; from tlcli.cli import main; sys.exit(main(['list', '.']))"
    script = f"{shlex.quote(sys.executable)} -c {shlex.quote(code)} <&- >&- 2>&-; echo $?"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(["/bin/sh", "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout == "0\n"


def test_a_working_directory_that_is_gone_is_a_usage_error(tlcli, tmp_path: Path, monkeypatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    ended = tlcli("train")
    monkeypatch.chdir(tmp_path)
    assert (ended.code, ended.err) == (2, "tlcli train: the working directory no longer exists: cd to one that does\n")


@pytest.mark.parametrize(
    ("line", "step"),
    [
        ("embed run images --to f.npz", "numpy.savez"),
        ("eval run", "tlcli.evaluate.write_json"),
        ("export run --to timm --output model", "tlcli.export.compare"),
        ("data check dataset=imagefolder dataset.root=photos --output checked", "tlcli.check.check_data"),
        ("rank dataset=imagefolder dataset.root=photos", "tlcli.engine.ranking.score"),
        ("similar run photos/down/000.png images", "tlcli.embed.Embedder.embed"),
    ],
)
def test_sigterm_leaves_no_draft(line: str, step: str, tlcli, trained, shapes, tmp_path: Path, monkeypatch) -> None:
    shutil.copytree(trained("head", "fp32"), tmp_path / "run")
    (tmp_path / "images").symlink_to(shapes / "test/down")
    (tmp_path / "photos").symlink_to(shapes / "test")
    before = set(tmp_path.rglob("*"))
    monkeypatch.setattr(step, lambda *args, **arrays: signal.raise_signal(signal.SIGTERM))
    previous = signal.signal(signal.SIGTERM, lambda *args: None)
    try:
        ended = tlcli(*line.split())
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert (ended.code, set(tmp_path.rglob("*"))) == (143, before), ended.err


def test_the_garbage_collector_rests_during_imports_alone() -> None:
    with pytest.raises(ValueError, match="oops"), fast_imports():
        assert not gc.isenabled()
        raise ValueError("oops")
    assert gc.isenabled()


def test_debug_shows_the_traceback(tlcli) -> None:
    assert "Traceback" not in tlcli("train", "epochs=0").err
    assert "Traceback" in tlcli("train", "epochs=0", "--debug").err
