"""Transforms on the device equal those on the CPU."""

from types import SimpleNamespace

import pytest
import torch

from tests.conftest import Compose
from tests.engine.test_activations import CPU, EIGHT, coded, device
from tlcli.data.dataset import Dataset
from tlcli.engine import inputs
from tlcli.engine.activations import Workload
from tlcli.engine.inputs import image_loader
from tlcli.reporter import Reporter


@pytest.mark.parametrize("augment", ["basic", "trivial", "randaugment", "none"])
@pytest.mark.parametrize(("views", "start"), [(None, 0), (2, 2)])
def test_changes_on_the_device_are_those_of_the_cpu(spec: Compose, augment: str, views, start, monkeypatch) -> None:
    words = (f"augment={augment}", *(("augment.erasing=0.9",) if augment != "none" else ()), "batch_size=4")
    wanted = spec(*words, *((f"cache.views={views}",) if views else ()))
    split = coded(11)
    data = Dataset("coded", ("a", "b", "c"), split, split, split, (), ())
    classifier = SimpleNamespace(network=torch.nn.Identity())
    workload = Workload(data, classifier, None, wanted, CPU, None)  # type: ignore[arg-type]
    vars(workload)["preprocessing"] = EIGHT
    load = lambda: image_loader(workload, device(), "train", Reporter())  # noqa: E731
    before = [(x, y) for epoch in (1, 2, 3) for (x,), y in load().epoch(epoch, start)]

    monkeypatch.setattr(inputs, "transforms_on_device", lambda accelerator: True)
    feed = load()
    assert (feed.transforms is None) == (augment == "none")
    after = [(x, y) for epoch in (1, 2, 3) for (x,), y in feed.epoch(epoch, start)]
    assert len(before) == len(after) == 3 * (3 - start)
    for (x, y), (found, labels) in zip(before, after, strict=True):
        assert torch.equal(x, found)
        assert torch.equal(y, labels)
        assert found.is_contiguous(memory_format=torch.channels_last)
