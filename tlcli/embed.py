"""Embeddings: the input of a network's head per image, as files, as a map in two dimensions, and by distance."""

import os
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from tlcli import __version__
from tlcli.data.batches import Preprocessing
from tlcli.data.listing import Named
from tlcli.device import DTYPES, ComputeFormat
from tlcli.engine.decisions import recorded_decisions
from tlcli.engine.extraction import Extractor
from tlcli.errors import TlcliError, UsageError
from tlcli.models.build import build_model
from tlcli.models.classifier import Classifier
from tlcli.predict import ImageMapper, choose_format
from tlcli.reporter import Reporter
from tlcli.runs.load import LoadedRun
from tlcli.runs.report import image_uri, render
from tlcli.specs import BackboneSpec, Precision
from tlcli.store import Store
from tlcli.transfer.cut import Cut, split_frozen

SUFFIXES = (".parquet", ".npz")
MAX_NPZ = 100_000  # images: an .npz file is written from memory
ROW_GROUP = 1024  # rows that are in memory, 5 MB with 1,280 dimensions
MAX_POINTS, MIN_POINTS = 5000, 5  # of a map: t-SNE takes about a minute for the first
PERPLEXITY, COMPONENTS = 30, 50  # of t-SNE, and of the PCA before it, as van der Maaten and Hinton (2008) have them
THUMBNAIL = 64  # pixels


class _HeadInput(nn.Module):
    """The inputs of the head of a network that cannot be cut there."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.network, self._inputs = classifier.network, list[Tensor]()
        for name in classifier.head:
            module = self.network.get_submodule(name)
            module.register_forward_pre_hook(lambda _, arguments: self._inputs.append(arguments[0]))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        self._inputs.clear()
        self.network(images)
        return tuple(self._inputs)


class Embedder(ImageMapper):
    """Computes the input of a network's head, (D) float32, per image; the batch changes it by rounding only."""

    def __init__(
        self,
        source: LoadedRun | BackboneSpec,
        accelerator: torch.device,
        store: Store,
        precision: Precision,
        batch_size: int | None,
    ) -> None:
        """Cut the network of a run, or of a backbone with its weights, at its head.

        Activations at the cut of a run, if its test read them, are computed as the run did. For a backbone `auto` is
        float32.
        """
        compiled_at = dict[str, bool]()  # whether the run compiled the prefix, by its cut
        if isinstance(source, LoadedRun):
            classifier, preprocessing = source.classifier, source.preprocessing
            form, decisions = choose_format(source, accelerator, precision), recorded_decisions(source.info)
            if decisions is not None and "test" in decisions.cached and form.dtype != torch.float32:
                compiled_at[str(source.info["cache"].get("at"))] = "test" in decisions.compiled
        else:
            classifier = build_model(source, ("", " "), size=None, seed=0)
            preprocessing = Preprocessing(classifier.size, classifier.fit, classifier.mean, classifier.std)
            layout = torch.contiguous_format if accelerator.type == "mps" else torch.channels_last
            form = ComputeFormat(DTYPES.get(precision, torch.float32), layout)
        network: Any = classifier.network.to(device=accelerator, memory_format=form.memory_format)  # type: ignore[call-overload]
        cut = split_frozen(network.eval(), preprocessing.size, classifier.head_parameters())
        prefix, place = (cut.prefix, cut.suffix_start) if isinstance(cut, Cut) else (_HeadInput(classifier), "")
        extractor = Extractor(f"{classifier.name} {place}", prefix, preprocessing, accelerator, form, store)
        super().__init__(extractor, batch_size, compiled_at.get(place) if place else False)

    def embed(
        self, images: Iterable[Named], *, total: int | None = None, reporter: Reporter | None = None
    ) -> Iterator[tuple[str, Tensor | None, Tensor | str]]:
        """Yield path, pixels uint8 (3, S, S) and vector (D) of each image, in order, or path, None and its error."""
        return self._map(images, total, reporter or Reporter())

    def _rows(self, images: Tensor) -> Tensor:
        inputs = self._extractor(images)
        return torch.cat([t.float().mean((1, 2)) if t.ndim == 4 else t.float().flatten(1) for t in inputs], dim=1)


# -- files


def check_output(path: Path, suffixes: Sequence[str], *, force: bool) -> None:
    """Raise UsageError if a file cannot be written there as one of these kinds, or exists and may not be replaced."""
    if path.suffix.lower() not in suffixes:
        raise UsageError(f"{path}: must end in {' or '.join(suffixes)}")
    if path.suffix.lower() == ".parquet" and find_spec("pyarrow") is None:
        raise UsageError(f"{path} needs pyarrow: pip install 'tlcli[parquet]', or write an .npz file")
    if path.is_dir() or not path.parent.is_dir():
        raise UsageError(f"{path}: not a file in an existing folder")
    if not os.access(path.parent, os.W_OK):  # known before the images are read
        raise UsageError(f"{path}: cannot be written, since {path.parent} is read-only for you; choose another folder")
    if not force and (path.exists() or path.is_symlink()):
        raise UsageError(f"{path} already exists: choose another file, or replace it with --force")


def check_number(path: Path, n: int) -> None:
    """Raise UsageError if a file of this kind does not hold the vectors of so many images."""
    if path.suffix.lower() == ".npz" and n >= MAX_NPZ:
        raise UsageError(f"{path}: holds fewer than {MAX_NPZ:,} images; write a .parquet file")


Row = tuple[str, str | None, Tensor]  # path, label if it is known, vector (D)


@contextmanager
def vector_file(path: Path, source: str, *, force: bool) -> Iterator[Callable[[Row], None]]:
    """Yield a function that writes a row. The file appears at the end, and not after an error or without rows."""
    draft, is_parquet = path.with_name(f".{path.name}.{os.getpid()}"), path.suffix.lower() == ".parquet"
    rows: list[Row] = []
    writer: Any = None

    def write_parquet() -> None:
        nonlocal writer
        import pyarrow as pa
        from pyarrow.parquet import ParquetWriter

        paths, labels, vectors = zip(*rows, strict=True)
        texts = [[t and t.encode(errors="backslashreplace").decode() for t in column] for column in (paths, labels)]
        values = torch.stack(vectors).numpy()
        columns = {
            "path": pa.array(texts[0], pa.string()),  # names need not be UTF-8
            "label": pa.array(texts[1], pa.string()),
            "vector": pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1]),
        }
        table = pa.table(columns, metadata={"tlcli": __version__, "source": source})
        writer = writer or ParquetWriter(draft, table.schema, compression="zstd", use_dictionary=["label"])
        writer.write_table(table)
        rows.clear()

    def write(row: Row) -> None:
        rows.append(row)
        if is_parquet and len(rows) == ROW_GROUP:
            write_parquet()
        check_number(path, len(rows))

    try:
        yield write
        if rows and is_parquet:
            write_parquet()
        elif rows:
            paths, labels, vectors = zip(*rows, strict=True)
            label = np.array([label or "" for label in labels])  # text, without pickled objects
            with draft.open("wb") as file:
                np.savez(file, path=np.array(paths), label=label, vector=torch.stack(vectors).numpy())
        if writer is not None:
            writer.close()
        if rows or writer is not None:
            check_output(path, SUFFIXES, force=force)  # it may have appeared meanwhile
            draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


# -- a map


@dataclass
class Map:
    """A sample of at most MAX_POINTS images of a stream, to be drawn in two dimensions."""

    seen: int = 0
    points: list[tuple[Row, str]] = field(default_factory=list)  # with a thumbnail
    _random: random.Random = field(default_factory=lambda: random.Random(0))

    def add(self, row: Row, pixels: Tensor) -> None:
        """Take an image into the sample, or not: each one with the same probability (reservoir sampling)."""
        self.seen += 1
        place = len(self.points) if self.seen <= MAX_POINTS else self._random.randrange(self.seen)
        if place < MAX_POINTS:
            thumbnail = Image.fromarray(pixels.permute(1, 2, 0).numpy()).resize((THUMBNAIL, THUMBNAIL))
            path, label, vector = row
            own = path, label, vector.clone()  # else it keeps its whole batch
            self.points[place : place + 1] = [(own, image_uri(thumbnail, "JPEG", quality=75))]

    def html(self, source: str) -> str:
        """Return a page with the points by t-SNE (van der Maaten and Hinton 2008) of their directions, after PCA."""
        from sklearn.decomposition import PCA
        from sklearn.manifold import TSNE

        n = len(self.points)
        if n < MIN_POINTS:
            raise TlcliError(f"a map needs at least {MIN_POINTS} images, and there are {n}")
        rows = [row for row, _ in self.points]
        x = torch.nn.functional.normalize(torch.stack([vector for _, _, vector in rows]), dim=1).numpy()
        perplexity = min(PERPLEXITY, (n - 1) / 3)
        with warnings.catch_warnings(action="ignore"):  # equal images have no variance
            x = PCA(min(COMPONENTS, *x.shape), random_state=0).fit_transform(x)
            xy = np.nan_to_num(TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(x))
        xy = (xy - xy.min(axis=0)) / max(float(np.ptp(xy[:, 0])), 1e-9)  # x from 0 to 1, and y in the same unit
        classes = sorted({label for _, label, _ in rows if label is not None})
        data = {
            "classes": classes,
            "label": [-1 if label is None else classes.index(label) for _, label, _ in rows],
            "path": [path for path, _, _ in rows],
            "x": [round(float(value), 4) for value in xy[:, 0]],
            "y": [round(float(value), 4) for value in xy[:, 1]],
            "image": [image for _, image in self.points],
        }
        view = {"title": f"Map of {source}", "source": source, "data": data, "n": n, "seen": self.seen}
        return render("map.html.j2", view | {"perplexity": perplexity}, "tlcli embed", "map.js")
