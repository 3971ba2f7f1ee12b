"""Runs on a disk that is full: unshare -rm python -m tests.faults.full 20

Mounts a small file system of its own, fills it to a level, trains there, and then goes on with what it left, once there
is room. Prints one JSON object a level.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.conftest import make_folder
from tests.faults.ended import COMMON, JOBS, Forked, apart
from tests.faults.runs_alike import differences, unreadable
from tlcli.cli.process import quiet_libraries
from tlcli.models.tensorfile import read_tensors
from tlcli.runs.run_dir import RunDir

SIZE_MB = 64
"""Of the file system: a run of Lite0 leaves 28 MB of weights."""


def main(levels: int) -> list[dict[str, Any]]:
    """Leave so many different amounts of room, from none to almost what a run takes."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images, disk = folder / "images", folder / "disk"
        disk.mkdir()
        for split, n in (("train", 20), ("test", 8)):
            make_folder(images / split, {"across": n, "checks": n, "down": n}, seed=n)
        words = [*COMMON, *JOBS["live"], f"dataset.root='{images}'"]
        whole = folder / "whole"
        assert Forked(["train", f"hydra.run.dir='{whole}'", *words], folder / "cache").wait(None) == 0
        needed = sum(path.stat().st_size for path in whole.rglob("*") if path.is_file())
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE_MB}m", "tmpfs", disk], check=True)
        try:
            rooms = [int(needed * 1.6 * level / levels) for level in range(levels)]
            return [tried(whole, disk, words, room, folder / "cache") for room in rooms]
        finally:
            subprocess.run(["umount", disk], check=True)


def tried(whole: Path, disk: Path, words: list[str], room: int, cache: Path) -> dict[str, Any]:
    """A run with so many bytes of room, and then with enough."""
    filler, out = disk / "filler", disk / "run"
    filler.write_bytes(bytes(SIZE_MB * 2**20 - room - 2**16))
    first = Forked(["train", f"hydra.run.dir='{out}'", *words], cache)
    code = first.wait(None)
    said = [line for line in first.log.read_text().splitlines() if line.startswith("tlcli train: ")]
    found = {
        "room": room,
        "code": code,
        "said": said,
        "unreadable": apart(unreadable, out),
        "best": bool(apart(lambda path: read_tensors(path)[0], RunDir(out).best_checkpoint))
        if RunDir(out).best_checkpoint.exists()
        else None,
        "drafts": [path.name for path in disk.rglob(".*") if path.name != ".hydra"],
        "traceback": "Traceback" in first.log.read_text(),
    }
    filler.unlink()
    begun = RunDir(out).info_file.exists()
    if code != 0:
        again = ["--resume", str(out)] if begun else [f"hydra.run.dir='{disk / 'anew'}'", *words]
        found["then"] = Forked(["train", *again], cache).wait(None)
    run = out if begun else disk / "anew"
    found["differences"] = apart(differences, whole, run)
    for path in (out, disk / "anew"):
        subprocess.run(["rm", "-rf", path], check=True)
    return found


if __name__ == "__main__":
    quiet_libraries()
    import tlcli.engine.session
    import tlcli.runs.resume_state
    import tlcli.train  # noqa: F401 - what a forked process then has

    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for one in main(int(sys.argv[1])):
        sys.stdout.write(json.dumps(one) + "\n")
