"""What is wrong with a folder of images, all of it at once: `list_imagefolder` stops at the first mistake."""

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from msgspec import structs

from tlcli.data.listing import EXTENSIONS, SPLITS, folded
from tlcli.files import expand_user, is_dir
from tlcli.specs import ImageFolderSpec


@dataclass(frozen=True)
class Layout:
    """`problems` are lines for people, each of which stops training; `classes` is what can be used without them (None:
    there are none); `ignored` counts files that are no images by their names, by extension."""

    problems: tuple[str, ...]
    classes: tuple[str, ...] | None
    ignored: Mapping[str, int]


def survey(spec: ImageFolderSpec) -> Layout:
    """Look at the names of all folders and files below root, and read none.

    What is no folder of class folders at all is left to `list_imagefolder`, which says so.
    """
    root = expand_user(spec.root or "")
    counts: dict[str, dict[str, int]] = {}
    ignored: Counter[str] = Counter()
    for split, folder in _split_folders(root):
        for path in _subfolders(folder):
            if spec.classes is None or path.name in spec.classes:
                images, others = _count(path)
                counts.setdefault(split, {})[path.name] = images
                ignored += others
    problems, bad = _problems(counts)
    names = {name for classes in counts.values() for name in classes}
    return Layout(tuple(problems), tuple(sorted(names - bad)) if problems else None, dict(ignored))


def _problems(counts: Mapping[str, Mapping[str, int]]) -> tuple[list[str], set[str]]:
    """Lines for people, and the classes that have to be left out for them."""
    problems, bad = [], set()
    total: Counter[str] = Counter()
    for split, classes in counts.items():
        total.update(classes)
        for name, n in classes.items():
            if n == 0:
                problems.append(f"{f'{split}/' if split else ''}{name} is an empty class folder: fill or remove it")
                bad.add(name)
    if "train" in counts:
        for split, classes in counts.items():
            if strange := sorted(set(classes) - set(counts["train"])):
                problems.append(f"{split} has classes that train lacks: {', '.join(strange)}")
                bad.update(strange)
    spelled: dict[str, list[str]] = {}
    for name in sorted(total):
        spelled.setdefault(folded(name), []).append(name)
    for names in spelled.values():
        if len(names) > 1:
            problems.append(f"class names that differ only in case: {', '.join(names)}; rename all but one")
            bad.update(set(names) - {max(names, key=lambda name: total[name])})
    return problems, bad


def _split_folders(root: Path) -> list[tuple[str, Path]]:
    """Each split and its folder; one without a name where root holds the classes."""
    if not is_dir(root):
        return []
    named = [(SPLITS[path.name.lower()], path) for path in _subfolders(root) if path.name.lower() in SPLITS]
    return named if any(_subfolders(path) for _, path in named) else [("", root)]


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not _hidden(path.name))


def _count(folder: Path) -> tuple[int, Counter[str]]:
    """How many images are below a folder, and how many other files, by extension."""
    images, others = 0, Counter[str]()
    for name in _names_below(folder):
        if name.lower().endswith(EXTENSIONS):
            images += 1
        else:
            others[Path(name).suffix.lower() or "no extension"] += 1
    return images, others


def _names_below(folder: Path) -> Iterator[str]:
    for _, inside, names in os.walk(folder):
        inside[:] = [name for name in inside if not _hidden(name)]
        yield from (name for name in names if not _hidden(name))


def _hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in ("__macosx", "thumbs.db", "desktop.ini")


def usable(spec: ImageFolderSpec, layout: Layout) -> ImageFolderSpec:
    """The spec without the classes that stop training, as far as two are left."""
    if layout.classes is None or len(layout.classes) < 2:
        return spec
    return structs.replace(spec, classes=tuple(layout.classes))
