"""The comparison of an exported model with the one that it came from."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tlcli.errors import TlcliError

TOLERANCE = 1e-4
"""The largest difference of a float32 logit: an order above what another order of summation brings."""


@dataclass(frozen=True)
class Check:
    """What the comparison found: the images, in words, and the largest difference of a logit."""

    images: str
    largest: float


def compare(model: Callable[[Tensor], Tensor], inputs: Tensor, reference: Tensor, images: str, what: str) -> Check:
    """Compare what a model gives, for all inputs at once and for the first one alone, with the reference (N, classes).

    Raises TlcliError where a logit differs by more than TOLERANCE or a class is another.
    """
    together, alone = model(inputs), model(inputs[:1])
    for found, wanted in ((together, reference), (alone, reference[:1])):
        if found.shape != wanted.shape:
            raise TlcliError(f"{what} gives {tuple(found.shape)} for {tuple(wanted.shape)} logits; nothing was written")
    differences = torch.cat([together, alone]) - torch.cat([reference, reference[:1]])
    largest = float(differences.abs().max())  # of torch, whose greatest number is NaN where there is one
    other = int((together.argmax(dim=1) != reference.argmax(dim=1)).sum())
    if not largest <= TOLERANCE or other:
        raise TlcliError(
            f"{what} does not give what PyTorch gives, on {images}: logits differ by up to {largest:.2g} "
            f"({TOLERANCE:g} is allowed), the class on {other}; nothing was written"
        )
    return Check(images, largest)


def logits_of(model: torch.nn.Module, inputs: Tensor) -> Tensor:
    """What a PyTorch model gives, (N, classes)."""
    with torch.inference_mode():
        out: Tensor = model(inputs)
    return out
