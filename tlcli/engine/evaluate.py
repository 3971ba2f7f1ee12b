"""A network over a whole split, without training: logits, or what enters the head."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tlcli.device import Device, threads
from tlcli.engine.inputs import BatchLoader
from tlcli.engine.metrics import Predictions, predictions_of
from tlcli.reporter import Reporter


@contextmanager
def eval_mode(network: nn.Module) -> Iterator[None]:
    """Eval mode throughout, and every module in the mode it had afterwards."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def evaluate(network: nn.Module, feed: BatchLoader, device: Device, reporter: Reporter, label: str) -> Predictions:
    """The logits for every image of a split, each once, in order; `network` is the whole one, whose modes are set."""
    logits, labels = [], []
    with (
        eval_mode(network),
        torch.inference_mode(),
        threads(feed.threads),
        reporter.track(label, len(feed)) as advance,
    ):
        for x, y in feed.in_order():
            with device.autocast(feed.dtype):
                logits.append(feed.network(*x))
            labels.append(y)
            advance(len(y))
    return predictions_of(logits, labels)


def features(
    network: nn.Module, head: nn.Module, feed: BatchLoader, device: Device, reporter: Reporter, label: str
) -> tuple[Tensor, Tensor]:
    """What enters `head` for every image, float32 on the CPU, and the labels (N)."""
    seen: list[Tensor] = []
    hook: Callable[..., None] = lambda module, args: seen.append(args[0].float().cpu())  # noqa: E731
    handle = head.register_forward_pre_hook(hook)
    try:
        labels = evaluate(network, feed, device, reporter, label).labels
    finally:
        handle.remove()
    return torch.cat(seen), labels
