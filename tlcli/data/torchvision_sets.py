"""The data sets of torchvision.datasets: a class, and what it is called with for each split."""

import contextlib
import inspect
import io
import sys
import tarfile
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tlcli.data.decode import BadImage, Pixels, to_rgb
from tlcli.data.source import Files, Images, Ints, Source, digest_of_pixels, whole
from tlcli.errors import TlcliError, UsageError
from tlcli.reporter import Reporter
from tlcli.specs import TorchvisionDatasetSpec
from tlcli.text import did_you_mean

UNPICKLING = ("LSUN", "LSUNClass")
"""Classes that unpickle a file beside the images. CIFAR's files are pickles too, whose digests torchvision compares."""


@dataclass(frozen=True, eq=False)
class Items:
    """Images as a torchvision data set returns them."""

    items: Any
    prefix: str

    def __len__(self) -> int:
        return len(self.items)

    def read(self, index: int) -> Pixels:
        try:
            image = self.items[index][0]
        except (OSError, SyntaxError, ValueError) as error:
            raise BadImage(" ".join(str(error).split())[:80]) from error
        if not isinstance(image, Image.Image):
            raise BadImage(f"a {type(image).__name__}, not an image")
        return to_rgb(image)

    def name(self, index: int) -> str:
        return f"{self.prefix}/{index}"

    def key(self, index: int) -> str:
        return self.name(index)

    def digest(self, index: int) -> bytes:
        return digest_of_pixels(self.read(index))


def load_torchvision(spec: TorchvisionDatasetSpec, reporter: Reporter) -> Source:
    """The splits of a torchvision data set, downloaded where `download` says so and nothing is there yet.

    Labels are read without decoding images; classes without names are called by their numbers. Raises UsageError for a
    class or an argument that torchvision does not have and for missing data, TlcliError for a failed download.
    """
    wanted = {"train": spec.train, "val": spec.val, "test": spec.test}
    if spec.val is None and spec.test is None:
        wanted = {"all": spec.train}
    sets = {k: _open(spec, dict(arguments), reporter) for k, arguments in wanted.items() if arguments is not None}
    labels = {k: _labels(spec, s) for k, s in sets.items()}
    classes = _class_names(next(iter(sets.values())), 1 + max(int(v.max(initial=0)) for v in labels.values()))
    root = Path(spec.root or "").expanduser()
    splits = {k: whole(_images(s, root, f"{spec.name}/{k}"), labels[k]) for k, s in sets.items()}
    # some name classes that no image has, as EMNIST's letters do with "N/A"
    in_use = [classes[i] for i in np.unique(np.concatenate(list(labels.values())))]
    return Source(classes, splits).keep(in_use if spec.classes is None else spec.classes, spec.name)


def dataset_class(name: str) -> Any:
    """The class of torchvision.datasets of this name. Raises UsageError; no other code can be named."""
    from torchvision import datasets

    base = datasets.VisionDataset
    exported = {n: getattr(datasets, n) for n in datasets.__all__}
    known = [n for n, c in exported.items() if inspect.isclass(c) and issubclass(c, base) and c is not base]
    if name in UNPICKLING:
        raise UsageError(
            f"dataset.class_name: torchvision's {name} unpickles a file beside the images, which could run any code: "
            f"use dataset=imagefolder"
        )
    if name not in known:
        raise UsageError(f"dataset.class_name: torchvision.datasets has no {name!r}.{did_you_mean(name, known)}")
    return exported[name]


def _open(spec: TorchvisionDatasetSpec, arguments: dict[str, Any], reporter: Reporter) -> Any:
    """The data set of one split: from root if it is there, else downloaded."""
    make = dataset_class(spec.class_name)
    takes = inspect.signature(make).parameters
    for name in arguments:
        if name not in takes or name in ("root", "download") or name.endswith("transform"):
            raise UsageError(f"dataset: torchvision's {spec.class_name} takes no {name!r}.{did_you_mean(name, takes)}")
    if "root" in takes:
        if spec.root is None:
            raise UsageError("dataset.root is not set: name the folder that holds the data, or is to hold it")
        arguments["root"] = str(Path(spec.root).expanduser())
    try:
        try:
            return make(**arguments)
        except (RuntimeError, OSError) as error:  # not there, or not whole
            if "download" not in takes or not spec.download:
                raise _missing(spec, error, can_download="download" in takes) from error
        return _download(spec, make, arguments, reporter)
    except (TypeError, ValueError, ImportError) as error:
        raise UsageError(f"dataset {spec.name}: {' '.join(str(error).split())}") from error


def _download(spec: TorchvisionDatasetSpec, make: Any, arguments: dict[str, Any], reporter: Reporter) -> Any:
    reporter.note(f"downloading {spec.name} to {arguments.get('root')}")
    try:
        with _no_bars_off_a_terminal(), _archives_stay_in_their_folder():
            return make(download=True, **arguments)
    except (RuntimeError, OSError, EOFError, zipfile.BadZipFile, tarfile.TarError) as error:
        raise TlcliError(
            f"{spec.name}: the download failed ({_short(error)}). Without a network, put the data under "
            f"{arguments.get('root')} as torchvision keeps it, or use dataset=imagefolder"
        ) from error


def _missing(spec: TorchvisionDatasetSpec, error: Exception, *, can_download: bool) -> UsageError:
    remedy = "set dataset.download=true" if can_download else "torchvision cannot download it"
    return UsageError(f"{spec.name}: not found under {spec.root} ({_short(error)}): {remedy}, or put it there")


def _short(error: Exception) -> str:
    """The first sentence of an error."""
    return (" ".join(str(error).split()) or type(error).__name__).split(". ")[0][:100].rstrip(".")


@contextlib.contextmanager
def _archives_stay_in_their_folder() -> Iterator[None]:
    """torchvision extracts tar files with Python's default, which before 3.14 lets them write anywhere."""
    before = tarfile.TarFile.extraction_filter
    tarfile.TarFile.extraction_filter = staticmethod(tarfile.data_filter)
    try:
        yield
    finally:
        tarfile.TarFile.extraction_filter = before


@contextlib.contextmanager
def _no_bars_off_a_terminal() -> Iterator[None]:
    """torchvision draws a bar for each download; that is for a terminal alone."""
    if sys.stderr.isatty():
        yield
    else:
        with contextlib.redirect_stderr(io.StringIO()):
            yield


def _labels(spec: TorchvisionDatasetSpec, items: Any) -> Ints:
    """The class of each image. torchvision's classes keep them under several names."""
    for name in ("targets", "labels", "_labels", "y"):
        if (values := getattr(items, name, None)) is not None:
            break
    else:
        values = [pair[1] for pair in getattr(items, "_samples", ())]
    found = np.asarray(values)
    if found.shape != (len(items),) or found.dtype.kind not in "iu" or (found < 0).any():
        raise UsageError(f"dataset: torchvision's {spec.class_name} does not give each image one class")
    return found.astype(np.int64)


def _class_names(items: Any, count: int) -> tuple[str, ...]:
    """The names of the classes; of an ImageNet class all its synonyms; its number where two have the same name."""
    names = getattr(items, "classes", None) or getattr(items, "categories", None)
    if not isinstance(names, Sequence) or len(names) < count:
        return tuple(str(i) for i in range(count))
    plain = [name if isinstance(name, str) else ", ".join(name) for name in names]
    times = Counter(plain)
    return tuple(name if times[name] == 1 else f"{name} ({i})" for i, name in enumerate(plain))


def _images(items: Any, root: Path, prefix: str) -> Images:
    """The files themselves where the data set has a list of them, so that they are decoded as all files are."""
    for name in ("_image_files", "_images", "samples", "_samples"):
        listed = getattr(items, name, None)
        if isinstance(listed, list) and len(listed) == len(items):
            paths = [x[0] if isinstance(x, tuple) else x for x in listed]
            if all(isinstance(path, str | Path) for path in paths):
                return Files(tuple(Path(path) for path in paths), root)
    return Items(items, prefix)
