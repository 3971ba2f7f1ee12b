"""The kinds of datasets: files, shards, torchvision's datasets and digits. Imports without torch and numpy."""

import inspect
import os
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec import structs

from tlcli.data.listing import ClassChoice, Listing, list_folder, list_manifest, resolve_classes
from tlcli.errors import TlcliError, UsageError
from tlcli.files import expand_user
from tlcli.locks import Lock
from tlcli.reporter import Reporter
from tlcli.specs import DatasetSpec, NonEmpty, Verify, option
from tlcli.text import did_you_mean, join_limited, one_line

if TYPE_CHECKING:
    from tlcli.data.images import ImageSource, Ints, Source

DIGITS = tuple("0123456789")


@option
class DigitsSpec(DatasetSpec, frozen=True, tag="digits"):
    """scikit-learn's 1,797 digits of 8 by 8 pixels."""

    def check(self, *, for_training: bool = True) -> None:
        if self.root is not None:
            raise UsageError(f"dataset.root={self.root} has no effect with dataset=digits; add dataset=imagefolder")
        resolve_classes(DIGITS, self.classes, self.name, for_training=for_training)

    def load(self, reporter: Reporter, *, for_training: bool = True) -> "Source":
        import numpy as np
        from sklearn import datasets

        from tlcli.data.images import ImageArrays, Source, full_split

        self.check(for_training=for_training)
        data = datasets.load_digits()
        gray = np.rint(data.images * (255 / 16)).astype(np.uint8)  # values 0 to 16 spread over 0 to 255
        images = ImageArrays(np.repeat(gray[..., None], 3, axis=3), self.name)
        source = Source(DIGITS, {"all": full_split(images, data.target)})
        return source.select_classes(self.classes, self.name, for_training=for_training)


class _FilesSpec(DatasetSpec, frozen=True):
    """A dataset that is listed before an image is read: files as a Listing, images in shards as a Source."""

    def list_chosen(self, choice: ClassChoice) -> "Listing | Source":
        raise NotImplementedError

    def list_files(self, *, for_training: bool = True, problems: list[str] | None = None) -> "Listing | Source":
        return self.list_chosen(ClassChoice(self.classes, for_training, problems))

    def check(self, *, for_training: bool = True) -> None:
        self.list_files(for_training=for_training)

    def load(self, reporter: Reporter, *, for_training: bool = True) -> "Source":
        from tlcli.data.images import source_of_files

        found = self.list_files(for_training=for_training)
        return source_of_files(found) if isinstance(found, Listing) else found

    def without_bad_classes(self) -> tuple[DatasetSpec, list[str]]:
        problems: list[str] = []
        listing = self.list_files(problems=problems)
        return structs.replace(self, classes=listing.classes) if problems else self, problems


@option
class ImageFolderSpec(_FilesSpec, frozen=True, tag="imagefolder"):
    """A folder with one subfolder per class, or with train/, val/ and test/ folders of these."""

    def list_chosen(self, choice: ClassChoice) -> Listing:
        return list_folder(self.root, choice)


@option
class ManifestSpec(_FilesSpec, frozen=True, tag="manifest"):
    """A CSV file with the columns path, label and optionally split; paths are relative to root or to the file."""

    file: NonEmpty

    def list_chosen(self, choice: ClassChoice) -> Listing:
        return list_manifest(self.file, self.root, choice)


@option
class ParquetSpec(_FilesSpec, frozen=True, tag="parquet"):
    """Parquet files with a column of image bytes and one of labels, as on the Hugging Face Hub."""

    image_column: str
    label_column: str

    def list_chosen(self, choice: ClassChoice) -> "Source":
        from tlcli.data.parquet import list_parquet

        return list_parquet(self.root, self.image_column, self.label_column, choice)


@option
class WebDatasetSpec(_FilesSpec, frozen=True, tag="webdataset"):
    """Tar archives in which each image NAME.jpg has its label in NAME.cls or NAME.txt."""

    def list_chosen(self, choice: ClassChoice) -> "Source":
        from tlcli.data.shards import list_tars

        return list_tars(self.root, choice, verify_all=self.verify is Verify.full)


@option
class TorchvisionDatasetSpec(DatasetSpec, frozen=True, tag="torchvision"):
    """A class of torchvision.datasets, and its arguments for each split (null: no such split)."""

    class_name: str
    train: dict[str, Any]
    val: dict[str, Any] | None
    test: dict[str, Any] | None
    download: bool

    def check(self, *, for_training: bool = True) -> None:
        resolve_classes(self.classes or (), self.classes, self.name, for_training=for_training)

    def offline(self) -> DatasetSpec:
        return structs.replace(self, download=False)

    def load(self, reporter: Reporter, *, for_training: bool = True) -> "Source":
        """Return the splits, downloaded if `download` is true and nothing is there yet. No image is decoded."""
        import numpy as np

        from tlcli.data.images import Source, full_split

        arguments = {"train": self.train, "val": self.val, "test": self.test}
        if self.val is None and self.test is None:
            arguments = {"all": self.train}
        sets = {k: _open_set(self, dict(value), reporter) for k, value in arguments.items() if value is not None}
        labels = {k: _labels(self, items) for k, items in sets.items()}
        first, count = next(iter(sets.values())), 1 + max(int(v.max(initial=0)) for v in labels.values())
        names = getattr(first, "classes", None) or getattr(first, "categories", None)
        if not isinstance(names, Sequence) or len(names) < count:
            names = [str(i) for i in range(count)]
        plain = [name if isinstance(name, str) else ", ".join(name) for name in names]  # all synonyms of ImageNet's
        uses = Counter(plain)  # classes of the same name get their numbers
        classes = tuple(name if uses[name] == 1 else f"{name} ({i})" for i, name in enumerate(plain))
        root = expand_user(self.root or "")
        splits = {k: full_split(_images(s, root, f"{self.name}/{k}"), labels[k]) for k, s in sets.items()}
        # some name classes that no image has, as EMNIST's letters do with "N/A"
        in_use = [classes[i] for i in np.unique(np.concatenate(list(labels.values())))]
        selected = in_use if self.classes is None else self.classes
        return Source(classes, splits).select_classes(selected, self.name, for_training=for_training)


def dataset_class(name: str) -> Any:
    """Return the class of torchvision.datasets of this name. Raise UsageError; no other code can be named."""
    from torchvision import datasets

    base = datasets.VisionDataset
    exported = {n: getattr(datasets, n) for n in datasets.__all__}
    known = [n for n, c in exported.items() if inspect.isclass(c) and issubclass(c, base) and c is not base]
    if name in ("LSUN", "LSUNClass"):  # CIFAR's files are pickles too, but torchvision checks their digests
        raise UsageError(f"dataset.class_name: {name} unpickles a file, which could run any code: use imagefolder")
    if name not in known:
        raise UsageError(f"dataset.class_name: torchvision.datasets has no {name!r}.{did_you_mean(name, known)}")
    return exported[name]


def _open_set(spec: TorchvisionDatasetSpec, arguments: dict[str, Any], reporter: Reporter) -> Any:
    """Return the dataset of one split: from root if it is there, else downloaded."""
    import tarfile
    import zipfile

    make = dataset_class(spec.class_name)
    takes = inspect.signature(make).parameters
    for name in arguments:
        is_own = name in ("root", "download", "target_type", "target_types") or name.endswith("transform")
        if name not in takes or is_own:
            near = did_you_mean(name, set(takes) - {name})
            raise UsageError(f"dataset: torchvision's {spec.class_name} takes no {name!r}.{near}")
    if "root" in takes:
        if spec.root is None:
            raise UsageError("dataset.root is not set: name the folder that holds the data, or is to hold it")
        arguments["root"] = str(expand_user(spec.root))
    root, problem = Path(arguments.get("root", "")), "its download was not finished"
    marker = root / f".{spec.class_name}.download"  # until a download is done: the names that were there before
    if not marker.exists():
        try:
            return make(**arguments)
        except (TypeError, ValueError, ImportError) as error:
            raise UsageError(f"dataset {spec.name}: {one_line(error)}") from error
        except (RuntimeError, OSError) as error:  # missing or incomplete
            problem = one_line(error).split(". ")[0][:100]
    if "download" not in takes or not spec.download:
        remedy = "torchvision cannot download it"
        if "download" in takes:
            remedy = "`tlcli train` with dataset.download=true downloads it"
        if marker.exists():
            remedy += f" (remove {marker} if the data is whole)"
        raise UsageError(f"{spec.name}: not found under {spec.root} ({problem}): {remedy}, or put it there")
    # torchvision extracts as Python does by default, which before 3.14 lets archives write anywhere
    tarfile.TarFile.extraction_filter = staticmethod(tarfile.data_filter)
    try:
        return _download(spec.name, partial(make, **arguments), root, marker, reporter)
    except (RuntimeError, ValueError, OSError, EOFError, zipfile.BadZipFile, tarfile.TarError) as error:
        reason = one_line(error)[:100] or type(error).__name__
        remedy = f"Offline, put the data under {root}, or use dataset=imagefolder"
        raise TlcliError(f"{spec.name}: the download failed ({reason}). {remedy}") from error


def _download(name: str, make: Callable[..., Any], root: Path, marker: Path, reporter: Reporter) -> Any:
    """Return the dataset, downloaded by one process; torchvision takes what an interrupted one left for the whole."""
    root.mkdir(parents=True, exist_ok=True)
    with Lock(root / ".download.lock").held():
        before = present = _names_in(root)
        if marker.exists():
            before = set(marker.read_text("utf-8", "surrogateescape").split("/"))
        if rest := present - before:
            new = f"new there since then: {join_limited(sorted(rest))}"
            remedy = f"remove what belongs to it ({new}), or {marker.name} if it is whole"
            raise UsageError(f"{name}: its download to {root} was interrupted: {remedy}")
        with suppress(RuntimeError, OSError):  # another process has downloaded it meanwhile
            return make()
        reporter.note(f"downloading {name} to {root}")
        marker.write_text("/".join(before), "utf-8", "surrogateescape")  # no name has a slash
        try:
            dataset = make(download=True)
        except BaseException:
            if _names_in(root) == before:  # nothing that could be taken for the whole
                marker.unlink()
            raise
        marker.unlink()
        return dataset


def _names_in(root: Path) -> set[str]:
    """Return the names of files, and of folders with a file, that tlcli has not made."""
    paths = [path for path in root.iterdir() if not path.name.endswith((".download", ".lock"))]
    return {path.name for path in paths if path.is_file() or any(inner.is_file() for inner in path.rglob("*"))}


def _labels(spec: TorchvisionDatasetSpec, items: Any) -> "Ints":
    """Return the class of each image. torchvision's classes keep them under several names."""
    import numpy as np

    known = (getattr(items, name, None) for name in ("targets", "labels", "_labels", "y"))
    values = next((found for found in known if found is not None), None)
    if values is None:
        values = [pair[1] for pair in getattr(items, "_samples", ())]
    try:
        labels: np.ndarray[Any, Any] = np.asarray(values)
    except ValueError:  # lists of different lengths
        labels = np.empty(0)
    if labels.shape != (len(items),) or labels.dtype.kind not in "iu" or (labels < 0).any():
        raise UsageError(f"dataset: torchvision's {spec.class_name} does not give each image one class of its own")
    return labels.astype(np.int64)


def _images(items: Any, root: Path, prefix: str) -> "ImageSource":
    """Return the files if the dataset has a list of them, so that they are decoded as all files are."""
    from tlcli.data.images import ImageFiles, TorchvisionImages

    for name in ("_image_files", "_images", "samples", "_samples"):
        listed = getattr(items, name, None)
        if isinstance(listed, list) and len(listed) == len(items):
            paths = [x[0] if isinstance(x, tuple) else x for x in listed]
            if all(isinstance(path, str | Path) for path in paths):
                return ImageFiles(root, [Path(os.path.relpath(path, root)).as_posix() for path in paths])
    return TorchvisionImages(items, prefix)
