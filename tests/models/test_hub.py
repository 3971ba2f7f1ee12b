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
from tlcli.models import hub
from tlcli.models.hub import kept_models, require_published

NAME = "mobilenetv3_small_050.lamb_in1k"
MODEL, REVISION = f"timm/{NAME}", "0" * 40


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def keep(cache: Path, content: bytes, name: str = "model.safetensors", *, published: bytes | None = None) -> Path:
    """Lay a file out as the hub's client does; what it has in its memory, by the digest of what was published."""
    folder = cache / f"models--{MODEL.replace('/', '--')}"
    blob = folder / "blobs" / hashlib.sha256(published or content).hexdigest()
    snapshot = folder / "snapshots" / REVISION
    for place in (blob.parent, snapshot, folder / "refs"):
        place.mkdir(parents=True, exist_ok=True)
    blob.write_bytes(content)
    (snapshot / name).symlink_to(Path("../../blobs", blob.name))
    (folder / "refs" / "main").write_text(REVISION)
    return blob


def test_what_was_published_is_taken(cache: Path) -> None:
    keep(cache, b"weights")
    require_published(MODEL)
    require_published("timm/another")
    assert kept_models("timm") == [NAME]


def test_another_file_of_the_same_size_is_refused(cache: Path) -> None:
    keep(cache, b"fine", "config.json")
    blob = keep(cache, b"weighty", published=b"weights")
    with pytest.raises(TlcliError, match=r"model\.safetensors of timm/mobilenet.*remove this file") as raised:
        require_published(MODEL)
    assert str(raised.value).startswith(str(blob))


def test_where_there_are_no_links_there_is_nothing_to_compare(cache: Path) -> None:
    blob = keep(cache, b"weights")
    link = cache / "models--timm--mobilenetv3_small_050.lamb_in1k" / "snapshots" / REVISION / "model.safetensors"
    link.unlink()
    blob.rename(link)
    require_published(MODEL)


SCRIPT = f"""
from tests.conftest import *
from tlcli.models.weights import published_weights
from tlcli.specs import TimmBackbone
spec = TimmBackbone(name="{NAME}", weights="default", reinit=[], dropout=0.0)
print(len(published_weights(spec, None, 3, 224).state))
"""


@pytest.mark.slow
@pytest.mark.parametrize("spoilt", [False, True])
def test_a_run_looks_at_what_timm_has_loaded(tmp_path: Path, spoilt: bool) -> None:
    """Through timm and the hub's own client, without a network."""
    network = timm.create_model(NAME, pretrained=False)
    content = save(network.state_dict())
    keep(tmp_path, content[:-1] + bytes([content[-1] ^ 1]) if spoilt else content, published=content)
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
    if spoilt:
        assert ended.returncode == 1
        assert f"model.safetensors of {MODEL} that was published" in ended.stderr
    else:
        assert (ended.returncode, int(ended.stdout.split()[-1])) == (0, len(network.state_dict()) - 2)
