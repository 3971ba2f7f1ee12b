"""Exports: what each format loads as gives PyTorch's logits, and nothing is left of one that does not."""

import json
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor, nn

from tlcli.data.preprocess import Preprocessing
from tlcli.errors import TlcliError, UsageError
from tlcli.exporting import FILES, check_format
from tlcli.exporting.check import Check, compare
from tlcli.exporting.export import Exported, export
from tlcli.exporting.graphs import FACTS, Normalised
from tlcli.exporting.samples import COUNT, Samples, find_samples
from tlcli.models.weights import read_weights
from tlcli.runs.load import LoadedRun, load_run
from tlcli.runs.run_dir import read_json
from tlcli.specs import Fit

GRAPHS = ("torchscript", "pt2")
SIZE = 32


def images_of_test(run: Path) -> list[Path]:
    """The files of the run's test set."""
    return sorted((run.parent / "images/test").rglob("*.png"))


def reference(loaded: LoadedRun, images: list[Path]) -> Tensor:
    """PyTorch's logits, image by image."""
    with torch.inference_mode():
        return torch.cat([loaded.model(loaded.preprocess(image)) for image in images])


def exported(loaded: LoadedRun, to: str, folder: Path, **options: Any) -> Exported:
    return export(loaded, to, find_samples(loaded, None), output=folder / FILES[to], **options)


def told(line: str) -> dict[str, Any]:
    """The names after the line that an export prints was executed."""
    names: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch on the age of TorchScript
        exec(line, names)
    return names


def runner(to: str, names: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    """Images to logits, of what a loaded export is."""
    if to == "onnx":
        session = names["session"]
        return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])

    def run(images: Tensor) -> Tensor:
        with torch.inference_mode():
            return names["model"](images)  # type: ignore[no-any-return]

    return run


SLOW_ONNX = pytest.param("onnx", marks=pytest.mark.slow)
"""Each takes PyTorch's exporter some seconds."""


@pytest.fixture(scope="module")
def made(loaded: LoadedRun, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """made("pt2"): the run in this format, which is made once."""
    done: dict[str, Exported] = {}

    def make(to: str) -> Exported:
        if to == "onnx":
            pytest.importorskip("onnxscript")
            pytest.importorskip("onnxruntime")
        if to not in done:
            done[to] = exported(replace(loaded, temperature=1.25), to, tmp_path_factory.mktemp(f"to {to}"))
        return done[to]

    return make


@pytest.mark.parametrize("to", [SLOW_ONNX, "torchscript", "pt2", "safetensors", "timm"])
def test_the_line_that_is_printed_loads_a_model_with_equal_logits(
    to: str, loaded: LoadedRun, resnet: Path, made: Callable[[str], Exported]
) -> None:
    images, done = images_of_test(resnet), made(to)
    assert done.path.name == FILES[to]
    assert done.check.images == f"{COUNT} of the run's test images"
    model, wanted = runner(to, told(done.load)), reference(loaded, images)
    for batch in (1, 7, len(images)):  # any size of a batch
        inputs = torch.cat([loaded.preprocess(image) for image in images[:batch]])
        found = model(inputs)
        assert found.shape == (batch, 3)
        assert float((found - wanted[:batch]).abs().max()) <= 1e-4
        assert torch.equal(found.argmax(1), wanted[:batch].argmax(1))
    assert [p.name for p in done.path.parent.iterdir()] == [FILES[to]]  # no draft is left


def pixels(image: Path) -> np.ndarray:
    """As somebody without tlcli has an image: these ones have the right size."""
    return np.asarray(Image.open(image).convert("RGB"))


@pytest.mark.parametrize("to", [SLOW_ONNX, "torchscript", pytest.param("pt2", marks=pytest.mark.slow)])
def test_with_preprocessing_a_graph_takes_pixels(to: str, loaded: LoadedRun, resnet: Path, tmp_path: Path) -> None:
    if to == "onnx":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    done, images = exported(loaded, to, tmp_path, with_preprocessing=True), images_of_test(resnet)
    assert "uint8 (N, 32, 32, 3)" in done.holds
    found = runner(to, told(done.load))(torch.from_numpy(np.stack([pixels(image) for image in images])))
    assert float((found - reference(loaded, images)).abs().max()) <= 1e-4


def test_what_normalises_inside_is_the_same_arithmetic() -> None:
    own = Preprocessing(4, Fit.crop, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    inside = Normalised(nn.Identity(), own.mean, own.std)
    assert torch.equal(inside(images.permute(0, 2, 3, 1)), own.normalise(images))


@pytest.mark.slow
def test_metadata_of_onnx(loaded: LoadedRun, made: Callable[[str], Exported]) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    facts = onnxruntime.InferenceSession(made("onnx").path).get_modelmeta().custom_metadata_map
    assert json.loads(facts["classes"]) == ["ants", "bees `x`", "wasps"]
    assert Preprocessing.from_json(json.loads(facts["preprocessing"])) == loaded.preprocessing
    assert float(facts["temperature"]) == 1.25
    assert facts["backbone"] == "resnet18"


@pytest.mark.parametrize("to", GRAPHS)
def test_metadata_of_graphs(to: str, loaded: LoadedRun, made: Callable[[str], Exported]) -> None:
    files = {FACTS: ""}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if to == "pt2":
            torch.export.load(made(to).path, extra_files=files)
        else:
            torch.jit.load(made(to).path, _extra_files=files)
    facts = json.loads(files[FACTS])
    assert (facts["classes"], facts["temperature"]) == (list(loaded.classes), 1.25)
    assert Preprocessing.from_json(facts["preprocessing"]) == loaded.preprocessing


def test_safetensors_has_metadata_and_is_a_place_to_train_from(loaded: LoadedRun, made: Any) -> None:
    with safe_open(made("safetensors").path, framework="pt") as content:
        facts = json.loads(content.metadata()["tlcli"])
    assert (facts["classes"], facts["temperature"]) == (list(loaded.classes), 1.25)
    assert read_weights(made("safetensors").path).classes == loaded.classes


@pytest.mark.parametrize("to", [SLOW_ONNX, *GRAPHS])
def test_no_file_tells_of_this_machine(to: str, made: Callable[[str], Exported]) -> None:
    path = made(to).path
    content = path.read_bytes()
    assert str(Path(torch.__file__).parent).encode() not in content
    assert str(path.parent).encode() not in content


# -- timm


def test_timm_folder_says_how_images_are_prepared(mobilenet: Path, tmp_path: Path) -> None:
    loaded, images = load_run(mobilenet), images_of_test(mobilenet)
    folder = exported(loaded, "timm", tmp_path).path
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    config = timm.data.resolve_model_data_config(model)
    assert list(config["input_size"]) == [3, SIZE, SIZE]
    assert config["mean"] == pytest.approx(loaded.preprocessing.mean)
    assert (config["interpolation"], config["crop_pct"], config["crop_mode"]) == ("bilinear", 1.0, "center")
    assert list(model.pretrained_cfg["label_names"]) == list(loaded.classes)
    transform = timm.data.create_transform(**config, is_training=False)
    with torch.inference_mode():
        found = model(torch.stack([transform(Image.open(image).convert("RGB")) for image in images]))
    assert float((found - reference(loaded, images)).abs().max()) <= 1e-4


@pytest.mark.parametrize("fit", Fit)
def test_timm_prepares_an_image_as_the_run_does(fit: Fit, loaded: LoadedRun, tmp_path: Path) -> None:
    """Within the rounding of another order of cutting and resizing."""
    own = replace(loaded, preprocessing=replace(loaded.preprocessing, fit=fit))
    folder = exported(own, "timm", tmp_path).path
    config = timm.data.resolve_model_data_config(timm.create_model(f"local-dir:{folder}", pretrained=True))
    row, column = np.mgrid[0:60, 0:90]
    smooth = np.stack([row * 4, column * 2, (row + column)], axis=-1).astype(np.uint8)
    found = timm.data.create_transform(**config, is_training=False)(Image.fromarray(smooth))
    if fit is Fit.pad:  # but for the colour of the borders, which is said
        note = exported(own, "timm", tmp_path / "again").note
        assert note is not None
        assert note in (folder / "README.md").read_text(encoding="utf-8")
        found, wanted = found[:, 6:26], own.preprocess(smooth)[0, :, 6:26]
    else:
        wanted = own.preprocess(smooth)[0]
    away = (found - wanted).abs() * torch.tensor(own.preprocessing.std).view(3, 1, 1) * 255
    assert float(away.mean()) < 4


def test_model_card(resnet: Path, tmp_path: Path) -> None:
    loaded = load_run(resnet)
    card = (exported(loaded, "timm", tmp_path).path / "README.md").read_text(encoding="utf-8")
    accuracy = read_json(resnet / "test.json")["accuracy"]
    assert f"Test accuracy {accuracy:.4f}" in card
    assert json.loads(re.findall(r"```json\n(.*?)\n```", card, re.S)[0]) == list(loaded.classes)
    assert str(resnet) not in card
    last = (exported(load_run(resnet, "last"), "timm", tmp_path / "last").path / "README.md").read_text("utf-8")
    assert "Test accuracy" not in last


def test_a_class_cannot_end_the_cards_code_block(loaded: LoadedRun, tmp_path: Path) -> None:
    odd = replace(loaded, classifier=replace(loaded.classifier, classes=("a", "```\n# b", "c")))
    card = (exported(odd, "timm", tmp_path).path / "README.md").read_text(encoding="utf-8")
    assert json.loads(re.findall(r"```json\n(.*?)\n```", card, re.S)[0]) == ["a", "```\n# b", "c"]


def test_what_timm_lacks_is_a_usage_error(loaded: LoadedRun, tmp_path: Path) -> None:
    for name in ("mobilenet_v3_small", "no_such_thing"):
        other = replace(loaded, classifier=replace(loaded.classifier, name=name))
        with pytest.raises(UsageError, match=f"no network with the tensors of torchvision's {name}: choose --to onnx"):
            exported(other, "timm", tmp_path)
    assert list(tmp_path.iterdir()) == []


# -- what goes wrong


def test_nothing_is_overwritten(loaded: LoadedRun, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("mine")
    with pytest.raises(UsageError, match="is there already and stays as it is"):
        exported(loaded, "safetensors", tmp_path)
    assert (tmp_path / "model.safetensors").read_text() == "mine"
    (tmp_path / "timm").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="already"):
        exported(loaded, "timm", tmp_path)


def test_what_is_there_is_refused_before_any_work(
    loaded: LoadedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model.onnx").write_text("mine")
    monkeypatch.setattr("tlcli.exporting.export.logits_of", None)
    with pytest.raises(UsageError, match="already"):
        exported(loaded, "onnx", tmp_path)


def test_what_appears_meanwhile_stays(loaded: LoadedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def meanwhile(*args: object) -> Check:
        (tmp_path / "model.safetensors").write_text("mine")
        return Check("no images", 0.0)

    monkeypatch.setattr("tlcli.exporting.export.compare", meanwhile)
    with pytest.raises(UsageError, match="already"):
        exported(loaded, "safetensors", tmp_path)
    assert (tmp_path / "model.safetensors").read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 1


def test_an_output_that_cannot_be_made(loaded: LoadedRun, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        exported(loaded, "safetensors", tmp_path / "file/below")


class Odd(nn.Module):
    """Gives something else once it is traced."""

    def __init__(self, network: nn.Module, off: float) -> None:
        super().__init__()
        self.network, self.off = network, off

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images)
        return logits + self.off if torch.jit.is_tracing() else logits


def with_network(loaded: LoadedRun, network: nn.Module) -> LoadedRun:
    architecture = replace(loaded.classifier.architecture, network=network)
    return replace(loaded, classifier=replace(loaded.classifier, architecture=architecture))


def test_another_result_is_refused_and_removed(loaded: LoadedRun, tmp_path: Path) -> None:
    with pytest.raises(TlcliError, match=r"logits differ by up to 0.001 \(0.0001 is allowed\)"):
        exported(with_network(loaded, Odd(loaded.model, 1e-3)), "torchscript", tmp_path / "export")
    assert not (tmp_path / "export").exists() or list((tmp_path / "export").iterdir()) == []
    assert exported(with_network(loaded, Odd(loaded.model, 1e-6)), "torchscript", tmp_path).check.largest <= 1e-4


class Branches(nn.Module):
    """Asks for a value: no exporter can follow that."""

    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3)) if images.sum() > 0 else images.amax((2, 3))


def test_a_network_that_is_no_graph_is_one_line(loaded: LoadedRun, tmp_path: Path) -> None:
    with pytest.raises(TlcliError, match="this network cannot be written as pt2") as caught:
        exported(with_network(loaded, Branches()), "pt2", tmp_path)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("found", [[[0.0, 1.0]], [[float("nan"), 0.0]], [[1.0, 0.0, 0.0]], [[1.00005, 1.0]]])
def test_compare_refuses(found: list[list[float]]) -> None:
    wanted = torch.tensor([[1.00001, 1.00003]]) if found == [[1.00005, 1.0]] else torch.tensor([[1.0, 0.0]])
    with pytest.raises(TlcliError, match="nothing was written"):
        compare(lambda x: torch.tensor(found), torch.zeros(1, 1), wanted, "1 image", "onnx")


def test_compare_minds_what_one_image_alone_gives() -> None:
    with pytest.raises(TlcliError):
        compare(lambda x: x + len(x), torch.zeros(2, 2), torch.full((2, 2), 2.0), "2 images", "onnx")


# -- the images of the check, and the packages


def test_images_that_are_not_here_are_random_and_said_to_be(
    loaded: LoadedRun, tmp_path: Path, spec: Callable[..., Any]
) -> None:
    away = replace(loaded, path=tmp_path)
    found = find_samples(away, spec("dataset=imagefolder", f"dataset.root='{tmp_path}/gone'"))
    assert found.source == f"{COUNT} random images, as the run's test images are not here"
    assert found.images.shape == (COUNT, 3, SIZE, SIZE)


def test_images_in_memory_are_found_by_the_spec(loaded: LoadedRun, tmp_path: Path, spec: Callable[..., Any]) -> None:
    found = find_samples(replace(loaded, path=tmp_path), spec("dataset=digits"))
    assert found.source == f"{COUNT} of the run's test images"
    assert found.images.dtype == torch.uint8


def test_downloads_are_never_tried(
    loaded: LoadedRun, tmp_path: Path, spec: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def load(data: Any, **options: object) -> None:
        asked.append(data.download)
        raise UsageError("not here")

    monkeypatch.setattr("tlcli.exporting.samples.load_dataset", load)
    wanted = spec("dataset=cifar10", f"dataset.root='{tmp_path}'", "dataset.download=true")
    assert "random" in find_samples(replace(loaded, path=tmp_path), wanted).source
    assert asked == [False]


def test_samples_are_what_the_network_sees(loaded: LoadedRun, resnet: Path) -> None:
    found = find_samples(loaded, None)
    assert isinstance(found, Samples)
    assert torch.equal(loaded.preprocessing.normalise(found.images[:1]), loaded.preprocess(images_of_test(resnet)[0]))


def test_formats_and_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="Did you mean 'onnx'"):
        check_format("onx", with_preprocessing=False)
    with pytest.raises(UsageError, match="timm holds weights and no graph"):
        check_format("timm", with_preprocessing=True)
    monkeypatch.setattr("tlcli.exporting.find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(UsageError, match=r"--to onnx needs onnxscript: pip install 'tlcli\[export\]'"):
        check_format("onnx", with_preprocessing=False)
    check_format("pt2", with_preprocessing=True)


def test_looking_at_formats_leaves_torch_out() -> None:
    code = "import sys, tlcli.exporting, tlcli.cli.export; print([m for m in ('torch', 'timm') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
