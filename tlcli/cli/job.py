"""Jobs of `tlcli train`: Hydra starts each one, and run.json records how it ended."""

import logging
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING, Any

from hydra._internal.callbacks import Callbacks
from hydra.core.config_loader import ConfigLoader
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.utils import run_job
from hydra.types import HydraContext, RunMode
from msgspec import structs
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tlcli import __version__
from tlcli.cli import exit_status, fast_imports
from tlcli.cli.compose import build_spec, fill_val_fraction, load_spec, quoted, resolve_paths
from tlcli.cli.conf_files import ConfFiles
from tlcli.cli.launch import rank_and_size
from tlcli.cli.launchers import living_jobs, other_processes
from tlcli.cli.view import TerminalReporter, log
from tlcli.errors import BadImagesError, StoppedError, TlcliError, UsageError
from tlcli.files import expand_user, is_file, resolve_links
from tlcli.interrupts import Preempted, handle_signals, preemption_signal
from tlcli.locks import heartbeat
from tlcli.reporter import Reporter
from tlcli.runs import leaderboard
from tlcli.runs.loggers import check_logger, logged_run
from tlcli.runs.run_dir import FOLD, REFIT, RunDir, strings
from tlcli.specs import VAL_FRACTION, TrainSpec
from tlcli.text import one_line

if TYPE_CHECKING:
    from tlcli.engine.session import Session

_session: "Session | None" = None  # of a process that a launcher has started, for all its jobs
_is_interrupted = False  # such a process starts no job any longer


@dataclass(eq=False)
class Command:
    """Hydra's task function: runs one job, with what the jobs of a command share.

    `sweep` is the folder of a sweep, None for a single run, which has `spec`. A job that is in its directory already is
    resumed; with `resume`, also one that is damaged. A launcher may copy this object into other processes.
    A trial of a search has a `reporter`, and a `session` that it shares with others; its test images are not read.
    """

    line: str
    files: ConfFiles
    sweep: Path | None
    spec: TrainSpec | None = None
    resume: bool = False
    reporter: Reporter | None = None
    session: "Session | None" = None
    error: Exception | None = None
    _claim_error: str | None = None  # the reason why the directory is not the job's own, if so
    _output_subdir: str | None = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__class__ = CopiedCommand

    def launch(self, config: DictConfig, loader: ConfigLoader, folder: Path) -> None:
        """Run the one job of a composed config, or all jobs of a sweep, in a folder."""
        OmegaConf.set_readonly(config.hydra, False)
        context = HydraContext(config_loader=loader, callbacks=Callbacks(config))
        self._output_subdir = config.hydra.output_subdir
        if self.sweep is None:
            config.hydra.mode, config.hydra.run.dir, config.hydra.output_subdir = RunMode.RUN, str(folder), None
            run_job(self, config, job_dir_key="hydra.run.dir", job_subdir_key=None, hydra_context=context)
            try:
                if self.error is not None:
                    raise self.error
                return
            finally:
                self.error = None  # its traceback holds the network and the batch in memory
        config.hydra.mode, config.hydra.sweep.dir = RunMode.MULTIRUN, str(folder)
        if self.resume and "submitit_folder" in config.hydra.launcher:  # it unpickles what it finds under its names
            config.hydra.launcher.submitit_folder = f"{folder}/.submitit/{token_hex(8)}/%j"
        # Hydra composes each job from these. It must not write into a job's directory before that is known to be free.
        for key, value in (("sweep.dir", quoted(folder)), ("output_subdir", "null")):
            config.hydra.overrides.hydra.append(f"hydra.{key}={value}")
        sweeper = Plugins.instance().instantiate_sweeper(config=config, hydra_context=context, task_function=self)
        launcher, words = config.hydra.launcher._target_.rpartition(".")[2], _as_typed(config.hydra)
        is_joblib, is_here = launcher == "JoblibLauncher", launcher == "BasicLauncher"
        if is_joblib:
            from joblib import effective_n_jobs

            n_jobs = config.hydra.launcher.n_jobs
            if n_jobs == 0:
                raise UsageError("hydra.launcher.n_jobs=0: must be a number of processes, or -1 for one per core")
            is_here = effective_n_jobs(n_jobs) == 1
        with nullcontext() if is_here else other_processes(folder, words, is_joblib=is_joblib):
            sweeper.sweep(arguments=words)

    def __call__(self, config: DictConfig) -> float | None:
        """Train, and return the validation metric that selected the epoch; None if the job failed.

        A failure is recorded in run.json and kept as `error`, not raised, so that the other jobs of a sweep run.
        """
        is_quiet = isinstance(self, CopiedCommand)
        job = HydraConfig.get()
        folder, overrides = Path(job.runtime.output_dir), _as_typed(job)
        named = [word for word in overrides if word.startswith("backbone.name=")]
        backbone = " ".join([f"backbone={job.runtime.choices['backbone']}", *named])
        has_folds = isinstance(config.get("folds"), int) and config.get("fold") is None
        run = RunDir(folder / REFIT if has_folds else folder)
        starting = ExitStack()  # until run.json says that this process runs the job
        try:  # of all that may fail: Hydra drops what is raised before
            reporter = self.reporter or TerminalReporter(backbone, quiet=is_quiet)
            if self.sweep is not None:
                run, self._claim_error = self._claim(folder, overrides, REFIT if has_folds else "")
                title = f"[{job.job.num}] {' '.join(overrides)}"
                if fill_val_fraction(config, is_sweep=True):  # recorded, so that the job's own command repeats it
                    overrides.append(f"dataset.val_fraction={VAL_FRACTION}")
                starting.enter_context(run.starting())
                run = RunDir(run.path)  # as another process may have left it
                if (earlier := _earlier_value(run)) is not None:
                    reporter.heading(f"{title}: done before, validation {earlier:.4f}")
                    return earlier
                if living_jobs(run.path):
                    reporter.heading(f"{title}: another process is running it")
                    return None
                reporter.heading(title)
            return self._run(run, config, overrides, reporter, self.spec, starting)
        except Exception as exc:
            if self.sweep is None:
                self.error = exc
            elif not is_quiet:
                print(f"[{job.job.num}] failed: {exit_status(exc)[1]}", file=sys.stderr, flush=True)
            if self.sweep is not None and not run.info_file.exists():
                raise  # the leaderboard will not list this job
            return None
        finally:
            starting.close()
            for listed in ([run.path.parent] if has_folds else []) + ([self.sweep] if self.sweep else []):
                with suppress(OSError):
                    leaderboard.write(listed)

    def _run(
        self,
        run: RunDir,
        config: DictConfig,
        overrides: list[str],
        reporter: Reporter,
        spec: TrainSpec | None,
        starting: ExitStack,
    ) -> float | None:
        """Train one run; a refit after its folds, which are runs in directories next to its own.

        `starting` is closed as soon as run.json says that the run is running.
        """
        run.path.mkdir(parents=True, exist_ok=True)
        with record_status(run):
            resumed, state = self._start(run, config, overrides), None
            starting.close()
            if resumed:
                with fast_imports():
                    from tlcli.runs.resume_state import prepare_resume, read_state
                state = read_state(run)
                prepare_resume(run, state)
            if state is not None:  # it continues as it was started, even if a config file has changed since
                composed = HydraConfig.instance().cfg
                spec = load_spec(run)
                HydraConfig.instance().cfg = composed  # if an error ends the job, Hydra does this
            if spec is None:  # as `check_spec` before a single run, except for the dataset: loading it tells the rest
                spec = build_spec(config, self.files)
                if spec.device.processes > 1:
                    raise UsageError(f"device.processes={spec.device.processes}: a job of a sweep has one process")
                check_logger(spec.logger)
                check_weights(spec.backbone.weights)
            if spec.own_folds:
                for fold in range(spec.own_folds):
                    leaderboard.write(run.path.parent)  # it has the refit, which has started
                    part, own = RunDir(run.path.with_name(FOLD.format(fold))), config.copy()
                    own.fold, earlier = fold, _earlier_value(part)
                    done = "" if earlier is None else f": done before, validation {earlier:.4f}"
                    reporter.heading(f"fold {fold + 1} of {spec.folds}{done}")
                    if earlier is None:
                        words, fold_spec = [*overrides, f"fold={fold}"], structs.replace(spec, fold=fold)
                        self._run(part, own, words, reporter, fold_spec, starting)
                reporter.heading("all folds")
            log.info(first_line(spec))
            with fast_imports():
                from tlcli.engine.session import session_for
                from tlcli.ranks import led_ranks
                from tlcli.train import train
            self.session = session_for(spec.cache, self.session)
            is_trial = self.reporter is not None
            with led_ranks(*rank_and_size()) as ranks, logged_run(spec, run.path, reporter) as logged:
                value = train(spec, run, logged, self.session, state, is_trial=is_trial, ranks=ranks)
        discard_state(run, spec)
        return value

    def _start(self, run: RunDir, config: DictConfig, overrides: list[str]) -> bool:
        """Write the files with which a run starts; return True if it is an earlier run instead, to be resumed."""
        job = HydraConfig.get()
        if job.job.chdir:
            resolve_paths(config, Path(job.runtime.cwd))
        resumed = self._claim_error is None and run.info_file.exists()
        try:
            is_damaged = resumed and not run.info
        except UsageError:
            is_damaged = True
        if is_damaged:  # the run starts again
            run.info_file.unlink()
            run.state_file.unlink(missing_ok=True)
        try:
            text = OmegaConf.to_yaml(config, resolve=True)
        except OmegaConfBaseException:  # build_spec reports it
            text = OmegaConf.to_yaml(config)
        if not resumed or is_damaged:
            run.start(command=self.line, overrides=overrides, config=text, cwd=job.runtime.cwd)
        elif not run.state_file.exists():  # it starts again, with what the config files say now
            run.write_config(text)
        if self._claim_error is not None:
            raise TlcliError(f"{self._claim_error}: hydra.sweep.subdir must give each job a directory of its own")
        if self._output_subdir is not None:  # what Hydra would write
            folder = run.path / self._output_subdir
            folder.mkdir(parents=True, exist_ok=True)
            contents = {"config": config, "hydra": HydraConfig.instance().cfg, "overrides": job.overrides.task}
            for name, content in contents.items():
                OmegaConf.save(content, folder / f"{name}.yaml")
        if resumed:
            run.mark_resumed(self.line)
        return resumed

    def _claim(self, path: Path, overrides: list[str], part: str) -> tuple[RunDir, str | None]:
        """Take a directory for a job, with its run.log as the mark; return the run in its folder `part` ("": itself).

        If `path` belongs to another job, take the next free one, path-2, ..., and return the reason, too.
        """
        if self.sweep is not None and not resolve_links(path).is_relative_to(resolve_links(self.sweep)):
            raise UsageError(f"{path}: is outside {self.sweep}; hydra.sweep.subdir must name a folder inside the sweep")
        error = None
        for n in count(1):
            folder = path if n == 1 else path.with_name(f"{path.name}-{n}")
            folder.mkdir(parents=True, exist_ok=True)
            run = RunDir(folder / part)
            try:
                RunDir(folder).log_file.touch(exist_ok=False)
                break
            except FileExistsError:
                words: tuple[str, ...] = ()
                with suppress(UsageError):
                    words = strings(run.info.get("overrides"))[: len(overrides)]  # as typed
                if words == tuple(overrides) or (self.resume and not words):
                    break
                error = error or f"{path.name} is the directory of the job {' '.join(words) or 'that started before'}"
        return run, error


class CopiedCommand(Command):
    """The task function in a process that a launcher has started.

    A signal is recorded as the end of the job, and the jobs after it do not start.
    """

    def __call__(self, config: DictConfig) -> float | None:
        """Train as `Command` does."""
        global _session, _is_interrupted
        if _is_interrupted:
            return None
        self.session = _session
        try:
            with handle_signals():
                return super().__call__(config)
        except Preempted:
            number = preemption_signal()
            if number is not None:
                self.session = None  # submitit pickles this object for the job that it queues
                signal.getsignal(number)(number, None)  # type: ignore[misc, operator]
            raise
        except KeyboardInterrupt:
            if "SUBMITIT_EXECUTOR" in os.environ:
                raise  # with a result the job would be done
            _is_interrupted = True
            return None
        finally:
            _session, self.session = self.session, None


def _earlier_value(run: RunDir) -> float | None:
    """Return the validation metric of a run that is done; None for any other."""
    with suppress(UsageError, ValueError, KeyError, TypeError):
        if run.info["status"] == "done":
            return float(run.info["best"][run.info["keep_best"]])
    return None


def _as_typed(hydra: Any) -> list[str]:
    words = OmegaConf.to_container(hydra.overrides.task, resolve=False)
    return [str(word) for word in words] if isinstance(words, list) else []


@contextmanager
def record_status(run: RunDir) -> Iterator[None]:
    """Write logs and warnings of the block to run.log, and its final status to run.json, which is touched meanwhile."""
    heartbeat.add(run.info_file)
    handler = logging.FileHandler(run.log_file, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    previous = warnings.showwarning  # that of logging within a run that records its own
    logging.captureWarnings(True)
    try:
        yield
    except BaseException as exc:
        if isinstance(exc, Exception):
            log.error(exit_status(exc)[1], exc_info=None if isinstance(exc, TlcliError) else exc)
        if isinstance(exc, BadImagesError):
            run.write_bad_files(exc.files)
        if run.info_file.exists():  # else it was interrupted before it began
            with suppress(OSError, ValueError):  # a full disk, or a damaged file, must not hide the error
                ends = {KeyboardInterrupt: "interrupted", StoppedError: "stopped"}
                status = next((name for kind, name in ends.items() if isinstance(exc, kind)), "failed")
                run.end(status, exit_status(exc)[1])
        raise
    finally:
        if warnings.showwarning is not previous:
            logging.captureWarnings(False)
        root.removeHandler(handler)
        handler.close()
        heartbeat.drop(run.info_file)
    run.end("done")


def finish_sweep(folder: Path) -> int:
    """Write and show the leaderboard of a sweep. Return 0, or 1 if a job failed."""
    board = leaderboard.write(folder)
    TerminalReporter().leaderboard(folder, board)
    failed = [job for job in board["jobs"] if job["status"] != "done"]
    if failed:
        print(f"tlcli train: {len(failed)} of {len(board['jobs'])} jobs did not finish:", file=sys.stderr)
    for job in failed:
        unknown = "in another process" if job["status"] == "running" else "no reason recorded"
        print(f"  {job['name']}  {job['status']}: {one_line(job['error'] or unknown)}", file=sys.stderr)
    return 1 if failed else 0


def discard_state(run: RunDir, spec: TrainSpec) -> None:
    """Remove the state of a run whose status is `done` already, so that no other run is without both."""
    if not spec.checkpoint.keep_state:
        run.state_file.unlink(missing_ok=True)


def check_spec(spec: TrainSpec) -> None:
    """Raise UsageError if the dataset, the weights or the package that a spec names are missing."""
    check_logger(spec.logger)
    spec.dataset.check()
    check_weights(spec.backbone.weights)


def check_weights(weights: str) -> None:
    """Raise UsageError unless this is `default`, `none`, a file of weights or the directory of a finished run."""
    path = expand_user(weights)
    if not (weights in ("default", "none") or is_file(path) or RunDir(path).best_checkpoint.is_file()):
        missing = "no finished run or file of weights there"
        raise UsageError(f"backbone.weights={weights}: {missing}; give default, none, a run directory or a file")


def first_line(spec: TrainSpec) -> str:
    """Return one line that says what a run is."""
    return one_line(f"tlcli {__version__}: {spec.dataset.name} -> {spec.backbone.name}, freeze={spec.freeze.kind}")
