"""Lists the files of a dataset with their classes. Finds every mistake of layout before anything is decoded.

Imports neither torch nor, for folders, numpy, so that a wrong folder is reported at once.
"""

import csv
import glob
import os
import re
import unicodedata
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from tlcli.errors import UsageError
from tlcli.files import expand_user, is_dir, is_file, resolve_links
from tlcli.text import Names, did_you_mean, join_limited

EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".gif", ".bmp", ".dib", ".webp", ".avif"),
    *(".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".heic", ".heif", ".hif"),
)
# names of folders, and values in a manifest, that stand for a split, in lower case
SPLITS = dict.fromkeys(("train", "training"), "train") | dict.fromkeys(("test", "testing"), "test")
SPLITS |= dict.fromkeys(("val", "valid", "validation"), "val")
_SYSTEM_FILES = {  # of macOS and Windows, of volumes, and with thumbnails on a NAS
    *("__macosx", "thumbs.db", "desktop.ini", "system volume information", "$recycle.bin", "lost+found"),
    *("@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot"),
}
_LIKE_A_SPLIT = re.compile(r"(?<![a-z])(train(ing)?|test(ing)?|val(id(ation)?)?|fold)s?(?![a-z])", re.IGNORECASE)
_ONE_PER_CLASS = "Expected one subfolder per class."
SINGLE_LABEL = "tlcli does single-label classification: give each image the name of one class"

FilesByClass = dict[str, dict[str, Names]]  # split -> class -> paths relative to the root, with slashes
ImagesByClass = Mapping[str, Mapping[str, Sized]]  # split -> class -> images of any kind


@dataclass(frozen=True)
class Listing:
    """Files by split ("train", "val", "test", or "all" for a dataset without splits), sorted by class, then by path.

    A split has the path of each file relative to `root`, with slashes, and its position in `classes`, which are sorted.
    `ignored` counts files that are not images by their names, by ending.
    """

    root: Path
    classes: tuple[str, ...]
    splits: Mapping[str, tuple[Names, "array[int]"]]
    ignored: Counter[str]


def resolve_classes(
    known: Sequence[str], selected: Iterable[str] | None, where: str, *, for_training: bool = True
) -> tuple[str, ...]:
    """Return the known classes that are selected (None: all), in the order in which they are known.

    Raise UsageError for an unknown name, and for a single class to train on.
    """
    if selected is None:
        return tuple(known)
    chosen = set(selected)
    for name in sorted(chosen - set(known)):
        raise UsageError(f"dataset.classes: {where} has no class {name!r}.{did_you_mean(name, known)}")
    if for_training and len(chosen) < 2:
        raise UsageError("dataset.classes keeps fewer than two classes: name at least two")
    return tuple(name for name in known if name in chosen)


@dataclass(frozen=True)
class ClassChoice:
    """Says which classes are used: the `selected` ones (None: all).

    With `problems`, those of classes are added to it, and the classes left out if two remain. Data to evaluate on
    (`for_training=False`) needs no training images and no second class.
    """

    selected: Sequence[str] | None = None
    for_training: bool = True
    problems: list[str] | None = None

    def apply(self, where: Path, known: Sequence[str], images: ImagesByClass, hint: str = "") -> tuple[str, ...]:
        """Return the known classes to use. Raise UsageError for a mistake, which `hint` follows."""
        if self.for_training and "all" not in images and "train" not in images:
            raise UsageError(f"{where}: has {' and '.join(images)} but no train: nothing to train on")
        classes = resolve_classes(known, self.selected, str(where), for_training=self.for_training)
        found = list(_problems(images, classes, self.for_training))
        bad = {name for _, names in found for name in names}
        if found and (self.problems is None or len(classes) - len(bad) < 2):
            raise UsageError(f"{where}: {found[0][0]}")
        if self.problems is not None:
            self.problems.extend(text for text, _ in found)
        classes = tuple(name for name in classes if name not in bad)
        if self.for_training and len(classes) < 2:
            raise UsageError(f"{where}: only one class, {classes[0]!r}: at least two are needed. {hint}".rstrip())
        return classes


def _make_listing(root: Path, where: Path, files: FilesByClass, choice: ClassChoice, ignored: Counter[str]) -> Listing:
    known = sorted({name for by_class in files.values() for name in by_class})
    classes = choice.apply(where, known, files, _ONE_PER_CLASS if where == root else "")
    splits = {split: (Names(), array("q")) for split in files}
    for split, (keys, labels) in splits.items():
        for label, name in enumerate(classes):
            in_class = sorted(files[split].get(name, ()), key=lambda key: key.split("/"))
            keys.extend(in_class)
            labels.extend([label] * len(in_class))
    return Listing(root, classes, splits, ignored)


def _problems(files: ImagesByClass, classes: Sequence[str], for_training: bool) -> Iterator[tuple[str, set[str]]]:
    """Yield each problem of the classes, and the classes without which it is gone."""
    for split, by_class in files.items():
        for name in classes:
            if name in by_class and not by_class[name]:
                folder = name if split == "all" else f"{split}/{name}"
                remedy = "add some, remove the folder, or name the others in dataset.classes"
                yield f"{folder}: no images in this class; {remedy}", {name}
    if undecoded := {name for name in classes if name.encode(errors="replace").decode() != name}:
        yield f"the name of class {min(undecoded)!r} is not UTF-8: rename its folder", undecoded
    spelled: dict[str, list[str]] = {}
    for name in classes:
        spelled.setdefault(same_spelling(name), []).append(name)
    for names in spelled.values():
        if len(names) > 1:
            images = {name: sum(len(by_class.get(name, ())) for by_class in files.values()) for name in names}
            smaller = set(names) - {max(names, key=images.__getitem__)}
            text = f"classes {' and '.join(map(repr, names))} differ only in case or in how accents are encoded"
            yield f"{text}: rename one", smaller
    main = "all" if "all" in files else "train"
    for split, by_class in files.items() if for_training else ():
        if strange := [name for name in classes if name in by_class and name not in files[main]]:
            yield f"{split} has classes that {main} lacks: {join_limited(strange)}", set(strange)


def same_spelling(name: str) -> str:
    """Return what names have in common that differ only in case or in how accents are encoded."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _walk(folder: str | Path, errors: list[OSError], links: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield each folder from `folder` down with its visible files, sorted. Links to folders are not followed."""
    for where, subfolders, names in os.walk(folder, onerror=errors.append):
        subfolders[:] = sorted(filter(is_visible, subfolders))
        links += filter(os.path.islink, (os.path.join(where, name) for name in subfolders))  # noqa: PTH118
        yield where, sorted(filter(is_visible, names))


def is_visible(name: str) -> bool:
    return not name.startswith(".") and name.lower() not in _SYSTEM_FILES


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS)


# -- folders ----------------------------------------------------------------------------------------------------------


def list_folder(root_text: str | None, choice: ClassChoice) -> Listing:
    """List the images of root/CLASS, or of root/train/CLASS, root/val/CLASS and root/test/CLASS, at any depth below.

    Hidden and system files are skipped. A class folder may be a link; links to folders below it are not followed. Raise
    UsageError for a mistake.
    """
    if root_text is None:
        raise UsageError("dataset.root is not set: name the folder that holds the images")
    root = expand_user(root_text)
    ignored: Counter[str] = Counter()
    with reading_folder(root, _ONE_PER_CLASS):
        folders = _split_folders(root) or {"all": root}
        files = {split: _scan_classes(folder, root, choice.selected, ignored) for split, folder in folders.items()}
        others = set(_subfolders(root)) - set(folders.values()) if "all" not in folders else ()
        ignored.update("folder beside the splits" for path in others if not _has_runs(path))
        for folder in {root, *folders.values()}:
            inside = filter(is_visible, os.listdir(folder))  # noqa: PTH208  no Path per name
            ignored.update("image beside the folders" for name in inside if _is_image(name))
    if choice.for_training and len(files.get("all", ())) == 1:
        ((name, keys),) = files["all"].items()
        if len({key.split("/")[1] for key in keys if key.count("/") > 1}) > 1:
            raise UsageError(f"{root}: only one class, {name!r}. Did you mean {root / name}? {_ONE_PER_CLASS}")
    elif (names := files.get("all")) and all(map(_LIKE_A_SPLIT.search, names)):
        inner = {tuple(p.name for p in _subfolders(root / name)) for name in names}
        if len(inner) == 1 and len(*inner) > 1:
            some, classes = join_limited(sorted(names)), join_limited(list(*inner))
            raise UsageError(f"{root}: {some} all have the subfolders {classes}: name the splits train, val and test")
    return _make_listing(root, root, files, choice, ignored)


@contextmanager
def reading_folder(root: Path, expected: str) -> Iterator[None]:
    """Turn errors of the system into a UsageError, which says what is expected."""
    try:
        yield
    except (OSError, ValueError) as error:  # a ValueError if there is a NUL in the name
        reason = (getattr(error, "strerror", None) or str(error)).lower()
        problem = f"cannot read this folder ({reason})."
        if isinstance(error, FileNotFoundError):
            known = [p.name for p in _subfolders(root.parent)] if is_dir(root.parent) else []
            problem = f"no such folder.{did_you_mean(root.name, known)}"
        raise UsageError(f"{getattr(error, 'filename', None) or root}: {problem} {expected}") from error


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


def _scan_classes(folder: Path, root: Path, selected: Sequence[str] | None, ignored: Counter[str]) -> dict[str, Names]:
    """Return the images of each class folder, as paths relative to root, and count the other files."""
    errors, links, classes = list[OSError](), list[str](), dict[str, Names]()
    for path in _subfolders(folder):
        if _has_runs(path):
            continue
        if train := _split_folders(path).get("train"):
            remedy = f"Did you mean {path}? Images of a class belong in {root / train.name / path.name}"
            raise UsageError(f"{path}: contains {train.name}, so it is not a class. {remedy}")
        images = classes[path.name] = Names()
        for where, names in _walk(path, errors, links) if selected is None or path.name in selected else ():
            prefix = Path(os.path.relpath(where, root)).as_posix()
            images.extend(f"{prefix}/{name}" for name in names if _is_image(name))
            ignored.update(Path(name).suffix.lower() or "no ending" for name in names if not _is_image(name))
    if errors:
        raise errors[0]
    ignored.update(["link to a folder"] * len(links))
    if not any(classes.values()) and (selected is None or classes.keys() <= set(selected)):
        others = join_limited([f"{suffix} ({n})" for suffix, n in ignored.most_common()])
        found = f" (other files: {others})" if others else ""
        raise UsageError(f"{folder}: no images in subfolders{found}. {_ONE_PER_CLASS}")
    return classes


def _has_runs(folder: Path) -> bool:
    """Return True for `outputs` with runs, or a search, that were started in the folder of images."""
    return folder.name == "outputs" and any(chain(folder.rglob("run.json"), folder.rglob("tune.json")))


def _subfolders(folder: Path) -> list[Path]:
    """Return visible subfolders, links to folders included, sorted by name. Links that form a circle are left out."""
    with os.scandir(folder) as entries:
        found = (e.name for e in entries if is_visible(e.name) and (is_dir(e.path) if e.is_symlink() else e.is_dir()))
        return sorted(folder / name for name in found)


# -- manifest ---------------------------------------------------------------------------------------------------------


def list_manifest(file_text: str, root_text: str | None, choice: ClassChoice) -> Listing:
    """List the images that a CSV file names in its columns path, label and, optionally, split.

    Paths are relative to the root, or to the file's folder, and may not leave it. Raise UsageError with the line of a
    mistake.
    """
    file = expand_user(file_text)
    if not is_file(file):
        raise UsageError(f"{file}: no such file. dataset.file names a CSV file with the columns path, label[, split]")
    root = file.parent if root_text is None else expand_user(root_text)
    if not is_dir(root):
        raise UsageError(f"{root}: no such folder. dataset.root names the folder to which the paths are relative")
    real_root, full_root = resolve_links(root), root.absolute()

    def key_of(name: str, line: int) -> str:
        relative = Path(name)
        if relative.is_absolute() and relative.is_relative_to(full_root):  # maybe through a link to another place
            relative = relative.relative_to(full_root)
        if not relative.is_absolute() and ".." not in relative.parts:
            return relative.as_posix()
        real = resolve_links((root / relative).parent) / relative.name  # behind a link, .. is another folder
        if not real.is_relative_to(real_root):
            raise UsageError(f"{file}, line {line}: {name} lies outside {root}; set dataset.root to its folder")
        return real.relative_to(real_root).as_posix()

    lines, hashes, first_missing, n_missing = dict[str, str](), array("q"), "", 0
    files: FilesByClass = {}
    for line, name, label, split in _read_rows(file):
        lines[label] = f"{file}, line {line}"
        key = key_of(name, line)
        hashes.append(hash(key))
        files.setdefault(split or "all", {}).setdefault(label, Names()).extend([key])
        if not is_file(root / name):
            n_missing += 1
            first_missing = first_missing or f"{lines[label]}: {root / name}: no such file"
    check_labels(lines)
    _check_repeated(file, hashes, key_of)
    if n_missing:
        more = f" ({n_missing - 1} more rows name missing files)" if n_missing > 1 else ""
        raise UsageError(first_missing + more)
    return _make_listing(root, file, files, choice, Counter())


def _read_rows(file: Path) -> Iterator[tuple[int, str, str, str]]:
    """Yield line, path, label and split ("" without) of each row."""
    has_split: bool | None = None
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream, strict=True)
            columns = reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
            for name in ("path", "label", "split"):
                if columns.count(name) > 1 or (name not in columns and name != "split"):
                    names = join_limited(columns, 8) or "none"
                    raise UsageError(f"{file}: its first line needs one column {name!r} (columns: {names})")
            for cells in reader:
                where = f"{file}, line {reader.line_num}"
                if None in cells:
                    raise UsageError(f"{where}: more fields than columns; quote a value that contains a comma")
                path, label, split = ((cells.get(name) or "").strip() for name in ("path", "label", "split"))
                for name, value in (("path", path), ("label", label)):
                    if not value or "\0" in value:
                        raise UsageError(f"{where}: the {name} is empty or contains a NUL character")
                if split and split.lower() not in SPLITS:
                    raise UsageError(f"{where}: split {split!r} is not one of train, val, test")
                if has_split not in (None, bool(split)):
                    raise UsageError(f"{where}: either all rows have a split or none has")
                has_split = bool(split)
                yield reader.line_num, path, label, SPLITS.get(split.lower(), "")
    except (csv.Error, UnicodeDecodeError, OSError) as error:
        raise UsageError(f"{file}: cannot read this as CSV in UTF-8 ({error})") from error
    if has_split is None:
        raise UsageError(f"{file}: no data rows; add one row per image")


def _check_repeated(file: Path, hashes: "array[int]", key_of: Callable[[str, int], str]) -> None:
    """Raise UsageError for the first image that two rows name, given the hash of the key of each row."""
    import numpy as np

    values, counts = np.unique(np.frombuffer(hashes, dtype=np.int64), return_counts=True)
    if (counts == 1).all():
        return
    repeated, first_rows = set(values[counts > 1].tolist()), dict[str, tuple[int, str]]()
    for (line, name, label, _), value in zip(_read_rows(file), hashes, strict=True):
        if value in repeated:
            first_line, first_label = first_rows.setdefault(key_of(name, line), (line, label))
            if first_label != label:
                labels = f"{first_label!r} (line {first_line}) and {label!r} (line {line})"
                raise UsageError(f"{file}: {name} has two labels: {labels}. {SINGLE_LABEL}")
            if first_line != line:
                raise UsageError(f"{file}: {name} is named twice (lines {first_line} and {line}); remove one")


def check_labels(labels: Mapping[str, str]) -> None:
    """Raise UsageError for labels of a regression or of a multi-label dataset, given the place of each."""
    parts = {label: [p.strip() for p in label.replace(";", "|").replace(",", "|").split("|")] for label in labels}
    uses = Counter(part for names in parts.values() for part in set(names))
    for label, place in labels.items():
        inner = label[1:-1].strip()
        is_item = not inner or inner[0] in "'\"+-.0123456789"  # a class may be `(none)`
        is_list = label[0] + label[-1] in ("[]", "{}", "()") and (is_item or len(parts[label]) > 1)
        if is_list or (len(parts[label]) > 1 and all(uses[part] > 1 for part in parts[label])):
            raise UsageError(f"{place}: label {label!r} is a list. {SINGLE_LABEL}")
    if all(re.fullmatch(r"nan|[+-]?\d*\.?\d+([eE][+-]\d+)?", label) for label in labels):  # 1_1 and 1E5 are names
        for label, place in labels.items():
            if not label.lstrip("+-").isdecimal():
                raise UsageError(f"{place}: labels are numbers ({label}). {SINGLE_LABEL}, not a value")


# -- images named on the command line ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class MissingPath:
    """An argument that names no image, and the reason."""

    path: str
    reason: str


Named = str | MissingPath


def expand_image_paths(arguments: Iterable[str], *, patterns: bool = True) -> Iterator[Named]:
    """Yield the images that each argument names, in order, as paths; an argument that names none as a MissingPath.

    A folder expands to its images in sorted order, then to those of its subfolders; hidden files are skipped. With
    `patterns`, what does not exist may be a pattern, ** included.
    """
    for argument in arguments:
        paths = [argument]
        if patterns and glob.has_magic(argument) and not os.path.lexists(argument):
            paths = sorted(glob.iglob(argument, recursive=True))  # noqa: PTH207 - Path.glob takes no absolute pattern
            if "**" in argument:  # it matches the contents of folders, too
                paths = [path for path in paths if not is_dir(path)]
            if not paths:
                yield MissingPath(argument, "no file matches")
        for path in paths:
            if is_dir(path):
                yield from _expand_folder(path)
            else:
                yield path


def _expand_folder(folder: str) -> Iterator[Named]:
    errors, links, is_empty = list[OSError](), list[str](), True
    for where, names in _walk(folder, errors, links):
        for name in filter(_is_image, names):
            is_empty = False
            yield os.path.join(where, name)  # noqa: PTH118 - as it was typed: Path would remove ./
    for error in errors:
        yield MissingPath(error.filename, (error.strerror or str(error)).lower())
    for link in links:
        yield MissingPath(link, "a link to a folder, which is not followed; name it, too")
    if is_empty and not errors and not links:
        yield MissingPath(folder, "no images in this folder")
