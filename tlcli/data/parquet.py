"""Parquet files in Hugging Face's layout, a column of image bytes and one of labels, read by row groups."""

import json
import os
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from tlcli.data.decode import BadImage
from tlcli.data.images import Ints, Source
from tlcli.data.listing import SINGLE_LABEL, ClassChoice, check_labels
from tlcli.data.shards import ShardImages, find_shards, source_of_shards
from tlcli.errors import UsageError
from tlcli.text import did_you_mean, join_limited, one_line

try:
    import pyarrow as pa
    from pyarrow import parquet as pq
    from pyarrow import types
except ImportError:
    raise UsageError("dataset=parquet needs pyarrow: pip install 'tlcli[parquet]'") from None

BUFFER_BYTES = 2**28  # row groups in the memory of each process, whose images an epoch mixes
_ERRORS = (pa.ArrowException, OSError, ValueError, NotImplementedError)


class ParquetImages(ShardImages):
    """Rows of parquet files, given the metadata of each file and the path of its column of bytes.

    A row group is read as a whole, and the last ones that were used stay in memory.
    """

    def __init__(self, root: Path, splits: Mapping[str, str], files: Mapping[str, tuple[Any, str]]) -> None:
        super().__init__(root, splits, [metadata.num_rows for metadata, _ in files.values()])
        self._files, self.column = files, next(iter(files.values()))[1]
        self._groups = [(shard, n) for shard, (file, _) in files.items() for n in range(file.num_row_groups)]
        groups = [files[shard][0].row_group(n) for shard, n in self._groups]
        self._group_starts: Ints = np.cumsum([0, *(group.num_rows for group in groups)])
        self._nbytes: Ints = np.array([group.total_byte_size for group in groups], dtype=np.int64)
        self._process, self._lock, self._buffer = os.getpid(), Lock(), OrderedDict[int, Any]()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_process": None, "_lock": None, "_buffer": None}  # another process gets its own

    def content(self, index: int) -> bytes:
        row = int(self.rows[index])
        group = int(np.searchsorted(self._group_starts, row, side="right")) - 1
        if self._process != os.getpid():  # forked, maybe while another thread held the lock
            self._process, self._lock, self._buffer = os.getpid(), Lock(), OrderedDict()
        with self._lock:
            if group not in self._buffer:
                shard, number = self._groups[group]
                metadata, column = self._files[shard]
                limit = BUFFER_BYTES + self._nbytes.max()  # one group is partly in the buffer, see `order_by_buffer`
                while self._buffer and self._nbytes[[group, *self._buffer]].sum() > limit:
                    self._buffer.popitem(last=False)
                try:
                    with pq.ParquetFile(self.root / shard, metadata=metadata) as file:
                        # a forked process has no threads of Arrow's
                        table = file.read_row_group(number, columns=[column], use_threads=False)
                except _ERRORS as error:
                    raise BadImage(f"its row group cannot be read ({one_line(error)[:80]})") from error
                self._buffer[group] = table.flatten().column(0)
            self._buffer.move_to_end(group)
            values, position = self._buffer[group], row - int(self._group_starts[group])
            content = values[position].as_py() if position < len(values) else None
        if content is None:
            raise BadImage("its bytes are not in the file")
        return bytes(content)

    def order_by_buffer(self, order: Ints, indices: Ints, seed: int, epoch: int) -> Ints:
        """Return the order by buffers, of row groups in random order; within a buffer, rows keep the order given."""
        groups = np.random.default_rng([seed, epoch, 1]).permutation(len(self._groups))
        buffers: Ints = np.empty_like(groups)
        buffers[groups] = (np.cumsum(self._nbytes[groups]) - self._nbytes[groups]) // BUFFER_BYTES
        group_of = np.searchsorted(self._group_starts, self.rows[indices], side="right") - 1
        return order[np.argsort(buffers[group_of], kind="stable")]


def list_parquet(root_text: str | None, image_column: str, label_column: str, choice: ClassChoice) -> Source:
    """Return the images of parquet files, in the order of files and rows.

    The classes are the names of the ClassLabel in the Hugging Face metadata, else the distinct labels, sorted.
    """
    root, splits = find_shards(root_text, r"\.parquet$", ".parquet")
    files, values, codes = dict[str, tuple[Any, str]](), list[Any](), list[Ints]()
    class_names: dict[str, list[str] | None] = {}
    for shard in splits:
        path = root / shard
        try:
            with pq.ParquetFile(path) as file:
                schema = file.schema_arrow
                for key, name in (("image_column", image_column), ("label_column", label_column)):
                    if schema.names.count(name) != 1:
                        hint = did_you_mean(name, schema.names) or f" Set dataset.{key}"
                        columns = join_limited(schema.names, 8)
                        raise UsageError(f"{path}: no column {name!r} (columns: {columns}).{hint}")
                column, kind = image_column, schema.field(image_column).type
                if types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
                    column, kind = f"{column}.bytes", kind.field("bytes").type
                if not (types.is_binary(kind) or types.is_large_binary(kind)):
                    problem = f"column {image_column!r} has {kind}, not images"
                    raise UsageError(f"{path}: {problem}: set dataset.image_column")
                files[shard], labels = (file.metadata, column), file.read([label_column], use_threads=False).column(0)
                rows = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
                if not len(labels) == file.metadata.num_rows == sum(rows) or min(rows, default=0) < 0:
                    raise ValueError("its numbers of rows differ")
        except _ERRORS as error:
            raise UsageError(f"{path}: cannot read this parquet file ({one_line(error)[:200]})") from error
        class_names[shard] = names = _class_names(path, schema.metadata or {}, label_column)
        if (first := next(iter(class_names.values()))) != names:
            raise UsageError(f"{path}: has other classes in its metadata than {next(iter(class_names))}")
        try:
            texts, own_codes = _labels(path, labels, names)
        except UnicodeDecodeError as error:
            raise UsageError(f"{path}: column {label_column!r} has labels that are not UTF-8") from error
        codes.append(own_codes + len(values))
        values += texts
    # numbers come before texts, and 2 before 10
    names = first or [*dict.fromkeys(str(v) for v in sorted(values, key=lambda v: (isinstance(v, str), v)))]
    code = {name: i for i, name in enumerate(names)}
    positions = np.array([code[str(value)] for value in values], dtype=np.int64)[np.concatenate(codes)]
    return source_of_shards(ParquetImages(root, splits, files), positions, names, np.arange(len(positions)), (), choice)


def _class_names(path: Path, metadata: Mapping[bytes, bytes], column: str) -> list[str] | None:
    """Return the names of a ClassLabel in the metadata of Hugging Face; None without one."""
    try:
        feature = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {}).get(column, {})
        names = feature["names"] if feature.get("_type") == "ClassLabel" else None
        if names is None or (len(set(names)) == len(names) and all(isinstance(n, str) and n.strip() for n in names)):
            return names
        raise ValueError("names of classes are missing or occur twice")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = one_line(error)[:80]
        raise UsageError(f"{path}: cannot read the Hugging Face metadata of {column!r} ({reason})") from error


def _labels(path: Path, column: Any, names: list[str] | None) -> tuple[list[Any], Ints]:
    """Return the distinct labels of a column, and each row's position in them. Raise UsageError."""
    kind = column.type.value_type if types.is_dictionary(column.type) else column.type
    is_text = types.is_string(kind) or types.is_large_string(kind)
    if not (is_text or types.is_integer(kind) or types.is_boolean(kind)):
        raise UsageError(f"{path}: the labels are of type {kind}, neither integers nor texts. {SINGLE_LABEL}")
    encoded = column.cast(kind).combine_chunks().dictionary_encode("encode")
    values, codes = encoded.dictionary.to_pylist(), encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64)
    rows = np.unique(codes, return_index=True)[1].tolist()
    places = {value: f"{path} row {row}" for value, row in zip(values, rows, strict=True)}
    for value, place in places.items():
        if value is None or (is_text and not value.strip()) or (names and value == -1):
            raise UsageError(f"{place}: no label. {SINGLE_LABEL}")
        if names and value not in (names if is_text else range(len(names))):
            raise UsageError(f"{place}: label {value!r} is none of the {len(names)} classes in the metadata")
    if not names and is_text:
        check_labels(places)
    return [names[value] for value in values] if names and not is_text else values, codes
