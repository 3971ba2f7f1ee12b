"""Fixtures of the tests of the data layer."""

import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.data.samples import save_image


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., Path]:
    """make_folder({"train/cats": 3, ...}) -> a folder "photos" with so many different images in each sub-folder."""

    def make(counts: dict[str, int]) -> Path:
        root = tmp_path / "photos"
        for place, n in counts.items():
            (root / place).mkdir(parents=True, exist_ok=True)
            for i in range(n):
                save_image(root / place / f"{i:03}.png", seed=zlib.crc32(f"{place}/{i}".encode()))
        return root

    return make
