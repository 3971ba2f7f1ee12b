"""Lists the files of a dataset with their classes. Finds every mistake of layout before anything is decoded.

Imports neither torch nor numpy, so that a wrong folder is reported at once.
"""

import contextlib
import csv
import glob
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from tlcli.errors import UsageError
from tlcli.files import expand_user, is_dir, is_file, resolve_links
from tlcli.text import did_you_mean, join_limited

EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".gif", ".bmp", ".dib", ".webp", ".avif"),
    *(".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".heic", ".heif", ".hif"),
)
# names of folders, and values in a manifest, that stand for a split, in lower case
SPLITS = dict.fromkeys(("train", "training"), "train") | dict.fromkeys(("test", "testing"), "test")
SPLITS |= dict.fromkeys(("val", "valid", "validation"), "val")
_SYSTEM_FILES = {"__macosx", "thumbs.db", "desktop.ini"}
_ONE_PER_CLASS = "Expected one subfolder per class."

FilesByClass = dict[str, dict[str, list[str]]]  # split -> class -> paths relative to the root, with slashes


@dataclass(frozen=True)
class Listing:
    """Files by split ("train", "val", "test", or "all" for a dataset without splits).

    A file is its path relative to `root`, with slashes, and its position in `classes`. Classes are sorted by name, the
    files of a split by class, then by path. `ignored` counts files that are not images by their names, by ending.
    """

    root: Path
    classes: tuple[str, ...]
    splits: Mapping[str, Sequence[tuple[str, int]]]
    ignored: Mapping[str, int]


def is_visible(name: str) -> bool:
    """Return True if a file or folder of this name is neither hidden nor a file of the system."""
    return not name.startswith(".") and name.lower() not in _SYSTEM_FILES


def is_image(name: str) -> bool:
    """Return True if a file of this name is listed as an image."""
    return name.lower().endswith(EXTENSIONS) and is_visible(name)


def resolve_classes(known: Sequence[str], selected: Iterable[str] | None, where: str) -> tuple[str, ...]:
    """Return the known classes that are selected (None: all), in the order in which they are known."""
    if selected is None:
        return tuple(known)
    chosen = set(selected)
    for name in sorted(chosen - set(known)):
        raise UsageError(f"dataset.classes: {where} has no class {name!r}.{did_you_mean(name, known)}")
    if len(chosen) < 2:
        raise UsageError("dataset.classes keeps fewer than two classes: name at least two")
    return tuple(name for name in known if name in chosen)


def _make_listing(
    root: Path,
    files: FilesByClass,
    selected: Iterable[str] | None,
    where: str,
    *,
    for_training: bool,
    ignored: Mapping[str, int],
) -> Listing:
    if for_training and "all" not in files and "train" not in files:
        raise UsageError(f"{where}: has {' and '.join(files)} but no train: nothing to train on")
    classes = resolve_classes(sorted({name for by_class in files.values() for name in by_class}), selected, where)
    for problem, _ in _problems(files, classes, for_training=for_training):
        raise UsageError(f"{where}: {problem}")
    if for_training and len(classes) < 2:
        raise UsageError(f"{where}: only one class, {classes[0]!r}: at least two are needed. {_ONE_PER_CLASS}")
    label = {name: i for i, name in enumerate(classes)}
    splits = {
        split: [(key, label[c]) for c in classes for key in sorted(by_class.get(c, ()), key=lambda k: k.split("/"))]
        for split, by_class in files.items()
    }
    return Listing(root, classes, splits, ignored)


def _problems(files: FilesByClass, classes: Sequence[str], *, for_training: bool) -> Iterator[tuple[str, set[str]]]:
    """Yield each problem of the classes, and the classes without which it is gone."""
    for split, by_class in files.items():
        for name in classes:
            if name in by_class and not by_class[name]:
                folder = name if split == "all" else f"{split}/{name}"
                yield f"{folder}: no images in this class; add some or remove the folder", {name}
    main = "all" if "all" in files else "train"
    for split, by_class in files.items() if for_training else ():
        if strange := [name for name in classes if name in by_class and name not in files[main]]:
            yield f"{split} has classes that {main} lacks: {join_limited(strange)}", set(strange)
    spelled: dict[str, list[str]] = {}
    for name in classes:
        normalized = unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
        spelled.setdefault(normalized, []).append(name)
    for names in spelled.values():
        if len(names) > 1:
            same_case = len({unicodedata.normalize("NFC", name) for name in names}) == 1
            difference = "how their accents are encoded, and look the same" if same_case else "case"
            images = {name: sum(len(by_class.get(name, ())) for by_class in files.values()) for name in names}
            smaller = set(names) - {max(names, key=images.__getitem__)}
            yield f"classes {' and '.join(map(repr, names))} differ only in {difference}: rename one", smaller


# -- folders ----------------------------------------------------------------------------------------------------------


def list_folder(root_text: str | None, selected: Iterable[str] | None, *, for_training: bool = True) -> Listing:
    """List the images of root/CLASS, or of root/train/CLASS, root/val/CLASS and root/test/CLASS, at any depth below.

    Hidden and system files are skipped. A class folder may be a link; links to folders below it are not followed. Raise
    UsageError if the layout is neither of the two, or `for_training` if there is no train folder or no second class.
    """
    root, files, ignored = _scan_root(root_text, selected)
    by_class = files.get("all", {})
    if len(by_class) == 1 and (inner := _dataset_below(root)):
        raise UsageError(f"{root}: only one class, {next(iter(by_class))!r}. Did you mean {inner}? {_ONE_PER_CLASS}")
    return _make_listing(root, files, selected, str(root), for_training=for_training, ignored=ignored)


def find_bad_classes(root: str | None, selected: Iterable[str] | None) -> tuple[list[str], list[str] | None]:
    """Return every problem of the class folders, and the classes without those that cause them.

    The classes are None if there is no problem, or if fewer than two are left.
    """
    _, files, _ = _scan_root(root, selected)
    known = sorted({name for by_class in files.values() for name in by_class if selected is None or name in selected})
    if "all" not in files and "train" not in files:
        return [], None
    problems = list(_problems(files, known, for_training=True))
    bad = {name for _, names in problems for name in names}
    good = [name for name in known if name not in bad]
    return [text for text, _ in problems], good if problems and len(good) >= 2 else None


def _scan_root(root_text: str | None, selected: Iterable[str] | None) -> tuple[Path, FilesByClass, Counter[str]]:
    if root_text is None:
        raise UsageError("dataset.root is not set: name the folder that holds the images")
    root = expand_user(root_text)
    if not is_dir(root):
        _raise_no_folder(root)
    files: FilesByClass = {}
    ignored: Counter[str] = Counter()
    try:
        for split, folder in (_split_folders(root) or {"all": root}).items():
            files[split] = {}
            for path in _class_folders(folder, root):
                files[split][path.name] = []
                if selected is None or path.name in selected:
                    files[split][path.name] = list(_images_below(path, root, ignored))
            if not any(files[split].values()) and (selected is None or set(files[split]) <= set(selected)):
                hint = f" Did you mean {inner}?" if (inner := _dataset_below(folder)) else ""
                raise UsageError(f"{folder}: no images found.{hint} {_ONE_PER_CLASS}")
    except PermissionError as error:
        raise UsageError(f"{error.filename}: not readable (permission denied)") from error
    return root, files, ignored


def _raise_no_folder(root: Path) -> NoReturn:
    try:
        root.stat()
    except (FileNotFoundError, NotADirectoryError):
        hint = did_you_mean(root.name, [p.name for p in _subfolders(root.parent)]) if is_dir(root.parent) else ""
        raise UsageError(f"{root}: no such folder.{hint}") from None
    except (OSError, ValueError) as error:
        reason = (getattr(error, "strerror", None) or str(error)).lower()
        raise UsageError(f"{root}: cannot read this folder ({reason}). {_ONE_PER_CLASS}") from error
    raise UsageError(f"{root}: not a folder. {_ONE_PER_CLASS}")


def _split_folders(root: Path) -> dict[str, Path]:
    """Return the folder of each split; empty if root holds class folders. A class may be called 'train' (and 'bus')."""
    subfolders = _subfolders(root)
    named = [p for p in subfolders if p.name.lower() in SPLITS]
    if not any(_subfolders(p) for p in named) and len(named) < len(subfolders):
        return {}
    folders: dict[str, Path] = {}
    for path in named:
        split = SPLITS[path.name.lower()]
        if split in folders:
            raise UsageError(f"{root}: {folders[split].name} and {path.name} both stand for {split}: keep one")
        folders[split] = path
    return folders


def _class_folders(folder: Path, root: Path) -> list[Path]:
    """Return the class folders of a split. Raise UsageError if they cannot be class folders."""
    subfolders = _subfolders(folder)
    if not subfolders and any(is_image(p.name) for p in folder.iterdir()):
        hint = f" Did you mean {folder.parent}?" if folder == root and len(_subfolders(folder.parent)) > 1 else ""
        raise UsageError(f"{folder}: images lie in the folder itself, not in classes.{hint} {_ONE_PER_CLASS}")
    for path in subfolders:
        if (train := _split_folders(path).get("train")) and _subfolders(train):
            raise UsageError(f"{folder}: holds a dataset, not classes. Did you mean {path}? {_ONE_PER_CLASS}")
        if train:
            right = root / train.name / path.name
            raise UsageError(f"{train}: a split inside a class; use {right} instead. {_ONE_PER_CLASS}")
    return subfolders


def _dataset_below(root: Path) -> Path | None:
    """Return a folder in root with at least two folders with images in them, for "Did you mean"."""
    for path in _subfolders(root):
        if len([p for p in _subfolders(path) if next(_images_below(p, root, Counter()), None)]) >= 2:
            return path
    return None


def _subfolders(folder: Path) -> list[Path]:
    """Return visible subfolders, links to folders included, sorted by name. Links that form a circle are left out."""
    with os.scandir(folder) as entries:
        return sorted(folder / e.name for e in entries if is_visible(e.name) and is_dir(e.path))


def _images_below(folder: Path, root: Path, ignored: Counter[str]) -> Iterator[str]:
    """Yield the images below a folder, as paths relative to root, and count the other files."""

    def stop(error: OSError) -> NoReturn:
        raise error

    for where, subfolders, names in os.walk(folder, onerror=stop):  # does not follow links, so there are no loops
        subfolders[:] = [name for name in subfolders if is_visible(name)]
        prefix = Path(os.path.relpath(where, root)).as_posix()
        for name in names:
            if is_image(name):
                yield f"{prefix}/{name}"
            elif is_visible(name):
                ignored[Path(name).suffix.lower() or "no ending"] += 1


# -- manifest ---------------------------------------------------------------------------------------------------------


_Row = tuple[int, str, str, str]  # line, path, label, split ("" without)


def list_manifest(
    file_text: str, root_text: str | None, selected: Iterable[str] | None, *, for_training: bool = True
) -> Listing:
    """List the images that a CSV file names in its columns path, label and, optionally, split.

    Paths are relative to the root, or to the file's folder, and may not leave it. Raise UsageError with the line of a
    row that is incomplete, double or names a missing file.
    """
    file = expand_user(file_text)
    if not is_file(file):
        problem = "not a file" if os.path.lexists(file) else "no such file"
        raise UsageError(f"{file}: {problem}. dataset.file names a CSV file with the columns path, label[, split]")
    root = file.parent if root_text is None else expand_user(root_text)
    if not is_dir(root):
        _raise_no_folder(root)
    rows = _read_rows(file)
    unsplit = [line for line, _, _, split in rows if not split]
    if unsplit and len(unsplit) < len(rows):
        raise UsageError(f"{file}, line {unsplit[0]}: no split, but other rows have one ({len(unsplit)} such rows)")
    _check_labels(file, {label: line for line, _, label, _ in rows})
    files: FilesByClass = {}
    for key, (_, _, label, split) in zip(_row_keys(file, root, rows), rows, strict=True):
        files.setdefault(split or "all", {}).setdefault(label, []).append(key)
    return _make_listing(root, files, selected, str(file), for_training=for_training, ignored={})


def _read_rows(file: Path) -> list[_Row]:
    rows: list[_Row] = []
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream, strict=True)
            columns = reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
            for name in ("path", "label"):
                if name not in columns:
                    names = join_limited(columns, 8) or "none"
                    raise UsageError(f"{file}: no column {name!r} in its first line (columns: {names})")
            if twice := [name for name in ("path", "label", "split") if columns.count(name) > 1]:
                raise UsageError(f"{file}: two columns are called {twice[0]!r}; rename one")
            for cells in reader:
                where = f"{file}, line {reader.line_num}"
                if None in cells:
                    raise UsageError(f"{where}: more fields than columns; quote a value that contains a comma")
                path, label, split = ((cells.get(name) or "").strip() for name in ("path", "label", "split"))
                for name, value in (("path", path), ("label", label)):
                    if not value:
                        raise UsageError(f"{where}: no {name}")
                    if "\0" in value:
                        raise UsageError(f"{where}: the {name} contains a NUL character; is this CSV in UTF-8?")
                if split and split.lower() not in SPLITS:
                    raise UsageError(f"{where}: split {split!r} is not one of train, val, test")
                rows.append((reader.line_num, path, label, SPLITS.get(split.lower(), "")))
    except UnicodeDecodeError as error:
        raise UsageError(f"{file}: not UTF-8 text; save it as CSV in UTF-8") from error
    except csv.Error as error:
        raise UsageError(f"{file}, line {reader.line_num}: not CSV ({error})") from error
    except OSError as error:
        raise UsageError(f"{file}: not readable ({error.strerror})") from error
    if not rows:
        raise UsageError(f"{file}: no data rows; add one row per image")
    return rows


def _check_labels(file: Path, labels: Mapping[str, int]) -> None:
    """Raise UsageError for labels of a regression or of a multi-label dataset, given a line of each."""
    single = "tlcli does single-label classification: give each image the name of one class"
    parts = {label: [p.strip() for p in label.replace(";", "|").replace(",", "|").split("|")] for label in labels}
    uses = Counter(part for names in parts.values() for part in set(names))
    for label, line in labels.items():
        is_list = label[0] + label[-1] in ("[]", "{}", "()")
        if is_list or (len(parts[label]) > 1 and all(uses[part] > 1 for part in parts[label])):
            raise UsageError(f"{file}, line {line}: label {label!r} is a list. {single}")
    fractions = [label for label in labels if not label.lstrip("+-").isdecimal()]
    with contextlib.suppress(ValueError):  # one is not a number
        numbers = list(map(float, labels))
        if fractions and numbers:
            line = labels[fractions[0]]
            raise UsageError(f"{file}, line {line}: labels are numbers ({fractions[0]}). {single}, not a value")


def _row_keys(file: Path, root: Path, rows: list[_Row]) -> list[str]:
    """Return the path of each row relative to root. Raise UsageError unless all exist, are below root and unique."""
    first_rows: dict[str, tuple[int, str]] = {}
    keys: list[str] = []
    missing: list[tuple[int, Path]] = []
    real_root = resolve_links(root)
    for line, name, label, _ in rows:
        path = root / name
        inside = not Path(name).is_absolute() and ".." not in path.parts
        if not inside and not resolve_links(path).is_relative_to(real_root):
            raise UsageError(f"{file}, line {line}: {name} lies outside {root}; set dataset.root to its folder")
        key = Path(os.path.relpath(path, root)).as_posix()
        if ".." in Path(name).parts:  # behind a link, .. is another folder than it seems
            key = Path(os.path.relpath(resolve_links(path.parent) / path.name, real_root)).as_posix()
        first_line, first_label = first_rows.setdefault(key, (line, label))
        if first_label != label:
            labels = f"{first_label!r} (line {first_line}) and {label!r} (line {line})"
            raise UsageError(f"{file}: {name} has two labels: {labels}. tlcli does single-label classification")
        if first_line != line:
            raise UsageError(f"{file}: {name} is named twice (lines {first_line} and {line}); remove one")
        if not is_file(path):
            missing.append((line, path))
        keys.append(key)
    if missing:
        line, path = missing[0]
        more = f" ({len(missing) - 1} more rows name missing files)" if len(missing) > 1 else ""
        problem = "not a file, or a broken link" if os.path.lexists(path) else "no such file"
        raise UsageError(f"{file}, line {line}: {path}: {problem}{more}")
    return keys


# -- images named on the command line ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class MissingPath:
    """An argument that names no image, and the reason."""

    path: str
    reason: str


Named = str | MissingPath


def expand_image_paths(arguments: Iterable[str], *, patterns: bool = True) -> Iterator[Named]:
    """Yield the images that each argument names, in order, as paths; an argument that names none as a MissingPath.

    A file is yielded whatever its name is. A folder expands to its images in sorted order, then to those of its
    subfolders; hidden files are skipped. With `patterns`, what is not a file may be a pattern, ** included. At most the
    names of one folder are in memory.
    """
    for argument in arguments:
        if is_dir(argument):
            yield from _expand_folder(argument)
        elif patterns and glob.has_magic(argument) and not os.path.lexists(argument):
            matches = sorted(glob.iglob(argument, recursive=True))  # noqa: PTH207 - Path.glob takes no absolute pattern
            if not matches:
                yield MissingPath(argument, "no file matches")
            for path in matches:
                if not is_dir(path):
                    yield path
                elif "**" not in argument:  # ** already matches the contents of folders
                    yield from _expand_folder(path)
        else:
            yield argument


def _expand_folder(folder: str) -> Iterator[Named]:
    paths = _expand_below(folder)
    yield next(paths, MissingPath(folder, "no images in this folder"))
    yield from paths


def _expand_below(folder: str) -> Iterator[Named]:
    """Yield the images below a folder. Links to folders are not followed, so that there are no loops."""
    try:
        with os.scandir(folder) as entries:
            names = sorted((e.name, e.is_dir(follow_symlinks=False)) for e in entries if is_visible(e.name))
    except OSError as error:
        yield MissingPath(folder, (error.strerror or str(error)).lower())
        return
    for name, is_folder in names:
        if not is_folder and is_image(name):
            yield os.path.join(folder, name)  # noqa: PTH118 - as it was typed: Path would remove ./
    for name, is_folder in names:
        if is_folder:
            yield from _expand_below(os.path.join(folder, name))  # noqa: PTH118
