"""Files from the Hugging Face hub, as its client keeps them: whether they are the ones that were published."""

import hashlib
import re
from pathlib import Path

from huggingface_hub.constants import HF_HUB_CACHE  # timm brings it, and has its weights from there

from tlcli.errors import TlcliError

_SHA256 = re.compile(r"[0-9a-f]{64}")


def kept_models(author: str) -> list[str]:
    """The names of this author's models of which there is a file here."""
    found = Path(HF_HUB_CACHE).glob(f"models--{author}--*")
    return sorted(path.name.removeprefix(f"models--{author}--") for path in found if any(path.glob("snapshots/*/*")))


def require_published(model: str) -> None:
    """Raise TlcliError unless the files of a model (`timm/NAME`) have the digests that the hub published for them.

    The client names each large file by the SHA-256 digest that the hub gave, and compares nothing but its size. Where
    the system has no links there is no such name, and nothing to compare with.
    """
    folder = Path(HF_HUB_CACHE, f"models--{model.replace('/', '--')}")
    for file in sorted(folder.glob("snapshots/*/*")):
        kept = file.resolve()
        if kept.is_file() and _SHA256.fullmatch(kept.name) and _digest(kept) != kept.name:
            raise TlcliError(
                f"{kept}: is not the {file.name} of {model} that was published, its digest is another: remove this "
                f"file, and the next run fetches it again"
            )


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
