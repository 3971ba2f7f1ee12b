"""Every command of README.md, docs/ and CONTRIBUTING.md runs: tlcli's here on small data, pip's in .ci/run."""

import re
import shlex
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec import structs
from PIL import Image

from tests.conftest import finish, make_folder, slow
from tests.data.samples import pack_parquet, pack_tar
from tlcli.cli import COMMANDS, main, tune

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
SMALL = ("epochs=1", "image.size=32", "batch_size=16")
"""Overrides that make a run short enough for a test; the rest of the command is as on the page."""


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def commands(page: str) -> Iterator[str]:
    """Yield the lines of the sh blocks of a page."""
    for block in re.findall(r"```sh\n(.*?)```", text_of(page), re.S):
        yield from block.strip().splitlines()


LINES = list(dict.fromkeys(line for page in PAGES for line in commands(page)))
FROM_A_RUN = ("--resume", "backbone.weights=outputs")
TRAIN = [line for line in LINES if line.startswith("tlcli train") and not any(word in line for word in FROM_A_RUN)]
SOURCE_TARGET = [line for line in TRAIN if "pretrained" in line]
AFTER_TRAINING = [line for line in LINES if line.startswith("tlcli ") and line not in TRAIN]
SNIPPETS = [snippet for page in PAGES for snippet in re.findall(r"```python\n(.*?)```", text_of(page), re.S)]


def marked(lines: list[str], *words: str) -> list[object]:
    """Mark lines as slow that contain one of the words, and those that are not in README.md, unless they print help."""
    own = {*commands("README.md")}
    quick = [line for line in lines if (line in own or "--help" in line) and not any(word in line for word in words)]
    return [*quick, *slow(*(line for line in lines if line not in quick))]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Enter a folder with what the commands name: photos, source, target, labels.csv, flowers and shards."""
    for number, name in enumerate(("photos", "source", "target")):
        make_folder(tmp_path / name, {f"{name}{k}": 12 for k in range(3)}, seed=number)
    rows = [f"{p.relative_to(tmp_path)},{p.parent.name}" for p in sorted((tmp_path / "photos").rglob("*.png"))]
    (tmp_path / "labels.csv").write_text("\n".join(["path,label", *rows]) + "\n")
    pack_parquet(tmp_path / "photos", tmp_path / "flowers/train-00000.parquet")
    pack_tar(tmp_path / "photos", tmp_path / "shards/train-00000.tar")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def adapted(line: str, home: Path) -> list[str]:
    """Return the words of a command with small settings; downloads are replaced by the photos and random weights."""
    words = shlex.split(line)[1:]
    if any(word in ("--help", "--cfg") for word in words):
        return words
    run = next(iter(sorted((home / "pretrained").glob("*/*"))), None)
    words = [re.sub(r"^backbone\.weights=pretrained/.*", f"backbone.weights='{run}'", word) for word in words]
    if any(word.startswith("experiment=cifar10") for word in words):
        words += ["dataset=imagefolder", "dataset.root=photos"]
        words += ["backbone.weights=none"] if "experiment=cifar10_resnet18" in words else []
    if not any(word.startswith("dataset.root=") or "dataset.file" in word for word in words):
        words.append("dataset.train_per_class=6")  # digits
    return [*words, *SMALL]


@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize(
    "line", marked([line for line in TRAIN if line not in SOURCE_TARGET], " -m ", "freeze.n=2", "lite2")
)
def test_command_runs(line: str, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if "launcher=joblib" in line:
        pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    assert main(adapted(line, home)) == 0, capsys.readouterr().err
    if "--help" not in line and "--cfg" not in line:
        file = "best/val_predictions.safetensors" if "folds=" in line else "test.json"
        assert list(home.glob(f"*/*/*/{file}")) or list(home.glob(f"*/*/*/*/{file}"))


@pytest.mark.slow
def test_source_then_target(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(SOURCE_TARGET) == 2
    for line in SOURCE_TARGET:
        assert main(adapted(line, home)) == 0, capsys.readouterr().err
    assert "head: replaced" in capsys.readouterr().out


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with photos, new images, and two finished runs, of EfficientNet-Lite0 and of ResNet-18."""
    home = tmp_path_factory.mktemp("finished")
    make_folder(home / "photos", {f"photos{k}": 12 for k in range(3)}, seed=0)
    make_folder(home / "more", {f"photos{k}": 12 for k in range(4)}, seed=2)
    make_folder(home / "new", {f"photos{k}": 2 for k in range(3)}, seed=1)
    Image.open(home / "new/photos0/000.png").save(home / "image.jpg")
    words = ("dataset=imagefolder", "dataset.root=photos", *SMALL)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setattr("tlcli.engine.metrics.MIN_KNOWN", 1)  # a threshold for --reject
        finish(Path("outputs/DATE/TIME"), *words)
        finish(Path("outputs/DATE/TIME2"), *words, "backbone=resnet18", "backbone.weights=none")
    return home


@pytest.mark.parametrize("line", marked(AFTER_TRAINING, "tlcli export", "tlcli tune"))
def test_command_runs_after_training(line: str, finished: Path, monkeypatch, capsys) -> None:
    if "onnx" in line:
        pytest.importorskip("onnxscript")
    if "parquet" in line:
        pytest.importorskip("pyarrow")
    monkeypatch.chdir(finished)
    words = shlex.split(line)[1:]
    if words[0] == "train" and "--resume" not in words:
        words += SMALL
    if "--int8" in words:
        words.append("--force")  # one of few images is more than a point
    if words[0] in ("data", "inspect") or "fill" in words:
        words.append("image.size=32")
    if words[0] == "tune":  # one trial
        words += ["image.size=32", "min_steps=2", "min_epochs=1"]
        read = tune.read_tune_spec
        monkeypatch.setattr(tune, "read_tune_spec", lambda *args: structs.replace(read(*args), trials=1, sizes=()))
    if words[0] == "demo":  # it would not end; tests/cli/test_demo.py opens the page
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            words += ["--port", str(free.getsockname()[1])]
        monkeypatch.setattr("uvicorn.Server.run", lambda *args, **options: None)
    assert main(words) == 0, capsys.readouterr().err


@pytest.mark.parametrize("snippet", SNIPPETS, ids=["tlcli", "torch alone"])
def test_snippet_runs(snippet: str, finished: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(finished)
    exec(compile(snippet.replace("new/image.jpg", "image.jpg"), "README.md", "exec"), {})
    assert "photos0" in capsys.readouterr().out


def test_the_other_commands_are_run_by_ci() -> None:
    assert [line for line in LINES if not line.startswith("tlcli ") and line not in text_of(".ci/run")] == []


@pytest.mark.usefixtures("no_plots")
def test_contributing_adds_a_backbone(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "my/backbone").mkdir(parents=True)
    text = re.findall(r"```yaml\n(.*?)```", text_of("CONTRIBUTING.md"), re.S)[0]
    (home / "my/backbone/shufflenet.yaml").write_text(text)
    lines = list(commands("CONTRIBUTING.md"))
    assert len(lines) == 2
    for line in lines:
        small = [] if "--help" in line else ["image.size=32", "dataset.train_per_class=6", "freeze.head_init=random"]
        assert main([*shlex.split(line)[1:], *small]) == 0, capsys.readouterr().err
        assert "shufflenet" in capsys.readouterr().out


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md"])
def test_paths_and_options_of_a_page_exist(page: str) -> None:
    text = text_of(page)
    for path in re.findall(r"`((?:tlcli|conf|tests|benchmarks)/[\w/.]+)`", text.replace("NAME.yaml", "")):
        assert (ROOT / path).exists(), path
    for target in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (ROOT / page).parent.joinpath(target).exists(), target
    for group, option in re.findall(r"\b(dataset|backbone|freeze|optimizer|augment|experiment)=([a-z]\w+)", text):
        if option not in ("shufflenet", "file"):
            assert (ROOT / "conf" / group / f"{option}.yaml").exists(), f"{group}={option}"


def test_readme_is_short_and_lists_every_command() -> None:
    readme = text_of("README.md")
    assert len(readme.splitlines()) <= 200
    assert all(re.search(rf"^\| `{name}\b", readme, re.M) for name in COMMANDS)
