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

    The client names each large file by the SHA-256 digest that the hub gave, compares nothing but its size, and links
    the file of a revision to that name. Where the system has no links there is nothing to compare with.
    """
    folder = Path(HF_HUB_CACHE, f"models--{model.replace('/', '--')}")
    present = folder / "refs" / "main"
    revision = present.read_text().strip() if present.is_file() else "*"
    for file in sorted(folder.glob(f"snapshots/{revision}/*")):
        # one link and no further: the name in the model's own folder is the digest; where the client shares files
        # between models that is a link too, to a name that says something else
        name = file.readlink().name if file.is_symlink() else ""
        if file.is_file() and _SHA256.fullmatch(name) and _digest(file) != name:
            raise TlcliError(
                f"{file}: is not the file of {model} that was published, its digest is another: remove this file and "
                f"{file.resolve()}, and the next run fetches it again"
            )


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
