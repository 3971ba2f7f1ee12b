"""The images on which an export is checked: some of the run's own test images, else random ones."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tlcli.data.dataset import load_dataset
from tlcli.data.decode import Pixels, read_image
from tlcli.errors import TlcliError
from tlcli.reporter import Reporter
from tlcli.runs.load import LoadedRun
from tlcli.runs.predictions import read_predictions
from tlcli.runs.run_dir import RunDir
from tlcli.specs import TorchvisionDataset, TrainSpec

COUNT = 16
"""Enough that every class of a small task is there, few enough that the check takes seconds with any network."""


@dataclass(frozen=True, eq=False)
class Samples:
    """Images as they are before normalisation, uint8 (N, 3, S, S), and in words where they are from."""

    images: Tensor
    source: str


def find_samples(run: LoadedRun, spec: TrainSpec | None) -> Samples:
    """Images spread over the run's test set; random ones where neither its files nor the data of the spec are here."""
    found = _from_files(run) or (_from_data(spec) if spec is not None else [])
    if found:
        return Samples(run.preprocessing.apply_batch(found).contiguous(), f"{len(found)} of the run's test images")
    generator = torch.Generator().manual_seed(0)
    size = run.preprocessing.size
    noise = torch.randint(0, 256, (COUNT, 3, size, size), dtype=torch.uint8, generator=generator)
    return Samples(noise, f"{COUNT} random images, as the run's test images are not here")


def _from_files(run: LoadedRun) -> list[Pixels]:
    """Test images from the files that the run's predictions name."""
    try:
        names = read_predictions(RunDir(run.path).test_predictions).names
        paths = [Path(str(run.info.get("cwd", ".")), name) for name in names]
        return [read_image(paths[i]) for i in _spread(len(paths))]
    except (TlcliError, OSError, ValueError):  # what does not decode is a ValueError
        return []


def _from_data(spec: TrainSpec) -> list[Pixels]:
    """Test images from the data set that the spec names. Nothing is downloaded."""
    data = spec.dataset
    if isinstance(data, TorchvisionDataset):
        data = replace(data, download=False)
    try:
        test = load_dataset(data, seed=spec.seed, reporter=Reporter(), sound=_TakenAsSound()).test
        return [test.read(i) for i in _spread(len(test))]
    except (TlcliError, OSError, ValueError):
        return []


class _TakenAsSound:
    """Spares the search for images that do not decode: a few are read here, and the run has decoded them all."""

    def known(self, fingerprint: str) -> dict[str, str] | None:
        return {}

    def record(self, fingerprint: str, bad: dict[str, str]) -> None:
        """There is nothing to remember."""


def _spread(n: int) -> list[int]:
    """At most COUNT positions below n, evenly spaced."""
    return [int(i) for i in np.unique(np.linspace(0, n - 1, min(n, COUNT)).astype(int))]
