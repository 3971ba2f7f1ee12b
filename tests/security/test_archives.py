"""Archives that a data set is downloaded as: nothing in them is written outside of the data set's folder."""

import io
import tarfile
import zipfile
from typing import Any

import pytest
from torchvision import datasets
from torchvision.datasets.utils import extract_archive

from tests.data.samples import torchvision_spec
from tlcli.errors import TlcliError
from tlcli.reporter import Reporter


def member(name: str, **changes: Any) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size = 0 if changes else 4
    for key, value in changes.items():
        setattr(info, key, value)
    return info


TRICKS = {
    "a path upwards": [member("../outside/evil")],
    "a link upwards": [member("link", type=tarfile.SYMTYPE, linkname="../outside"), member("link/evil")],
    "a link to a file": [member("link", type=tarfile.LNKTYPE, linkname="../outside/there")],
    "a device": [member("null", type=tarfile.CHRTYPE)],
    "a zip": None,
}


@pytest.mark.parametrize("members", TRICKS.values(), ids=TRICKS)
def test_an_archive_stays_in_its_folder(members: list[tarfile.TarInfo] | None, tmp_path, monkeypatch) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/there").write_text("mine")
    archive = tmp_path / ("a.zip" if members is None else "a.tar.gz")
    if members is None:
        with zipfile.ZipFile(archive, "w") as packed:
            packed.writestr("../outside/evil", "evil")
            packed.writestr(f"{tmp_path}/outside/evil", "evil")
    else:
        with tarfile.open(archive, "w:gz") as tar:
            for one in members:
                tar.addfile(one, io.BytesIO(b"evil"))
    # in the place of torchvision's download: the archive is here, and it continues as torchvision does
    unpack = lambda url, root, **more: extract_archive(str(archive), str(root))  # noqa: E731
    monkeypatch.setattr(datasets.cifar, "download_and_extract_archive", unpack)
    spec = torchvision_spec("CIFAR10", tmp_path / "data", train={"train": True}, test={"train": False}, download=True)
    monkeypatch.setattr(tarfile.TarFile, "extraction_filter", None)  # Python's default
    with pytest.raises(TlcliError) as caught:
        spec.load(Reporter())
    assert "\n" not in str(caught.value) and (members is None or "the download failed" in str(caught.value))
    assert [path.name for path in (tmp_path / "outside").iterdir()] == ["there"]
    assert (tmp_path / "outside/there").read_text() == "mine"
    assert members is None or not [p for p in (tmp_path / "data").rglob("*") if p.is_symlink() or not p.is_file()]
