"""Every command of README.md and CONTRIBUTING.md runs: those of tlcli here, on small data, those of pip in .ci/run."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import make_folder
from tlcli.cli import main

ROOT = Path(__file__).resolve().parents[1]
SMALL = ("epochs=1", "image.size=32", "batch_size=16")
"""What makes a run of the README's short enough for a test; the command itself is as it stands there."""


def commands(document: str) -> Iterator[str]:
    """The lines of its sh blocks."""
    text = (ROOT / document).read_text(encoding="utf-8")
    for block in re.findall(r"```sh\n(.*?)```", text, re.S):
        yield from block.strip().splitlines()


README = list(commands("README.md"))
TRAIN = [line for line in README if line.startswith("tlcli train") and "--resume" not in line]
WITH_RUNS = [line for line in README if line.startswith("tlcli ") and line not in TRAIN]
"""Commands that take a run's directory, and others that train nothing."""
SNIPPETS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with what the README's commands name: photos, source, target, and labels.csv."""
    for place, name in enumerate(("photos", "source", "target")):
        make_folder(tmp_path / name, {f"{name}{k}": 12 for k in range(3)}, seed=place)
    rows = [f"{p.relative_to(tmp_path)},{p.parent.name}" for p in sorted((tmp_path / "photos").rglob("*.png"))]
    (tmp_path / "labels.csv").write_text("\n".join(["path,label", *rows]) + "\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def adapted(line: str, home: Path) -> list[str]:
    """The command's words, smaller; what would be fetched is replaced by the photos and random weights."""
    words = [w for w in shlex.split(line)[1:] if not re.fullmatch(r"[\w.-]+/\d{4}-\d\d-\d\d/[\d-]+", w)]
    if any(w in ("--help", "--cfg") for w in words):
        return words
    run = next(iter(sorted((home / "pretrained").glob("*/*"))), None)
    words = [re.sub(r"^backbone\.weights=pretrained/.*", f"backbone.weights='{run}'", w) for w in words]
    if any(w.startswith("experiment=cifar10") for w in words):
        words += ["dataset=imagefolder", "dataset.root=photos"]
        words += ["backbone.weights=none"] if "experiment=cifar10_resnet18" in words else []
    if not any(w.startswith("dataset.root=") or "dataset.file" in w for w in words):
        words.append("dataset.train_per_class=6")  # digits
    return [*words, *SMALL]


LONGER = (" -m ", "freeze.n=2", "cache.views=", "efficientnet_lite2")
"""What makes a run take seconds, however small its images."""


@pytest.mark.parametrize(
    "line",
    [
        pytest.param(line, marks=pytest.mark.slow) if any(word in line for word in LONGER) else line
        for line in TRAIN
        if "pretrained/" not in line
    ],
)
def test_command_runs(line: str, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(adapted(line, home)) == 0, capsys.readouterr().err
    if "--help" not in line and "--cfg" not in line:
        assert list(home.glob("*/*/*/test.json")) or list(home.glob("*/*/*/*/test.json"))


@pytest.mark.slow
def test_source_then_target(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for line in (line for line in TRAIN if "pretrained" in line):
        assert main(adapted(line, home)) == 0, capsys.readouterr().err
    assert "head: replaced" in capsys.readouterr().out


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with photos, new images, and two finished runs, of EfficientNet-Lite0 and of ResNet-18."""
    home = tmp_path_factory.mktemp("finished")
    make_folder(home / "photos", {f"photos{k}": 12 for k in range(3)}, seed=0)
    make_folder(home / "new", {f"photos{k}": 2 for k in range(3)}, seed=1)
    Image.open(home / "new/photos0/000.png").save(home / "image.jpg")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        for time, backbone in (("TIME", "efficientnet_lite0"), ("TIME2", "resnet18")):
            weights = "backbone.weights=none" if backbone == "resnet18" else "backbone.weights=default"
            words = ["dataset=imagefolder", "dataset.root=photos", f"backbone={backbone}", weights]
            assert main(["train", *words, f"hydra.run.dir=outputs/DATE/{time}", *SMALL]) == 0
    return home


LONG = ("tlcli export", "tlcli inspect")
"""Commands that take seconds, however small the network."""


@pytest.mark.parametrize(
    "line", [pytest.param(line, marks=pytest.mark.slow) if line.startswith(LONG) else line for line in WITH_RUNS]
)
def test_command_runs_after_training(line: str, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "onnx" in line:
        pytest.importorskip("onnxscript")
    monkeypatch.chdir(finished)
    words = shlex.split(line)[1:]
    if words[0] in ("data", "inspect"):
        words.append("image.size=32")
    assert main(words) == 0


@pytest.mark.parametrize("snippet", SNIPPETS, ids=["tlcli", "torch alone"])
def test_snippet_runs(
    snippet: str, finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(finished)
    exec(compile(snippet.replace("new/image.jpg", "image.jpg"), "README.md", "exec"), {})
    assert "photos0" in capsys.readouterr().out


def test_the_other_commands_are_what_ci_and_the_shell_run(capsys: pytest.CaptureFixture[str]) -> None:
    ci = (ROOT / ".ci/run").read_text(encoding="utf-8")
    others = [line for line in README if not line.startswith("tlcli ") and line not in ci]
    assert others == ["source <(tlcli completion bash)"]
    assert main(["completion", "bash"]) == 0
    assert "complete " in capsys.readouterr().out


def test_contributing_does_what_it_says(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (home / "my/backbone").mkdir(parents=True)
    (home / "my/backbone/shufflenet.yaml").write_text(re.findall(r"```yaml\n(.*?)```", text, re.S)[0])
    lines = list(commands("CONTRIBUTING.md"))
    assert len(lines) == 2
    for line in lines:
        small = [] if "--help" in line else ["image.size=32", "dataset.train_per_class=6", "freeze.head_init=random"]
        assert main([*shlex.split(line)[1:], *small]) == 0, capsys.readouterr().err
        assert "shufflenet" in capsys.readouterr().out


def test_contributing_names_what_is_there() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for path in re.findall(r"`((?:tlcli|conf|tests)/[\w/.]+)`", text.replace("NAME.yaml", "")):
        assert (ROOT / path).exists(), path
    homes = {
        "SCHEMAS": "specs.py",
        "_STRATEGIES": "transfer/freeze.py",
        "_AFTER_WARMUP": "engine/schedule.py",
        "SOURCES": "data/dataset.py",
        "COMMANDS": "cli/__init__.py",
    }
    for name, file in homes.items():
        assert name in text
        assert re.search(rf"^{name}\b", (ROOT / "tlcli" / file).read_text(encoding="utf-8"), re.M), name


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_options_that_documents_name_exist(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    for group, option in re.findall(r"\b(dataset|backbone|freeze|optimizer|augment|experiment)=([a-z]\w+)", text):
        if option != "shufflenet":  # the one that CONTRIBUTING adds
            assert (ROOT / "conf" / group / f"{option}.yaml").exists(), f"{group}={option}"
