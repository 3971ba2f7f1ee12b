"""The choice of a dtype and a memory format: what may be chosen, what is measured, what is stored."""

import copy
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import Compose
from tlcli import device
from tlcli.device import ComputeFormat, allowed_formats
from tlcli.engine import numerics
from tlcli.engine.activations import Workload
from tlcli.engine.numerics import measure_network
from tlcli.engine.session import Session
from tlcli.errors import UsageError
from tlcli.store import Store
from tlcli.transfer.contract import apply_freeze

CPU = torch.device("cpu")
MEASURE = numerics._measure  # conftest.py replaces it
FAST, SLOW = (ComputeFormat(dtype, torch.channels_last) for dtype in (torch.bfloat16, torch.float32))


@pytest.mark.parametrize(
    ("bfloat16", "on", "overrides", "expected"),
    [
        (False, "cpu", [], ["float32, channels_last", "float32, contiguous"]),
        (True, "cpu", ["device.channels_last=false"], ["float32, contiguous", "bfloat16, contiguous"]),
        (True, "cpu", ["device.precision=bf16"], ["bfloat16, channels_last", "bfloat16, contiguous"]),
        (False, "cpu", ["device.precision=bf16", "device.channels_last=true"], ["bfloat16, channels_last"]),
        (True, "mps", [], ["float32, contiguous"]),
        (True, "mps", ["device.channels_last=true"], ["float32, channels_last"]),
    ],
)
def test_formats_are_what_the_machine_has_and_the_user_allows(
    spec: Compose, monkeypatch: pytest.MonkeyPatch, bfloat16: bool, on: str, overrides: list[str], expected: list[str]
) -> None:
    monkeypatch.setattr(device, "cpu_has_bfloat16", lambda: bfloat16)
    found = allowed_formats(spec(*overrides).device, torch.device(on))
    assert [option.description for option in found] == expected


def test_half_precision_on_a_cpu_is_refused(spec: Compose) -> None:
    with pytest.raises(UsageError, match=r"precision=fp16 needs a GPU.*bf16"):
        allowed_formats(spec("device.precision=fp16").device, CPU)


@pytest.fixture(autouse=True)
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numerics, "_measure", MEASURE)


def test_a_linear_layer_trains_in_float32_whatever_the_precision(spec: Compose) -> None:
    workload = SimpleNamespace(plain_head=lambda cut: nn.Linear(2, 2), spec=spec("device.precision=bf16"))
    assert numerics.measure_suffix(workload, None, FAST).dtype == torch.float32  # type: ignore[arg-type]


class Timed(nn.Module):
    """A network whose steps take `seconds` of a clock by dtype, for which the mode of each step is listed."""

    seconds: dict[torch.dtype, float]
    clock = 0.0
    steps: list[tuple[bool, torch.dtype, bool]]

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4 * 36, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        Timed.clock += Timed.seconds[x.dtype]
        Timed.steps.append((self.training, x.dtype, x.requires_grad))
        return self.head(x.flatten(1))


@pytest.fixture
def choose(spec: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., ComputeFormat]:
    """choose([SLOW, FAST], 0.2, 0.1): the format chosen for training if steps take these seconds."""
    monkeypatch.setattr(numerics.time, "perf_counter", lambda: Timed.clock)
    network, own = Timed(), spec("batch_size=8", "device.channels_last=true")

    def make(
        options: list[ComputeFormat], slow: float, fast: float, store: str = "one", name: str = "x", size: int = 8
    ):
        Timed.clock, Timed.steps = 0.0, []
        Timed.seconds = {torch.float32: slow, torch.bfloat16: fast}
        monkeypatch.setattr(numerics, "allowed_formats", lambda *args: options)
        backbone, session = SimpleNamespace(kind="timm", name=name), SimpleNamespace(store=Store(tmp_path / store))
        workload = SimpleNamespace(
            spec=SimpleNamespace(device=own.device, backbone=backbone, batch_size=size),
            classifier=SimpleNamespace(network=network),
            contract=SimpleNamespace(train_mode=network.train),
            preprocessing=SimpleNamespace(size=8),
            train_size=8,
            accelerator=CPU,
            session=session,
        )
        return measure_network(workload)[0]  # type: ignore[arg-type]

    return make


def test_the_fastest_is_chosen_with_its_speed_and_reason(choose) -> None:
    found = choose([SLOW, FAST], 0.2, 0.1)
    assert (found.dtype, found.images_per_second) == (torch.bfloat16, pytest.approx(80))
    assert found.reason == "measured: float32, channels_last 40, bfloat16, channels_last 80 images/s"
    assert set(Timed.steps) == {(training, dtype, training) for training in (True, False) for dtype in Timed.seconds}


def test_the_first_of_nearly_equal_ones_is_chosen(choose) -> None:
    assert choose([SLOW, FAST], 0.105, 0.1, "near").dtype == torch.float32
    assert choose([FAST, SLOW], 0.105, 0.1, "turned").dtype == torch.bfloat16
    assert choose([SLOW, FAST], 0.12, 0.1, "far").dtype == torch.bfloat16


def test_the_speed_of_a_single_format_is_known(choose) -> None:
    found = choose([FAST], 0.2, 0.1)
    assert (found.images_per_second, found.reason) == (pytest.approx(80), "the only choice here")


def test_another_program_that_disturbs_one_round_does_not_change_the_choice(choose, monkeypatch) -> None:
    seconds = iter([0.2, 0.4, 0.2, 0.1] * 2)  # the fast one's first round was disturbed
    monkeypatch.setattr(numerics, "_measure", lambda *args, **settings: next(seconds))
    assert choose([SLOW, FAST], 0.2, 0.1).dtype == torch.bfloat16


def test_a_choice_is_stored(choose) -> None:
    """It is used even if the steps would be different now: no result depends on a race."""
    first, again = choose([SLOW, FAST], 0.2, 0.1), choose([SLOW, FAST], 0.1, 0.2)
    assert Timed.steps == []
    assert replace(again, reason="") == replace(first, reason="")
    assert again.reason.startswith("measured before: ")


@pytest.mark.parametrize("change", ["machine", "torch", "name", "size", "options"])
def test_another_case_is_measured_again(change: str, choose, monkeypatch: pytest.MonkeyPatch) -> None:
    choose([SLOW, FAST], 0.2, 0.1)
    if change == "machine":
        monkeypatch.setattr(numerics, "machine_name", lambda accelerator: "another")
    if change == "torch":
        monkeypatch.setattr(torch, "__version__", "2.99")
    options = [FAST, SLOW] if change == "options" else [SLOW, FAST]
    choose(options, 0.2, 0.1, **{"name": {"name": "y"}, "size": {"size": 4}}.get(change, {}))
    assert Timed.steps


@pytest.mark.slow
def test_measuring_changes_nothing(spec: Compose, shapes: Path, tmp_path: Path) -> None:
    """Not the tensors, their layout and versions, the gradients, the modes or the generator."""
    words = ("dataset=imagefolder", f"dataset.root='{shapes}'", "image.size=32", "freeze=last_stages")
    own = spec(*words, "freeze.bn_stats=update", "backbone.dropout=0.5")
    classifier = Session(Store(tmp_path), 0).model(own.backbone, ("a", "b", "c"), size=32, seed=0)
    contract, network = apply_freeze(own.freeze, classifier), classifier.network
    contract.train_mode()
    tensors, modes = copy.deepcopy(network.state_dict()), {n: m.training for n, m in network.named_modules()}
    strides = {name: t.stride() for name, t in network.state_dict().items()}
    versions = {name: p._version for name, p in network.named_parameters()}
    session, data = Session(Store(tmp_path), 0), SimpleNamespace(value_range=None)
    generator = torch.get_rng_state()
    measure_network(Workload(data, classifier, contract, own, CPU, session))  # type: ignore[arg-type]
    assert torch.equal(torch.get_rng_state(), generator)
    assert {name: m.training for name, m in network.named_modules()} == modes
    assert all(p.grad is None for p in network.parameters())
    assert {name: p._version for name, p in network.named_parameters()} == versions
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, tensors[name]), name
        assert tensor.stride() == strides[name]


def test_measurements_of_a_gpu_are_not_those_of_the_cpu_beside_it() -> None:
    assert numerics.machine_name(torch.device("mps")) != numerics.machine_name(CPU)


def test_images_that_need_too_much_memory_are_fewer(choose, monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory of the first try is free then."""
    tried: list[int] = []

    def measure(workload: Any, option: Any, module: Any, inputs: Any, *limits: float, trains: bool) -> float:
        tried.append(len(inputs[0]))
        assert sys.exception() is None
        if tried[-1] > 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 0.1

    monkeypatch.setattr(numerics, "MEASURE_BATCH_SIZE", {"cpu": 32})
    monkeypatch.setattr(numerics, "_measure", measure)
    assert choose([SLOW], 0.2, 0.1, size=64).images_per_second == 80
    assert tried == [32, 8, 32, 8]  # training, then evaluation
