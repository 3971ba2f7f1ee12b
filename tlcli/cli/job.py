"""One run, from its composed config to its final status."""

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tlcli.cli.checks import check_weights, first_line
from tlcli.cli.compose import build, refuse_environment
from tlcli.cli.conf_files import ConfFiles
from tlcli.cli.endings import Abort, ending
from tlcli.cli.libraries import importing
from tlcli.cli.logs import log, logging_to
from tlcli.cli.view import TerminalReporter
from tlcli.data.listing import check_dataset
from tlcli.errors import BadImagesError, TlcliError, UsageError
from tlcli.runs import leaderboard
from tlcli.runs.loggers import logged_run
from tlcli.runs.run_dir import RunDir, read_json
from tlcli.specs import DatasetSpec, TrainSpec


class Command:
    """What the jobs of one command share: the line that was typed, the data set last looked at, and the session.

    `goes_on`: the sweep was begun before; jobs that are done stay as they are, the others go on.
    """

    def __init__(self, line: str, *, goes_on: bool = False) -> None:
        self.line = line
        self.goes_on = goes_on
        self.session: Any = None  # of tlcli.engine.session, which imports torch
        self._sound: DatasetSpec | None = None

    def check(self, spec: TrainSpec) -> None:
        """Raise UsageError where what a spec names is not there; a data set is looked at once."""
        check_weights(spec.backbone.weights)
        if spec.dataset != self._sound:
            check_dataset(spec.dataset)
            self._sound = spec.dataset


def run_job(config: DictConfig, files: ConfFiles, command: Command) -> float | None:
    """Hydra's task: train, and record the ending in run.json, whichever it is.

    In a sweep a failure is recorded and None returned, so that the other jobs go on; else it is raised as an Abort,
    which Hydra does not catch.
    """
    job = HydraConfig.get()
    run = RunDir(Path(job.runtime.output_dir))
    sweep = Path(job.sweep.dir) if job.mode == RunMode.MULTIRUN else None
    words = OmegaConf.to_container(job.overrides.task, resolve=False)  # as they were typed
    overrides = [str(word) for word in words] if isinstance(words, list) else []
    heading = f"[{job.job.num}] {' '.join(overrides)}" if sweep else ""
    try:
        if command.goes_on and (found := done_before(run, overrides)) is not None:
            print(f"{heading}: done before, validation {found:.4f}", flush=True)
            return found
        begun = command.goes_on and run.info_file.exists()
        with recorded_job(run):
            if not begun:
                text, refused = _saved_text(config, overrides)
                run.start(command=command.line, overrides=overrides, config=text)
                if refused:
                    raise refused
            reporter = TerminalReporter(_backbone_words(job.runtime.choices, overrides))
            if sweep:
                reporter.heading(heading)
            spec = build(config, files)
            if sweep:  # of a single run this was looked at before its directory was made
                command.check(spec)
            restart = go_on(run, command.line) if begun else None
            return train_job(spec, run, reporter, restart, command)
    except Exception as exc:
        if sweep is None:
            raise Abort(exc) from exc
        print(f"[{job.job.num}] failed: {ending(exc)[1]}", file=sys.stderr, flush=True)
        return None
    finally:
        if sweep:
            with contextlib.suppress(OSError):
                leaderboard.write(sweep)


def done_before(run: RunDir, overrides: Sequence[str]) -> float | None:
    """The validation figure of a job that is done; None where it is not. Raises TlcliError where the directory is that
    of a job with other overrides."""
    try:
        record = read_json(run.info_file)
        if record["overrides"] != list(overrides):
            raise TlcliError(f"{run.path}: is of the job {' '.join(record['overrides'])}: it stays as it is")
        return float(record["best"][record["keep_best"]]) if record["status"] == "done" else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def go_on(run: RunDir, line: str) -> Any:
    """Make a run's directory ready to go on, and say so in run.json; its Restart (of tlcli.runs.restart), or None where
    it ended before its first checkpoint and begins again."""
    with importing():  # torch, and not before
        from tlcli.runs.restart import read_restart, start_over

    restart = read_restart(run)
    run.mark_resumed(line)
    if restart is None:
        start_over(run)
    else:
        restart.rewind()
    return restart


def train_job(
    spec: TrainSpec, run: RunDir, reporter: TerminalReporter, restart: Any = None, command: Command | None = None
) -> float | None:
    """Train what a spec says in a run's directory, from where `restart` says."""
    log.info(first_line(spec))
    with importing():  # torch, and not before
        from tlcli.engine.session import session_for
        from tlcli.train import train

    session = session_for(spec.cache, command.session if command else None)
    if command:
        command.session = session
    with logged_run(spec, run.path, reporter) as told:
        return train(spec, run, told, session, restart)


@contextlib.contextmanager
def recorded_job(run: RunDir) -> Iterator[None]:
    """What happens within goes to run.log, and the ending to run.json."""
    with recorded(run), logging_to(run.log_file), logged():
        yield


@contextlib.contextmanager
def recorded(run: RunDir) -> Iterator[None]:
    """Write run.json's final status when the block ends, in whichever way that is."""
    try:
        yield
    except KeyboardInterrupt as exc:
        _end(run, "interrupted", ending(exc)[1])
        raise
    except BaseException as exc:
        if isinstance(exc, BadImagesError):
            run.write_bad_files(exc.files)
        _end(run, "failed", ending(exc)[1])
        raise
    run.end("done")


@contextlib.contextmanager
def logged() -> Iterator[None]:
    """Write the error that ends the block to run.log, with its traceback where it is none of ours."""
    try:
        yield
    except Exception as exc:
        log.error(ending(exc)[1], exc_info=None if isinstance(exc, TlcliError) else exc)
        raise


def _end(run: RunDir, status: str, error: str | None) -> None:
    """A disk that is full must not hide the error that it caused."""
    with contextlib.suppress(OSError):
        run.end(status, error)


def _backbone_words(choices: Mapping[str, str], overrides: Sequence[str]) -> str:
    """The words of the command line that choose the same backbone again."""
    own = [word for word in overrides if word.startswith("backbone.name=")]
    return " ".join([f"backbone={choices['backbone']}", *own])


def _saved_text(config: DictConfig, overrides: Sequence[str]) -> tuple[str, UsageError | None]:
    """The config as it is saved; with an error its references stay as they are, for following one could save a secret.
    That can be so with files that a sweep chooses, which Hydra alone has composed."""
    try:
        refuse_environment(config, overrides)
    except UsageError as error:
        return OmegaConf.to_yaml(config), error
    return _resolved(config), None


def _resolved(config: DictConfig) -> str:
    """The config as YAML with its references resolved, where they can be."""
    with contextlib.suppress(OmegaConfBaseException):
        return OmegaConf.to_yaml(config, resolve=True)
    return OmegaConf.to_yaml(config)
