"""A million images: python -m benchmarks.million [--small] [--files N]

The files are hard links to 500 small images in 100 classes. Each part is a process of its own: `tlcli train` up to the
plan, in a first call, which decodes every image, and in a second one; an epoch of a linear head on cached features of
ResNet-18, which are random numbers of a stub in place of its frozen layers; `tlcli predict` over four classes and
over eight. Memory is the peak of anonymous memory (RssAnon, which Linux has): pages of mapped files do not count. At
the end is an estimate for ImageNet-21k.
"""

import argparse
import heapq
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import yaml  # type: ignore[import-untyped]
from PIL import Image

from benchmarks.figures import Measure, at_most
from benchmarks.run import out_folder, publish, publish_measures
from tlcli.reporter import Reporter, RunPlan

FILES, SMALL_FILES = 1_000_000, 2_000
CLASSES, PER_CLASS = 100, 5  # images that differ, of each class
SIZE = 32  # pixels of an image
PREDICTED = (4, 8)  # classes whose images are predicted: enough for the network to be compiled in both

IMAGENET_IMAGES, IMAGENET_BYTES = 14_197_122, 1.31e12  # of ImageNet-21k as it was published in 2011
RATE, ROW_BYTES = 62.3, 4 * 1280  # EfficientNet-Lite0 at 224 px: images per second of one thread (docs/scale.md)
DECODED = 464  # images per second of one core: photographs of 0.2 megapixels and 110 kB


def make_files(root: Path, n: int) -> None:
    """Write images of noise, 10 s in the past, so that their digests are remembered; the others are links to them."""
    rng, past = np.random.default_rng(0), time.time() - 10
    originals: list[Path] = []
    for i in range(n):
        folder = root / f"class{i % CLASSES:03}"
        path = folder / f"{i:07}.jpg"
        if i < CLASSES * PER_CLASS:
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)).save(path, quality=50)
            os.utime(path, (past, past))
            originals.append(path)
        else:
            os.link(originals[i % len(originals)], path)


def anonymous(pid: int | str = "self") -> float:
    """Return the anonymous memory of a process in GB."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(encoding="utf-8"))
    return int(found[1]) * 1024 / 1e9 if found else 0.0


class PlannedError(Exception):
    """Ends a run of which only the plan is wanted."""


class Watch(Reporter):
    """Takes the time of the plan, and the memory at the start of an epoch and at its peak."""

    def __init__(self, *, only_plan: bool) -> None:
        self.found: dict[str, Any] = {}
        self._only_plan = only_plan

    def plan(self, plan: RunPlan) -> None:
        """Record the plan, and end the run if nothing else is wanted."""
        images = sum(map(sum, plan.counts.values()))
        self.found |= {"planned": time.time(), "cpu": time.process_time(), "images": images}
        if self._only_plan:
            raise PlannedError

    @contextmanager
    def track(self, label: str, total: int | None, unit: str = "images") -> Iterator[Callable[[int], None]]:
        """Record seconds and images of a phase, and how much memory grows in it, by fifty looks."""
        start, done, used = time.perf_counter(), 0, [anonymous()]

        def advance(n: int) -> None:
            nonlocal done
            done += n
            if done * 50 >= len(used) * max(1, total or 1):
                used.append(anonymous())

        yield advance
        self.found[label] = {
            "seconds": time.perf_counter() - start,
            "images": done,
            "growth_mb": 1e3 * (max(used) - used[0]),
        }


def run_part(root: str, run: Path, *, only_plan: bool) -> dict[str, Any]:
    """Train up to the plan, or to the end on features that a stub makes, and return what was recorded."""
    import torch

    from tlcli.cli.compose import compose_spec
    from tlcli.cli.job import check_spec
    from tlcli.engine.activations import SplitActivations
    from tlcli.engine.session import session_for
    from tlcli.runs.run_dir import RunDir
    from tlcli.text import to_plain
    from tlcli.train import train

    def extract(split: Any, extractor: Any, reporter: Reporter) -> None:
        """Write random numbers as activations."""
        values = torch.randn(4096, *extractor.columns[0].shape)
        sizes = [min(len(values), len(split) - start) for start in range(0, len(split), len(values))]
        rows = ([memoryview(values[:n].numpy()).cast("B")] for n in sizes)  # type: ignore[arg-type]
        split.found = split.store.write(split.key, len(split), extractor.columns, split.metadata, rows)

    SplitActivations._extract = extract  # type: ignore[method-assign]
    words = ["dataset=imagefolder", f"dataset.root='{root}'", "backbone=resnet18", "backbone.weights=none"]
    words += [f"image.size={SIZE}", "image.fit=squash", "freeze=head", "epochs=1", "cache.mode=require"]
    spec = compose_spec([*words, "cache.ram_gb=0", "device.precision=fp32", "batch_size=256"])
    check_spec(spec)  # as the command does, before it makes a directory
    directory, watch = RunDir(run), Watch(only_plan=only_plan)
    directory.start(command="tlcli train", overrides=words, config=yaml.safe_dump(to_plain(spec)))
    with suppress(PlannedError):
        train(spec, directory, watch, session_for(spec.cache))
        directory.end("done")
    return watch.found


def measured(command: Sequence[str], cache: Path) -> dict[str, Any]:
    """Run a command. Return the JSON in its output, the seconds up to the plan or the end, and the peak of memory."""
    start, peak = time.time(), 0.0
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "TLCLI_CACHE": str(cache)}
    ) as process:
        while process.poll() is None:
            with suppress(OSError):  # it has just ended
                peak = max(peak, anonymous(process.pid))
            time.sleep(0.01)
        assert process.stdout is not None
        output = process.stdout.read()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    found = json.loads(output or "{}")
    return {**found, "seconds": found.get("planned", time.time()) - start, "peak_gb": peak}


def queue_hours(
    images: int, rate: float, workers: int, shards: int, *, slow: float = 0.1, slowdown: float = 4.0, seed: int = 0
) -> float:
    """Simulate workers that take shards from a queue; return the hours until the last one is done.

    Each worker is a straggler with probability `slow`, and `slowdown` times slower; times of shards vary by 10 %.
    """
    rng = np.random.default_rng(seed)
    speed = rate / np.where(rng.random(workers) < slow, slowdown, 1.0)
    free, last = [(0.0, worker) for worker in range(workers)], 0.0
    for work in images / shards * rng.normal(1, 0.1, shards).clip(0.5):
        now, worker = heapq.heappop(free)
        end = now + work / float(speed[worker])
        heapq.heappush(free, (end, worker))
        last = max(last, end)
    return last / 3600


def estimate(out: Path) -> None:
    """Print hours for the features of ImageNet-21k by the number of workers and of shards per worker."""
    rows = []
    for workers in (1, 8, 64, 256):
        ideal = IMAGENET_IMAGES / RATE / workers / 3600
        hours = [
            np.mean([queue_hours(IMAGENET_IMAGES, RATE, workers, workers * n, seed=seed) for seed in range(20)])
            for n in (1, 8, 64)
        ]
        row = [workers, f"{workers * RATE:,.0f}", f"{ideal:.2g}", *(f"{h:.2g}" for h in hours)]
        rows.append([*map(str, row), f"{IMAGENET_BYTES / ideal / 3.6e9:,.0f} MB/s"])
    header = ["workers", "images per second", "hours, no stragglers", "1 shard per worker", "8", "64", "bytes read"]
    sizes = {"images": IMAGENET_BYTES, "features": IMAGENET_IMAGES * ROW_BYTES}
    parts = [f"{n / 1e9:,.0f} GB of {what}" for what, n in sizes.items()]
    parts.append(
        f"{IMAGENET_IMAGES / DECODED / 3600:.1f} hours of one core for the first part, which decodes each image"
    )
    print(f"ImageNet-21k, an estimate: {', '.join(parts)}\n")
    publish("imagenet21k", header, rows, out, sizes)


def main(out: Path, *, small: bool = False, files: int | None = None) -> list[Measure]:
    """Make the files, measure all parts, print the tables, and return the bars."""
    n, root, cache = files or (SMALL_FILES if small else FILES), out / "images", out / "cache"
    if not root.exists():
        make_files(root, n)
    part = [sys.executable, "-m", "benchmarks.million", "--out", str(out), "--part"]
    seen = {name: measured([*part, name], cache) for name in ("first plan", "second plan", "epoch")}
    for count in PREDICTED:
        folders = [str(root / f"class{label:03}") for label in range(count)]
        command = [sys.executable, "-m", "tlcli", "predict", str(out / "epoch"), *folders, "--format", "csv"]
        name = f"predict {count * n // CLASSES:,}"
        seen[name] = measured([*command, "--device", "cpu", "--output", str(out / f"{name}.csv")], cache)
    epoch, growth = seen["epoch"]["epoch 1"], np.diff([seen[name]["peak_gb"] for name in seen if "predict" in name])
    rows = [[name, f"{p['seconds']:.1f}", f"{p['peak_gb']:.2f} GB"] for name, p in seen.items()]
    rows[2:3] = [[f"epoch of {epoch['images']:,}", f"{epoch['seconds']:.1f}", rows[2][2]]]
    publish("million", [f"{n:,} files", "seconds", "peak of anonymous memory"], rows, out, seen)
    measures = [
        at_most("plan, second call", 60, [seen["second plan"]["seconds"]], " s"),
        at_most("plan, second call, anonymous memory", 1.5, [seen["second plan"]["peak_gb"]], " GB"),
        at_most("growth of memory in an epoch", 50, [epoch["growth_mb"]], " MB"),
        at_most("growth of memory from four classes predicted to eight", 50, [1e3 * float(growth[0])], " MB"),
    ]
    publish_measures("million_measures", measures, out)
    estimate(out)
    return measures


if __name__ == "__main__":
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("--small", action="store_true", help="tiny settings, to test that it runs")
    command.add_argument("--files", type=int, metavar="N", help="instead of a million")
    command.add_argument("--out", type=Path, help="folder for files, runs and JSON (default: a new temporary folder)")
    command.add_argument("--part", help=argparse.SUPPRESS)
    given = command.parse_args()
    if given.part:
        images = str(given.out / "images")
        print(json.dumps(run_part(images, given.out / given.part, only_plan="plan" in given.part)))
    else:
        main(out_folder(given.out, "million"), small=given.small, files=given.files)
