"""Heat maps: where in an image a network found evidence for a class, and their place over the image."""

import math
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from tlcli.errors import TlcliError
from tlcli.specs import Fit

MIN_SIDE = 3  # positions; in 2 x 2 of EfficientNet-Lite0 at 64 px the maximum was at the object in 9 % of the images
OPACITY = 0.7  # of the colors at the maximum of a map
UNSEEN_BRIGHTNESS = 0.35  # of the parts of an image that the network did not see
COLORS = np.array([(255, 230, 0), (255, 140, 0), (225, 0, 0)])  # from no evidence to the maximum


def heat_map(network: nn.Module, image: Tensor, label: int) -> Tensor:
    """Return the evidence for a class by position, (side, side) from 0 to 1, float32 on the CPU.

    `image` is the input of a network in eval mode, (1, 3, S, S). It is LayerCAM (Jiang et al. 2021) of the last block
    with a grid of positions on which the logit depends (in a transformer with a class token that is not the last one):
    activations times their gradients, of which the positive ones are summed over the channels. Raise TlcliError if
    there is no such block.
    """
    outputs: list[Any] = []
    blocks = [module for module in network.modules() if next(module.children(), None) is not None]
    with ExitStack() as hooks, torch.inference_mode(False):  # gradients, whatever the caller has set
        for block in blocks:
            hooks.enter_context(block.register_forward_hook(lambda *call: outputs.append(call[2])))
        logit = network(image.clone().requires_grad_())[0, label]
    n_prefix = getattr(network, "num_prefix_tokens", None)
    for output in reversed(outputs):
        if isinstance(output, Tensor) and output.requires_grad and (activations := _grid(output, n_prefix)) is not None:
            (gradient,) = torch.autograd.grad(logit, output, retain_graph=True, allow_unused=True)
            if gradient is not None and (at_positions := _grid(gradient, n_prefix)) is not None and at_positions.any():
                evidence = (activations * at_positions).relu().sum(dim=2).detach()
                return (evidence / evidence.max().clamp_min(torch.finfo(torch.float32).tiny)).float().cpu()
    raise TlcliError(f"no heat map: {type(network).__name__} has no block with a grid of positions")


def _grid(output: Tensor, n_prefix: int | None) -> Tensor | None:
    """Return a block's output for one image as (side, side, channels); None if it has no such grid.

    Maps have their channels first or last; tokens of patches follow `n_prefix` others (None: as few as possible).
    """
    if output.ndim not in (3, 4) or len(output) != 1:
        return None
    grid = output[0]
    if grid.ndim == 2:
        n_prefix = len(grid) - math.isqrt(len(grid)) ** 2 if n_prefix is None else n_prefix
        side = math.isqrt(max(0, len(grid) - n_prefix))
        if n_prefix + side**2 != len(grid):
            return None
        grid = grid[n_prefix:].reshape(side, side, grid.shape[1])
    elif grid.shape[1] == grid.shape[2]:
        grid = grid.permute(1, 2, 0)
    return grid if len(grid) == grid.shape[1] >= MIN_SIDE else None


def draw_heat_map(picture: Image.Image, heat: Tensor, fit: Fit) -> Image.Image:
    """Return a picture, of any size, in gray with the heat map of the square that the network saw of it.

    What a crop left out is dark. The map of a padded square is drawn without the padding.
    """
    width, height = picture.size
    box = (height, width)  # of the map, in pixels of the picture, with the same middle
    if fit is not Fit.squash:
        box = (min(box),) * 2 if fit is Fit.crop else (max(box),) * 2
    large = F.interpolate(heat[None, None], box, mode="bilinear")[0, 0]
    top, left = round((height - box[0]) / 2), round((width - box[1]) / 2)  # below 0 for a padded square: F.pad crops
    margins = (left, width - box[1] - left, top, height - box[0] - top)
    shown = F.pad(large, margins, value=math.nan).numpy()[..., None]
    values, pixels = np.nan_to_num(shown), np.asarray(picture.convert("L").convert("RGB"), dtype=np.float32)
    color = np.stack([np.interp(values[..., 0], np.linspace(0, 1, len(COLORS)), c) for c in COLORS.T], axis=2)
    pixels = np.where(np.isnan(shown), UNSEEN_BRIGHTNESS * pixels, pixels + OPACITY * values * (color - pixels))
    return Image.fromarray(pixels.round().astype(np.uint8))
