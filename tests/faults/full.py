"""Runs on a disk that is full: unshare -rm python -m tests.faults.full 20

Mounts a small file system of its own, fills it to a level, trains there, and then resumes what that left, once there is
room. Prints one JSON object per level.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.faults.ended import COMMON, JOBS, Forked, apart, import_torch, make_images
from tests.faults.runs_alike import differences, unreadable
from tlcli.models.tensorfile import read_tensors
from tlcli.runs.run_dir import RunDir

SIZE_MB = 128  # of the file system: a run of Lite0 leaves 31 MB, and has two states while one replaces the other


def main(levels: int) -> None:
    """Leave so many different amounts of room, from none to almost what a run takes."""
    with tempfile.TemporaryDirectory() as name:
        folder, disk, whole = Path(name), Path(name, "disk"), Path(name, "whole")
        disk.mkdir()
        words = [*COMMON, *JOBS["live"], make_images(folder)]
        assert Forked(["train", f"hydra.run.dir='{whole}'", *words], folder / "cache").wait() == 0
        needed = sum(path.stat().st_size for path in whole.rglob("*") if path.is_file())
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE_MB}m", "tmpfs", disk], check=True)
        try:
            for level in range(levels):
                found = tried(whole, disk, words, int(needed * 1.6 * level / levels), folder / "cache")
                sys.stdout.write(json.dumps(found) + "\n")
        finally:
            subprocess.run(["umount", disk], check=True)


def tried(whole: Path, disk: Path, words: list[str], room: int, cache: Path) -> dict[str, Any]:
    """Run with `room` bytes of free space, and then with enough."""
    filler, out, best = disk / "filler", disk / "run", RunDir(disk / "run").best_checkpoint
    filler.write_bytes(bytes(SIZE_MB * 2**20 - room - 2**16))
    first = Forked(["train", f"hydra.run.dir='{out}'", *words], cache)
    found: dict[str, Any] = {"room": room, "code": first.wait(), "unreadable": apart(unreadable, out)}
    log = first.log.read_text()
    found["said"] = [line for line in log.splitlines() if line.startswith("tlcli train: ")]
    found["traceback"] = "Traceback" in log
    found["best"] = bool(apart(lambda path: read_tensors(path)[0], best)) if best.exists() else None
    found["drafts"] = [path.name for path in disk.rglob(".*") if path.name != ".hydra"]
    filler.unlink()
    run = out if RunDir(out).info_file.exists() else disk / "anew"
    if found["code"] != 0:
        again = ["--resume", str(out)] if run == out else [f"hydra.run.dir='{run}'", *words]
        found["then"] = Forked(["train", *again], cache).wait()
    found["differences"] = apart(differences, whole, run)
    subprocess.run(["rm", "-rf", out, disk / "anew"], check=True)
    return found


if __name__ == "__main__":
    import_torch()
    main(int(sys.argv[1]))
