"""Which files a data set has. Every mistake of layout is found here, before anything is decoded or written.

Imports neither torch nor numpy: a wrong folder is to be told at once.
"""

import csv
import os
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from tlcli.errors import UsageError
from tlcli.files import expand_user, is_dir, is_file, resolve_links
from tlcli.specs import DatasetSpec, DigitsSpec, ImageFolderSpec, ManifestSpec
from tlcli.text import did_you_mean

EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".gif", ".bmp", ".dib", ".webp", ".avif"),
    *(".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
)
SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
"""The names of folders, and of values in a manifest, that stand for a split; upper or lower case."""

DIGITS = tuple("0123456789")

_SYSTEM = {"__macosx", "thumbs.db", "desktop.ini"}
_ONE_A_CLASS = "A dataset folder holds one sub-folder a class."

Found = dict[str, dict[str, list[Path]]]
"""For each split, for each class, its files."""


@dataclass(frozen=True)
class Listing:
    """Files by split ("train", "val", "test", or "all" for a set that is not split) with positions in `classes`.

    Sorted: classes by name, files of a split by class, then by path. All lie below `root`.
    """

    root: Path
    classes: tuple[str, ...]
    splits: dict[str, list[tuple[Path, int]]]


def check_dataset(spec: DatasetSpec, *, trains: bool = True) -> None:
    """Raise UsageError for what is wrong with the data set, as far as it shows without decoding or downloading."""
    if isinstance(spec, ImageFolderSpec):
        list_imagefolder(spec, trains=trains)
    elif isinstance(spec, ManifestSpec):
        list_manifest(spec, trains=trains)
    elif isinstance(spec, DigitsSpec):
        kept_classes(DIGITS, spec.classes, spec.name)
    elif spec.classes is not None and len(set(spec.classes)) < 2:
        raise UsageError("dataset.classes keeps fewer than two classes: name at least two")


def kept_classes(known: Sequence[str], wanted: Iterable[str] | None, where: str) -> tuple[str, ...]:
    """The known classes that are wanted (None: all), in the order in which they are known."""
    if wanted is None:
        return tuple(known)
    chosen = set(wanted)
    for name in sorted(chosen - set(known)):
        raise UsageError(f"dataset.classes: {where} has no class {name!r}.{did_you_mean(name, known)}")
    if len(chosen) < 2:
        raise UsageError("dataset.classes keeps fewer than two classes: name at least two")
    return tuple(name for name in known if name in chosen)


def _listing(root: Path, found: Found, wanted: Iterable[str] | None, where: str, trains: bool) -> Listing:
    """The files found below root as a Listing, once classes are known to be sound, to train on where that is meant."""
    main = "all" if "all" in found else "train"
    if trains and main not in found:
        raise UsageError(f"{where}: has {' and '.join(found)} but no train: nothing to train on")
    known = sorted({name for classes in found.values() for name in classes})
    classes = kept_classes(known, wanted, where)
    for split in found if trains else ():
        if strange := [name for name in classes if name in found[split] and name not in found[main]]:
            raise UsageError(f"{where}: {split} has classes that {main} lacks: {_some(strange)}")
    same: dict[str, str] = {}
    for name in classes:
        if (other := same.setdefault(folded(name), name)) != name:
            raise UsageError(f"{where}: classes {other!r} and {name!r} differ only in {_difference(other, name)}")
    if trains and len(classes) < 2:
        raise UsageError(f"{where}: only one class, {_some(classes)!r}: at least two are needed. {_ONE_A_CLASS}")
    place = {name: i for i, name in enumerate(classes)}
    return Listing(
        root,
        classes,
        {s: [(p, place[c]) for c in classes for p in sorted(by_class.get(c, ()))] for s, by_class in found.items()},
    )


def folded(name: str) -> str:
    """The same text for names that people take for one: upper or lower case, accents in one character or in two."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _difference(one: str, other: str) -> str:
    """What tells two names apart that are the same once folded, and what to do."""
    if unicodedata.normalize("NFC", one) == unicodedata.normalize("NFC", other):
        return "how their accents are encoded, and look the same: rename one"
    return "case: rename one"


def _some(names: Sequence[str], most: int = 5) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


# -- folders ----------------------------------------------------------------------------------------------------------


def list_imagefolder(spec: ImageFolderSpec, *, trains: bool = True) -> Listing:
    """The images of root/CLASS, or of root/train/CLASS, root/val/CLASS and root/test/CLASS, at any depth below.

    Hidden and system files are no images, nor is what has another extension. A class folder may be a link; links to
    folders below it are not followed. What is not to train on needs neither a train folder nor a second class. Raises
    UsageError, one line, for a layout that is neither.
    """
    if spec.root is None:
        raise UsageError("dataset.root is not set: name the folder that holds the images")
    root = expand_user(spec.root)
    if not is_dir(root):
        _no_folder(root)
    try:
        folders = _split_folders(root)
        found = {s: _class_files(folder, root, spec.classes) for s, folder in (folders or {"all": root}).items()}
    except PermissionError as error:
        raise UsageError(f"{error.filename}: not readable (permission denied)") from error
    if len(only := found.get("all", {})) == 1 and (inner := _dataset_below(root)):
        raise UsageError(f"{root}: only one class, {next(iter(only))!r}. Did you mean {inner}? {_ONE_A_CLASS}")
    return _listing(root, found, spec.classes, str(root), trains)


def _no_folder(root: Path) -> NoReturn:
    try:
        root.stat()
    except (FileNotFoundError, NotADirectoryError):
        near = did_you_mean(root.name, [p.name for p in _subfolders(root.parent)]) if is_dir(root.parent) else ""
        raise UsageError(f"{root}: no such folder.{near}") from None
    except (OSError, ValueError) as error:
        why = (getattr(error, "strerror", None) or str(error)).lower()
        raise UsageError(f"{root}: no folder that can be read ({why}). {_ONE_A_CLASS}") from error
    raise UsageError(f"{root}: not a folder. {_ONE_A_CLASS}")


def _split_folders(root: Path) -> dict[str, Path]:
    """The folder of each split; empty where root holds class folders. A class may be called 'train' (and 'bus')."""
    inside = _subfolders(root)
    named = [p for p in inside if p.name.lower() in SPLITS]
    if not any(_subfolders(p) for p in named) and len(named) < len(inside):
        return {}
    folders: dict[str, Path] = {}
    for path in named:
        split = SPLITS[path.name.lower()]
        if split in folders:
            raise UsageError(f"{root}: {folders[split].name} and {path.name} both stand for {split}: keep one")
        folders[split] = path
    return folders


def _class_files(folder: Path, root: Path, wanted: Iterable[str] | None) -> dict[str, list[Path]]:
    """The images of each class folder, of the wanted classes alone. Raises UsageError where one has none."""
    names = _subfolders(folder)
    if not names and any(is_image(p.name) for p in folder.iterdir()):
        near = f" Did you mean {folder.parent}?" if folder == root and len(_subfolders(folder.parent)) > 1 else ""
        raise UsageError(f"{folder}: images lie in the folder itself, not in classes.{near} {_ONE_A_CLASS}")
    for name in names:
        if (train := _split_folders(name).get("train")) and _subfolders(train):
            raise UsageError(f"{folder}: holds a data set, not classes. Did you mean {name}? {_ONE_A_CLASS}")
        if train:
            right = Path(train.name, name.name)
            raise UsageError(f"{train}: a split inside a class; turn it round, {root / right}. {_ONE_A_CLASS}")
    unwanted = set() if wanted is None else {p.name for p in names} - set(wanted)
    files = {p.name: [] if p.name in unwanted else list(_images_below(p)) for p in names}
    if not any(files.values()) and not unwanted:
        near = f" Did you mean {inner}?" if (inner := _dataset_below(folder)) else ""
        raise UsageError(f"{folder}: no images here.{near} {_ONE_A_CLASS}")
    if empty := [name for name, paths in files.items() if not paths and name not in unwanted]:
        more = f" (and {len(empty) - 1} more)" if len(empty) > 1 else ""
        raise UsageError(f"{folder / empty[0]}{more}: no images in this class; add some or remove the folder")
    return files


def _dataset_below(root: Path) -> Path | None:
    """A folder in root that holds a data set, for "Did you mean": it has at least two folders with images in them."""
    for path in _subfolders(root):
        inside = _subfolders(path)
        if len([p for p in inside if next(_images_below(p), None)]) >= 2:
            return path
    return None


def _subfolders(folder: Path) -> list[Path]:
    """Visible sub-folders, links to folders included, sorted by name."""
    with os.scandir(folder) as entries:
        return sorted(folder / e.name for e in entries if is_visible(e.name) and _leads_to_folder(e))


def _leads_to_folder(entry: "os.DirEntry[str]") -> bool:
    """Whether this is a folder or a link to one; links that lead in a circle are none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _images_below(folder: Path) -> Iterator[Path]:
    def stop(error: OSError) -> NoReturn:
        raise error

    for where, inside, names in os.walk(folder, onerror=stop):  # does not follow links, so no loops
        inside[:] = [name for name in inside if is_visible(name)]
        yield from (Path(where, name) for name in names if is_image(name))


def is_visible(name: str) -> bool:
    """Whether a file or folder of this name is neither hidden nor a system's own."""
    return not name.startswith(".") and name.lower() not in _SYSTEM


def is_image(name: str) -> bool:
    """Whether a file of this name is listed as an image."""
    return is_visible(name) and name.lower().endswith(EXTENSIONS)


# -- manifest ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Row:
    line: int
    path: str
    label: str
    split: str


def list_manifest(spec: ManifestSpec, *, trains: bool = True) -> Listing:
    """The images that a CSV file names in its columns path, label and, optionally, split.

    Paths are relative to `root`, or to the file's folder, and may not leave it. UTF-8, with or without a byte order
    mark. Raises UsageError with the line number for a row that is incomplete, double or names a missing file.
    """
    file = expand_user(spec.file)
    if not is_file(file):
        what = "not a file" if os.path.lexists(file) else "no such file"
        raise UsageError(f"{file}: {what}. dataset.file names a CSV file with the columns path, label[, split]")
    root = file.parent if spec.root is None else expand_user(spec.root)
    if not is_dir(root):
        _no_folder(root)
    rows = _rows(file)
    _check_splits(file, rows)
    found: Found = {}
    for path, row in zip(_paths(file, root, rows), rows, strict=True):
        found.setdefault(row.split or "all", {}).setdefault(row.label, []).append(path)
    return _listing(root, found, spec.classes, str(file), trains)


def _rows(file: Path) -> list[_Row]:
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream, strict=True)
            columns = [name.strip() for name in reader.fieldnames or ()]
            reader.fieldnames = columns
            for name in ("path", "label"):
                if name not in columns:
                    seen = _some(columns, 8) or "none"
                    raise UsageError(f"{file}: no column {name!r} in its first line (columns: {seen})")
            if twice := [name for name in ("path", "label", "split") if columns.count(name) > 1]:
                raise UsageError(f"{file}: two columns are called {twice[0]!r}; rename one")
            rows = [_row(file, reader.line_num, fields) for fields in reader]
    except UnicodeDecodeError as error:
        raise UsageError(f"{file}: not UTF-8 text; save it as CSV in UTF-8") from error
    except csv.Error as error:
        raise UsageError(f"{file}, line {reader.line_num}: not CSV ({error})") from error
    except OSError as error:
        raise UsageError(f"{file}: not readable ({error.strerror})") from error
    if not rows:
        raise UsageError(f"{file}: no rows below its first line; give one a image")
    return rows


def _row(file: Path, line: int, fields: dict[str, str | None]) -> _Row:
    if None in fields:
        raise UsageError(f"{file}, line {line}: more fields than columns; quote a value that has a comma in it")
    path, label, split = ((fields.get(name) or "").strip() for name in ("path", "label", "split"))
    for name, value in (("path", path), ("label", label)):
        if not value:
            raise UsageError(f"{file}, line {line}: no {name}")
        if "\0" in value:
            raise UsageError(f"{file}, line {line}: its {name} has a NUL character in it; is this CSV in UTF-8?")
    if split and split.lower() not in SPLITS:
        raise UsageError(f"{file}, line {line}: split {split!r} is none of train, val, test")
    return _Row(line, path, label, SPLITS.get(split.lower(), ""))


def _check_splits(file: Path, rows: list[_Row]) -> None:
    without = [row.line for row in rows if not row.split]
    if without and len(without) < len(rows):
        raise UsageError(f"{file}, line {without[0]}: no split, though other rows have one ({len(without)} such rows)")


def _paths(file: Path, root: Path, rows: list[_Row]) -> list[Path]:
    """The path of each row, once it is known that all exist, lie below root and are named once."""
    seen: dict[str, _Row] = {}
    paths, missing = [], []
    for row in rows:
        path = root / row.path
        if (Path(row.path).is_absolute() or ".." in path.parts) and not resolve_links(path).is_relative_to(
            resolve_links(root)
        ):
            raise UsageError(f"{file}, line {row.line}: {row.path} lies outside {root}; set dataset.root to its folder")
        first = seen.setdefault(os.path.abspath(path), row)  # noqa: PTH100  resolve() would read the disk for each row
        if first.label != row.label:
            labels = f"{first.label!r} (line {first.line}) and {row.label!r} (line {row.line})"
            raise UsageError(f"{file}: {row.path} has two labels: {labels}")
        if first is not row:
            raise UsageError(f"{file}: {row.path} is named twice (lines {first.line} and {row.line}); remove one")
        if not is_file(path):
            missing.append(row)
        paths.append(path)
    if missing:
        more = f" ({len(missing) - 1} more rows name missing files)" if len(missing) > 1 else ""
        path = root / missing[0].path
        what = "not a file, or a link that leads to none" if os.path.lexists(path) else "no such file"
        raise UsageError(f"{file}, line {missing[0].line}: {path}: {what}{more}")
    return paths
