"""Heat maps: their maximum is where the class is, in convolutional networks and transformers, whatever the fit."""

from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from tests.conftest import Compose
from tlcli.cli.conf_files import ConfFiles
from tlcli.data.batches import Preprocessing
from tlcli.engine.heat_maps import UNSEEN_BRIGHTNESS, draw_heat_map, heat_map
from tlcli.errors import TlcliError
from tlcli.models.build import build_model
from tlcli.specs import Fit

COLORS = torch.tensor([(220, 40, 40), (40, 200, 60), (50, 70, 230)])


class ColorFinder(nn.Module):
    """The logit of a class is the mean over cells of 8 x 8 pixels of how much its color exceeds the others."""

    def __init__(self) -> None:
        super().__init__()
        cells = nn.Conv2d(3, 3, 8, stride=8, bias=False)
        cells.weight.data = (torch.eye(3) * 3 - 1)[..., None, None].expand(3, 3, 8, 8) / 64
        self.body = nn.Sequential(nn.Sequential(cells, nn.ReLU()))

    def forward(self, images: Tensor) -> Tensor:
        maps: Tensor = self.body(images)
        return maps.mean((2, 3))


class OneMoreBlock(ColorFinder):
    """Has a block on which no logit depends: its output has no gradients, or it is tokens without those of patches."""

    num_prefix_tokens = 3

    def __init__(self, *, has_gradients: bool) -> None:
        super().__init__()
        self.last = nn.Sequential(nn.Flatten(2) if has_gradients else nn.Identity())
        self.has_gradients = has_gradients

    def forward(self, images: Tensor) -> Tensor:
        maps: Tensor = self.body(images)
        self.last(maps if self.has_gradients else maps.detach())
        return maps.mean((2, 3))


def picture(height: int, width: int, top: int, left: int, label: int) -> np.ndarray:
    """Return gray noise with a square of 40 pixels in the color of a class."""
    pixels = np.random.default_rng(0).integers(60, 120, (height, width, 1)).repeat(3, axis=2)
    pixels[top : top + 40, left : left + 40] = COLORS[label]
    return pixels.astype(np.uint8)


@pytest.mark.parametrize("fit", Fit)
@pytest.mark.parametrize(
    ("height", "width", "top", "left"), [(120, 201, 10, 50), (120, 200, 70, 115), (231, 120, 150, 5), (90, 90, 0, 50)]
)
def test_the_map_is_put_back_at_its_place(fit: Fit, height: int, width: int, top: int, left: int) -> None:
    pixels = picture(height, width, top, left, label=1)
    preprocessing = Preprocessing(64, fit, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    heat = heat_map(ColorFinder(), preprocessing.normalize(preprocessing.apply(pixels)[None]), 1)
    assert heat.shape == (8, 8) and heat.max() == 1 and heat.min() >= 0
    for scale in (1, 2, 0.5):
        size = round(width * scale), round(height * scale)
        drawn = np.asarray(draw_heat_map(Image.fromarray(pixels).resize(size), heat, fit)).astype(int)
        assert drawn.shape[:2] == size[::-1]
        strength = drawn[..., 0] - drawn[..., 2]
        row, column = np.argwhere(strength > strength.max() - 12).mean(axis=0) / scale
        assert abs(row - top - 20) < 10 and abs(column - left - 20) < 10, (row, column)


def test_what_the_network_did_not_see_is_dark() -> None:
    pixels, heat = picture(100, 180, 30, 80, label=0), torch.zeros(4, 4)
    gray = np.asarray(Image.fromarray(pixels).convert("L").convert("RGB")).astype(float)
    for fit in (Fit.squash, Fit.pad):
        assert (np.asarray(draw_heat_map(Image.fromarray(pixels), heat, fit)) == gray).all()
    drawn = np.asarray(draw_heat_map(Image.fromarray(pixels), heat, Fit.crop))
    assert (drawn[:, 40:140] == gray[:, 40:140]).all()
    for outside in (np.s_[:, :40], np.s_[:, 140:]):
        assert np.abs(drawn[outside] - UNSEEN_BRIGHTNESS * gray[outside]).max() < 0.51


def test_a_narrow_picture_has_a_map() -> None:
    for fit in Fit:
        assert draw_heat_map(Image.new("RGB", (300, 1)), torch.ones(3, 3), fit).size == (300, 1)


def test_it_is_the_formula_of_layer_cam_and_changes_nothing() -> None:
    network, image = timm.create_model("test_resnet", num_classes=3).eval(), torch.randn(1, 3, 96, 96)
    network.requires_grad_(False)
    before = network(image)
    activations = network.forward_features(image).requires_grad_()
    (gradient,) = torch.autograd.grad(network.forward_head(activations)[0, 2], activations)
    expected = (gradient.relu() * activations).sum(1)[0].relu()
    with torch.inference_mode():
        found = heat_map(network, image, 2)
    assert torch.allclose(found, expected / expected.max(), atol=1e-5)
    assert torch.equal(network(image), before)
    assert not [module for module in network.modules() if module._forward_hooks]


@pytest.mark.parametrize(
    ("name", "side"),
    [("test_vit", 6), ("test_vit4", 6), ("test_convnext", 3), ("test_maxvit", 3), ("test_mambaout", 3)],
)
def test_kinds_of_networks_have_a_map_that_varies(name: str, side: int) -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"img_size": 96} if "vit" in name else {}
    network = timm.create_model(name, num_classes=3, **options).eval()
    heat = heat_map(network, torch.randn(1, 3, 96, 96), 1)
    assert heat.shape == (side, side) and heat.max() == 1 and heat.std() > 0.01


@pytest.mark.parametrize("has_gradients", [True, False])
def test_a_block_without_gradients_or_tokens_of_patches_is_skipped(has_gradients: bool) -> None:
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    heat = heat_map(OneMoreBlock(has_gradients=has_gradients), image, 1)
    assert heat.max() == 1 and torch.equal(heat, heat_map(ColorFinder(), image, 1))


def test_a_network_without_positions_is_refused() -> None:
    network = nn.Sequential(nn.Sequential(nn.Flatten(), nn.Linear(48, 2)))
    with pytest.raises(TlcliError, match="Sequential has no block with a grid of positions"):
        heat_map(network, torch.randn(1, 3, 4, 4), 0)


@pytest.mark.slow
@pytest.mark.parametrize("backbone", sorted(set(ConfFiles().groups["backbone"]) - {"timm"}))
def test_every_backbone_has_a_map(backbone: str, spec: Compose) -> None:
    chosen = spec(f"backbone={backbone}", "backbone.weights=none")
    classifier = build_model(chosen.backbone, ("a", "b"), size=None, seed=0)
    size = classifier.size
    heat = heat_map(classifier.network.eval(), torch.randn(1, 3, size, size), 1)
    assert 7 <= len(heat) <= 32 and heat.max() == 1 and heat.std() > 0.005


def patches(n: int, size: int, side: int, random: np.random.Generator) -> tuple[Tensor, Tensor, list[tuple[int, int]]]:
    """Return images of noise with a square in the color of their class, labels, and the squares' upper left corners."""
    labels, corners = torch.from_numpy(random.integers(0, 3, n)), random.integers(0, size - side + 1, (n, 2)).tolist()
    noise = random.normal(0, 25, (n, 3, size // 4, size // 4)).repeat(4, axis=2).repeat(4, axis=3)
    images = torch.from_numpy(random.uniform(60, 200, (n, 1, 1, 1)) + noise).float()
    for image, label, (row, column) in zip(images, labels, corners, strict=True):
        part = torch.from_numpy(random.normal(0, 15, (3, side, side)))
        image[:, row : row + side, column : column + side] = COLORS[label][:, None, None] + part
    return (images.clamp(0, 255) / 255 - 0.5) / 0.25, labels, corners


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size", "cell", "n", "epochs", "share"),
    [
        ("tf_efficientnet_lite0", 128, 32, 160, 4, 0.95),  # its ImageNet weights are fine-tuned
        ("test_convnext", 160, 32, 600, 6, 0.95),
        ("test_vit", 96, 16, 600, 12, 0.9),  # with a class token
        ("test_vit2", 96, 16, 600, 12, 0.9),  # mean over its tokens
    ],
)
def test_the_maximum_is_in_the_patch(name: str, size: int, cell: int, n: int, epochs: int, share: float, spec) -> None:
    torch.manual_seed(0)
    random, side = np.random.default_rng(0), cell * 5 // 2
    if name == "tf_efficientnet_lite0":
        network = build_model(spec().backbone, ("a", "b", "c"), size=size, seed=0).network
        network.classifier.weight.data.zero_()  # timm's random ones are large, tlcli starts from a probe
    else:
        network = timm.create_model(name, num_classes=3, **({"img_size": size} if "vit" in name else {}))
    images, labels, _ = patches(n, size, side, random)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=epochs * (n // 32))
    for _ in range(epochs):
        for batch in torch.randperm(n)[: n // 32 * 32].split(32):
            optimizer.zero_grad()
            F.cross_entropy(network(images[batch]), labels[batch]).backward()
            optimizer.step()
            schedule.step()
    network.eval()
    tests, labels, corners = patches(100, size, side, random)
    assert (network(tests).argmax(1) == labels).float().mean() > 0.95
    hits = 0
    for image, label, (row, column) in zip(tests, labels.tolist(), corners, strict=True):
        heat = heat_map(network, image[None], label)
        y, x = ((place + 0.5) * size / len(heat) for place in divmod(int(heat.argmax()), len(heat)))
        hits += row <= y < row + side and column <= x < column + side
    assert hits >= 100 * share, hits
