"""One run in several processes is the run of one process: the same images in the same batches, the same weights."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import Compose, make_folder
from tests.processes import in_ranks
from tlcli.cli.launch import rank_and_size
from tlcli.data.batches import Preprocessing
from tlcli.device import setup_process
from tlcli.engine.activations import load_workload
from tlcli.engine.decisions import Decisions
from tlcli.engine.inputs import Inputs
from tlcli.engine.metrics import evaluate
from tlcli.engine.session import Session
from tlcli.engine.trainer import Trainer
from tlcli.ranks import ALONE, join
from tlcli.reporter import Reporter
from tlcli.specs import TrainSpec
from tlcli.store import Store

N_IMAGES = 17  # a prime: with batches of 8 the last one has one image, and other ranks have none
STEPS = 20


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with 17 training images and 5 of test."""
    root = tmp_path_factory.mktemp("images")
    make_folder(root / "train", {"across": 9, "checks": 8}, seed=0)
    make_folder(root / "test", {"across": 3, "checks": 2}, seed=1)
    return root


def train_in_float64(spec: TrainSpec, folder: Path, cached: bool) -> int:
    """Train for 20 steps in float64 and write the weights, and the logits of the training images, of this rank."""
    rank, size = rank_and_size()
    ranks = join(rank, size) if size > 1 else ALONE
    accelerator, session = setup_process(spec.device), Session(Store(folder / "cache"), 10**9)
    workload = load_workload(spec, session.dataset(spec.dataset, 0, Reporter()), accelerator, session)
    workload = replace(workload, ranks=ranks)
    decisions = Decisions(train_precision="float32", eval_precision="float32", channels_last=True)
    if cached:
        decisions = replace_cached(decisions)
    inputs = Inputs(decisions, workload)
    inputs.device.place(workload.classifier.network)
    loaders = [inputs.open(name, Reporter()) for name in ("train", "train_eval")]  # activations are those of float32
    network = workload.classifier.network.double()
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign]
    normalize = Preprocessing.normalize
    Preprocessing.normalize = lambda *args: normalize(*args).double()  # type: ignore[method-assign]
    trainer, epoch = Trainer(workload, inputs.device), 0
    while trainer.step < STEPS:
        epoch += 1
        row = trainer.fit(loaders[0], epoch, Reporter())
    predictions = evaluate(network, loaders[1], inputs.device, Reporter(), "")
    result = {"row": torch.tensor([row["loss"], row["accuracy"]]), "logits": predictions.logits}
    save_file(result | {k: v.contiguous() for k, v in network.state_dict().items()}, folder / f"{rank}of{size}")
    return 0


def replace_cached(decisions: Decisions) -> Decisions:
    from msgspec import structs

    return structs.replace(decisions, cached=frozenset({"train", "train_eval"}))


NETWORK = ("backbone=mobilenet_v3_small", "backbone.weights=none", "backbone.dropout=0", "freeze.bn_stats=frozen")
NETWORK += ("image.size=32", "optimizer=sgd")


@pytest.mark.parametrize(
    ("words", "cached"),
    [
        (("freeze=none", "augment=basic"), False),
        (("freeze=last_stages", "freeze.n=1", "augment=none", "accumulate=2"), True),
        (("freeze=head", "augment=basic", "cache.views=2", "optimizer=adamw"), True),
    ],
)
def test_weights_are_those_of_one_process(
    words: tuple[str, ...], cached: bool, spec: Compose, images: Path, tmp_path: Path
) -> None:
    own = spec("dataset=imagefolder", f"dataset.root='{images}'", *NETWORK, "batch_size=8", "epochs=20", *words)
    for size in (1, 2, 3):
        ends = in_ranks(size, lambda rank: train_in_float64(own, tmp_path, cached), tmp_path)
        assert [code for code, _ in ends] == [0] * size, ends
    alone = load_file(tmp_path / "0of1")
    for size in (2, 3):
        for rank in range(size):
            found = load_file(tmp_path / f"{rank}of{size}")
            for name, tensor in alone.items():
                difference = (found[name] - tensor).abs().max()
                assert difference <= 1e-10, (name, rank, size, difference)
