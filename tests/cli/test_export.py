"""`tlcli export`: its words, its exit codes, and what it prints."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Ended
from tests.exporting.conftest import small_run
from tlcli.cli.completion import candidates
from tlcli.exporting import FILES

Tlcli = Callable[..., Ended]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; tests give an --output of their own."""
    return small_run(tmp_path_factory.mktemp("export"), "backbone=resnet18")


def test_export_into_the_run_says_what_it_did(run: Path, tlcli: Tlcli) -> None:
    ended = tlcli("export", str(run), "--to", "safetensors")
    assert ended.code == 0, ended.err
    file = run / "export/model.safetensors"
    lines = dict(re.split(r" {2,}", line, maxsplit=1) for line in ended.out.splitlines() if not line.startswith(" "))
    assert list(lines) == ["wrote", "holds", "checked", "load it"]
    assert lines["wrote"].startswith(f"{file} (44.8 MB)")
    assert "16 of the run's test images: every class equal" in lines["checked"]
    names: dict[str, object] = {}
    exec(lines["load it"], names)
    assert "model" in names
    again = tlcli("export", str(run), "--to=safetensors")
    assert again.code == 2
    assert "is there already and stays as it is: give another --output" in again.err


def test_output_and_checkpoint(run: Path, tlcli: Tlcli, tmp_path: Path) -> None:
    ended = tlcli("export", "--to=torchscript", "--output", "new/net.pt", "--with-preprocessing", str(run))
    assert ended.code == 0, ended.err
    assert (tmp_path / "new/net.pt").is_file()
    assert "images uint8 (N, 32, 32, 3) RGB -> logits (N, 3)" in ended.out
    assert tlcli("export", str(run), "--to", "timm", "--output=last", "--checkpoint=last").code == 0
    assert "the weights of the last epoch" in (tmp_path / "last/README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["RUN"], "name the format: --to onnx|torchscript|pt2|safetensors|timm"),
        (["--to", "onnx"], "give one run directory, not 0"),
        (["RUN", "RUN", "--to", "onnx"], "give one run directory, not 2"),
        (["RUN", "--to"], "--to needs a value"),
        (["RUN", "--to", "onx"], "Did you mean 'onnx'?"),
        (["RUN", "--too", "onnx"], "Did you mean '--to'?"),
        (["RUN", "--to", "timm", "--checkpoint", "bst"], "Did you mean 'best'?"),
        (["RUN", "--to", "timm", "--with-preprocessing"], "timm holds weights and no graph"),
        (["nowhere", "--to", "timm"], "no such run directory"),
    ],
)
def test_usage_errors(words: list[str], said: str, run: Path, tlcli: Tlcli) -> None:
    ended = tlcli("export", *[str(run) if word == "RUN" else word for word in words])
    assert ended.code == 2
    assert said in ended.err
    assert ended.err.startswith("tlcli export: ")
    assert len(ended.err.splitlines()) == 1


def test_a_missing_package_is_said_before_anything_is_loaded(tlcli: Tlcli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tlcli.exporting.find_spec", lambda name: None)
    ended = tlcli("export", "nowhere", "--to", "onnx")
    assert (ended.code, ended.err) == (
        2,
        "tlcli export: --to onnx needs onnx, onnxscript, onnxruntime: pip install 'tlcli[export]'\n",
    )


def test_a_check_that_fails_exits_1_and_leaves_nothing(
    run: Path, tlcli: Tlcli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tlcli.exporting.check.TOLERANCE", -1.0)
    ended = tlcli("export", str(run), "--to", "timm", "--output", "folder")
    assert ended.code == 1
    assert "nothing was written" in ended.err
    assert list(tmp_path.iterdir()) == []


def test_help_and_completion(tlcli: Tlcli, tmp_path: Path) -> None:
    text = tlcli("export", "--help").out
    assert text.count("  tlcli export outputs/DATE/TIME --to ") == 2
    assert all(name in text for name in FILES)
    assert max(map(len, text.splitlines())) < 80
    (tmp_path / "outputs/2026-11-24/10-15-00").mkdir(parents=True)
    (tmp_path / "outputs/2026-11-24/10-15-00/run.json").write_text("{}")
    assert "outputs/2026-11-24/10-15-00 " in candidates("tlcli export ")
    assert candidates("tlcli export x --to ") == [f"{name} " for name in FILES]
    assert "--output " in candidates("tlcli export x --to onnx --")
