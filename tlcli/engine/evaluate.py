"""Run a network over a whole split without training it: logits, or the input of the head."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tlcli.device import Device, limit_threads
from tlcli.engine.loaders import BatchLoader
from tlcli.engine.metrics import Predictions
from tlcli.models.classifier import eval_mode
from tlcli.reporter import Reporter


def evaluate(network: nn.Module, loader: BatchLoader, device: Device, reporter: Reporter, label: str) -> Predictions:
    """Return the logits of every image of a split, in order; `network` is the whole one, whose modes are set."""
    logits, labels = [], []
    with (
        eval_mode(network),
        torch.inference_mode(),
        limit_threads(loader.threads),
        reporter.track(label, len(loader)) as advance,
    ):
        for x, y in loader.in_order():
            with device.autocast(loader.dtype):
                logits.append(loader.network(*x))
            labels.append(y)
            advance(len(y))
    return Predictions(torch.cat(logits).float().cpu(), torch.cat(labels).cpu())


def features(
    network: nn.Module, head: nn.Module, loader: BatchLoader, device: Device, reporter: Reporter, label: str
) -> tuple[Tensor, Tensor]:
    """Return the input of `head` for every image, (N, D) float32 on the CPU, and the labels (N)."""
    batches: list[Tensor] = []
    record: Callable[..., None] = lambda module, args: batches.append(args[0].float().cpu())  # noqa: E731
    handle = head.register_forward_pre_hook(record)
    try:
        labels = evaluate(network, loader, device, reporter, label).labels
    finally:
        handle.remove()
    return torch.cat(batches), labels
