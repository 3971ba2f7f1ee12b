"""The loop that somebody who knows PyTorch writes, as the baseline of benchmarks.quality.

timm's EfficientNet-Lite0 with the weights of tlcli's default backbone and a new head; images in memory;
RandomResizedCrop(0.5 to 1) and, if allowed, flips; AdamW with 1e-3 for the head and 3e-4 for the body, weight decay
0.01, cosine to 0 per step, 8 epochs (20 below 500 images), batches of at most 32, channels_last, the faster of bfloat16
and float32. It trains on all images of train and val, and the last epoch counts. Nothing of tlcli is imported.

`benchmarks.run.alone` calls it in its own process and reads the line of JSON that it prints.
"""

import math
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as pixels

from benchmarks.baselines import lite0, network_input

BATCH = 32
FEW_IMAGES = 500  # below it there are 20 epochs
HEAD_RATE, BODY_RATE, WEIGHT_DECAY = 1e-3, 3e-4, 0.01


def fine_tune(root: str, seed: int, flip: bool, size: int = 224, epochs: int | None = None) -> dict[str, Any]:
    """Train on train/ and val/ of a folder. Return the predicted class of each file CLASS/NAME in test/."""
    torch.manual_seed(seed)
    train, test = files_of(root, "train", "val"), files_of(root, "test")
    classes = sorted({file.parent.name for file in train})
    labels = torch.tensor([classes.index(file.parent.name) for file in train])
    with ThreadPoolExecutor() as pool:  # Pillow decodes in parallel
        images = list(pool.map(partial(read_at_most, side=size * 8 // 7), train))
        test_images = torch.stack(list(pool.map(partial(read_center, size=size), test)))
    epochs = epochs or (20 if len(train) < FEW_IMAGES else 8)
    network = lite0(len(classes)).to(memory_format=torch.channels_last)
    dtype = faster_dtype(network, size)
    crop = v2.RandomResizedCrop(size, scale=(0.5, 1), antialias=True)
    augment = v2.Compose([crop, v2.RandomHorizontalFlip()]) if flip else crop
    fit(network, images, labels, augment, epochs, dtype)
    network.eval()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        chosen = torch.cat([network(network_input(part, size)).argmax(1) for part in test_images.split(2 * BATCH)])
    names = [f"{file.parent.name}/{file.name}" for file in test]
    predicted = {name: classes[index] for name, index in zip(names, chosen.tolist(), strict=True)}
    return {"predicted": predicted, "epochs": epochs, "dtype": str(dtype)}


def files_of(root: str, *splits: str) -> list[Path]:
    """Return the files ROOT/SPLIT/CLASS/NAME of these splits, sorted; a missing split has none."""
    return [file for split in splits for file in sorted(Path(root, split).glob("*/*"))]


def read_at_most(file: Path, side: int) -> Tensor:
    """Return an image as uint8 (3, H, W), with its shorter side reduced to `side` if it is longer."""
    image = pixels.pil_to_tensor(Image.open(file).convert("RGB"))
    return pixels.resize(image, [side], antialias=True) if min(image.shape[1:]) > side else image


def read_center(file: Path, size: int) -> Tensor:
    """Return the center of an image as uint8 (3, size, size), after a resize of its shorter side to `size`."""
    image = pixels.pil_to_tensor(Image.open(file).convert("RGB"))
    return pixels.center_crop(pixels.resize(image, [size], antialias=True), [size])


def faster_dtype(network: nn.Module, size: int) -> torch.dtype:
    """Return the dtype in which a copy of the network trains faster: two steps each, after one to warm up."""
    copy, seconds = deepcopy(network).train(), {}
    batch, labels = torch.rand(BATCH, 3, size, size), torch.zeros(BATCH, dtype=torch.int64)
    batch = batch.contiguous(memory_format=torch.channels_last)
    for dtype in (torch.bfloat16, torch.float32):
        for step in range(3):
            if step == 1:
                began = time.perf_counter()
            loss_of(copy, batch, labels, dtype).backward()
        seconds[dtype] = time.perf_counter() - began
    return min(seconds, key=lambda dtype: seconds[dtype])


def fit(
    network: nn.Module, images: Sequence[Tensor], labels: Tensor, augment: nn.Module, epochs: int, dtype: torch.dtype
) -> None:
    """Train the network in place, in batches of about equal size.

    A last batch of 4 images disturbs BatchNorm: on 100 images it cost 2 to 6 points (two seeds, 96 px).
    """
    batches = math.ceil(len(labels) / BATCH)
    head = list(network.get_submodule("classifier").parameters())
    body = [tensor for name, tensor in network.named_parameters() if not name.startswith("classifier.")]
    groups = [{"params": head, "lr": HEAD_RATE}, {"params": body, "lr": BODY_RATE}]
    optimizer = torch.optim.AdamW(groups, weight_decay=WEIGHT_DECAY, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * batches)
    network.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(labels)).tensor_split(batches):
            batch = torch.stack([augment(images[index]) for index in chosen.tolist()])
            loss_of(network, network_input(batch, batch.shape[-1]), labels[chosen], dtype).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()


def loss_of(network: nn.Module, batch: Tensor, labels: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the mean cross-entropy of a batch."""
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        return F.cross_entropy(network(batch), labels)
