"""Fixtures of all tests: specs composed from conf/ as users compose them, small image folders, and a small network."""

import functools
import gc
import os
import pickle
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra._internal.config_repository import ConfigRepository
from hydra.core.object_type import ObjectType
from PIL import Image

from tlcli.cli import main, quiet_libraries
from tlcli.cli.compose import compose_spec
from tlcli.cli.conf_files import ConfFiles, conf_dir
from tlcli.reporter import Reporter
from tlcli.specs import TrainSpec

quiet_libraries()  # before torch is imported: two processes of tests share the cores
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job, and what it starts, ignores it


def pytest_configure(config: pytest.Config) -> None:
    """Compute with one thread in each process of the default tests; slow tests use as many as there are cores."""
    if "PYTEST_XDIST_WORKER" in os.environ and config.option.markexpr == "not slow":
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    gc.disable()


def pytest_collection_finish() -> None:
    """Leave out of each garbage collection the million objects of the libraries, which all stay."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Use a cache for the tests alone; the user's is never touched."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TLCLI_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session", autouse=True)
def small_scale() -> Iterator[None]:
    """Hold out and select with one validation image, because the tests' sets are too small for the default, and take
    the first of the allowed formats (float32) instead of the one that is measured to be the fastest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tlcli.data.dataset.MIN_VALIDATION_IMAGES", 1)
        patch.setattr("tlcli.engine.numerics._measure", lambda *args, **settings: 0.1)
        yield


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk() -> Iterator[None]:
    """Write nothing through to the disk: that takes 4 ms a file, and shows only after a power failure."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda handle: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def conf_is_parsed_once() -> Iterator[None]:
    """Parse each file of conf/ and of Hydra once, which takes a quarter of the time of composing a config."""
    load, parsed = ConfigRepository.load_config, dict[tuple[str, str], bytes]()

    def load_once(repository: ConfigRepository, config_path: str) -> Any:
        source = repository._find_object_source(config_path, ObjectType.CONFIG)
        if source is None or source.path not in (str(conf_dir()), "hydra.conf", ""):
            return load(repository, config_path)
        if (key := (source.path, config_path)) not in parsed:
            parsed[key] = pickle.dumps(load(repository, config_path))
        return pickle.loads(parsed[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ConfigRepository, "load_config", load_once)
        yield


Compose = Callable[..., TrainSpec]
TINY = ("backbone=timm", "backbone.name=test_efficientnet", "backbone.weights=none")
"""Overrides of a network of 0.4 M parameters, for what does not depend on the network."""


class Notes(Reporter):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(scope="session")
def spec() -> Compose:
    """spec("freeze=head", "epochs=1"): the TrainSpec that these overrides compose."""
    return functools.cache(lambda *overrides: compose_spec(overrides))


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with train/ and test/ of three separable classes: two kinds of stripes and a checkerboard."""
    root = tmp_path_factory.mktemp("shapes")
    for split, n in (("train", 20), ("test", 8)):
        make_folder(root / split, {"across": n, "checks": n, "down": n}, seed=n)
    return root


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """TINY with a file of weights: it counts as pretrained, so that first stages are frozen and probes are fitted."""
    import timm
    import torch

    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("tiny") / "tiny.pth"
    torch.save(timm.create_model("test_efficientnet").state_dict(), file)
    return (*TINY[:2], f"backbone.weights='{file}'")


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the plots of a run, which take longer than its training."""
    monkeypatch.setattr("tlcli.runs.recorder.Recorder._plot", lambda *args: None)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Start Chromium, with a stand-in for a camera."""
    if (path := shutil.which("chromium") or shutil.which("google-chrome")) is None:
        pytest.skip("Chromium is not installed")
    from playwright.sync_api import sync_playwright

    flags = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    with sync_playwright() as playwright, playwright.chromium.launch(executable_path=path, args=flags) as opened:
        yield opened


def slow(*values: object) -> list[Any]:
    """Mark values of a parameter as slow."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


def freeze_words(strategy: str, stage: str) -> list[str]:
    """Return the overrides that choose a freeze strategy; a key that needs a value gets the name of a stage."""
    option = ConfFiles().groups["freeze"][strategy]
    return [f"freeze={strategy}", *(f"freeze.{key.name}=['{stage}']" for key in option.keys if key.default == "???")]


def finish(out: Path, *words: str) -> Path:
    """Run `tlcli train` with these words and without plots, which are slow, and return its directory."""
    from tlcli.runs.recorder import Recorder  # here: most tests need no torch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recorder, "_plot", lambda *args: None)
        assert main(["train", f"hydra.run.dir='{out}'", *words]) == 0
    return out


@pytest.fixture(scope="session")
def trained(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """trained("head", "fp32"): a finished run on the shapes, the same one for all tests; copy it to change it."""
    freezes = {
        "head": ("freeze=head",),
        "stage": ("freeze=last_stages", "freeze.n=1", "augment=none", "cache.mode=require"),
        "none": ("freeze=none",),
    }

    @functools.cache
    def run(freeze: str, precision: str) -> Path:
        words = ["dataset=imagefolder", f"dataset.root='{shapes}'", "image.size=32", "epochs=1", "device.workers=0"]
        words += [*TINY, f"device.precision={precision}", *freezes[freeze]]
        return finish(tmp_path_factory.mktemp("runs") / freeze, *words)

    return run


def make_folder(root: Path, counts: dict[str, int], *, side: int = 32, seed: int = 0) -> None:
    """Make one subfolder per class with n PNG images: the class's pattern in a random phase and color, with noise."""
    random = np.random.default_rng(seed)
    for place, (name, n) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for i in range(n):
            Image.fromarray(pattern(place, side, random)).save(root / name / f"{i:03}.png")


def pattern(kind: int, side: int, random: np.random.Generator) -> np.ndarray:
    """uint8 (side, side, 3): stripes across (0), checks (1), stripes down (2), diagonals (3)."""
    row, column = np.mgrid[0:side, 0:side] + random.integers(0, 8)
    wave = [row // 4, row // 4 + column // 4, column // 4, (row + column) // 4][kind % 4] % 2
    colour = random.uniform(80, 255, 3)
    return np.clip(wave[..., None] * colour + random.normal(0, 20, (side, side, 3)), 0, 255).astype(np.uint8)
