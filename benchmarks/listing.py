"""Seconds and memory of listing and fingerprinting many small files, in the first run and in the second.

    python -m benchmarks.listing [--files N]

Each run is a process of its own. Its memory is the peak resident size beyond that after torch is imported.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CLASSES = 10


def make_files(root: Path, n: int) -> None:
    """Write small files that all differ; 10 s in the past, so that their digests are remembered."""
    past = time.time() - 10
    for label in range(CLASSES):
        (root / f"class{label}").mkdir(parents=True)
    for i in range(n):
        path = root / f"class{i % CLASSES}" / f"{i:07}.jpg"
        path.write_bytes(b"%d " % i * 100)
        os.utime(path, (past, past))


def measure(root: Path, cache: Path) -> dict[str, float]:
    """List the files of a folder and compute their fingerprint, as each run does."""
    import torch  # noqa: F401

    from tlcli.data.images import DigestRecord, ImageFiles, source_of_files
    from tlcli.data.listing import list_folder
    from tlcli.store import Store

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    split = source_of_files(list_folder(str(root), None)).splits["all"]
    assert isinstance(split.images, ImageFiles)
    split.images.record = DigestRecord(Store(cache), root, verify_all=False)
    split.fingerprint()
    seconds = time.perf_counter() - start
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": round(seconds, 2), "megabytes": round((peak - before) * unit / 1e6, 1)}


def main() -> None:
    """Make the files, measure twice, and print a line per run."""
    parser = argparse.ArgumentParser(prog="benchmarks.listing", description="Time the listing of many small files.")
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--measure", nargs=2, type=Path, metavar=("ROOT", "CACHE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(*arguments.measure)))
        return
    with tempfile.TemporaryDirectory() as folder:
        root, cache = Path(folder) / "photos", Path(folder) / "cache"
        make_files(root, arguments.files)
        command = [sys.executable, "-m", "benchmarks.listing", "--measure", str(root), str(cache)]
        for name in ("first", "second"):
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            result = json.loads(done.stdout)
            print(f"{name} run, {arguments.files:,} files: {result['seconds']} s, {result['megabytes']} MB")


if __name__ == "__main__":
    main()
