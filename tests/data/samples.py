"""Specs and small images for the tests of the data layer."""

import io
import json
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from tlcli.data.sources import (
    DigitsSpec,
    ImageFolderSpec,
    ManifestSpec,
    ParquetSpec,
    TorchvisionDatasetSpec,
    WebDatasetSpec,
)
from tlcli.specs import OnBad, Verify

CONF = Path(__file__).parents[2] / "conf"

COMMON: dict[str, Any] = yaml.safe_load((CONF / "common" / "dataset.yaml").read_text()) | {
    "name": "set",
    "val_fraction": 0.25,
    "test_fraction": 0.25,
    "on_bad": OnBad.error,
    "verify": Verify.changed,
}
"""The values that the configuration gives; larger fractions, so that a few images are enough."""


def folder_spec(root: Path, **changes: Any) -> ImageFolderSpec:
    return ImageFolderSpec(**COMMON | {"root": str(root)} | changes)


def manifest_spec(file: Path, **changes: Any) -> ManifestSpec:
    return ManifestSpec(**COMMON | {"file": str(file)} | changes)


def digits_spec(**changes: Any) -> DigitsSpec:
    return DigitsSpec(**COMMON | {"name": "digits"} | changes)


def torchvision_spec(class_name: str, root: Path, **changes: Any) -> TorchvisionDatasetSpec:
    kind = {"class_name": class_name, "root": str(root), "train": {}, "val": None, "test": None, "download": False}
    return TorchvisionDatasetSpec(**COMMON | kind | changes)


def save_image(path: Path, seed: int = 0, size: tuple[int, int] = (12, 10)) -> Path:
    """Write a small image of noise; folders are made as needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def tar_spec(root: Path, **changes: Any) -> WebDatasetSpec:
    return WebDatasetSpec(**COMMON | {"root": str(root)} | changes)


def parquet_spec(root: Path, **changes: Any) -> ParquetSpec:
    columns = {"image_column": "image", "label_column": "label"}
    return ParquetSpec(**COMMON | {"root": str(root)} | columns | changes)


def tar_of(*members: tuple[str, bytes]) -> bytes:
    """Return an archive of files with these names and contents."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_of(*members))
    return path


def pack_tar(folder: Path, path: Path, part: slice = slice(None)) -> Path:
    """Write images of a folder with one subfolder per class into an archive, in another order than that of names."""
    members = []
    for file in _mixed(folder)[part]:
        name, label = file.relative_to(folder).as_posix(), file.relative_to(folder).parts[0]
        members += [(name, file.read_bytes()), (f"{name.removesuffix(file.suffix)}.cls", f"{label}\n".encode())]
    return write_tar(path, members)


def _mixed(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.*"), key=lambda file: (file.name[::-1], file.parent))


def write_parquet(
    path: Path, images: Sequence[bytes | None], labels: Sequence[Any], names: Any = None, *, rows_per_group: int = 3
) -> Path:
    """Write a file as the Hugging Face Hub has them, with the names of a ClassLabel in its metadata."""
    import pyarrow as pa
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    structs = pa.array([{"bytes": image, "path": f"{i}.png"} for i, image in enumerate(images)])
    table = pa.table({"image": structs, "label": pa.array(labels)})
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    if names is not None:
        metadata = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": metadata})
    parquet.write_table(table, path, row_group_size=rows_per_group)
    return path


def pack_parquet(folder: Path, path: Path, part: slice = slice(None), **options: Any) -> Path:
    """Write images of a folder with one subfolder per class, in the order of `pack_tar`."""
    names, files = sorted(p.name for p in folder.iterdir()), _mixed(folder)[part]
    codes = [names.index(file.relative_to(folder).parts[0]) for file in files]
    return write_parquet(path, [file.read_bytes() for file in files], codes, names, **options)
