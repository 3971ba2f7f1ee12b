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
from tlcli.cli.compose import build
from tlcli.cli.conf_files import ConfFiles
from tlcli.cli.endings import Abort, ending
from tlcli.cli.libraries import quiet_libraries
from tlcli.cli.logs import log, logging_to
from tlcli.cli.view import TerminalWatch
from tlcli.data.listing import check_dataset
from tlcli.errors import BadImages, TlcliError
from tlcli.runs import leaderboard
from tlcli.runs.loggers import logged_run
from tlcli.runs.run_dir import RunDir
from tlcli.specs import DatasetSpec, TrainSpec


class Command:
    """What the jobs of one command share: the line that was typed, the data set last looked at, and the session."""

    def __init__(self, line: str) -> None:
        self.line = line
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
    overrides = list(job.overrides.task)
    try:
        with recorded(run), logging_to(run.log_file), logged():
            run.start(command=command.line, overrides=overrides, config=_resolved(config))
            watch = TerminalWatch(_backbone_words(job.runtime.choices, overrides))
            if sweep:
                watch.heading(f"[{job.job.num}] {' '.join(overrides)}")
            return _train(config, files, run, watch, command, checked=sweep is None)
    except Exception as exc:
        if sweep is None:
            raise Abort(exc) from exc
        print(f"[{job.job.num}] failed: {ending(exc)[1]}", file=sys.stderr, flush=True)
        return None
    finally:
        if sweep:
            with contextlib.suppress(OSError):
                leaderboard.write(sweep)


def _train(
    config: DictConfig, files: ConfFiles, run: RunDir, watch: TerminalWatch, command: Command, checked: bool
) -> float | None:
    """Train what a config says. `checked`: the data set and the weights it names were looked at already."""
    spec = build(config, files)
    if not checked:
        command.check(spec)
    log.info(first_line(spec))
    quiet_libraries()
    from tlcli.engine.session import session_for  # torch is imported here, and not before
    from tlcli.train import train

    command.session = session_for(spec.cache, command.session)
    with logged_run(spec, run.path, watch) as told:
        return train(spec, run, told, command.session)


@contextlib.contextmanager
def recorded(run: RunDir) -> Iterator[None]:
    """Write run.json's final status when the block ends, in whichever way that is."""
    try:
        yield
    except KeyboardInterrupt as exc:
        _end(run, "interrupted", ending(exc)[1])
        raise
    except BaseException as exc:
        if isinstance(exc, BadImages):
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


def _resolved(config: DictConfig) -> str:
    """The config as YAML with its references resolved, where they can be."""
    with contextlib.suppress(OmegaConfBaseException):
        return OmegaConf.to_yaml(config, resolve=True)
    return OmegaConf.to_yaml(config)
