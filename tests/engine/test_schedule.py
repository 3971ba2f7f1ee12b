"""Learning rates over time."""

import math

import pytest
import torch

from tests.conftest import Compose
from tlcli.engine.schedule import Schedule, lr_factor, number_of_epochs

STEPS, PER_EPOCH = 100, 25


def factors(spec: Compose, *overrides: str) -> list[float]:
    of = spec(*overrides).scheduler
    return [lr_factor(of, step, STEPS, PER_EPOCH) for step in range(STEPS)]


@pytest.mark.parametrize("name", ["constant", "cosine", "linear", "step", "plateau"])
def test_warmup_rises_to_the_full_rate(spec: Compose, name: str) -> None:
    values = factors(spec, f"scheduler={name}", "scheduler.warmup=0.2")
    assert values[:20] == sorted(values[:20])
    assert 0 < values[0] < 0.1
    assert values[19] < 1.0
    assert values[20] == pytest.approx(1.0)
    assert all(0 <= v <= 1 for v in values)


def test_shapes(spec: Compose) -> None:
    assert set(factors(spec, "scheduler=constant")) == {1.0}
    cosine = factors(spec, "scheduler=cosine", "scheduler.warmup=0", "scheduler.final=0.1")
    assert cosine[50] == pytest.approx(0.55)
    assert cosine[-1] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * 0.99)) / 2)
    linear = factors(spec, "scheduler=linear", "scheduler.warmup=0", "scheduler.final=0.5")
    assert linear[50] == pytest.approx(0.75)
    step = factors(spec, "scheduler=step", "scheduler.every=2", "scheduler.gamma=0.1")
    assert (step[0], step[49], step[50], step[99]) == pytest.approx((1.0, 1.0, 0.1, 0.1))
    cycle = factors(spec, "scheduler=one_cycle")
    assert cycle[0] == pytest.approx(1 / 25)
    assert max(range(STEPS), key=lambda i: cycle[i]) == 30
    assert cycle[-1] < 0.01


@pytest.mark.parametrize(
    ("words", "images", "epochs"),
    [((), 100, 38), ((), 250, 19), ((), 10_000, 5), (("accumulate=2",), 250, 38), (("epochs=3",), 100, 3)],
)
def test_small_sets_are_seen_more_often(spec: Compose, words: tuple[str, ...], images: int, epochs: int) -> None:
    """At least 150 steps of 32 images, and at least 5 epochs."""
    assert number_of_epochs(spec(*words), images) == epochs


def test_plateau_reduces_the_lr_of_each_group_once_the_loss_does_not_decrease(spec: Compose) -> None:
    groups = [{"params": [torch.zeros(1, requires_grad=True)], "lr": lr} for lr in (1.0, 0.5)]
    optimizer = torch.optim.SGD(groups)
    schedule = Schedule(spec("scheduler=plateau").scheduler, optimizer, steps_per_epoch=1, epochs=9)
    seen = []
    for epoch, loss in enumerate([1.0, 0.9, 0.95, 0.96, 0.97, 0.98]):
        schedule.before_step(epoch)
        seen.append([group["lr"] for group in optimizer.param_groups])
        schedule.after_epoch(loss)
    assert seen == [pytest.approx([factor, 0.5 * factor]) for factor in (1.0, 1.0, 1.0, 1.0, 0.1, 0.1)]
