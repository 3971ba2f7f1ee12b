"""Subsets of image folders for tlcli and the baselines."""

import shutil
from pathlib import Path


def subset(source: Path, target: Path, **per_class: int) -> Path:
    """Copy n images per class, as in `subset(cifar10, out, train=64, val=2, test=2)`, and return their folder.

    The first ones by name. A val split that the source lacks is taken from its train images, behind those of train.
    """
    if not target.exists():
        for split, n in per_class.items():
            borrowed = split == "val" and not (source / "val").is_dir()
            first = per_class["train"] if borrowed else 0
            for folder in sorted(p for p in (source / ("train" if borrowed else split)).iterdir() if p.is_dir()):
                _copy(folder, target / split / folder.name, first, n)
    return target


def _copy(source: Path, target: Path, first: int, n: int) -> None:
    files = sorted(f for f in source.iterdir() if f.is_file() and not f.name.startswith("."))[first : first + n]
    if len(files) < n:
        raise SystemExit(f"{source}: this benchmark needs {first + n} images of each class, and there are fewer")
    target.mkdir(parents=True)
    for file in files:
        shutil.copy(file, target / file.name)


def count(folder: Path) -> int:
    """Return the number of images in a folder of class folders."""
    return sum(1 for _ in folder.glob("*/*"))
