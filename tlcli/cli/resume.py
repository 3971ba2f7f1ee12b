"""`tlcli train --resume RUN`: finish an interrupted run, or the jobs of an interrupted sweep."""

import shlex
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, chdir, suppress
from pathlib import Path
from typing import Any

from msgspec import structs
from omegaconf import OmegaConf

from tlcli.cli import fast_imports
from tlcli.cli.compose import compose_config, composing, load_spec, parse_flags, resolve_paths
from tlcli.cli.job import Command, check_spec, discard_state, finish_sweep, first_line, record_status
from tlcli.cli.launch import launch, rank_and_size
from tlcli.cli.launchers import living_jobs, running_jobs
from tlcli.cli.trust import check_words, return_to
from tlcli.cli.view import TerminalReporter, log
from tlcli.engine.schedule import lr_factor
from tlcli.errors import UsageError
from tlcli.files import check_links, expand_user
from tlcli.locks import runs_on_this_machine
from tlcli.runs import leaderboard
from tlcli.runs.loggers import logged_run
from tlcli.runs.run_dir import (
    REFIT,
    STATE_FILE,
    RunDir,
    check_version,
    has_folds,
    integer,
    is_sweep,
    open_run,
    rerun_command,
)
from tlcli.specs import TrainSpec
from tlcli.text import flat_keys, shown_path, to_plain

# keys, and groups of keys, that may be given new values, as the error message lists them
CHANGEABLE = (
    "epochs (upward), device.workers, log_every, device.processes, checkpoint, logger, dataset.root (if the images "
    "have moved), dataset.file, dataset.ram_gb, cache.max_gb, cache.ram_gb"
)


def resume_argument(argv: Sequence[str]) -> tuple[Path | None, list[str]]:
    """Return the directory of `--resume DIR`, `--resume=DIR` or `resume=DIR`, if any, and the other words."""
    words, folder = list(argv), None
    for i, word in enumerate(argv):
        if word == "--resume":
            folder, words = "".join(argv[i + 1 : i + 2]), [*argv[:i], *argv[i + 2 :]]
        elif word.startswith(("--resume=", "resume=")):
            folder, words = word.partition("=")[2], [*argv[:i], *argv[i + 1 :]]
    if folder == "":
        raise UsageError("--resume needs the directory of a run or a sweep: --resume outputs/DATE/TIME")
    return (expand_user(folder) if folder is not None else None), words


def resume_hint(path: Path) -> str:
    """Return what to type to resume a run or a sweep."""
    return f"resume with: {shlex.join(['tlcli', 'train', '--resume', shown_path(path)])}"


def resume(path: Path, overrides: Sequence[str]) -> int:
    """Resume a run or a sweep; return the exit code."""
    absolute = Path.cwd() / path
    if (path / STATE_FILE).is_file():
        raise UsageError(f"{path}: a search is resumed with: {shlex.join(['tlcli', 'tune', '--resume', str(path)])}")
    check_links(path)  # what it has is written to
    try:
        with chdir(Path.cwd()):  # a sweep or its jobs may change it
            if not is_sweep(path):
                return _resume_run(path, overrides)
            return _resume_sweep(absolute, overrides)
    except KeyboardInterrupt as exc:
        exc.args = (resume_hint(absolute),)
        raise


def _resume_sweep(path: Path, overrides: Sequence[str]) -> int:
    """Run what is not done of a sweep or of a run with folds, as some job recorded its command line and folder.

    The overrides repeat words of the command line that only the user may give.
    """
    runs = [RunDir(file.parent) for file in sorted(path.rglob("run.json"))]
    for run in runs:
        with suppress(UsageError, ValueError):  # damaged: this job starts again
            info = run.info
            if shlex.split(str(info.get("command")))[:2] == ["tlcli", "train"]:
                break
    else:
        raise UsageError(f"{path}: no job has a run.json that says how the sweep was started; start it again")
    command, is_one_run = info["command"], has_folds(path)
    living = _living_jobs(path)
    if is_one_run:
        for part in living:
            raise still_running(part.path, part.info)
        if run.path.name == REFIT and info.get("status") == "done":
            return _nothing_to_resume(run)
        fold = run.path.name.replace("-", "=")  # fold=0, which is not the whole run's
        command = shlex.join(word for word in shlex.split(rerun_command(info)) if word != fold)
    return_to(str(info.get("cwd")), path)
    flags, typed = parse_flags(shlex.split(command)[2:]), parse_flags(overrides)
    for word in [*typed.flags, *typed.overrides]:
        if word not in flags.overrides:
            what, advice = ("sweep", "to change jobs, resume each one")
            if is_one_run:
                what, advice = "run with folds", "leave it out"
            raise UsageError(f"{word}: a {what} is resumed as it was started; {advice}")
    own = (word for word in flags.overrides if word not in typed.overrides)
    check_words(own, run.info_file, flags.files.folders, of_command=True)
    for other in runs:
        with suppress(UsageError, ValueError):
            check_version(path, other.info)
    try:
        with composing(flags.files):
            config, loader = compose_config(flags)
        with composing(flags.files, runs=is_one_run):
            Command(command, flags.files, None if is_one_run else path, resume=True).launch(config, loader, path)
    finally:
        leaderboard.update(run)
        code = 0 if is_one_run else finish_sweep(path)
    return code


def still_running(path: Path, info: Mapping[str, Any]) -> UsageError:
    """Return the error for a run that is still running."""
    where = "" if runs_on_this_machine(info) else " of another machine"
    return UsageError(f"{path}: process {info.get('pid')}{where} is still running it; stop it first, or wait")


def _living_jobs(path: Path) -> list[RunDir]:
    """Return the jobs at or under a folder that are running. Say so if it takes long to know."""
    if elsewhere := [run for run in running_jobs(path) if runs_on_this_machine(run.info) is None]:
        names = ", ".join(run.path.name for run in elsewhere)
        print(f"{names}: not of this machine; within 60 s it will be known if it still runs", flush=True)
    return living_jobs(path)


def _resume_run(path: Path, overrides: Sequence[str]) -> int:
    run = open_run(path)
    info, before = run.info, load_spec(run)
    spec = load_spec(run, overrides) if overrides else before
    if spec.own_folds:
        raise UsageError(f"{path}: is the refit of a run with folds; resume the whole run: --resume {path.parent}")
    is_done, epochs = info.get("status") == "done", integer(info.get("epochs"))
    fits = integer(info.get("fits")) or 1
    if epochs is not None and (is_done or run.state_file.is_file()):  # that followed from the number of images
        own = fits if fits > 1 else None
        before, spec = (
            structs.replace(s, epochs=s.epochs or epochs // fits, fits=s.fits or own) for s in (before, spec)
        )
        if fits > 1 and spec.epochs != before.epochs:
            raise UsageError(f"{path}: averages {fits} fits, whose number of epochs cannot change; start a new run")
    _check_changes(before, spec)
    if is_done and spec.epochs == before.epochs:
        return _nothing_to_resume(run)
    if is_done and not run.state_file.is_file():
        reason = "has no checkpoints/state.safetensors to resume from (checkpoint.keep_state=true keeps it)"
        raise UsageError(f"{run.path}: {reason}; to train its weights further, start with backbone.weights={path}")
    for part in _living_jobs(run.path):
        raise still_running(part.path, part.info)
    check_spec(spec)
    if spec.device.processes > 1 and rank_and_size()[1] == 1:
        return launch(spec.device.processes, ["--resume", str(path), *overrides])
    print(first_line(spec), flush=True)
    with fast_imports():
        from tlcli.engine.session import session_for
        from tlcli.ranks import led_ranks
        from tlcli.runs.resume_state import prepare_resume, read_state
        from tlcli.train import train

    state = read_state(run)
    starting = ExitStack()
    try:
        starting.enter_context(run.starting())
        for part in _living_jobs(run.path):  # again, just before this process says that it runs it
            raise still_running(part.path, part.info)
        if not is_done and RunDir(run.path).info.get("status") == "done":  # meanwhile: its state has been removed
            return _nothing_to_resume(run)
        with record_status(run):
            run.mark_resumed(shlex.join(["tlcli", "train", "--resume", str(path), *overrides]))
            starting.close()
            prepare_resume(run, state)
            if spec != before:
                values = to_plain(spec)
                resolve_paths(values, Path.cwd())  # of words of this command; the run may have begun elsewhere
                run.write_config(OmegaConf.to_yaml(values))
            reporter = TerminalReporter()
            ends = [10 * (s.epochs or 0) for s in (before, spec)]  # as if an epoch had ten steps
            factors = [[lr_factor(spec.scheduler, i, end, 10) for i in range(ends[0])] for end in ends]
            if factors[0] != factors[1]:
                schedule = f"the {spec.scheduler.kind} schedule of {spec.epochs} epochs"
                change = f"from here on the learning rate follows {schedule}, unlike in a run started with it"
                reporter.note(f"epochs={spec.epochs}, was {before.epochs}: {change}")
            log.info(first_line(spec))
            with led_ranks(*rank_and_size()) as ranks, logged_run(spec, run.path, reporter) as logged:
                train(spec, run, logged, session_for(spec.cache), state, ranks=ranks)
        discard_state(run, spec)
    finally:
        starting.close()
        leaderboard.update(run)
    return 0


def _nothing_to_resume(run: RunDir) -> int:
    rank, size = rank_and_size()
    if size > 1:
        from tlcli.ranks import led_ranks

        with led_ranks(rank, size) as ranks:  # those that torchrun has started wait
            ranks.broadcast(None)
    accuracy = run.test().get("accuracy")
    reached = f", test accuracy {accuracy:.4f}" if isinstance(accuracy, float) else ""
    print(f"{run.path} is done{reached}: nothing to resume")
    return 0


def _check_changes(before: TrainSpec, now: TrainSpec) -> None:
    old, new = flat_keys(to_plain(before)), flat_keys(to_plain(now))
    allowed = tuple(f"{words.split()[0]}." for words in CHANGEABLE.split(", "))
    changes = (key for key in {**old, **new} if old.get(key, ...) != new.get(key, ...))
    wrong = [key for key in changes if not f"{key}.".startswith(allowed)]
    if now.epochs is not None and before.epochs is not None and now.epochs < before.epochs:
        wrong.append(f"epochs={now.epochs}, less than {before.epochs}")
    if wrong:
        raise UsageError(f"a resumed run cannot change {', '.join(wrong)}; it may change {CHANGEABLE}")
