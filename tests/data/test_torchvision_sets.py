"""torchvision's data sets on small files in their formats, and all that conf/ names."""

import struct
import urllib.error
import zlib
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import yaml
from torchvision import datasets

from tests.data.samples import CONF, save_image, torchvision_spec
from tests.data.test_dataset import load
from tlcli.data.decode import BadImage
from tlcli.data.images import TorchvisionImages
from tlcli.data.sources import TorchvisionDatasetSpec
from tlcli.errors import TlcliError, UsageError
from tlcli.reporter import Reporter

YAMLS = {path.stem: yaml.safe_load(path.read_text()) for path in sorted((CONF / "dataset").glob("*.yaml"))}
OURS = {name: conf for name, conf in YAMLS.items() if "class_name" in conf}
KEYS = ("name", "class_name", "train", "val", "test")


def from_conf(name: str, root: Path, **changes: Any) -> TorchvisionDatasetSpec:
    """Return the spec of conf/dataset/NAME.yaml, without a download."""
    return torchvision_spec(**{k: OURS[name].get(k) for k in KEYS} | {"root": root} | changes)


@pytest.mark.parametrize("name", OURS)
def test_missing_data_of_each_dataset_is_one_line(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        load(from_conf(name, tmp_path / "data"))
    assert f"{name}: not found under {tmp_path}/data" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("CIFAR11", {}, "has no 'CIFAR11'. Did you mean 'CIFAR10'?"),
        ("os", {}, "has no 'os'"),
        ("CIFAR10", {"trian": True}, "takes no 'trian'. Did you mean 'train'?"),
        ("CIFAR10", {"transform": None}, "takes no 'transform'"),
        ("CelebA", {"target_type": "identity"}, "takes no 'target_type'"),
        ("OxfordIIITPet", {"target_types": "binary-category"}, "takes no 'target_types'"),
        ("DTD", {"split": "dev"}, "dataset set: "),
        ("FakeData", {"size": 4}, "FakeData does not give each image one class"),
    ],
)
def test_mistakes_are_one_line(name: str, arguments: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        load(torchvision_spec(name, tmp_path, train=arguments))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [urllib.error.URLError("no route"), RuntimeError("File not found or corrupted.")])
def test_a_failed_download(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(datasets.cifar, "download_and_extract_archive", fail)
    with pytest.raises(TlcliError, match=r"the download failed.*dataset=imagefolder") as caught:
        load(from_conf("cifar10", tmp_path, download=True))
    assert not isinstance(caught.value, UsageError)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [struct.error("unpack requires a buffer"), AssertionError()], ids=repr)
def test_whatever_decoding_raises_is_a_bad_image(error: Exception) -> None:
    items = MagicMock()
    items.__getitem__.side_effect = error
    with pytest.raises(BadImage, match=f"^{str(error) or 'AssertionError'}$"):
        TorchvisionImages(items, "set").decode(0)


def write_idx(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
    path.write_bytes(header + values.astype(np.uint8).tobytes())


def test_fashion_mnist(tmp_path: Path) -> None:
    raw = tmp_path / "FashionMNIST" / "raw"
    for part, n in (("train", 40), ("t10k", 20)):
        write_idx(raw / f"{part}-images-idx3-ubyte", np.arange(n)[:, None, None] * np.ones((1, 28, 28)))
        write_idx(raw / f"{part}-labels-idx1-ubyte", np.arange(n) % 10)
    data = load(from_conf("fashion_mnist", tmp_path))
    assert (data.classes[0], len(data.classes)) == ("T-shirt/top", 10)
    assert [len(data.train), len(data.val), len(data.test)] == [30, 10, 20]
    assert data.test.name(3) == "fashion_mnist/test/3"
    assert np.array_equal(data.test.read(3), np.full((28, 28, 3), 3))
    kept = load(from_conf("fashion_mnist", tmp_path, classes=["Bag", "Coat"]))
    assert (kept.classes, kept.test.labels.tolist()) == (("Coat", "Bag"), [0, 1, 0, 1])
    assert [kept.test.name(i) for i in range(4)] == [f"fashion_mnist/test/{i}" for i in (4, 8, 14, 18)]


def test_dtd(tmp_path: Path) -> None:
    root = tmp_path / "dtd" / "dtd"
    (root / "labels").mkdir(parents=True)
    for number, split in enumerate(("train", "val", "test")):
        lines = [f"{name}/{name}_{number}.jpg" for name in ("banded", "woven")]
        for line in lines:
            save_image(root / "images" / line, seed=zlib.crc32(line.encode()))
        (root / "labels" / f"{split}1.txt").write_text("\n".join(lines))
    data = load(from_conf("dtd", tmp_path))
    assert (data.classes, data.notes) == (("banded", "woven"), ())
    assert [len(data.train), len(data.val), len(data.test)] == [2, 2, 2]


class Named(datasets.VisionDataset):
    """Stands for a class with other names for its labels."""

    def __init__(self, root: str, **attributes: Any) -> None:
        super().__init__(root)
        self.__dict__ |= attributes

    def __len__(self) -> int:
        return 4


@pytest.mark.parametrize(
    ("attributes", "classes"),
    [
        ({"labels": np.array([0, 1, 0, 1])}, ("0", "1")),
        ({"_labels": [0, 1, 0, 1], "classes": ["a", "b"]}, ("a", "b")),
        ({"targets": [1, 2, 1, 2], "classes": ["N/A", "a", "b"]}, ("a", "b")),
        ({"y": [0, 1, 0, 1], "categories": ["a", "b"]}, ("a", "b")),
        ({"targets": [0, 1, 0, 1], "classes": [("crane",), ("crane",)]}, ("crane (0)", "crane (1)")),
        ({"targets": [0, 1, 0, 1], "classes": [("tench", "Tinca tinca"), ("ray",)]}, ("tench, Tinca tinca", "ray")),
    ],
)
def test_names_of_labels_and_classes(attributes: dict[str, Any], classes, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("tlcli.data.sources.dataset_class", lambda name: Named)
    monkeypatch.setattr(Named, "__init__", lambda self, root: self.__dict__.update({"root": root, **attributes}))
    source = torchvision_spec("Named", tmp_path).load(Reporter())
    assert source.classes == classes
    assert source.splits["all"].labels.tolist() == [0, 1, 0, 1]


def test_what_an_interrupted_download_left_is_not_taken_for_the_whole(tmp_path: Path, monkeypatch) -> None:
    interrupts = [KeyboardInterrupt(), OSError("no network")]

    def fetch(root: str, download: bool = False) -> Named:
        if download:
            (Path(root) / "raw").mkdir(exist_ok=True)
            if len(interrupts) == 1:
                (Path(root) / "raw/part").touch()
            if interrupts:
                raise interrupts.pop()
        if not download and not (Path(root) / "raw/part").exists():
            raise RuntimeError("Dataset not found")
        return Named(root, targets=[0, 1, 0, 1])

    monkeypatch.setattr("tlcli.data.sources.dataset_class", lambda name: fetch)
    (tmp_path / "others").mkdir()
    spec = torchvision_spec("Named", tmp_path, download=True)
    with pytest.raises(TlcliError, match="no network"):
        spec.load(Reporter())
    with pytest.raises(KeyboardInterrupt):  # an empty folder is no reason to refuse another try
        spec.load(Reporter())
    for again, words in (
        (spec, r"was interrupted: remove what belongs to it \(new there since then: raw\)"),
        (spec.offline(), "download was not finished"),
    ):
        with pytest.raises(UsageError, match=words):
            again.load(Reporter())
    (tmp_path / "raw/part").unlink()
    assert spec.load(Reporter()).classes == ("0", "1")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["others", "raw"]
