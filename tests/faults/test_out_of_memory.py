"""Out of memory in a step: the error names the largest batch that fits, if one is found, and nothing was trained."""

import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import Compose
from tests.faults.test_counting import CLASSES, Exact, Small, trainer_for
from tlcli.errors import OutOfMemory, is_out_of_memory
from tlcli.models.classifier import Classifier, Stage
from tlcli.reporter import Reporter

KINDS: dict[str, Callable[[], Exception]] = {
    "a GPU": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "Python": MemoryError,
    "NumPy": lambda: type("_ArrayMemoryError", (MemoryError,), {})("Unable to allocate 3.00 TiB"),
    "PyTorch on a CPU": lambda: RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    "Apple": lambda: RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
}


class Limited(Small):
    """A network with memory for a number of images. A forward pass holds a large object, as activations are."""

    class Activations:
        alive = 0

        def __init__(self) -> None:
            Limited.Activations.alive += 1

        def __del__(self) -> None:
            Limited.Activations.alive -= 1

    def __init__(self, max_images: int, error: Callable[[], Exception]) -> None:
        super().__init__()
        self.max_images, self.error, self.tried = max_images, error, list[int]()

    def forward(self, x: Tensor) -> Tensor:
        assert Limited.Activations.alive == 0, "the failed step must let go of its memory before the next try"
        held = Limited.Activations()
        self.tried.append(len(x))
        if len(x) > self.max_images:
            raise self.error()
        assert held is not None
        return super().forward(x)


def fit(spec: Compose, network: nn.Module, *overrides: str) -> None:
    names = [name for name, _ in network.named_parameters()]
    stages = (Stage("body", frozenset(names[:2])), Stage("head", frozenset(names[2:])))
    classifier = Classifier("small", network, ("head",), stages, 1, (0.0,) * 3, (1.0,) * 3, CLASSES)
    own = spec("batch_size=64", "device.precision=fp32", *overrides)
    trainer = trainer_for(own, classifier, (22, 21, 21))
    trainer.fit(Exact(network, 64, 64), 1, Reporter(), lambda *running: None)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_the_error_names_the_largest_batch_that_fits(spec: Compose, kind: str) -> None:
    gc.collect()
    network = Limited(9, KINDS[kind])
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    assert is_out_of_memory(KINDS[kind]())
    with pytest.raises(OutOfMemory) as caught:
        fit(spec, network, "accumulate=2")
    assert network.tried == [64, 32, 16, 8]
    assert str(caught.value) == (
        "out of memory with batch_size=64: 8 fits here; batch_size=8 accumulate=16 keeps the size of a step"
    )
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize(("room", "advice"), [(1, "1 fits"), (2, "2 fits"), (63, "32 fits")])
def test_a_batch_is_halved_until_it_fits(spec: Compose, room: int, advice: str) -> None:
    with pytest.raises(OutOfMemory, match=advice):
        fit(spec, Limited(room, MemoryError))


def test_if_nothing_fits_the_images_are_too_large(spec: Compose) -> None:
    network = Limited(0, MemoryError)
    with pytest.raises(OutOfMemory, match=r"no smaller batch was found to fit: try a smaller image\.size"):
        fit(spec, network)
    assert network.tried[-1] == 1


def test_other_errors_are_raised_as_they_are(spec: Compose) -> None:
    network = Limited(0, lambda: ValueError("a bug"))
    with pytest.raises(ValueError, match="a bug"):
        fit(spec, network)
    assert network.tried == [64]
