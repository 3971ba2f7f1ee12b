"""A sweep's leaderboard: its jobs ranked by validation, with test metrics, read from their run directories alone."""

from contextlib import suppress
from pathlib import Path
from typing import Any

from tlcli.files import write_csv
from tlcli.locks import Lock
from tlcli.runs.index import rank, read_entry
from tlcli.runs.run_dir import LEADERBOARD_FILE, SWEEP_FILE, RunDir, read_json, result_of_search, text, write_json
from tlcli.text import natural_order

SCHEMA_VERSION = 1


def read(folder: Path) -> dict[str, Any]:
    """Return the contents of sweep.json for the runs under a folder.

    `figure` is the validation metric that ranks; `keys` are those that vary, and `values` those of a job. The best job
    is the first; without a rank are jobs that did not finish, and folds, of which those of a sweep's job are left out.
    """
    found = {file.parent for file in folder.rglob("run.json")} - {result_of_search(folder)}
    names = sorted((path.relative_to(folder).as_posix() for path in found), key=natural_order)
    entries = {name: read_entry(folder / name) for name in names}
    names = [name for name, entry in entries.items() if not entry["is_fold"] or "/" not in name]
    runs = [entries[name] for name in names]
    values = [dict(word.lstrip("+").partition("=")[::2] for word in run["overrides"]) for run in runs]
    keys = [key for key in dict.fromkeys(key for own in values for key in own) if len({v.get(key) for v in values}) > 1]
    metric, ranked = rank(runs)
    ranks = {run["path"]: place for place, run in enumerate(ranked, start=1)}
    jobs: list[dict[str, Any]] = []
    for name, run, own in zip(names, runs, values, strict=True):
        best = run["best"] or {}
        jobs.append(
            {
                "rank": ranks.get(run["path"]),
                "name": name,
                "status": run["status"],
                "values": {key: own[key] for key in keys if key in own},
                "validation": best.get(metric),
                "epoch": int(best["epoch"]) if "epoch" in best else None,
                "test_accuracy": run["test"],
                "test_ci95": run["test_ci95"],
                "seconds": None if run["minutes"] is None else round(60 * run["minutes"], 3),
                "error": run["error"],
            }
        )
    jobs.sort(key=lambda job: job["rank"] or len(runs) + 1)
    command = next((text(RunDir(run["path"]).info.get("command")) for run in runs if run["status"] != "damaged"), None)
    return {"schema_version": SCHEMA_VERSION, "command": command or "", "figure": metric, "keys": keys, "jobs": jobs}


def write(folder: Path) -> dict[str, Any]:
    """Write leaderboard.csv and sweep.json into a sweep's folder, each in one atomic step; return the leaderboard."""
    with Lock(folder / ".leaderboard.lock").held():
        board = read(folder)
        write_json(folder / SWEEP_FILE, board)
        head = ["rank", "job", "status", *board["keys"], f"val_{board['figure']}", "epoch"]
        rows: list[list[object]] = [[*head, "test_accuracy", "test_low", "test_high", "seconds", "error"]]
        for job in board["jobs"]:
            cells = [job["rank"], job["name"], job["status"], *(job["values"].get(key, "") for key in board["keys"])]
            cells += [job["validation"], job["epoch"], job["test_accuracy"], *(job["test_ci95"] or (None, None))]
            rows.append([*cells, job["seconds"], job["error"]])
        write_csv(folder / LEADERBOARD_FILE, rows)
    return board


def update(run: RunDir) -> None:
    """Write the leaderboards of the folders whose sweep.json names this run: that of its folds and that of a sweep."""
    path = run.path.absolute()
    for folder in path.parents[:3]:  # names of jobs may have slashes
        with suppress(OSError, ValueError, KeyError, TypeError):  # from files of other jobs, which do not matter here
            jobs = read_json(folder / SWEEP_FILE)["jobs"]
            if path.relative_to(folder).as_posix() in [job["name"] for job in jobs]:
                write(folder)
