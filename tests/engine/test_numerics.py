"""The choice of a number format and a memory format: what may be chosen, what is measured, what is remembered."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.conftest import Compose
from tlcli.engine import numerics
from tlcli.engine.numerics import Autotuner, ComputeFormat, allowed_formats, forward_step, training_step
from tlcli.errors import UsageError
from tlcli.models.build import build_model
from tlcli.models.classifier import Classifier
from tlcli.store import Store
from tlcli.transfer.contract import apply_freeze

CPU = torch.device("cpu")
FAST, SLOW = (ComputeFormat(dtype, torch.channels_last) for dtype in (torch.bfloat16, torch.float32))


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """processor(True): one that multiplies bfloat16."""
    return lambda bfloat16: monkeypatch.setattr(numerics, "cpu_has_bfloat16", lambda: bfloat16)


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
    spec: Compose, processor, bfloat16: bool, on: str, overrides: list[str], expected: list[str]
) -> None:
    processor(bfloat16)
    found = allowed_formats(spec(*overrides).device, torch.device(on))
    assert [option.description for option in found] == expected


def test_half_precision_on_a_cpu_is_refused(spec: Compose) -> None:
    with pytest.raises(UsageError, match=r"precision=fp16 needs a GPU.*bf16"):
        allowed_formats(spec("device.precision=fp16").device, CPU)


class Steps:
    """Steps of stand-ins; `seconds` by words."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: dict[str, float]) -> None:
        self.run = 0
        self.seconds = seconds
        self.clock = 0.0
        monkeypatch.setattr(numerics.time, "perf_counter", lambda: self.clock)

    def __call__(self, option: ComputeFormat) -> Callable[[], None]:
        def step() -> None:
            self.run += 1
            self.clock += self.seconds[option.description]

        return step


def chosen(store: Store, steps: Steps, *options: ComputeFormat, **subject: object) -> ComputeFormat:
    return Autotuner(store, CPU, **{"backbone": "one", **subject}).choose(options, 8, "training", steps)


def test_the_quickest_is_chosen_with_its_speed_and_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(monkeypatch, {SLOW.description: 0.2, FAST.description: 0.1})
    found = chosen(Store(tmp_path), steps, SLOW, FAST)
    assert found.dtype == torch.bfloat16
    assert found.images_per_second == pytest.approx(80)
    assert found.reason == "measured: float32, channels_last 40, bfloat16, channels_last 80 images/s"


def test_what_is_nearly_as_quick_and_comes_first_is_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(monkeypatch, {SLOW.description: 0.105, FAST.description: 0.1})
    assert chosen(Store(tmp_path / "near"), steps, SLOW, FAST).dtype == torch.float32
    assert chosen(Store(tmp_path / "turned"), steps, FAST, SLOW).dtype == torch.bfloat16
    steps.seconds[SLOW.description] = 0.12
    assert chosen(Store(tmp_path / "far"), steps, SLOW, FAST).dtype == torch.bfloat16


def test_a_choice_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the steps would have told otherwise: no result depends on a race."""
    steps = Steps(monkeypatch, {SLOW.description: 0.2, FAST.description: 0.1})
    first = chosen(Store(tmp_path), steps, SLOW, FAST)
    steps.run, steps.seconds = 0, {SLOW.description: 0.1, FAST.description: 0.2}
    again = chosen(Store(tmp_path), steps, SLOW, FAST)
    assert steps.run == 0
    assert (again.description, again.images_per_second) == (first.description, first.images_per_second)
    assert again.reason.startswith("measured before: ")


@pytest.mark.parametrize("change", ["machine", "torch", "subject", "images", "what", "options"])
def test_another_case_is_measured_anew(change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(monkeypatch, {SLOW.description: 0.2, FAST.description: 0.1})
    chosen(Store(tmp_path), steps, SLOW, FAST)
    steps.run = 0
    if change == "machine":
        monkeypatch.setattr(numerics, "machine_name", lambda accelerator: "another")
    if change == "torch":
        monkeypatch.setattr(torch, "__version__", "2.99")
    quickest = Autotuner(Store(tmp_path), CPU, backbone="two" if change == "subject" else "one")
    options = [FAST, SLOW] if change == "options" else [SLOW, FAST]
    quickest.choose(options, 4 if change == "images" else 8, "evaluation" if change == "what" else "training", steps)
    assert steps.run > 0


def test_what_is_much_slower_runs_twice_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(monkeypatch, {SLOW.description: 9.0, FAST.description: 0.01})
    chosen(Store(tmp_path), steps, FAST, SLOW)
    assert steps.clock == pytest.approx(2 * 9.0 + 6 * 0.01)


@pytest.fixture
def classifier(spec: Compose) -> Classifier:
    """Lite0 with its weights, half of it frozen, in the mode in which it trains; BatchNorm updates."""
    own = spec("freeze=last_stages", "freeze.bn_stats=update", "backbone.dropout=0.5")
    model = build_model(own.backbone, ("a", "b", "c"), size=32, seed=0)
    apply_freeze(own.freeze, model).train_mode()
    return model


@pytest.mark.parametrize("make", [training_step, forward_step])
@pytest.mark.parametrize("option", [FAST, SLOW], ids=lambda option: option.description)
def test_measuring_leaves_everything_as_it_was(make, option: ComputeFormat, classifier: Classifier) -> None:
    network = classifier.network
    images = torch.rand(4, 3, 32, 32)
    tensors, modes = copy.deepcopy(network.state_dict()), {n: m.training for n, m in network.named_modules()}
    strides = {name: t.stride() for name, t in network.state_dict().items()}
    versions = {name: p._version for name, p in network.named_parameters()}
    generator, copied = torch.get_rng_state(), images.clone()

    arguments = (network, images) if make is forward_step else (network, network, images)
    step = make(*arguments[:-1], (images,), CPU, option)
    step()
    step()

    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.equal(images, copied)
    assert {name: m.training for name, m in network.named_modules()} == modes
    assert all(p.grad is None for p in network.parameters())
    assert {name: p._version for name, p in network.named_parameters()} == versions
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, tensors[name]), name
        assert tensor.stride() == strides[name]


def test_a_training_step_has_a_backward_pass_in_the_modes_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bool, torch.dtype, bool]] = []

    class Probe(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append((self.training, x.dtype, x.requires_grad))
            return x

    network = nn.Sequential(nn.Conv2d(3, 4, 3), Probe(), nn.Flatten(), nn.Linear(4 * 36, 3))
    images = torch.rand(2, 3, 8, 8)
    training_step(network, network, (images,), CPU, FAST)()
    forward_step(network, (images,), CPU, SLOW)()
    assert seen == [(True, torch.bfloat16, True), (False, torch.float32, False)]
