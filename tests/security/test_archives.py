"""Archives that a data set is downloaded as: nothing in them is written outside of the data set's folder."""

import io
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torchvision import datasets
from torchvision.datasets.utils import extract_archive

from tests.data.samples import torchvision_spec
from tlcli.errors import TlcliError
from tlcli.reporter import Reporter


def member(name: str, **changes: Any) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size = 0 if changes.get("type", tarfile.REGTYPE) != tarfile.REGTYPE else 4
    for key, value in changes.items():
        setattr(info, key, value)
    return info


TRICKS = {
    "a path upwards": [member("../outside/evil")],
    "a link upwards": [member("link", type=tarfile.SYMTYPE, linkname="../outside"), member("link/evil")],
    "a link to a file": [member("link", type=tarfile.LNKTYPE, linkname="../outside/there")],
    "a device": [member("null", type=tarfile.CHRTYPE)],
}


def download(archive: Path) -> Callable[..., None]:
    """In the place of torchvision's download: the archive is here, and it goes on as torchvision does."""
    return lambda url, root, **more: extract_archive(str(archive), str(root))


def load(root: Path) -> None:
    spec = torchvision_spec("CIFAR10", root, train={"train": True}, test={"train": False}, download=True)
    spec.load(Reporter())


@pytest.mark.parametrize("members", TRICKS.values(), ids=TRICKS)
def test_a_tar_stays_in_its_folder(
    members: list[tarfile.TarInfo], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/there").write_text("mine")
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
        for one in members:
            tar.addfile(one, io.BytesIO(b"evil"))
    monkeypatch.setattr(datasets.cifar, "download_and_extract_archive", download(tmp_path / "a.tar.gz"))
    before = tarfile.TarFile.extraction_filter
    with pytest.raises(TlcliError, match="the download failed") as caught:
        load(tmp_path / "data")
    assert "\n" not in str(caught.value)
    assert [path.name for path in (tmp_path / "outside").iterdir()] == ["there"]
    assert (tmp_path / "outside/there").read_text() == "mine"
    assert [path for path in (tmp_path / "data").rglob("*") if path.is_symlink() or not path.is_file()] == []
    assert tarfile.TarFile.extraction_filter is before


def test_a_zip_stays_in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("../outside/evil", "evil")
        archive.writestr(f"{tmp_path}/evil", "evil")
    monkeypatch.setattr(datasets.cifar, "download_and_extract_archive", download(tmp_path / "a.zip"))
    with pytest.raises(TlcliError):
        load(tmp_path / "data")
    assert not (tmp_path / "outside").exists()
    assert not (tmp_path / "evil").exists()
