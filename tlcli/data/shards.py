"""Images in shards, files that hold many; tar archives, from which nothing is extracted. See parquet.py too."""

import os
import re
import tarfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import ValidationError, convert

from tlcli.data.decode import read_bytes
from tlcli.data.images import SETTLED_NS, ImageFiles, Ints, Source, Split, digest_of, ignored_notes, positions_by_class
from tlcli.data.listing import EXTENSIONS, SINGLE_LABEL, SPLITS, ClassChoice, check_labels, is_visible, reading_folder
from tlcli.errors import UsageError
from tlcli.files import expand_user, is_dir, is_file
from tlcli.store import Store, cache_dir
from tlcli.text import Names, join_limited, one_line

MAX_LABEL_BYTES = 1000

Index = tuple[list[str], list[int], list[int], list[str], dict[str, int]]
"""Name, offset, bytes and label of each image of an archive, and the number of its other files by ending."""


class ShardImages(ImageFiles):
    """Images in shards below a folder, by their splits, with `counts` of images. A key is the shard and a name in it.

    A row is the number of an image among all, in the order of the shards. `rows` are those of the images by position.
    """

    def __init__(self, root: Path, splits: Mapping[str, str], counts: Sequence[int]) -> None:
        super().__init__(root, ())
        self.splits, self.shards = splits, list(splits)
        self.starts: Ints = np.cumsum([0, *counts])
        self.rows: Ints = np.arange(self.starts[-1])

    def __len__(self) -> int:
        return len(self.rows)

    def find(self, index: int) -> tuple[str, int]:
        """Return the shard of an image, and its number in it."""
        row = int(self.rows[index])
        shard = int(np.searchsorted(self.starts, row, side="right")) - 1
        return self.shards[shard], row - int(self.starts[shard])

    def file(self, index: int) -> str:
        return f"{self.root}/{self.find(index)[0]}"

    def key(self, index: int) -> str:
        return "{} row {}".format(*self.find(index))


def find_shards(root_text: str | None, pattern: str, kind: str) -> tuple[Path, dict[str, str]]:
    """Return a folder, and by path relative to it the split of each file with this ending, sorted.

    The root is the folder, in which those that stand for splits are searched too, or one file. The split is the first
    word of the file's name that stands for one, else its folder; "all" if no file has one. Raise UsageError.
    """
    expected = f"dataset.root names a {kind} file, or the folder that holds such files"
    if root_text is None:
        raise UsageError(f"dataset.root is not set: {expected}")
    root = where = expand_user(root_text)
    if is_file(where):
        root, paths = where.parent, [where]
    else:
        with reading_folder(root, f"{expected}."):
            folders = [root, *(path for path in root.iterdir() if path.name.lower() in SPLITS and is_dir(path))]
            paths = [path for folder in folders for path in folder.iterdir() if is_visible(path.name) and is_file(path)]
    names = sorted(path.relative_to(root).as_posix() for path in paths if re.search(pattern, path.name.lower()))
    if not names:
        nearer = sorted(path.parent for path in root.glob(f"*/*{kind}"))
        raise UsageError(f"{where}: no {kind} file. " + (f"Did you mean {nearer[0]}?" if nearer else expected))
    splits = {}
    for name in names:
        folder, _, file = name.rpartition("/")
        splits[name] = next((SPLITS[w] for w in re.findall("[a-z]+", f"{file} {folder}".lower()) if w in SPLITS), "all")
    if "all" in splits.values() and len(set(splits.values())) > 1:
        name = next(name for name in names if splits[name] == "all")
        raise UsageError(f"{root / name}: its name has neither train, val nor test, which others have; rename it")
    return root, splits


def source_of_shards(
    images: ShardImages, labels: Ints, names: Sequence[str], order: Ints, notes: tuple[str, ...], choice: ClassChoice
) -> Source:
    """Return the images, given the position in `names` of each row's class.

    The images of a split come in this order of rows, the classes in that of `names`.
    """
    split_of = np.repeat(list(images.splits.values()), np.diff(images.starts))[order]
    rows = {split: part for split in ("all", "train", "val", "test") if len(part := order[split_of == split])}
    counts = {split: enumerate(np.bincount(labels[part]).tolist()) for split, part in rows.items()}
    by_class = {split: {names[i]: range(n) for i, n in pairs if n} for split, pairs in counts.items()}
    in_use = [name for name in names if any(name in known for known in by_class.values())]
    if not in_use:
        raise UsageError(f"{images.root}: no images in {join_limited(images.shards, 3)}")
    classes = choice.apply(images.root, in_use, by_class)
    images.rows = np.concatenate(list(rows.values()))
    positions = np.split(np.arange(len(images)), np.cumsum([len(part) for part in rows.values()])[:-1])
    pairs = zip(rows.items(), positions, strict=True)
    parts = {split: Split(images, indices, labels[part]) for (split, part), indices in pairs}
    return Source(tuple(names), parts, notes).keep_classes(classes)


class TarImages(ShardImages):
    """Images of tar archives, each read at its offset."""

    def __init__(self, root: Path, splits: Mapping[str, str], indexes: Mapping[str, Index]) -> None:
        super().__init__(root, splits, [len(index[0]) for index in indexes.values()])
        self.members = Names(name for index in indexes.values() for name in index[0])
        places = [np.array(index[1:3], dtype=np.int64) for index in indexes.values()]
        self._offsets, self._sizes = np.concatenate(places, axis=1)

    def key(self, index: int) -> str:
        return f"{self.find(index)[0]} {self.members[self.rows[index]]}"

    def content(self, index: int) -> bytes:
        row = self.rows[index]
        return read_bytes(Path(self.file(index)), int(self._offsets[row]), int(self._sizes[row]))


def list_tars(root_text: str | None, choice: ClassChoice, *, verify_all: bool) -> Source:
    """Return the images of tar archives, sorted by class, name and archive.

    The cache keeps the index of an archive, which is used again, unless `verify_all`, if it is the same file.
    """
    root, splits = find_shards(root_text, r"\.tar(\.(gz|bz2|xz|zst))?$|\.tgz$", ".tar")
    place = root / next(iter(splits)) if len(splits) == 1 else root
    store, notes = Store(cache_dir()), "tars-" + digest_of(os.fsencode(place.absolute())).hex()
    known = {} if verify_all else store.read_notes(notes)
    indexes, entries = dict[str, Index](), dict[str, Index]()
    for shard in splits:
        stat = (root / shard).stat()
        state = f"{shard} {stat.st_size} {stat.st_ino} {stat.st_mtime_ns}"
        is_settled = time.time_ns() - stat.st_mtime_ns >= SETTLED_NS
        with suppress(KeyError, ValidationError):  # not known, or damaged
            indexes[shard] = convert(known[state], Index)
        if shard not in indexes:
            indexes[shard] = index_tar(root / shard)
        if is_settled:
            entries[state] = indexes[shard]
    with suppress(OSError):
        if entries.keys() != known.keys():
            store.write_notes(notes, entries)
    images, ignored = TarImages(root, splits, indexes), Counter[str]()
    for index in indexes.values():
        ignored.update(index[4])
    texts = [label for index in indexes.values() for label in index[3]]
    names, first, labels = np.unique(np.array(texts, dtype=object), return_index=True, return_inverse=True)
    check_labels({name: images.key(row) for name, row in zip(names.tolist(), first.tolist(), strict=True)})
    by_class = positions_by_class(labels, len(names))
    rows = [row for part in by_class for row in sorted(part.tolist(), key=lambda row: images.members[row].split("/"))]
    order = np.array(rows, dtype=np.int64)
    return source_of_shards(images, labels, names.tolist(), order, ignored_notes(ignored), choice)


def index_tar(path: Path) -> Index:
    """Return the index of an archive, in its order. Links and paths with .. are no images. Raise UsageError."""
    images: dict[str, tuple[str, int, int]] = {}  # by the name without its ending, as labels are
    labels: dict[str, list[tuple[str, bytes]]] = {}
    ignored: Counter[str] = Counter()
    end = 0
    try:
        with path.open("rb") as stream:
            archive: Any = tarfile.TarFile(fileobj=stream, encoding="utf-8")
            while (member := archive.next()) is not None:
                archive.members.clear()  # it would keep them all
                if archive.offset <= end:
                    raise tarfile.ReadError("a size is negative")
                end = archive.offset
                parts = [part for part in member.name.split("/") if part not in ("", ".")]
                name = "/".join(parts)
                ending, stem = Path(name).suffix, name.removesuffix(Path(name).suffix)
                if ".." in parts or "\0" in name or member.issparse() or not (member.isreg() or member.isdir()):
                    ignored["link or .."] += 1
                elif member.isdir() or not all(map(is_visible, parts)):
                    continue
                elif ending.lower() in (".cls", ".txt"):
                    stream.seek(member.offset_data)
                    labels.setdefault(stem, []).append((name, stream.read(min(member.size, MAX_LABEL_BYTES + 1))))
                elif not ending.lower().endswith(EXTENSIONS):
                    ignored[ending.lower() or "no ending"] += 1
                elif stem in images:
                    raise UsageError(f"{path} {name}: has the label of {images[stem][0]} too: rename one of them")
                else:
                    images[stem] = (name, member.offset_data, member.size)
            stream.seek(archive.offset)
            tail = stream.read(2**20)
            if len(tail) < tarfile.BLOCKSIZE or tail.strip(b"\0"):  # which tarfile takes for the end
                raise tarfile.ReadError(f"no header and no end mark at byte {archive.offset:,}")
    except (tarfile.TarError, OSError, ValueError, OverflowError, RecursionError) as error:
        remedy = "decompress it if it is compressed, else copy or make it again"
        raise UsageError(f"{path}: cannot read this tar archive ({one_line(error)}); {remedy}") from error
    texts = [_label_of(f"{path} {image[0]}", stem, labels.pop(stem, [])) for stem, image in images.items()]
    ignored.update(Path(name).suffix.lower() for found in labels.values() for name, _ in found)
    names, offsets, sizes = ([image[k] for image in images.values()] for k in range(3))
    return names, offsets, sizes, texts, dict(ignored)  # type: ignore[return-value]  # the columns have one type each


def _label_of(image: str, stem: str, found: Sequence[tuple[str, bytes]]) -> str:
    if not found:
        raise UsageError(f"{image}: no label: add {stem}.cls or {stem}.txt, or remove the image")
    if len(found) > 1:
        texts = " and ".join(f"{name} ({one_line(text.decode(errors='replace'))[:40]})" for name, text in found)
        raise UsageError(f"{image}: two labels: {texts}. {SINGLE_LABEL}")
    name, content = found[0]
    with suppress(UnicodeDecodeError):
        text = content.decode().strip()
        if text and text.isprintable() and len(content) <= MAX_LABEL_BYTES:
            return text
    expected = f"one line, in UTF-8, of {MAX_LABEL_BYTES:,} bytes at most"
    raise UsageError(f"{image}: {name} is not the name of a class: {expected}")
