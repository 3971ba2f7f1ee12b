"""`tlcli train --resume RUN`: going on with a run, or with the jobs of a sweep, where it ended before its time."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msgspec import to_builtins
from omegaconf import OmegaConf

from tlcli.cli.checks import check, first_line
from tlcli.cli.job import go_on, recorded_job, train_job
from tlcli.cli.saved import saved_spec
from tlcli.cli.view import TerminalReporter
from tlcli.errors import UsageError
from tlcli.runs import leaderboard
from tlcli.runs.run_dir import RunDir, host_digest, open_run, process_has_exited, read_json
from tlcli.specs import TrainSpec
from tlcli.text import flat_keys

FLAG, WORD = "--resume", "resume="

MAY_CHANGE = {
    "epochs": "upward",
    "device.workers": "",
    "log_every": "",
    "checkpoint": "",
    "logger": "",
    "dataset.root": "or .file, where the images have moved",
    "dataset.file": "",
    "dataset.ram_gb": "",
    "cache.max_gb": "",
    "cache.ram_gb": "",
}
"""Keys, or groups of them, that a run that goes on may have otherwise, with what is to be said about that."""


@dataclass(frozen=True)
class Begun:
    """A sweep: the words behind `tlcli train` that began it, and the directory in which they were typed."""

    path: Path
    argv: tuple[str, ...]
    cwd: Path


def named_run(argv: Sequence[str]) -> tuple[Path | None, list[str]]:
    """The directory that `--resume DIR`, `--resume=DIR` or `resume=DIR` names, if any, and the other words."""
    words, found = list(argv), None
    for i, word in enumerate(argv):
        if word == FLAG:
            if i + 1 == len(argv):
                raise UsageError("--resume needs the directory of a run or a sweep: --resume outputs/DATE/TIME")
            found, words = argv[i + 1], [*argv[:i], *argv[i + 2 :]]
        elif word.startswith((f"{FLAG}=", WORD)):
            found, words = word.partition("=")[2], [*argv[:i], *argv[i + 1 :]]
    if found == "":
        raise UsageError("resume= needs the directory of a run or a sweep: resume=outputs/DATE/TIME")
    return (Path(found).expanduser() if found is not None else None), words


def sweep_begun(path: Path) -> Begun:
    """How a sweep was begun, by the run.json of one of its jobs. Raises UsageError where none has one."""
    for file in sorted(path.rglob("run.json")):
        try:
            record = read_json(file)
            words = shlex.split(record["command"])
            if words[:2] == ["tlcli", "train"] and Path(record["cwd"]).is_dir():
                return Begun(path.absolute(), tuple(words[2:]), Path(record["cwd"]))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    raise UsageError(f"{path}: no job has a run.json that says how the sweep was begun; start it again")


def resume_run(path: Path, overrides: Sequence[str]) -> int:
    """Go on with one run; the exit code. Says so, and does nothing, where the run is done."""
    run = open_run(path)
    info = run.info
    began = saved_spec(run)
    spec = saved_spec(run, overrides) if overrides else began
    changes = list(_changes(began, spec))
    _require_allowed(changes, began, spec)
    if info.get("status") == "done" and spec.epochs == began.epochs:
        print(f"{run.path} is done{_accuracy(run)}: nothing to resume; epochs={2 * began.epochs} would train on")
        return 0
    _require_ended(run, info)
    _require_state(run, info)
    check(spec)
    print(first_line(spec), flush=True)
    with ranked(run), recorded_job(run):
        restart = go_on(run, shlex.join(["tlcli", "train", FLAG, str(path), *overrides]))
        if changes:
            run.write_config(OmegaConf.to_yaml(OmegaConf.structured(spec)))
        reporter = TerminalReporter(f"backbone={spec.backbone.name}")
        if foreign := _elsewhere(info):
            reporter.note(foreign)
        train_job(spec, run, reporter, restart)
    return 0


@contextmanager
def ranked(run: RunDir) -> Iterator[None]:
    """However a job of a sweep ends within, its leaderboard knows of that afterwards."""
    try:
        yield
    finally:
        sweep = leaderboard.sweep_of(run)
        if sweep is not None:
            with suppress(OSError, ValueError, TypeError):  # of other jobs' records, which are no concern of this one
                leaderboard.write(sweep)


def _accuracy(run: RunDir) -> str:
    try:
        return f", test accuracy {read_json(run.test_file)['accuracy']:.4f}"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _require_ended(run: RunDir, info: Mapping[str, Any]) -> None:
    """Raise UsageError where the run's process is still there."""
    if info.get("status") == "running" and info.get("host") == host_digest() and not process_has_exited(info):
        raise UsageError(f"{run.path}: process {info.get('pid')} is still running it; stop it first, or wait")


def _require_state(run: RunDir, info: Mapping[str, Any]) -> None:
    """Raise UsageError where beginning again would lose what a run has: it is done, or of tlcli 0.3 or earlier."""
    if run.state_file.is_file() or not (
        info.get("status") == "done" or run.state_file.with_name("last.state").exists()
    ):
        return
    raise UsageError(
        f"{run.path}: has no {run.state_file.relative_to(run.path).as_posix()} to go on from; start a new run"
    )


def _elsewhere(info: Mapping[str, Any]) -> str | None:
    """A warning where nobody can tell whether the run still goes on."""
    if info.get("status") == "running" and info.get("host") != host_digest():
        return "run.json says that this run goes on, on another machine: if it does, stop it there"
    return None


# -- what may change


def _changes(began: TrainSpec, now: TrainSpec) -> Iterator[str]:
    """The keys whose values differ."""
    before, after = flat_keys(to_builtins(began)), flat_keys(to_builtins(now))
    yield from (key for key in {**before, **after} if before.get(key, ...) != after.get(key, ...))


def _require_allowed(changes: Sequence[str], began: TrainSpec, now: TrainSpec) -> None:
    """Raise UsageError for changes after which the run would be another one."""
    wrong = [key for key in changes if not any(key == own or key.startswith(f"{own}.") for own in MAY_CHANGE)]
    if now.epochs < began.epochs:
        wrong.append(f"epochs={now.epochs}, less than {began.epochs}")
    if wrong:
        allowed = ", ".join(f"{key} ({why})" if why else key for key, why in MAY_CHANGE.items())
        raise UsageError(f"a run that goes on cannot change {', '.join(wrong)}; it may change {allowed}")
