"""The loop: the classic tutorial's, accumulation, what stops it, what it does with one image left over."""

import math
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from msgspec import structs
from torch import Tensor, nn
from torchvision.transforms import v2

from tests.conftest import Compose, make_folder, slow
from tests.faults.test_counting import trainer_for
from tlcli.data.batches import epoch_order
from tlcli.data.dataset import Dataset
from tlcli.engine.activations import Workload
from tlcli.engine.decisions import decide
from tlcli.engine.inputs import Inputs
from tlcli.engine.schedule import steps_per_epoch
from tlcli.engine.session import Session
from tlcli.engine.trainer import Trainer
from tlcli.errors import TlcliError
from tlcli.interrupts import handle_signals
from tlcli.models.build import build_model
from tlcli.models.classifier import Classifier, eval_mode
from tlcli.reporter import Reporter
from tlcli.specs import TrainSpec
from tlcli.store import Store, cache_dir
from tlcli.transfer.contract import apply_freeze

CPU = torch.device("cpu")


class Setting:
    """Everything that a training epoch needs, made as train.py makes it."""

    def __init__(self, spec: TrainSpec) -> None:
        self.spec = spec
        session = Session(Store(cache_dir()), int(spec.cache.ram_gb * 1e9))
        self.data: Dataset = session.dataset(spec.dataset, spec.seed, Reporter())
        self.model: Classifier = session.model(spec.backbone, self.data.classes, size=spec.image.size, seed=spec.seed)
        self.contract = apply_freeze(spec.freeze, self.model)
        self.contract.seal()
        self.workload = Workload(self.data, self.model, self.contract, spec, CPU, session)
        self.opened = Inputs(decide(self.workload), self.workload)
        self.device = self.opened.device
        self.device.place(self.model.network)
        self.train = self.opened.open("train", Reporter())
        self.trainer = Trainer(self.workload, self.device)
        self.running: list[tuple[int, float]] = []

    def fit(self, epoch: int = 1) -> dict[str, Any]:
        on_running = lambda epoch, *values: self.running.append(values)  # noqa: E731
        return self.trainer.fit(self.train, epoch, Reporter(), on_running)


@pytest.fixture
def small(spec: Compose, shapes: Path, tiny: tuple[str, ...]):
    """Return a setting on the shapes: the tiny network at 32 px in float32, with overrides."""
    words = ("dataset=imagefolder", f"dataset.root='{shapes}'", *tiny, "image.size=32", "freeze.head_init=random")
    words += ("device.precision=fp32", "device.channels_last=true", "epochs=2")
    return lambda *overrides: Setting(spec(*words, *overrides))


def test_weights_that_the_last_step_makes_infinite_are_an_error(small, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = small("batch_size=64", "optimizer.lr=1e9")
    monkeypatch.setattr(Trainer, "_update", lambda self: self._trainable[0].data.fill_(math.inf))
    with pytest.raises(TlcliError, match=r"the weights are not finite after epoch 1: try optimizer.lr=1e\+08, "):
        setting.fit(1)


@pytest.mark.slow
def test_the_tutorials_loop(spec: Compose, tmp_path: Path) -> None:
    """experiment=cifar10_resnet18 gives the weights of the tutorial's plain loop: 20 steps in float32, batches of 4."""
    make_folder(tmp_path / "train", {"across": 34, "down": 34, "checks": 34}, seed=3)
    make_folder(tmp_path / "test", {"across": 2, "down": 2, "checks": 2}, seed=4)
    overrides = ("dataset=imagefolder", f"dataset.root='{tmp_path}'", "backbone.weights=none", "image.size=64")
    setting = Setting(spec("experiment=cifar10_resnet18", *overrides, "dataset.val_fraction=0.2", "epochs=1"))
    train = setting.data.train
    assert len(train) >= 80

    network = build_model(setting.spec.backbone, setting.data.classes, size=64, seed=setting.spec.seed).network
    optimizer = torch.optim.SGD(network.parameters(), lr=0.001, momentum=0.9)
    criterion = nn.CrossEntropyLoss()
    resize = v2.Resize((64, 64))  # of torchvision, on uint8 as there
    network.train()
    order = epoch_order(len(train), setting.spec.seed, 1)
    for step in range(20):
        images = [torch.from_numpy(train.read(int(i))).permute(2, 0, 1) for i in order[step * 4 : step * 4 + 4]]
        inputs = (torch.stack([resize(image) for image in images]) / 255 - 0.5) / 0.5
        labels = torch.tensor([int(train.labels[i]) for i in order[step * 4 : step * 4 + 4]])
        optimizer.zero_grad()
        criterion(network(inputs), labels).backward()
        optimizer.step()

    twenty = iter(list(setting.train.epoch(1))[:20])
    setting.train.epoch = lambda number, start: twenty  # type: ignore[method-assign]
    setting.fit()
    assert setting.trainer.step == 20
    expected = network.state_dict()
    for name, tensor in setting.model.network.state_dict().items():
        assert torch.allclose(tensor.float(), expected[name].float(), atol=1e-5), name


def test_training_learns(small) -> None:
    setting = small("optimizer.lr=1e-4", "augment=none")
    first, again = setting.fit(1), setting.fit(2)
    assert again["step"] == 2 * first["step"] == 2 * steps_per_epoch(setting.spec, len(setting.data.train))
    assert again["loss"] < first["loss"]
    assert setting.contract.verify() > 0


@pytest.mark.parametrize("log_every", ["null", "1"])
def test_not_finite_stops_the_run_and_says_where(log_every: str, small) -> None:
    own = ("optimizer=sgd", "optimizer.lr=1e12", "scheduler=constant", "augment=none", "batch_size=8")
    setting = small(*own, f"log_every={log_every}")
    words = r"epoch 1, batch \d+ \(step \d+, lr 1e\+12\).*try optimizer.lr=1e\+11"
    with pytest.raises(TlcliError, match=words):
        for epoch in (1, 2):
            setting.fit(epoch)
    assert all(math.isfinite(loss) for _, loss in setting.running)


def test_augmented_images_are_of_the_size_of_training_and_others_of_that_of_evaluation(small) -> None:
    setting = small("image.train_size=24", "augment=basic", "freeze=none")
    val = setting.opened.open("val", Reporter())
    assert next(iter(val.in_order()))[0][0].shape[-1] == 32
    assert next(iter(setting.train.epoch(1)))[0][0].shape[-1] == 24


def test_one_image_left_over_does_not_crash_batchnorm(small) -> None:
    """54 images in batches of 53 leave one, and maps of 1 by 1 pixel have no batch statistics then."""
    setting = small("freeze.bn_stats=update", "batch_size=53")
    assert len(setting.data.train) == 54
    before = setting.model.network.bn2.running_mean.clone()
    setting.fit()
    after = setting.model.network.bn2.running_mean
    assert not torch.equal(before, after)
    assert after.isfinite().all()


def test_batches_of_one_under_batchnorm_are_explained(small) -> None:
    setting = small("freeze.bn_stats=update", "batch_size=1")
    with pytest.raises(TlcliError, match=r"batch_size=1.*set batch_size=2"):
        setting.fit()


def test_out_of_memory_says_what_keeps_the_size_of_a_step(small, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, in Python, in NumPy, in PyTorch on a CPU and on MPS. Other errors are raised as they are."""
    setting = small("batch_size=8", "accumulate=2", "freeze=head")
    errors = (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError(),
        type("_ArrayMemoryError", (MemoryError,), {})("Unable to allocate 3.00 TiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    )
    advice = "out of memory with batch_size=8: set batch_size=4 accumulate=4, which keeps the size of a step, or"
    for error in (*errors, ValueError("a bug")):
        monkeypatch.setattr(setting.trainer, "_step", Mock(side_effect=error))
        kind, text = (ValueError, "a bug") if isinstance(error, ValueError) else (TlcliError, advice)
        with pytest.raises(kind, match=text):
            setting.fit()


def test_a_gradient_that_is_not_deterministic_is_explained(small, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = small()
    error = RuntimeError("adaptive_avg_pool2d_backward_cuda does not have a deterministic implementation, but you set")
    monkeypatch.setattr(setting.trainer, "_step", Mock(side_effect=error))
    with pytest.raises(TlcliError, match=r"device\.deterministic=true: .*; set device\.deterministic=false"):
        setting.fit()


def test_running_loss_is_of_the_last_batches_also_within_a_group(small) -> None:
    """Without a step in between, the mean of the running losses of an epoch is its mean loss per batch."""
    setting = small("log_every=3", "batch_size=9", "accumulate=4", "optimizer.lr=1e-12", "augment=none")
    stats = setting.fit()
    assert [batch for batch, _ in setting.running] == [3, 6]
    assert sum(loss for _, loss in setting.running) / 2 == pytest.approx(stats["loss"], rel=1e-5)


def test_clip_grad_bounds_the_step(small) -> None:
    """By its norm: with lr=1 and without momentum a step is the clipped gradient, which is longer than 0.001."""
    words = ("optimizer=sgd", "optimizer.momentum=0", "optimizer.lr=1", "scheduler=constant", "batch_size=54")
    setting = small(*words, "freeze=head", "clip_grad=0.001")
    parameters = [p for p in setting.model.network.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in parameters]
    setting.fit()
    moved = sum((p - b).square().sum().item() for p, b in zip(parameters, before, strict=True))
    assert math.sqrt(moved) == pytest.approx(0.001, rel=0.01)


def weights(setting: Setting) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in setting.model.network.named_parameters() if tensor.requires_grad}


ONE_STEP = ("optimizer=sgd", "optimizer.momentum=0", "optimizer.weight_decay=0", "scheduler=constant", "batch_size=54")


def test_l2sp_pulls_the_body_to_where_it_started(small) -> None:
    """A second step moves it by lr * l2sp of its distance to the start more; a weight of 0 changes no bit."""
    words = (*ONE_STEP, "augment=none", "freeze=last_stages", "optimizer.lr=0.01")
    plain, same, pulled = small(*words), small(*words, "l2sp=0"), small(*words, "l2sp=10")
    start = weights(plain)
    for setting in (plain, same, pulled):
        setting.fit(1)
    first = weights(plain)
    assert all(torch.equal(tensor, weights(pulled)[name]) for name, tensor in first.items()), "no distance yet"
    for setting in (plain, same, pulled):
        setting.fit(2)
    second, head = weights(plain), plain.model.head_parameters()
    assert all(torch.equal(tensor, weights(same)[name]) for name, tensor in second.items())
    for name, tensor in weights(pulled).items():
        pull = 0 if name in head else 0.1 * (first[name] - start[name])
        assert torch.allclose(tensor, second[name] - pull, atol=1e-6), name


def test_the_average_is_of_all_steps_and_with_decay_0_the_weights_themselves(small) -> None:
    words = (*ONE_STEP, "augment=none", "freeze=head", "optimizer.lr=0.1")
    last, average = small(*words, "ema=0"), small(*words, "ema=0.75")
    seen = []
    for epoch in (1, 2, 3):
        last.fit(epoch)
        average.fit(epoch)
        seen.append(weights(average))
    before = weights(last)
    with last.trainer.averaged():
        assert all(torch.equal(tensor, before[name]) for name, tensor in weights(last).items())
    with average.trainer.averaged():
        for name, tensor in weights(average).items():
            expected = 0.75 * (0.75 * seen[0][name] + 0.25 * seen[1][name]) + 0.25 * seen[2][name]
            assert torch.allclose(tensor, expected, atol=1e-6)
    assert all(torch.equal(tensor, seen[2][name]) for name, tensor in weights(average).items()), "as trained again"


def test_statistics_of_batchnorm_move_with_the_weights(small) -> None:
    setting = small(*ONE_STEP, "augment=none", "freeze.bn_stats=update", "ema=0.75")
    norms = list(setting.contract.updated_norms().values())
    means = lambda: torch.cat([norm.running_mean for norm in norms])  # noqa: E731
    start = means()
    setting.trainer.remember_start()
    setting.fit(1)
    first = means()
    setting.fit(2)
    second = means()
    assert not torch.equal(start, first)
    with setting.trainer.averaged():
        assert torch.allclose(means(), 0.75 * first + 0.25 * second)
    setting.trainer.interpolate(0.5)
    assert torch.allclose(means(), (start + second) / 2)


def test_a_signal_while_the_average_is_replaced_waits_for_all_weights(small, monkeypatch) -> None:
    setting, replace = small(*ONE_STEP, "augment=none", "ema=0.75"), Trainer._set
    setting.fit(1)
    setting.fit(2)
    before = weights(setting)

    def interrupted(trainer: Trainer, tensors: Sequence[Tensor]) -> None:
        signal.raise_signal(signal.SIGINT)
        replace(trainer, tensors)

    with pytest.raises(KeyboardInterrupt), handle_signals(), setting.trainer.averaged():
        assert not all(torch.equal(tensor, before[name]) for name, tensor in weights(setting).items())
        monkeypatch.setattr(Trainer, "_set", interrupted)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(setting).items())


def test_fits_start_alike_and_their_weights_are_averaged(small) -> None:
    """The second one has the schedule of the first, and the order and the crops of later epochs."""
    words = ("freeze=last_stages", "optimizer.lr=0.01")
    both, first, second = small(*words, "fits=2"), small(*words, "fits=1"), small(*words, "fits=1")
    for epoch in (1, 2):
        rates = [setting.fit(epoch)["lr"] for setting in (both, first)]
    one = weights(first)
    assert all(torch.equal(tensor, one[name]) for name, tensor in weights(both).items())
    for epoch in (3, 4):
        rates += [setting.fit(epoch)["lr"] for setting in (both, second)]
    assert rates[0] == rates[-1] == rates[-2]
    other = weights(second)
    assert any(not torch.equal(tensor, one[name]) for name, tensor in other.items())
    for name, tensor in weights(both).items():
        torch.testing.assert_close(tensor, (one[name] + other[name]) / 2, rtol=0, atol=1e-6)


@pytest.mark.parametrize("words", ["augment.mixup=0.4", "augment.cutmix=1", "augment.mixup=0.4 augment.cutmix=1"])
def test_mixed_labels_are_shares_of_the_mixed_images(small, words: str) -> None:
    """An image of ones per class: the mean of a mixed image in the channel of a class is the share of its label."""
    setting = small("augment=none", *words.split())
    images = torch.eye(3)[:, :, None, None].expand(3, 3, 20, 20).contiguous()
    torch.manual_seed(0)
    kinds = set()
    for _ in range(20):
        mixed, shares = setting.trainer._mixer(images, torch.arange(3))
        assert torch.allclose(shares.sum(dim=1), torch.ones(3))
        assert torch.allclose(mixed.mean(dim=(2, 3)), shares, atol=1e-5)
        if not torch.equal(mixed, images):
            kinds.add("cutmix" if set(mixed.unique().tolist()) == {0.0, 1.0} else "mixup")
    assert kinds == {kind for kind in ("mixup", "cutmix") if kind in words}
    assert math.isfinite(setting.fit()["loss"])


def test_balanced_classes_weigh_alike(spec: Compose, small) -> None:
    counts = (6, 30, 12)
    trainer = trainer_for(spec("class_weights=balanced"), small().model, counts)
    assert (trainer._class_weights * torch.tensor(counts)).tolist() == pytest.approx([48 / 3] * 3)


@pytest.mark.slow
def test_bfloat16_trains_as_float32_but_for_rounding(small) -> None:
    exact, rounded = (small(f"device.precision={name}", "augment=none").fit()["loss"] for name in ("fp32", "bf16"))
    assert rounded == pytest.approx(exact, rel=0.05)


@pytest.mark.parametrize(
    "backbone",
    ["efficientnet_lite0", "timm levit_128s", *slow("resnet18", "timm resnetv2_18", "timm mobilenetv3_small_050")],
)
def test_a_thousand_classes_do_not_tie_in_bfloat16(spec: Compose, backbone: str) -> None:
    """The head computes in float32 under autocast; logits in bfloat16 tie at the top in a few percent of rows."""
    option, *name = backbone.split()
    backbone_spec = spec(f"backbone={option}", *(f"backbone.name={n}" for n in name)).backbone
    size = 224 if "levit" in backbone else 32
    classes = [f"c{i:03}" for i in range(1000)]
    network = build_model(structs.replace(backbone_spec, weights="none"), classes, size=size, seed=0).network
    images = torch.randn(8 if size == 224 else 128, 3, size, size, generator=torch.Generator().manual_seed(0))
    with eval_mode(network), torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        logits = network(images)
    first, second = logits.topk(2, dim=1).values.unbind(dim=1)
    assert logits.dtype == torch.float32
    assert (first > second).all()
