"""A run is loaded as it was, from what it recorded and no more; what cannot be loaded is one line."""

import shutil
import socket
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import tlcli
from tests.conftest import TINY, finish, slow
from tlcli.engine.metrics import ENERGY
from tlcli.errors import UsageError
from tlcli.models.tensorfile import read_tensors, write_tensors
from tlcli.runs.load import load_run
from tlcli.runs.run_dir import RunDir, read_json, read_predictions, write_json

BACKBONES = {
    "lite": ("backbone=efficientnet_lite0",),
    "torchvision": ("backbone=mobilenet_v3_small", "epochs=4", "keep_best=loss"),
    "timm": TINY,
    "vit": ("backbone=timm", "backbone.name=vit_tiny_patch16_224"),
}
EXACT = ("device.precision=fp32", "cache.mode=off")


@pytest.fixture(scope="module")
def trained(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """trained("timm"): a finished run with random first weights, the same one for all tests."""

    @cache
    def run(kind: str) -> Path:
        words = ["dataset=imagefolder", f"dataset.root='{shapes}'", "image.size=32", "epochs=1", *EXACT]
        words += [*BACKBONES[kind], "backbone.weights=none", "freeze=head"]
        return finish(tmp_path_factory.mktemp("runs") / kind, *words)

    return run


@pytest.fixture
def run(trained: Callable[[str], Path], tmp_path: Path) -> Path:
    """Copy a run, to damage it."""
    return Path(shutil.copytree(trained("torchvision"), tmp_path / "run"))


@pytest.mark.parametrize("kind", ["torchvision", "timm", *slow("lite", "vit")])
def test_the_loaded_network_gives_the_logits_of_the_test(kind: str, trained, monkeypatch) -> None:
    path = trained(kind)
    monkeypatch.setattr(socket.socket, "connect", lambda *args: pytest.fail("it asked the network"))
    loaded = load_run(path)
    recorded = read_predictions(RunDir(path).test_predictions)
    images = torch.cat([loaded.preprocess(name) for name in recorded.names])
    with torch.inference_mode():
        assert torch.allclose(loaded.model(images), recorded.logits, atol=1e-4)
    assert loaded.classes == recorded.classes == ("across", "checks", "down")
    assert not any(module.training for module in loaded.model.modules())
    assert loaded.temperature == read_json(path / "run.json")["calibration"]["temperature"]


def test_an_image_may_be_a_path_a_picture_or_pixels(run: Path, shapes: Path) -> None:
    loaded, file = tlcli.load_run(run), shapes / "test/checks/000.png"
    with Image.open(file) as image:
        found = [loaded.predict(one) for one in (file, str(file), image, np.asarray(image.convert("RGB")))]
    assert found[0] == found[1] == found[2] == found[3]
    assert sum(value for _, value in found[0]) == pytest.approx(1)
    assert [value for _, value in found[0]] == sorted((value for _, value in found[0]), reverse=True)
    assert len(loaded.predict(file, top=2)) == 2


def test_a_run_that_was_tested_with_mirror_images_predicts_with_them(run: Path) -> None:
    class Corner(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images[:, :, 0, 0]  # three colors, of three classes

    def predictions() -> list[dict[str, float]]:
        loaded = load_run(run)
        loaded = replace(loaded, classifier=replace(loaded.classifier, network=Corner()))
        return [dict(loaded.predict(pixels)) for pixels in (image, image[:, ::-1].copy())]

    image = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    plain, mirrored = predictions()
    RunDir(run).update(tta="flip")
    one, other = predictions()
    assert one == pytest.approx(other) != pytest.approx(plain)
    assert plain != pytest.approx(mirrored)


def test_an_explanation_has_the_shape_of_its_picture(run: Path) -> None:
    loaded, pixels = tlcli.load_run(run), np.random.default_rng(0).integers(0, 255, (50, 90, 3), dtype=np.uint8)
    maps = [np.asarray(loaded.explain(pixels, name, side=45)) for name in loaded.classes]
    assert {one.shape for one in maps} == {(25, 45, 3)}
    assert len({one.tobytes() for one in maps}) == 3  # each class has its own
    with pytest.raises(ValueError, match="'nothing' is not a class of"):
        loaded.explain(pixels, "nothing")


def test_probabilities_are_calibrated_and_only_those_of_the_best_epoch(run: Path, shapes: Path) -> None:
    info = read_json(run / "run.json")
    info["calibration"]["temperature"] = 4.0
    write_json(run / "run.json", info)
    loaded = load_run(run)
    x = loaded.preprocess(shapes / "test/down/001.png")
    with torch.inference_mode():
        expected = torch.softmax(loaded.model(x).double() / 4, dim=1)[0].max().item()
    assert loaded.predict(shapes / "test/down/001.png")[0][1] == pytest.approx(expected)
    assert load_run(run, "last").temperature == (4.0 if info["best"]["epoch"] == 4 else 1.0)
    write_json(run / "run.json", {**info, "best": {**info["best"], "epoch": 7}})
    assert load_run(run).temperature == 1.0


def test_the_last_weights_are_calibrated_only_if_they_are_those_that_were_kept(run: Path) -> None:
    files = RunDir(run)
    files.update(calibration={"temperature": 4.0}, unknown={"score": ENERGY, "threshold": 2.0})
    files.unknown_file.unlink(missing_ok=True)
    state, metadata = read_tensors(files.best_checkpoint)
    write_tensors(files.last_checkpoint, state, metadata)
    for interpolated, expected in (({}, (4.0, 2.0, True)), ({"interpolate": 0.5}, (1.0, None, False))):
        write_tensors(files.best_checkpoint, state, {**metadata, **interpolated})
        last = load_run(run, "last")
        assert (last.temperature, last.threshold, last.is_kept) == expected
        assert load_run(run).is_kept
    files.best_checkpoint.write_bytes(b"damaged")
    assert load_run(run, "last").temperature == 1.0


def test_a_run_that_cannot_be_loaded_is_one_line(run: Path) -> None:
    with pytest.raises(UsageError, match=r"no such run directory. Did you mean 'run'"):
        load_run(run.with_name("rum"))
    for path in (run.parent, run / "checkpoints/best.safetensors"):
        with pytest.raises(UsageError, match=rf"not a run directory \(it has no run.json\). Did you mean {run}\?"):
            load_run(path)
    with pytest.raises(UsageError, match="best, last"):
        load_run(run, "first")
    (run / "checkpoints/best.safetensors").unlink()
    RunDir(run).update(status="failed", error="the disk is full")
    words = r"has no checkpoints/best.safetensors; its status is failed \(the disk is full\)$"
    with pytest.raises(UsageError, match=words):
        load_run(run)
