"""A small finished run that the tests of security share."""

import shutil
from pathlib import Path

import pytest

from tests.conftest import TINY, finish
from tlcli.runs.run_dir import RunDir

SMALL = ("image.size=32", "epochs=1", "freeze=head", *TINY, "device.precision=fp32", "device.channels_last=true")
"""The words of a run that takes a second, on any data."""


COMMANDS = {
    "list": "list .",
    "predict": "predict {run} {image}",
    "eval": "eval {run}",
    "report": "report {run} --output page.html",
    "compare": "compare {run} {other}",
    "inspect": "inspect {run}",
    "export as a graph": "export {run} --to pt2 --output model.pt2",
}
"""Commands that read a run, as words to format."""


@pytest.fixture(scope="session")
def finished(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a run that tests must not change."""
    out = tmp_path_factory.mktemp("finished") / "run"
    return finish(out, "dataset=imagefolder", f"dataset.root='{shapes}'", *SMALL)


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> RunDir:
    """Copy the run, to change it."""
    return RunDir(Path(shutil.copytree(finished, tmp_path / "run")))
