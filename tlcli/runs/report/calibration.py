"""How far the probabilities can be trusted, before and after temperature scaling, on test."""

from dataclasses import dataclass

from torch import Tensor

from tlcli.engine import calibration as engine
from tlcli.runs.report.figures import Bin, Chart, reliability


@dataclass(frozen=True)
class Calibration:
    """The reliability diagram, and the expected calibration error (Guo et al. 2017) before and after."""

    temperature: float
    ece_before: float
    ece_after: float
    chart: Chart | None


def calibration_of(logits: Tensor, labels: Tensor, temperature: float) -> Calibration:
    """From logits (N, classes) and labels (N) of the test set, and the temperature that validation gave."""
    series = {"scaled": _bins(logits, labels, temperature)}
    if temperature != 1.0:
        series = {"unscaled": _bins(logits, labels, 1.0), **series}
    return Calibration(
        temperature,
        engine.expected_calibration_error(logits, labels, 1.0),
        engine.expected_calibration_error(logits, labels, temperature),
        reliability(series),
    )


def _bins(logits: Tensor, labels: Tensor, temperature: float) -> list[Bin]:
    """The bins that have images in them."""
    return [Bin(*found) for found in engine.reliability(logits, labels, temperature) if found[2]]
