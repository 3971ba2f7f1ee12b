"""Every image counts once: in evaluation and in an epoch, live and cached, and in the mean over accumulated batches.
And what must not matter does not: workers, progress bars, and runs that begin in the same second."""

import io
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.cli.test_predict import Terminal
from tests.conftest import TINY, Compose, finish, slow
from tests.faults.programs import scale, together
from tlcli.cli.train import make_folder
from tlcli.data.batches import ImageBatches, Preprocessing
from tlcli.data.images import ImageArrays, Split
from tlcli.device import Device
from tlcli.engine import loaders
from tlcli.engine.loaders import ActivationLoader, BatchLoader, ImageLoader
from tlcli.engine.metrics import compute_report, evaluate
from tlcli.engine.trainer import Trainer
from tlcli.models.classifier import Classifier, Stage
from tlcli.ranks import ALONE
from tlcli.reporter import Reporter
from tlcli.runs.run_dir import read_json
from tlcli.specs import Fit, TrainSpec
from tlcli.transfer.contract import apply_freeze

CPU = Device(torch.device("cpu"), torch.float32, torch.float32, torch.channels_last, compile=False, workers=0)
BATCH_SIZES = (7, 64, 100)
SOME = (1, 6, 7, 8, 63, 64, 65, 99, 100, 101, 127, 128, 129, 257)
CLASSES = ("a", "b", "c")


def coded(n: int) -> Split:
    """Return n images of one pixel whose first two colors are its number."""
    numbers = np.arange(n)
    pixels = np.stack([numbers % 256, numbers // 256, 0 * numbers], axis=-1).astype(np.uint8)
    return Split(ImageArrays(pixels[:, None, None], "coded"), numbers, numbers % len(CLASSES))


class Numbers(nn.Module):
    """Images, or rows, to logits that say which number each has, and where its label is right."""

    def forward(self, x: Tensor) -> Tensor:
        low, high = (x.flatten(1)[:, :2] * 255).round().unbind(1)
        number = low + 256 * high
        return torch.stack([number, -torch.ones_like(number), -torch.ones_like(number)], dim=1)


PLAIN = Preprocessing(size=1, fit=Fit.squash, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def live(split: Split, batch_size: int, workers: int = 0) -> BatchLoader:
    batches = ImageBatches(split, PLAIN, batch_size=batch_size, workers=workers)
    return ImageLoader(batches, CPU, network=Numbers(), dtype=torch.float32)


def cached(split: Split, batch_size: int) -> BatchLoader:
    rows = torch.from_numpy(np.concatenate([split.read(i)[0] for i in range(len(split))]).astype(np.float32) / 255)
    return ActivationLoader(
        *([(rows,)], torch.arange(len(split)), split),
        network=Numbers(),
        head=None,
        dtype=torch.float32,
        device=CPU,
        batch_size=batch_size,
        seed=0,
    )


def counts_each_once(feed: BatchLoader, n: int) -> None:
    """Assert that evaluation and an epoch have the images 0 to n-1 with their labels."""
    found = evaluate(feed.network, feed, CPU, Reporter(), "test")
    assert found.logits[:, 0].tolist() == list(range(n))
    assert found.labels.tolist() == [i % len(CLASSES) for i in range(n)]
    report = compute_report(found, CLASSES)
    assert report["n"] == sum(map(sum, report["confusion"])) == n
    numbers = torch.cat([feed.network(*x)[:, 0] for x, _ in feed.epoch(1)])
    labels = torch.cat([y for _, y in feed.epoch(1)])
    assert sorted(numbers.tolist()) == list(range(n))
    assert torch.equal(labels, numbers.long() % len(CLASSES))


KINDS_OF_FEED = {"live": live, "cached": cached}


@pytest.mark.parametrize("feed", KINDS_OF_FEED.values(), ids=KINDS_OF_FEED)
@pytest.mark.parametrize("sizes", [SOME, *slow(range(1, 258))], ids=["some", "all"])
def test_every_image_counts_once_whatever_the_sizes(feed, sizes, monkeypatch) -> None:
    """Most of the time the batches do not divide the images."""
    monkeypatch.setattr(loaders, "READ_ROWS", 1)  # else they are all read at once
    for n in sizes:
        for batch_size in BATCH_SIZES:
            counts_each_once(feed(coded(n), batch_size), n)


def test_every_image_counts_once_whatever_the_workers() -> None:
    counts_each_once(live(coded(13), 4, 2), 13)


# -- accumulation


class Small(nn.Module):
    """A network without batch statistics, in float64."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.body, self.head = nn.Linear(12, 9).double(), nn.Linear(9, 3).double()
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 3

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)))


def trainer_for(spec: TrainSpec, model: Classifier, counts: tuple[int, ...]) -> Trainer:
    train = SimpleNamespace(class_counts=lambda n: counts)
    data, contract = SimpleNamespace(train=train, classes=CLASSES), apply_freeze(spec.freeze, model)
    workload = SimpleNamespace(
        spec=spec, data=data, classifier=model, contract=contract, epochs_per_fit=spec.epochs or 1, fits=1
    )
    return Trainer(workload, CPU)  # type: ignore[arg-type]


class Exact:
    """Random rows in float64, in order: a feed."""

    def __init__(self, network: nn.Module, n: int, batch_size: int) -> None:
        generator = torch.Generator().manual_seed(n)
        self.network, self.threads, self.head, self.ranks = network, None, None, ALONE
        self.dtype = torch.float32  # of autocast, which has nothing to do then
        self._x = torch.randn(n, 12, generator=generator, dtype=torch.float64)
        self._y = torch.randint(3, (n,), generator=generator)
        self._batch_size = batch_size

    def __len__(self) -> int:
        return len(self._y)

    def epoch(self, number: int, start: int = 0) -> Iterator[tuple[tuple[Tensor], Tensor]]:
        for at in range(start, len(self), self._batch_size):
            part = slice(at, at + self._batch_size)
            yield (self._x[part],), self._y[part]

    in_order = epoch


def trained(spec: Compose, n: int, batch_size: int, accumulate: int, *overrides: str) -> tuple[dict[str, Tensor], int]:
    """Return the weights after two epochs, and the number of steps."""
    network = Small()
    stages = tuple(Stage(name, frozenset({f"{name}.weight", f"{name}.bias"})) for name in ("body", "head"))
    model = Classifier("small", network, ("head",), stages, 1, (0.0,) * 3, (1.0,) * 3, CLASSES)
    own = spec(f"batch_size={batch_size}", f"accumulate={accumulate}", "epochs=2", "device.precision=fp32", *overrides)
    trainer = trainer_for(own, model, (n // 3, n // 3, n - 2 * (n // 3)))
    for epoch in (1, 2):
        trainer.fit(Exact(network, n, batch_size), epoch, Reporter(), lambda *running: None)  # type: ignore[arg-type]
    return dict(network.state_dict()), trainer.step


@pytest.mark.parametrize(
    ("n", "batch_size", "accumulate", "overrides"),
    [
        (48, 8, 3, ("optimizer=sgd",)),
        (54, 8, 3, ("optimizer=adamw",)),
        (61, 8, 3, ("optimizer=sgd", "clip_grad=0.1", "class_weights=balanced")),
        (7, 2, 4, ("optimizer=adamw", "clip_grad=0.1")),
    ],
)
def test_accumulated_batches_are_the_large_batch(n: int, batch_size: int, accumulate: int, overrides, spec) -> None:
    """A last group that is short, of one batch or more, and whose last batch is short, included."""
    words = ("label_smoothing=0.1", "optimizer.lr=0.1", *overrides)
    once, steps = trained(spec, n, batch_size * accumulate, 1, *words)
    parts, same = trained(spec, n, batch_size, accumulate, *words)
    assert steps == same == 2 * -(-n // (batch_size * accumulate))
    first = Small().state_dict()
    for name, tensor in once.items():
        assert not torch.equal(tensor, first[name])
        assert torch.allclose(tensor, parts[name], rtol=1e-10, atol=1e-12), (tensor - parts[name]).abs().max()


# -- what must not matter


def test_runs_that_begin_at_once_have_a_directory_each(tmp_path: Path) -> None:
    def member(number: int, wait: Callable[[], object]) -> str:
        wait()
        return make_folder(tmp_path / "2026-11-24/10-15-00")[0].name

    n = scale(8, 50)
    found = {"10-15-00", *(f"10-15-00-{number}" for number in range(2, n + 1))}
    assert {*together(member, n)} == found == {path.name for path in tmp_path.glob("2026-11-24/*")}


def weights(out: Path, shapes: Path, *words: str, stdout: io.StringIO | None = None) -> tuple[bytes, dict[str, Any]]:
    """Return the last checkpoint and test.json of a run with its own cache."""
    words = ("dataset=imagefolder", f"dataset.root='{shapes}'", "image.size=32", "epochs=2", *EXACT, *words)
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(stdout or io.StringIO()):
        patch.setenv("TLCLI_CACHE", str(out.with_suffix(".cache")))
        patch.setenv("TERM", "xterm-256color")
        for name in ("NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "FORCE_COLOR"):
            patch.delenv(name, raising=False)
        finish(out, *words)
    return (out / "checkpoints/last.safetensors").read_bytes(), read_json(out / "test.json")


EXACT = ("device.precision=fp32", "device.channels_last=true", "freeze.head_init=random", *TINY)
KINDS = {"live": ("freeze=none", "augment=basic", "cache.mode=off"), "cached": ("freeze=head",)}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker")  # of machines with fewer cores
@pytest.mark.parametrize("words", KINDS.values(), ids=KINDS)
def test_workers_and_progress_bars_change_no_bit(words: tuple[str, ...], shapes: Path, tmp_path: Path) -> None:
    found = {
        n: weights(tmp_path / f"w{n}", shapes, *words, f"device.workers={n}", f"device.deterministic={n == 1}")
        for n in (0, 1, 2, 4)
    }
    for n in (1, 2, 4):
        assert found[n] == found[0], n
    terminal = Terminal()
    assert weights(tmp_path / "bars", shapes, *words, "device.workers=0", stdout=terminal) == found[0]
    assert "\x1b[" in terminal.getvalue()
    other = weights(tmp_path / "other", shapes, *words, "device.workers=0", "seed=1")
    assert other[0] != found[0][0]
