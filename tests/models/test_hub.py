"""A file of the hub's that is not what was published is refused."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
from safetensors.torch import save

from tlcli.errors import TlcliError
from tlcli.models import build
from tlcli.models.backbones import TimmBackboneSpec
from tlcli.models.build import cached_timm_models, verify_published

NAME = "mobilenetv3_small_050.lamb_in1k"
MODEL, REVISION = f"timm/{NAME}", "0" * 40


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(build, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def keep(hub: Path, content: bytes, name: str = "model.safetensors", *, published: bytes | None = None) -> Path:
    """Lay a file out as the hub's client does; what it has in its memory, by the digest of what was published."""
    folder = hub / f"models--{MODEL.replace('/', '--')}"
    blob = folder / "blobs" / hashlib.sha256(published or content).hexdigest()
    snapshot = folder / "snapshots" / REVISION
    for path in (blob.parent, snapshot, folder / "refs"):
        path.mkdir(parents=True, exist_ok=True)
    blob.write_bytes(content)
    (snapshot / name).symlink_to(Path("../../blobs", blob.name))
    (folder / "refs" / "main").write_text(REVISION)
    return blob


def test_what_was_published_is_taken(hub: Path) -> None:
    keep(hub, b"weights")
    verify_published(MODEL)
    verify_published("timm/another")
    assert cached_timm_models() == [NAME]
    plain = NAME.partition(".")[0]  # the name without that of its default weights
    assert [TimmBackboneSpec.is_local(name) for name in (NAME, plain, "mobilenetv3_small_075")] == [True, True, False]


def test_another_file_of_the_same_size_is_refused(hub: Path) -> None:
    keep(hub, b"fine", "config.json")
    blob = keep(hub, b"weighty", published=b"weights")
    with pytest.raises(TlcliError, match=r"safetensors: checksum differs from the published file of timm") as raised:
        verify_published(MODEL)
    assert str(blob) in str(raised.value)


def test_a_file_that_several_models_share_has_its_digest_in_the_first_link(hub: Path) -> None:
    """The client may keep it elsewhere, by a name of as many digits that is no SHA-256 digest."""
    blob = keep(hub, b"weights")
    shared = hub / "blobs" / "ab" / ("ab" * 32)
    shared.parent.mkdir(parents=True)
    blob.rename(shared)
    blob.symlink_to(Path("../../blobs/ab", shared.name))
    verify_published(MODEL)
    shared.write_bytes(b"weighty")
    with pytest.raises(TlcliError, match=r"remove this file and .*abab"):
        verify_published(MODEL)


SCRIPT = f"""
import os, sys
sys.addaudithook(lambda event, args: event.startswith("socket.getaddrinfo") and os._exit(3))
from tests.conftest import *
from tlcli.models.build import published_weights
from tlcli.models.backbones import TimmBackboneSpec
options = dict(reinit=[], size=None, dropout=0.0, imagenet_top1=None, license=None)
spec = TimmBackboneSpec(name="{NAME}", weights="default", **options)
print(len(published_weights(spec, spec.build(3), 3, 224).state))
"""


@pytest.mark.slow
@pytest.mark.parametrize("spoilt", [None, -1, 0])  # with its first byte changed the file does not load
def test_weights_in_the_cache_are_checked_and_need_no_network(tmp_path: Path, spoilt: int | None) -> None:
    network = timm.create_model(NAME, pretrained=False)
    content = save(network.state_dict())
    kept = bytearray(content)
    if spoilt is not None:
        kept[spoilt] ^= 1
    keep(tmp_path, bytes(kept), published=content)
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path)}
    ended = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
    if spoilt is not None:
        assert ended.returncode == 1
        assert f"checksum differs from the published file of {MODEL}" in ended.stderr.splitlines()[-1]
    else:
        assert (ended.returncode, int(ended.stdout.split()[-1])) == (0, len(network.state_dict()) - 2)
