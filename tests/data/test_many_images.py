"""Listing, splits, digests, copies and predictions keep arrays: no Python object per image."""

import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.data.samples import folder_spec, manifest_spec
from tlcli.data.batches import epoch_order
from tlcli.data.dataset import load_dataset
from tlcli.data.images import ConcatSplits, positions_by_class
from tlcli.engine.metrics import Predictions
from tlcli.reporter import Reporter
from tlcli.runs.run_dir import SplitPredictions, read_predictions, write_predictions
from tlcli.specs import DatasetSpec
from tlcli.store import Store
from tlcli.text import Names

N = 400  # images per class


def objects_of(make: Callable[[], object]) -> tuple[object, int]:
    """Return what is made, and how many blocks of memory for Python objects it holds."""
    make()  # imports, caches
    gc.collect()
    before = sys.getallocatedblocks()
    made = make()
    gc.collect()
    return made, sys.getallocatedblocks() - before


@pytest.mark.parametrize("kind", ["folder", "manifest"])
def test_images_are_no_objects(tmp_path: Path, kind: str) -> None:
    rows = ["path,label"]
    for name in ("a", "b"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(N):
            file = tmp_path / "photos" / name / f"{i}.jpg"
            file.write_bytes(b"%d" % (i % 50))
            os.utime(file, (1e9, 1e9))
            rows.append(f"{name}/{i}.jpg,{name}")
    (tmp_path / "photos" / "labels.csv").write_text("\n".join(rows))
    is_folder = kind == "folder"
    spec: DatasetSpec = folder_spec(tmp_path / "photos") if is_folder else manifest_spec(tmp_path / "photos/labels.csv")

    def make() -> object:
        data = load_dataset(spec, seed=0, reporter=Reporter(), store=Store(tmp_path / "cache"), decode=False)
        splits = {"train": data.train, "val": data.val, "test": data.test}
        p = Predictions(torch.zeros(len(data.test), 2), torch.from_numpy(data.test.labels))
        predictions = SplitPredictions.of(data.test, p, data.classes)
        write_predictions(tmp_path / "p.safetensors", predictions)
        rest = ConcatSplits(splits).first_copies(Reporter()), epoch_order(len(data.train), 0, 1)
        return data, data.train.fingerprint(), rest, read_predictions(tmp_path / "p.safetensors")

    (data, *_), blocks = objects_of(make)  # type: ignore[misc]
    assert len(data.train) + len(data.val) + len(data.test) == 2 * N
    assert blocks < N / 2


def test_names_are_a_sequence_of_texts() -> None:
    texts = ["a/0.jpg", "", "b/\udcff.jpg", "b/\N{SNOWMAN}.jpg"]
    names = Names(texts)
    assert list(names) == texts == names[:] and names[-1] == texts[-1] and names[1::2] == texts[1::2]
    assert texts[2] in names and "b" not in names and len(Names()) == 0
    with pytest.raises(IndexError):
        names[4]


def test_positions_by_class_are_ascending_and_complete() -> None:
    labels = np.array([2, 0, 2, 3, 0])
    assert [part.tolist() for part in positions_by_class(labels, 5)] == [[1, 4], [], [0, 2], [3], []]
