"""`tlcli export`: what each format loads as gives PyTorch's logits, and nothing is left of an export that does not."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn

from tests.cli.conftest import Tlcli
from tests.conftest import finish, make_folder
from tlcli.data.batches import Preprocessing
from tlcli.data.dataset import load_dataset
from tlcli.errors import TlcliError, UsageError
from tlcli.export import (
    FORMATS,
    METADATA_FILE,
    PAD_NOTE,
    SAMPLE_IMAGES,
    _model_card,
    export,
    export_int8,
    find_samples,
    int8_images,
    prepare,
)
from tlcli.reporter import Reporter
from tlcli.runs.load import LoadedRun, load_run
from tlcli.runs.run_dir import RunDir
from tlcli.specs import Fit

SIZE = 32
SLOW = {"onnx": [pytest.mark.slow]}  # PyTorch's exporter takes some seconds
EACH_FORMAT = [pytest.param(name, marks=SLOW.get(name, ())) for name in FORMATS]
EACH_GRAPH = [pytest.param(f.name, marks=SLOW.get(f.name, ())) for f in FORMATS.values() if f.has_graph]


def small_run(folder: Path, *overrides: str) -> Path:
    """Return the directory of a run of an untrained network on images in the same folder."""
    make_folder(folder / "images/train", {"ants": 10, "bees `x`": 10, "wasps": 10})
    make_folder(folder / "images/test", {"ants": 6, "bees `x`": 6, "wasps": 6}, seed=1)
    words = ["dataset=imagefolder", f"dataset.root='{folder}/images'", "backbone.weights=none", f"image.size={SIZE}"]
    words += ["epochs=1", "freeze=head", "cache.mode=off", "device.precision=fp32", "device.channels_last=false"]
    return finish(folder / "run", *words, *overrides)


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a torchvision network that timm has too."""
    return small_run(tmp_path_factory.mktemp("a place"), "backbone=resnet18")


@pytest.fixture(scope="module")
def loaded(resnet: Path) -> LoadedRun:
    return load_run(resnet)


def images_of_test(run: Path) -> list[Path]:
    return sorted((run.parent / "images/test").rglob("*.png"))


def reference(loaded: LoadedRun, images: list[Path]) -> Tensor:
    """Return PyTorch's logits, image by image."""
    with torch.inference_mode():
        return torch.cat([loaded.model(loaded.preprocess(image)) for image in images])


def exported(loaded: LoadedRun, to: str, folder: Path, *, with_preprocessing: bool = False) -> Path:
    path = folder / FORMATS[to].file_name
    assert export(prepare(loaded, None, with_preprocessing), FORMATS[to], path) <= 1e-4
    return path


def runner(to: str, path: Path) -> Callable[[Tensor], Tensor]:
    """Execute the line that an export prints; return the function from images to logits."""
    names: dict[str, Any] = {}
    exec(FORMATS[to].load.format(path=str(path)), names)
    if to == "onnx":
        return lambda images: torch.from_numpy(names["session"].run(None, {"images": images.numpy()})[0])
    return lambda images: names["model"](images).detach()


@pytest.fixture(scope="module")
def made(loaded: LoadedRun, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """made("pt2"): the run in this format, written once."""

    @cache
    def make(to: str) -> Path:
        for package in FORMATS[to].packages:
            pytest.importorskip(package)
        return exported(replace(loaded, temperature=1.25), to, tmp_path_factory.mktemp(f"to {to}"))

    return make


@pytest.mark.parametrize("to", EACH_FORMAT)
def test_the_printed_line_loads_a_model_with_equal_logits(to: str, loaded: LoadedRun, resnet: Path, made) -> None:
    images, path = images_of_test(resnet), made(to)
    model, expected = runner(to, path), reference(loaded, images)
    for batch in (1, 7, len(images)):  # any batch size
        logits = model(torch.cat([loaded.preprocess(image) for image in images[:batch]]))
        assert logits.shape == (batch, 3)
        assert float((logits - expected[:batch]).abs().max()) <= 1e-4
        assert torch.equal(logits.argmax(1), expected[:batch].argmax(1))
    assert [p.name for p in path.parent.iterdir()] == [FORMATS[to].file_name]  # no draft is left


@pytest.mark.slow
@pytest.mark.parametrize("to", EACH_GRAPH)
def test_with_preprocessing_a_graph_takes_pixels(to: str, loaded: LoadedRun, resnet: Path, tmp_path: Path) -> None:
    for package in FORMATS[to].packages:
        pytest.importorskip(package)
    path, images = exported(loaded, to, tmp_path, with_preprocessing=True), images_of_test(resnet)
    pixels = np.stack([np.asarray(Image.open(image).convert("RGB")) for image in images])  # of the right size already
    logits = runner(to, path)(torch.from_numpy(pixels))
    assert float((logits - reference(loaded, images)).abs().max()) <= 1e-4


@pytest.mark.parametrize("to", EACH_GRAPH)
def test_a_graph_has_metadata_and_nothing_of_this_machine(to: str, loaded: LoadedRun, made) -> None:
    path = made(to)
    if to == "onnx":
        import onnxruntime

        metadata = onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map
        texts = {key: json.loads(metadata[key]) for key in ("classes", "preprocessing", "temperature")}
        metadata = {**metadata, **texts}
    else:
        files = {METADATA_FILE: ""}
        torch.export.load(path, extra_files=files)
        metadata = json.loads(files[METADATA_FILE])
    assert (metadata["classes"], metadata["temperature"]) == (list(loaded.classes), 1.25)
    assert metadata["tta"] == "none"
    assert Preprocessing.from_json(metadata["preprocessing"]) == loaded.preprocessing
    content = path.read_bytes()
    assert str(Path(torch.__file__).parent).encode() not in content
    assert str(path.parent).encode() not in content


# -- timm


@pytest.mark.parametrize("fit", Fit)
def test_timm_prepares_an_image_as_the_run_does(fit: Fit, loaded: LoadedRun, tmp_path: Path) -> None:
    """Within the rounding of another order of cropping and resizing."""
    own = replace(loaded, preprocessing=replace(loaded.preprocessing, fit=fit))
    path = exported(own, "timm", tmp_path)
    model = timm.create_model(f"local-dir:{path}", pretrained=True)
    assert list(model.pretrained_cfg["label_names"]) == list(loaded.classes)
    config = timm.data.resolve_model_data_config(model)
    assert list(config["input_size"]) == [3, SIZE, SIZE]
    row, column = np.mgrid[0:60, 0:90]
    smooth = np.stack([row * 4, column * 2, (row + column)], axis=-1).astype(np.uint8)
    actual = timm.data.create_transform(**config, is_training=False)(Image.fromarray(smooth))
    expected = own.preprocess(smooth)[0]
    card = (path / "README.md").read_text(encoding="utf-8")
    assert (fit is Fit.crop) == ("timm resizes an image before it crops" in card)
    if fit is Fit.pad:  # except for the color of the borders, which the card and the output say
        assert PAD_NOTE in card
        actual, expected = actual[:, 6:26], expected[:, 6:26]
    difference = (actual - expected).abs() * torch.tensor(own.preprocessing.std).view(3, 1, 1) * 255
    assert float(difference.mean()) < 4


@pytest.mark.slow
def test_a_network_of_timm_goes_back_to_timm(tmp_path: Path) -> None:
    run = small_run(tmp_path, "backbone=timm", "backbone.name=mobilenetv3_small_050")
    exported(load_run(run), "timm", tmp_path)


def test_the_model_card_cannot_be_broken_by_a_class(loaded: LoadedRun, resnet: Path, tmp_path: Path) -> None:
    classes = ("a", "```\n# b", "c")
    odd = replace(loaded, classifier=replace(loaded.classifier, classes=classes))
    card = (exported(odd, "timm", tmp_path) / "README.md").read_text(encoding="utf-8")
    assert json.loads(re.findall(r"```json\n(.*?)\n```", card, re.DOTALL)[0]) == list(classes)
    accuracy = json.loads((resnet / "test.json").read_text())["accuracy"]
    assert f"Test accuracy {accuracy:.4f}" in card
    assert str(resnet) not in card and "Divide the logits by the temperature" in card
    uncalibrated = replace(odd, checkpoint="last", info={**loaded.info, "calibration": None})
    card = (exported(uncalibrated, "timm", tmp_path / "2") / "README.md").read_text(encoding="utf-8")
    assert "temperature" not in card and "the weights of the kept epoch were tested." in card
    assert "temperature" not in _model_card(replace(odd, checkpoint="last", is_kept=False), "resnet18")
    for tta, is_said in (("flip", True), ("none", False)):
        mirrored = replace(loaded, info={**loaded.info, "tta": tta})
        assert ("mean over each image and its mirror image" in _model_card(mirrored, "resnet18")) is is_said


def test_a_network_that_timm_lacks_is_a_usage_error(loaded: LoadedRun, tmp_path: Path) -> None:
    for name in ("mobilenet_v3_small", "no_such_thing"):
        other = replace(loaded, classifier=replace(loaded.classifier, name=name))
        with pytest.raises(UsageError, match=f"no network with the tensors of torchvision's {name}: use --to onnx"):
            exported(other, "timm", tmp_path)
    assert list(tmp_path.iterdir()) == []


# -- int8


def int8_job(run: Path, spec: Callable[..., Any], with_preprocessing: bool = False) -> Any:
    """Return the job of a run and the images that its model in int8 is calibrated on, judged on, and tested on."""
    dataset = spec("dataset=imagefolder", f"dataset.root='{run.parent}/images'").dataset
    loaded, data = load_run(run), load_dataset(dataset, seed=0, reporter=Reporter())
    return prepare(loaded, None, with_preprocessing), int8_images(loaded, data, Reporter())


@pytest.mark.parametrize(
    ("minimum", "judged"),
    [(200, "15 other training images (the run has no validation images)"), (1, "3 validation images")],
)
def test_int8_is_calibrated_and_judged_on_different_images(minimum: int, judged, resnet, spec, monkeypatch) -> None:
    monkeypatch.setattr("tlcli.data.dataset.MIN_VALIDATION_IMAGES", minimum)
    _, (calibration, held, test) = int8_job(resnet, spec)
    assert held.name == judged and test.name == "18 test images"
    assert torch.equal(held.labels.bincount(), torch.full((3,), len(held.labels) // 3))
    assert calibration.labels.unique().tolist() == [0, 1, 2] and len(calibration.pixels) in (15, 27)
    pairs = {tuple(image.flatten()[:200].tolist()) for image in (*calibration.pixels, *held.pixels)}
    assert len(pairs) == len(calibration.pixels) + len(held.pixels)


def test_int8_needs_the_classes_of_the_run(resnet: Path, spec: Callable[..., Any]) -> None:
    loaded = load_run(resnet)
    dataset = spec("dataset=imagefolder", f"dataset.root='{resnet.parent}/images'").dataset
    data = replace(load_dataset(dataset, seed=0, reporter=Reporter()), classes=("a", *loaded.classes[1:]))
    with pytest.raises(UsageError, match="the classes of imagefolder have changed"):
        int8_images(loaded, data, Reporter())


@pytest.mark.slow
@pytest.mark.parametrize("with_preprocessing", [False, True])
def test_int8_is_a_smaller_model_for_the_same_input(with_preprocessing: bool, resnet: Path, spec, tmp_path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    job, images = int8_job(resnet, spec, with_preprocessing)
    found = export_int8(job, images, tmp_path / "m.onnx", Reporter(), force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]
    assert (tmp_path / "m.onnx").stat().st_size == found.nbytes[1] < 0.3 * found.nbytes[0]
    assert list(found.accuracies) == [images[1].name, images[2].name]
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    logits = session.run(None, {"images": job.inputs.numpy()})[0]
    assert np.corrcoef(logits.ravel(), job.reference.numpy().ravel())[0, 1] > 0.95
    predicted = session.run(None, {"images": job.take(images[2].pixels).numpy()})[0].argmax(axis=1)
    assert (predicted == images[2].labels.numpy()).mean() == found.accuracies[images[2].name][1]
    assert json.loads(session.get_modelmeta().custom_metadata_map["classes"]) == list(job.run.classes)


@pytest.mark.slow
def test_int8_that_loses_too_much_tries_each_method_and_needs_force(resnet: Path, spec, tmp_path, monkeypatch) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr("tlcli.export.MAX_LOSS", -2.0)
    (job, images), notes = int8_job(resnet, spec), list[str]()
    monkeypatch.setattr(Reporter, "note", lambda self, text: notes.append(text))
    words = r"int8 loses .* points on 3 validation images .* nothing was written; --force writes it"
    with pytest.raises(TlcliError, match=words):
        export_int8(job, images, tmp_path / "m.onnx", Reporter(), force=False)
    assert notes == [f"int8: calibrating by {name}" for name in ("MinMax", "Entropy", "Percentile")]
    assert list(tmp_path.iterdir()) == []
    export_int8(job, images, tmp_path / "m.onnx", Reporter(), force=True)
    assert (tmp_path / "m.onnx").exists()


@pytest.mark.slow
def test_the_command_compares_int8_with_float32(resnet: Path, tlcli: Tlcli, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    ended = tlcli("export", str(resnet), "--to", "onnx", "--int8", "--force")
    assert ended.code == 0, ended.err
    assert (resnet / "export/model-int8.onnx").is_file()
    for words in ("images per second", "on 18 test images", "of the bytes", "training images", "InferenceSession"):
        assert words in ended.out


# -- errors


def test_nothing_is_overwritten(loaded: LoadedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def someone_writes(*args: object) -> float:
        (tmp_path / "timm").write_text("mine")
        return 0.0

    monkeypatch.setattr("tlcli.export.compare", someone_writes)  # the file appears while the export is checked
    with pytest.raises(UsageError, match="already exists"):
        exported(loaded, "timm", tmp_path)
    assert (tmp_path / "timm").read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 1
    with pytest.raises(TlcliError, match="cannot write"):
        exported(loaded, "timm", tmp_path / "timm/below")


class Odd(nn.Module):
    """Gives the mean of each channel, but changed if it is exported."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.change = change

    def forward(self, images: Tensor) -> Tensor:
        means = images.mean((2, 3))
        return self.change(means) if torch.compiler.is_exporting() else means


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda means: means + 1e-3, r"by more than 0\.0001: by 0\.001; nothing was written"),
        (lambda means: means if means.sum() > 0 else -means, "cannot write this network as pt2"),
    ],
)
def test_a_network_that_computes_something_else_is_removed(change, message, loaded, tmp_path) -> None:
    odd = replace(loaded, classifier=replace(loaded.classifier, network=Odd(change)))
    with pytest.raises(TlcliError, match=message) as caught:
        exported(odd, "pt2", tmp_path)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


# -- the images of the check


def test_samples_are_test_images_as_the_network_sees_them(loaded: LoadedRun, resnet: Path, tmp_path, spec) -> None:
    dataset = spec("dataset=imagefolder", f"dataset.root='{resnet.parent}/images'").dataset
    images, source = find_samples(loaded, dataset)
    assert source == f"{SAMPLE_IMAGES} test images of the run"
    assert torch.equal(loaded.preprocessing.normalize(images[:1]), loaded.preprocess(images_of_test(resnet)[0]))
    gone = spec("dataset=cifar10", f"dataset.root='{tmp_path}/gone'", "dataset.download=true").dataset
    for other in (gone, spec("dataset=digits").dataset, None):  # the files of the predictions are there
        found, text = find_samples(loaded, other)
        assert (text, torch.equal(found, images)) == (source, True)
    assert list(tmp_path.iterdir()) == []  # nothing is downloaded


# -- the command line


@pytest.mark.slow
def test_it_is_told_that_the_test_had_mirror_images(resnet: Path, tlcli: Tlcli, tmp_path: Path) -> None:
    shutil.copytree(resnet, tmp_path / "run", ignore=shutil.ignore_patterns("export"))
    RunDir(tmp_path / "run").update(tta="flip")
    assert "mirror image (tta=flip)" in tlcli("export", str(tmp_path / "run"), "--to", "pt2").out


def test_export_into_the_run_says_what_it_did(resnet: Path, tlcli: Tlcli, tmp_path: Path) -> None:
    ended = tlcli("export", str(resnet), "--to", "timm", "--checkpoint=last")
    assert ended.code == 0, ended.err
    folder = resnet / "export/timm"
    lines = dict(re.split(r" {2,}", line, maxsplit=1) for line in ended.out.splitlines() if not line.startswith(" "))
    assert list(lines) == ["wrote", "holds", "checked", "load it"]
    assert lines["wrote"].startswith(f"{folder} (44.8 MB)")
    assert f"{SAMPLE_IMAGES} test images of the run: every class equal" in lines["checked"]
    exec(lines["load it"], {})
    assert "Weights of the last epoch" in (folder / "README.md").read_text(encoding="utf-8")
    again = tlcli("export", str(resnet), "--to=timm")
    assert again.code == 2
    assert "already exists: choose another --output" in again.err


def test_a_missing_package_is_reported_before_anything_is_loaded(tlcli: Tlcli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tlcli.export.find_spec", lambda name: None)
    ended = tlcli("export", "nowhere", "--to", "onnx")
    message = "tlcli export: --to onnx needs onnx, onnxscript, onnxruntime: pip install 'tlcli[export]'\n"
    assert (ended.code, ended.err) == (2, message)
