"""Looking at a network, and leaving it and the random number generators as they were found."""

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def as_found(network: nn.Module) -> Iterator[None]:
    """Afterwards buffers (BatchNorm's statistics) and random number generators are what they were."""
    buffers = [(buffer, buffer.clone()) for buffer in network.buffers()]
    device = device_of(network)
    python, mps = random.getstate(), torch.mps.get_rng_state() if device.type == "mps" else None
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        set_buffers(buffers)
        random.setstate(python)
        if mps is not None:
            torch.mps.set_rng_state(mps)


@contextmanager
def exact_arithmetic(network: nn.Module) -> Iterator[None]:
    """Full float32 in the trials: no autocast, no TF32, whose rounding depends on the batch size."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    found = cudnn.allow_tf32, matmul.allow_tf32
    cudnn.allow_tf32 = matmul.allow_tf32 = False
    try:
        with torch.autocast(device_of(network).type, enabled=False):
            yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = found


@contextmanager
def eval_mode(network: nn.Module) -> Iterator[None]:
    """All in eval mode for a while, then each module in the mode that it was in."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def set_buffers(buffers: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Give buffers their values back, where they have others."""
    with torch.no_grad():
        for buffer, value in buffers:
            if not torch.equal(buffer, value):
                buffer.copy_(value)


def device_of(network: nn.Module) -> torch.device:
    """Where its parameters are."""
    return next((parameter.device for parameter in network.parameters()), torch.device("cpu"))


def random_state(device: torch.device) -> Tensor:
    """The state of the generator that draws on this device."""
    if device.type == "cuda":
        return torch.cuda.get_rng_state(device)
    return torch.mps.get_rng_state() if device.type == "mps" else torch.get_rng_state()
