"""Near duplicates: the same picture in another size, format or brightness is one; another picture is none."""

import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from tlcli.data import near
from tlcli.data.near import ALIKE, RADIUS, SMALLEST, coefficients, hashes, joined, near_pairs, thumbnail

Change = Callable[[Image.Image], Image.Image]


def picture(seed: int, width: int = 160, height: int = 120) -> Image.Image:
    """Smooth blobs of light and dark, as photographs have them."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (7, 9, 3), dtype=np.uint8)
    fine = Image.fromarray(random.integers(0, 256, (30, 40, 3), dtype=np.uint8)).resize((width, height))
    return Image.blend(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), fine, 0.25)


def reencoded(image: Image.Image, quality: int, form: str = "JPEG") -> Image.Image:
    stream = io.BytesIO()
    image.save(stream, form, quality=quality)
    return Image.open(stream).convert("RGB")


CHANGES: dict[str, Change] = {
    "jpeg": lambda image: reencoded(image, 40),
    "webp": lambda image: reencoded(image, 60, "WEBP"),
    "half": lambda image: image.resize((image.width // 2, image.height // 2)),
    "double": lambda image: image.resize((image.width * 2, image.height * 2)),
    "squashed": lambda image: image.resize((100, 100)),
    "gray": lambda image: image.convert("L").convert("RGB"),
    "brighter": lambda image: image.point(lambda value: min(255, int(value * 1.15) + 10)),
}


def pairs(*pictures: Image.Image) -> list[tuple[int, int]]:
    thumbnails = np.stack([thumbnail(np.asarray(image)) for image in pictures])
    return [(i, j) for i, j, _ in near_pairs(thumbnails, coefficients(thumbnails))]


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_the_same_picture_is_found(change: Change) -> None:
    pictures = [picture(seed) for seed in range(30)]
    found = pairs(*pictures, *map(change, pictures))
    assert sorted(found) == [(i, i + 30) for i in range(30)]


def test_pictures_with_one_mean_colour_are_not_alike() -> None:
    """As different photographs on the same plain background are."""
    found = []
    for seed in range(40):
        values = np.asarray(picture(seed), dtype=np.float32)
        same = values - values.mean(axis=(0, 1)) + 128
        found.append(Image.fromarray(same.clip(0, 255).astype(np.uint8)))
    assert pairs(*found) == []


def test_another_thing_on_the_same_plain_background_is_not_alike() -> None:
    scenes = []
    for seed in range(60):
        scene = Image.new("RGB", (160, 120), "white")
        scene.paste(picture(seed, 60, 60), (50, 30))
        scenes.append(scene)
    assert pairs(*scenes) == []


def test_plain_pictures_are_left_out() -> None:
    """What is in a wall of a few shades says nothing, even where it is the same."""
    shade = np.asarray(picture(0).convert("L")) // 64 + 200
    walls = [Image.fromarray(shade), Image.fromarray(shade - 50)]
    noise = np.random.default_rng(0).integers(200, 203, (10, 64, 64), dtype=np.uint8)
    assert pairs(*(image.convert("RGB") for image in [*walls, *map(Image.fromarray, noise)])) == []


def test_an_image_without_enough_in_it_has_no_thumbnail() -> None:
    assert thumbnail(np.zeros((SMALLEST - 1, 100, 3), dtype=np.uint8)) is None
    assert thumbnail(np.zeros((SMALLEST, 100, 3), dtype=np.uint8)).shape == (32, 32)


def test_the_search_finds_what_comparing_all_pairs_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where many hashes have a word in common."""
    monkeypatch.setattr(near, "alike_inside", lambda one, other: True)
    random = np.random.default_rng(0)
    bases = random.integers(0, 256, (8, 32, 32))
    noisy = np.repeat(bases, 25, axis=0) + random.normal(0, 90, (200, 32, 32)) * random.random((200, 1, 1))
    thumbnails = noisy.clip(0, 255).astype(np.uint8)
    found = coefficients(thumbnails)
    bits = np.unpackbits(hashes(found).view(np.uint8), axis=1).astype(int)
    apart = bits @ (1 - bits).T + (1 - bits) @ bits.T
    wanted = {(i, j) for i, j in np.argwhere((apart <= RADIUS) & (found @ found.T >= ALIKE)).tolist() if i < j}
    got = [(i, j) for i, j, _ in near_pairs(thumbnails, found)]
    assert len(wanted) > 100
    assert len(got) == len(set(got))
    assert set(got) == wanted


def test_groups_hang_together() -> None:
    assert joined([(3, 5), (0, 9), (5, 7), (9, 8)]) == [[0, 8, 9], [3, 5, 7]]
    assert joined([]) == []
