"""Batches on their way to a GPU while it computes."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from tlcli.device import Device

Pair = tuple[Tensor, Tensor]


def prefetch_to_device(batches: Iterable[Pair], device: Device) -> Iterator[Pair]:
    """The same batches on the device, in order. On CUDA the next one is copied, from pinned memory and on a stream of
    its own, while the present one is computed with."""
    if device.accelerator.type != "cuda":
        for x, y in batches:
            yield device.put(x), device.put(y)
        return
    copying = torch.cuda.Stream(device.accelerator)  # type: ignore[no-untyped-call]
    waiting: Pair | None = None
    for x, y in batches:
        with torch.cuda.stream(copying):
            coming = device.put(x), device.put(y)
        if waiting is not None:
            yield _arrived(waiting, copying, device)
        waiting = coming
    if waiting is not None:
        yield _arrived(waiting, copying, device)


def _arrived(batch: Pair, copying: torch.cuda.Stream, device: Device) -> Pair:
    """The batch, once the stream that computes has waited for its copy; its memory is not used anew before that."""
    computing = torch.cuda.current_stream(device.accelerator)
    computing.wait_stream(copying)
    for tensor in batch:
        tensor.record_stream(computing)
    return batch
