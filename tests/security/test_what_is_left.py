"""The files of a run and of all that is made from it have the permissions of the umask and hold no secrets."""

import os
import stat
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

from tests.security.conftest import SMALL
from tlcli.cli import main

TOKENS = {"HF_TOKEN": "hf_canary0123456789", "WANDB_API_KEY": "wandbcanary0123456789", "PASSWORD": "canary0123456789!"}


UMASK = 0o027


@pytest.fixture(scope="module")
def left(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Make a folder with a run, its exports, its cache and the output under a umask."""
    folder = tmp_path_factory.mktemp("left")
    image = next((shapes / "test").rglob("*.png"))
    lines = [
        ["train", "hydra.run.dir=run", "dataset=imagefolder", f"dataset.root='{shapes}'", *SMALL],
        ["eval", "run"],
        ["report", "run", "--output", "page.html"],
        ["predict", "run", str(image), "--format", "csv", "--output", "answers.csv"],
        ["export", "run", "--to", "timm"],
        ["list", ".", "--format", "json"],
    ]
    before = os.umask(UMASK)
    shown = StringIO()
    try:
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(shown), redirect_stderr(shown):
            patch.chdir(folder)
            patch.setenv("TLCLI_CACHE", str(folder / "cache"))
            for name, value in TOKENS.items():
                patch.setenv(name, value)
            codes = [main(line) for line in lines]
        (folder / "shown.txt").write_text(shown.getvalue())
    finally:
        os.umask(before)
    assert codes == [0] * len(lines), shown.getvalue()
    yield folder


EXPECTED = {
    *("run/run.json", "run/checkpoints/best.safetensors", "run/test_predictions.safetensors", "run/plots/curves.png"),
    *("run/eval-1/predictions.safetensors", "run/export/timm/model.safetensors"),
    *("page.html", "answers.csv", "cache/activations"),
}  # some of the files, each written in a way of its own


def test_files_have_the_permissions_of_the_umask(left: Path) -> None:
    found = {path.relative_to(left).as_posix(): path for path in left.rglob("*")}
    assert found.keys() >= EXPECTED
    modes = {name: stat.S_IMODE(path.stat().st_mode) for name, path in found.items()}
    assert {name: oct(m) for name, m in modes.items() if m != (0o777 if found[name].is_dir() else 0o666) & ~UMASK} == {}


def test_no_file_has_a_secret_of_the_environment(left: Path) -> None:
    files = [path for path in left.rglob("*") if path.is_file()]
    assert len(files) > 30
    for path in files:
        content = path.read_bytes()
        assert [name for name, value in TOKENS.items() if value.encode() in content] == [], path
    temporary = [path for path in left.rglob(".*") if path.name != ".hydra"]
    assert temporary == []
