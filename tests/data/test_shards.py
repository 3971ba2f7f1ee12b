"""Images in tar archives and parquet files are those of folders: pixels, order, splits, digests; and refusals."""

import os
import shutil
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.data.samples import (
    folder_spec,
    pack_parquet,
    pack_tar,
    parquet_spec,
    save_image,
    tar_of,
    tar_spec,
    write_parquet,
    write_tar,
)
from tests.faults.programs import scale
from tests.faults.refusals import refused, untouched
from tlcli.data import parquet, shards
from tlcli.data.batches import ImageBatches, Preprocessing, split_order
from tlcli.data.dataset import Dataset, load_dataset
from tlcli.data.decode import BadImage
from tlcli.data.images import Split
from tlcli.errors import BadImagesError, UsageError
from tlcli.reporter import Reporter
from tlcli.specs import DatasetSpec, Fit, OnBad, Verify
from tlcli.store import Store

MakeFolder = Callable[..., Path]
EIGHT = Preprocessing(size=8, fit=Fit.squash, mean=(0.5,) * 3, std=(0.5,) * 3)
FORMS = {"tar": (pack_tar, tar_spec), "parquet": (pack_parquet, parquet_spec)}
both_forms = pytest.mark.parametrize("form", FORMS)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Use a new cache in each test, which also keeps what is known of files that are not 2 s old."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("TLCLI_CACHE", str(folder))
    monkeypatch.setattr("tlcli.data.images.SETTLED_NS", 0)
    monkeypatch.setattr(shards, "SETTLED_NS", 0)
    return folder


@pytest.fixture(scope="module")
def png(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return save_image(tmp_path_factory.mktemp("image") / "x.png").read_bytes()


def pack(root: Path, form: str, names: Sequence[str] = ("part-0", "part-1"), **options: Any) -> Path:
    """Divide the images of a folder among shards with these names, in a new folder."""
    for i, name in enumerate(names):
        FORMS[form][0](root, root.parent / form / f"{name}.{form}", slice(i, None, len(names)), **options)
    return root.parent / form


def load(spec: DatasetSpec, **options: Any) -> Dataset:
    return load_dataset(spec, seed=0, reporter=Reporter(), **options)


def everything(spec: DatasetSpec) -> Split:
    return spec.load(Reporter()).splits["all"]


def batches(split: Split, **options: Any) -> ImageBatches:
    return ImageBatches(split, EIGHT, batch_size=4, **{"workers": 0} | options)


# -- the same images


@pytest.mark.parametrize("seed", range(3))
def test_each_form_has_the_same_decoded_batches(make_folder: MakeFolder, seed: int) -> None:
    """Archives come in the order of folders; parquet files keep their own, so that the images are compared sorted."""
    random = np.random.default_rng(seed)
    root = make_folder({name: int(random.integers(3, 9)) for name in ("b", "a", "c", "B2")})
    specs = folder_spec(root), tar_spec(pack(root, "tar")), parquet_spec(pack(root, "parquet"))
    assert [spec.load(Reporter()).classes for spec in specs] == [("B2", "a", "b", "c")] * 3
    found = [[torch.cat(part) for part in zip(*batches(everything(spec)).in_order(), strict=True)] for spec in specs]
    assert all(map(torch.equal, found[0], found[1]))
    as_sets = [sorted((label, *x.flatten().tolist()) for x, label in zip(x, y.tolist())) for x, y in found]  # noqa: B905
    assert as_sets[0] == as_sets[2]


@pytest.mark.parametrize("folds", [None, 3])
@pytest.mark.parametrize("names", [["all"], ["z", "y", "x"]])
def test_archives_have_the_splits_of_folders(make_folder: MakeFolder, folds: int | None, names: list[str]) -> None:
    root = make_folder({"b": 9, "a": 7, "c/d": 6, "c": 5})
    one, other = (load(spec, folds=folds) for spec in (folder_spec(root), tar_spec(pack(root, "tar", names))))
    for name in ("train", "val", "test"):
        images, archived = getattr(one, name), getattr(other, name)
        assert [archived.key(i).partition(" ")[2] for i in range(len(archived))] == list(
            map(images.key, range(len(images)))
        )
        assert archived.labels.tolist() == images.labels.tolist()
    assert np.array_equal(one.folds, other.folds)  # type: ignore[arg-type]


@both_forms
@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (["train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"], {"train": 8, "test": 4}),
        (["set1-training-0", "set1_validation", "set1.test"], {"train": 4, "val": 4, "test": 4}),
        (["train/0", "valid/0", "test/0"], {"train": 4, "val": 4, "test": 4}),
        (["Train/test-0", "Train/0", "Train1"], {"train": 8, "test": 4}),
        (["one", "two", ".hidden-test"], {"all": 8}),
    ],
)
def test_names_of_files_and_folders_say_the_split(make_folder: MakeFolder, form: str, names: list[str], splits) -> None:
    source = FORMS[form][1](pack(make_folder({"a": 7, "b": 5}), form, names)).load(Reporter())
    assert {name: len(split) for name, split in source.splits.items()} == splits


@both_forms
def test_train_and_val_are_one_pool_of_folds(make_folder: MakeFolder, form: str) -> None:
    root = pack(make_folder({"a": 12, "b": 12}), form, ["train", "val", "test"])
    data = load(FORMS[form][1](root), folds=2)
    assert Counter(data.train.key(i).split(".")[0] for i in range(len(data.train))) == {"train": 8, "val": 8}
    assert {data.train.read(i).tobytes() for i in range(16)}.isdisjoint({data.test.read(i).tobytes() for i in range(8)})


@both_forms
def test_a_file_may_be_the_root_and_classes_are_selected(make_folder: MakeFolder, form: str) -> None:
    root, spec = pack(make_folder({"a": 4, "b": 4, "c": 4}), form, ["train", "val"]), FORMS[form][1]
    file = root / f"val.{form}"
    assert spec(file).load(Reporter(), for_training=False).splits["val"].class_counts(3) == (2, 2, 2)
    source = spec(file, classes=("c", "a")).load(Reporter(), for_training=False)
    assert source.classes == ("a", "c") and source.splits["val"].class_counts(2) == (2, 2)
    refused(spec(file).check, 2, "has val but no train", keeps=root)


def test_classes_that_cannot_be_used_are_left_out_by_the_check(tmp_path: Path, png: bytes) -> None:
    labels = {"train": "aab", "test": "abz"}
    for split, names in labels.items():
        members = [
            (f"{i}{end}", text) for i, n in enumerate(names) for end, text in ((".png", png), (".cls", n.encode()))
        ]
        write_tar(tmp_path / f"{split}.tar", members)
    refused(tar_spec(tmp_path).check, 2, "test has classes that train lacks: z", keeps=tmp_path)
    spec, problems = tar_spec(tmp_path).without_bad_classes()
    assert spec.classes == ("a", "b") and problems == ["test has classes that train lacks: z"]


# -- what is known, and errors by name


@both_forms
def test_what_is_known_of_a_shard_is_not_read_again(make_folder: MakeFolder, form: str, cache, monkeypatch) -> None:
    root, spec = pack(make_folder({"a": 6, "b": 6}), form), FORMS[form][1]
    before = load(spec(root), store=Store(cache)).train.fingerprint()
    images = type(everything(spec(root)).images)
    read, index = Mock(wraps=images.content), Mock(wraps=shards.index_tar)  # type: ignore[attr-defined]
    monkeypatch.setattr(images, "content", lambda *args: read(*args))
    monkeypatch.setattr(shards, "index_tar", index)

    def reads(**changes: Any) -> tuple[int, int]:
        read.reset_mock(), index.reset_mock()
        assert load(spec(root, **changes), store=Store(cache)).train.fingerprint() == before
        return read.call_count, index.call_count

    assert reads() == (0, 0)
    os.utime(root / f"part-1.{form}", (1, 1))
    assert reads() == (6, form == "tar")
    assert reads() == (0, 0)
    assert reads(verify=Verify.full) == (12, 2 * (form == "tar"))


def test_files_of_one_folder_are_known_beside_each_other_and_replaced_ones_are_not(make_folder: MakeFolder) -> None:
    file = pack(make_folder({"a": 3, "b": 3}), "tar", ["one"]) / "one.tar"
    other, new = file.with_name("other.tar"), file.with_name("new")
    shutil.copy2(file, other)
    shutil.copy2(file, new)  # size and time are the same
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "index_tar", index := Mock(wraps=shards.index_tar))
        for name in (file, other, file, other):
            everything(tar_spec(name))
        assert index.call_count == 2
        new.replace(file)
        everything(tar_spec(file))
        assert index.call_count == 3


def test_two_columns_of_one_parquet_file_are_two_sets_of_images(make_folder: MakeFolder, cache: Path) -> None:
    root = pack(make_folder({"a": 3, "b": 3}), "parquet", ["x"])
    table = pq.read_table(root / "x.parquet")
    images = table.column("image").to_pylist()
    pq.write_table(
        table.append_column("other", pa.array(images[::-1], table.schema.field("image").type)), root / "x.parquet"
    )
    one, other = (load(parquet_spec(root, image_column=name), store=Store(cache)).train for name in ("image", "other"))
    assert one.fingerprint() == load(parquet_spec(root)).train.fingerprint()
    assert (
        other.fingerprint() == load(parquet_spec(root, image_column="other")).train.fingerprint() != one.fingerprint()
    )


@both_forms
def test_a_fingerprint_is_of_names_and_bytes(make_folder: MakeFolder, form: str) -> None:
    root, spec = pack(make_folder({"a": 3, "b": 3}), form, ["x"]), FORMS[form][1]
    before = everything(spec(root)).fingerprint()
    assert everything(spec(root.rename(root.with_name("moved")))).fingerprint() == before
    (root.parent / "moved" / f"x.{form}").rename(root.parent / "moved" / f"y.{form}")
    assert everything(spec(root.parent / "moved")).fingerprint() != before


def test_an_index_that_is_damaged_is_made_again(make_folder: MakeFolder, cache: Path) -> None:
    root = pack(make_folder({"a": 3, "b": 3}), "tar", ["x"])
    before, store = everything(tar_spec(root)).fingerprint(), Store(cache)
    (notes,) = (file.stem for file in cache.glob("tars-*.json"))
    (state,) = store.read_notes(notes)
    for damage in ([], 7, [["n"], [0], ["1"], ["a"], {}]):
        store.write_notes(notes, {state: damage})
        assert everything(tar_spec(root)).fingerprint() == before


def test_images_that_do_not_decode_are_named(tmp_path: Path, png: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [png, png[:40], None, png, b"", png, *[png] * 6]
    write_parquet(tmp_path / "train.parquet", images, [0, 1] * 6, ["a", "b"])
    members = [
        (f"{i}{end}", text or b"")
        for i, image in enumerate(images)
        for end, text in ((".png", image), (".txt", b"ab"[i % 2 : i % 2 + 1]))
    ]
    write_tar(tmp_path / "train.tar", members)
    with pytest.raises(BadImagesError) as caught:
        load(parquet_spec(tmp_path))
    found = {Path(file).name: reason for file, reason in caught.value.files}
    assert found.keys() == {f"train.parquet row {row}" for row in (1, 2, 4)}
    assert found["train.parquet row 2"] == "its bytes are not in the file"
    with pytest.raises(BadImagesError, match=r"train\.tar 2\.png \(empty\), .*train\.tar 1\.png \("):
        load(tar_spec(tmp_path))
    data = load(tar_spec(tmp_path, on_bad=OnBad.skip))
    assert len(data.train) + len(data.val) + len(data.test) == 9 and len(data.bad_files) == 3


def test_deep_images_in_shards_have_a_range(tmp_path: Path) -> None:
    from PIL import Image

    for i in range(8):
        stream = BytesIO()
        Image.fromarray(np.full((4, 4), 1000 + i, np.uint16)).save(stream, "PNG")
        (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
        (tmp_path / "ab"[i % 2] / f"{i}.png").write_bytes(stream.getvalue())
    pack_tar(tmp_path, tmp_path / "tar/all.tar")
    one = load(folder_spec(tmp_path, range="auto", classes=("a", "b")))
    other = load(tar_spec(tmp_path / "tar", range="auto"))
    assert one.value_range == other.value_range is not None
    assert [one.train.read(i).max() for i in range(4)] == [other.train.read(i).max() for i in range(4)]


# -- the order in which parquet files are read


@pytest.fixture
def in_groups(make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch) -> Split:
    """Return 40 images in 10 row groups, of which three are in memory at once."""
    root = make_folder({"a": 20, "b": 20})
    split = everything(parquet_spec(pack(root, "parquet", rows_per_group=4)))
    monkeypatch.setattr(parquet, "BUFFER_BYTES", int(split.images._nbytes.max() * 2.2))  # type: ignore[attr-defined]
    return split


def test_an_epoch_shuffles_row_groups_and_the_rows_of_a_buffer(in_groups: Split) -> None:
    orders = []
    for seed, epoch in ((0, 1), (0, 1), (0, 2), (1, 1)):
        order = split_order(in_groups, seed, epoch, balanced=False)
        assert sorted(order) == list(range(40))
        groups = [group for group, previous in pairwise([*(order // 4), -1])]
        assert all(len(set(groups[i : i + 4])) > 1 for i in range(0, 32, 4)), "rows of several groups mix"
        last_seen = [np.flatnonzero(np.array(groups) == g) for g in range(10)]
        assert max(seen.max() - seen.min() for seen in last_seen) < 16, "a group is read within one buffer"
        orders.append(order.tolist())
    assert orders[0] == orders[1]
    assert len({frozenset(i // 4 for i in order[:8]) for order in orders}) == 3, "each epoch and seed has other groups"


def test_an_epoch_reads_each_row_group_once(in_groups: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Mock(wraps=parquet.pq.ParquetFile)
    monkeypatch.setattr(parquet.pq, "ParquetFile", opened)
    for balanced in (False, True):
        opened.reset_mock()
        x = torch.cat([y for _, y in batches(in_groups, seed=3, balanced=balanced).epoch(1)])
        assert len(x) == 40 and opened.call_count == 10


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than the cores of this machine
def test_workers_and_a_start_in_the_middle_change_nothing(in_groups: Split) -> None:
    whole = list(batches(in_groups, seed=3).epoch(2))
    for rest in (
        list(batches(in_groups, seed=3, workers=2).epoch(2, start=4)),
        list(batches(in_groups, seed=3).epoch(2, start=4)),
    ):
        assert len(rest) == 6
        assert all(torch.equal(x, same) for (x, _), (same, _) in zip(whole[4:], rest, strict=True))


# -- what is refused


NO_HEADER = "x.tar: cannot read this tar archive (no header and no end mark at byte 4,096)"
A, B = (("a.jpg", b"image"), ("a.cls", b"cat")), (("b.jpg", b"image"), ("b.txt", b"dog"))
SOUND = tar_of(*A, *B)
TARS = {
    "no label": (tar_of(*A, ("d/b.jpg", b"")), "x.tar d/b.jpg: no label: add d/b.cls or d/b.txt"),
    "two labels": (tar_of(*A, *B, ("b.cls", b"bird")), "x.tar b.jpg: two labels: b.txt (dog) and b.cls (bird)"),
    "a label twice": (tar_of(*A, *B, ("b.txt", b"dog")), "x.tar b.jpg: two labels: b.txt (dog) and b.txt (dog)"),
    "an image twice": (tar_of(*A, *B, B[0]), "x.tar b.jpg: has the label of b.jpg too"),
    "two images": (tar_of(*A, *B, ("b.png", b"")), "x.tar b.png: has the label of b.jpg too"),
    "a text": (tar_of(*A, B[0], ("b.txt", b"a dog\non a sofa")), "x.tar b.jpg: b.txt is not the name of a class"),
    "an essay": (tar_of(*A, B[0], ("b.txt", b"dog" * 500)), "x.tar b.jpg: b.txt is not the name of a class"),
    "no text": (tar_of(*A, B[0], ("b.cls", b" \n")), "x.tar b.jpg: b.cls is not the name of a class"),
    "not UTF-8": (tar_of(*A, B[0], ("b.cls", b"\xff\xfe")), "x.tar b.jpg: b.cls is not the name of a class"),
    "a number": (tar_of(*A, B[0], ("b.cls", b"1.5")), "only"),
    "one class": (tar_of(*A), "only one class, 'cat': at least two are needed"),
    "no image": (tar_of(("README.txt", b"x" * 5000), ("x.json", b"{}")), "no images in x.tar"),
    "empty": (b"", "x.tar: cannot read this tar archive (empty file)"),
    "no archive": (b"PK\3\4" + bytes(2000), "x.tar: cannot read this tar archive"),
    "truncated": (SOUND[:1030], "x.tar: cannot read this tar archive"),
    "without its end": (SOUND[: 8 * 512], NO_HEADER),
    "damaged": (SOUND[:2048] + b"\1" + SOUND[2049:], NO_HEADER.removesuffix(" byte 4,096)")),
    "two archives": (SOUND + SOUND, NO_HEADER),
    "gzip": (b"\x1f\x8b\x08\0" + SOUND, "decompress it if it is compressed, else copy or make it again"),
}


@pytest.mark.parametrize(("content", "words"), TARS.values(), ids=TARS)
def test_an_archive_that_is_refused(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set/x.tar").write_bytes(content)
    if words != "only":
        refused(tar_spec(tmp_path / "set").check, 2, words, keeps=tmp_path / "set")


def test_a_negative_size_ends(tmp_path: Path) -> None:
    """Python 3.11 would read the same header for ever (CVE-2025-8194)."""
    header = bytearray(tar_of(*A)[:512])
    header[124:136] = b"\xff" * 10 + b"\xfe\x00"  # -512 in base 256
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "x.tar").write_bytes(SOUND[:2048] + bytes(header) + bytes(1024))
    refused(tar_spec(tmp_path).check, 2, "x.tar: cannot read this tar archive", keeps=tmp_path)


def test_links_and_paths_upward_are_no_images_and_nothing_is_extracted(tmp_path: Path, png: bytes) -> None:
    (tmp_path / "outside.png").write_bytes(png)
    names = ["./c/a.png", "b.PNG", "../up.png", "/abs.png", "c/d.json", "README"]
    names += ["._b.png", "__MACOSX/c.png", "c/@eaDir/a.png"]  # system files
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name in names:
            for ending, content in (("", png), (".txt", b"cat" if "a" in name else b"dog")):
                member = tarfile.TarInfo(name.rpartition(".")[0] + ending if ending else name)
                member.size = len(content)
                archive.addfile(member, BytesIO(content))
        for kind, target in ((tarfile.SYMTYPE, "../outside.png"), (tarfile.LNKTYPE, "b.PNG"), (tarfile.CHRTYPE, "")):
            member = tarfile.TarInfo(f"link{kind!r}.png")
            member.type, member.linkname = kind, target
            archive.addfile(member)
    with untouched(tmp_path):
        source = tar_spec(tmp_path / "x.tar").load(Reporter())
    split = source.splits["all"]
    assert [split.key(i) for i in range(len(split))] == ["x.tar abs.png", "x.tar c/a.png", "x.tar b.PNG"]
    assert all(np.array_equal(split.read(i), split.read(0)) for i in range(3))
    assert any("link or .. (" in note and ".json (1)" in note for note in source.notes)


def image_rows(*labels: Any, **columns: Any) -> dict[str, Any]:
    return {"image": [{"bytes": b"x", "path": None}] * len(labels), "label": pa.array(labels), **columns}


def hugging_face(names: Any) -> dict[str, str]:
    import json

    features = {"label": {"_type": "ClassLabel", "names": names}}
    return {"huggingface": json.dumps({"info": {"features": features}})}


LATIN_1 = pa.array([b"caf\xe9", b"b"]).view(pa.string())  # a column of texts whose bytes are not checked
TABLES = {
    "no image column": ({"img": [b""], "label": [0]}, {}, "no column 'image' (columns: img, label)."),
    "no label column": ({"image": [b""], "labels": [0]}, {}, "no column 'label' (columns: image, labels). Did you"),
    "texts for images": ({"image": ["a.jpg"], "label": [0]}, {}, "column 'image' has string, not images"),
    "regression": (image_rows(0.5, 1.5), {}, "x.parquet: the labels are of type double"),
    "several labels": (image_rows([0, 1], [2]), {}, "x.parquet: the labels are of type list"),
    "lists in texts": (image_rows("a,b", "a", "b,a"), {}, "x.parquet row 0: label 'a,b' is a list"),
    "not UTF-8": (image_rows(0, 1, label=LATIN_1), {}, "x.parquet: column 'label' has labels that are not UTF-8"),
    "no label": (image_rows(0, 1, None), {}, "x.parquet row 2: no label"),
    "an empty label": (image_rows("a", " ", "b"), {}, "x.parquet row 1: no label"),
    "a hidden label": (image_rows(0, 1, -1), hugging_face(["a", "b"]), "x.parquet row 2: no label"),
    "a strange label": (image_rows(0, 2, 1), hugging_face(["a", "b"]), "row 1: label 2 is none of the 2 classes"),
    "a class twice": (image_rows(0, 1), hugging_face(["a", "a"]), "cannot read the Hugging Face metadata of 'label'"),
    "no names": (image_rows(0, 1), hugging_face(None) | {}, ""),
    "not JSON": (image_rows(0, 1), {"huggingface": "{"}, "cannot read the Hugging Face metadata of 'label'"),
    "one class": (image_rows(0, 0), hugging_face(["a", "b"]), "only one class, 'a'"),
    "no rows": ({"image": pa.array([], pa.binary()), "label": pa.array([], pa.int64())}, {}, "no images in x.parquet"),
}


@pytest.mark.parametrize(("columns", "metadata", "words"), TABLES.values(), ids=TABLES)
def test_a_parquet_file_that_is_refused(columns: dict[str, Any], metadata: dict[str, str], words, tmp_path) -> None:
    table = pa.table(columns).replace_schema_metadata(metadata)
    parquet.pq.write_table(table, tmp_path / "x.parquet")
    if words:
        refused(parquet_spec(tmp_path).check, 2, words, keeps=tmp_path)
    else:
        parquet_spec(tmp_path).check()


@pytest.mark.parametrize("size", [0, 3, 200, -1])
def test_a_truncated_parquet_file_is_refused(size: int, tmp_path: Path, png: bytes) -> None:
    file = write_parquet(tmp_path / "x.parquet", [png] * 4, [0, 1, 0, 1], ["a", "b"])
    file.write_bytes(file.read_bytes()[:size])
    refused(parquet_spec(tmp_path).check, 2, "x.parquet: cannot read this parquet file (", keeps=tmp_path)


def test_a_damaged_row_group_is_of_bad_images(tmp_path: Path, png: bytes) -> None:
    file = write_parquet(tmp_path / "x.parquet", [png] * 8, [0, 1] * 4, ["a", "b"], rows_per_group=4)
    place = parquet.pq.read_metadata(file).row_group(1).column(0)
    content = bytearray(file.read_bytes())
    start = place.dictionary_page_offset or place.data_page_offset
    content[start : start + 20] = b"\xff" * 20
    file.write_bytes(content)
    words = r"4 files do not decode: .*x\.parquet row 4 \(its row group cannot be read"
    with pytest.raises(BadImagesError, match=words):
        load(parquet_spec(tmp_path))


def test_a_parquet_file_with_a_byte_changed_anywhere_is_read_or_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.parquet"
    options: dict[str, Any] = {"write_statistics": False, "store_schema": False, "use_dictionary": False}
    table = pa.table({"image": [b"x"] * 5, "label": [0, 1, 0, 1, 0]})
    parquet.pq.write_table(table, file, row_group_size=3, compression="none", **options)
    content, read = file.read_bytes(), 0
    for i in range(0, len(content), scale(5, 1)):
        file.write_bytes(content[:i] + bytes([content[i] ^ 2]) + content[i + 1 :])
        try:
            split = everything(parquet_spec(file))
        except UsageError as error:
            assert "x.parquet" in str(error)
            continue
        for row in range(len(split)):
            with suppress(BadImage):
                read += len(split.images.content(row))  # type: ignore[attr-defined]
    assert read


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        ([10, 2, 2], ("2", "10")),
        (["10", "2", "b"], ("10", "2", "b")),
        ([True, False, True], ("False", "True")),
        (pa.array(["b", "a", "b"]).dictionary_encode(), ("a", "b")),
        (pa.array(["b", "a", "b"], pa.large_string()), ("a", "b")),
        (pa.array([7, 3, 7], pa.uint8()), ("3", "7")),
    ],
)
def test_labels_without_metadata_are_classes_in_order(labels: Any, classes: tuple[str, ...], tmp_path: Path) -> None:
    table = pa.table({"picture": [b"x"] * 3, "kind": labels})
    parquet.pq.write_table(table, tmp_path / "x.parquet")
    source = parquet_spec(tmp_path, image_column="picture", label_column="kind").load(Reporter())
    assert source.classes == classes
    texts = [str(value) for value in table["kind"].to_pylist()]
    assert [source.classes[label] for label in source.splits["all"].labels] == texts


def test_classes_of_the_metadata_keep_their_order_and_differ_in_no_file(tmp_path: Path, png: bytes) -> None:
    write_parquet(tmp_path / "train.parquet", [png] * 3, [0, 2, 0], ["z", "unused", "a"])
    source = parquet_spec(tmp_path).load(Reporter())
    assert source.classes == ("z", "a") and source.splits["train"].labels.tolist() == [0, 1, 0]
    write_parquet(tmp_path / "val.parquet", [png] * 2, [0, 1], ["a", "z"])
    refused(parquet_spec(tmp_path).check, 2, "val.parquet: has other classes in its metadata", keeps=tmp_path)


ROOTS = {
    "sets": "sets: no such folder. Did you mean 'set'? dataset.root names a {0} file",
    "set": "set: no {0} file. Did you mean {1}/set/data?",
    "set/file.csv": "file.csv: no {0} file. Did you mean {1}/set/data?",
    "set/none": "none: no {0} file. dataset.root names a {0} file, or the folder that holds such files",
    "set/mixed": "has neither train, val nor test, which others have",
}


@both_forms
@pytest.mark.parametrize("root", ROOTS)
def test_a_root_without_shards_is_refused(form: str, root: str, tmp_path: Path) -> None:
    for name in ("file.csv", f"data/a.{form}", f"mixed/train-0.{form}", f"mixed/more.{form}"):
        (tmp_path / "set" / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / "set" / name).touch()
    (tmp_path / "set/none").mkdir()
    refused(FORMS[form][1](tmp_path / root).check, 2, ROOTS[root].format(f".{form}", tmp_path), keeps=tmp_path)


def test_pyarrow_is_an_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.delitem(sys.modules, "tlcli.data.parquet")
    words = "dataset=parquet needs pyarrow: pip install 'tlcli[parquet]'"
    refused(parquet_spec(tmp_path).check, 2, words, keeps=tmp_path)
