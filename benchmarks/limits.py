"""The limits of the machine: python -m benchmarks.limits [--small]

GFLOP/s of a large square matrix product, and the images per second that this allows: the FLOPs of a network's forward
pass, counted by PyTorch, at that rate. No convolution runs faster than the matrix product that it is made of.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
import torchvision
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.run import out_folder, publish

SIZE, SMALL_SIZE, REPEATS = 2048, 128, 9


def matrix_gflops(size: int = SIZE, repeats: int = REPEATS) -> dict[str, float]:
    """Return GFLOP/s of a (size, size) matrix product in float32 and bfloat16: medians after two warm-up products."""
    rates: dict[str, float] = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b, out = (torch.randn(size, size).to(dtype) for _ in range(3))
        seconds = []
        for _ in range(repeats + 2):
            began = time.perf_counter()
            torch.mm(a, b, out=out)
            seconds.append(time.perf_counter() - began)
        rates[str(dtype).removeprefix("torch.")] = 2 * size**3 / statistics.median(seconds[2:]) / 1e9
    return rates


def forward_gflop(size: int) -> float:
    """Return GFLOP of ResNet-18's forward pass for one image of (size, size) pixels; a multiply-add is two."""
    with torch.device("meta"):
        network, image = torchvision.models.resnet18().eval(), torch.empty(1, 3, size, size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(image)
    return counter.get_total_flops() / 1e9


def main(out: Path, *, small: bool = False) -> None:
    """Print rates and limits."""
    rates = matrix_gflops(SMALL_SIZE if small else SIZE)
    work = forward_gflop(224)
    rows = [[name, f"{rate:.0f}", f"{rate / work:.1f}"] for name, rate in rates.items()]
    header = ["number format", "matrix product, GFLOP/s", "limit for ResNet-18 at 224 px, images per second"]
    publish("limits", header, rows, out, {"gflops": rates, "gflop_a_forward_image": work})


if __name__ == "__main__":
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("--small", action="store_true")
    command.add_argument("--out", type=Path)
    given = command.parse_args()
    main(out_folder(given.out, "limits"), small=given.small)
