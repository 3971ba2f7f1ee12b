"""Running `tlcli train` under Hydra: check, run once or sweep, and leave nothing behind where nothing began."""

import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf

from tlcli.cli import sweep
from tlcli.cli.checks import check, first_line
from tlcli.cli.compose import Flags, build, composed, composing, parse_flags, quoted
from tlcli.cli.conf_files import ConfFiles, conf_dir
from tlcli.cli.endings import Abort
from tlcli.cli.folders import Folder, named_folder, new_folder
from tlcli.cli.job import Command, run_job
from tlcli.cli.resume import named_run, resume_run, sweep_begun
from tlcli.cli.signals import terminable
from tlcli.errors import UsageError
from tlcli.runs.run_dir import RunDir, is_sweep


def run(argv: list[str]) -> int:
    """Do what argv asks; the exit code. Raises what ended it otherwise, in terms of tlcli's own errors."""
    path, words = named_run(argv)
    if path is not None:
        with terminable():
            return resume(path, words)
    flags = parse_flags(argv)
    with terminable():
        if flags.runs:
            return _run_in_folder(flags, argv)
        with _explained(flags.files):
            _hydra_main(flags, _command(argv), flags.overrides)
    return 0


def _command(argv: Sequence[str], *, goes_on: bool = False) -> Command:
    """What the jobs of a command share; its line is what the user typed."""
    return Command(shlex.join(["tlcli", "train", *argv]), goes_on=goes_on)


def _run_in_folder(flags: Flags, argv: list[str]) -> int:
    """Check all that can be checked before anything is written, make the directory, and run once or sweep.

    Of a sweep only what Hydra itself minds is checked here: each job checks its own values.
    """
    with _explained(flags.files):
        config = composed(flags)
    sweeping = flags.multirun or str(config.hydra.mode).endswith("MULTIRUN")
    spec = None if sweeping else build(config, flags.files)
    if spec:
        check(spec)
    key = "hydra.sweep.dir" if sweeping else "hydra.run.dir"
    folder = _folder(config, key, flags.overrides)
    try:
        if spec:
            print(first_line(spec), flush=True)
        with _explained(flags.files):
            _hydra_main(flags, _command(argv), (*flags.overrides, f"{key}={quoted(folder.path)}"))
    except BaseException as exc:
        _tidy(folder, exc, sweeping)
        if isinstance(exc, KeyboardInterrupt) and folder.path.exists():
            exc.args = (how_to_go_on(folder.path),)
        raise
    return sweep.finish(folder.path) if sweeping else 0


def resume(path: Path, words: Sequence[str]) -> int:
    """Go on with a run or a sweep that ended before its time; the exit code."""
    here = Path.cwd()
    whole = here / path
    try:
        return _resume_sweep(path, words) if is_sweep(path) else resume_run(path, words)
    except KeyboardInterrupt as exc:
        exc.args = (how_to_go_on(whole),)
        raise
    finally:
        os.chdir(here)


def how_to_go_on(path: Path) -> str:
    """What to type to go on with a run or a sweep."""
    near = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    return f"{shlex.join(['tlcli', 'train', '--resume', str(near)])} goes on"


def _resume_sweep(path: Path, words: Sequence[str]) -> int:
    """Run the jobs of a sweep that are not done; the exit code."""
    if words:
        raise UsageError(f"{words[0]}: a sweep goes on as it was begun; resume its jobs one by one to change them")
    began = sweep_begun(path)
    flags = parse_flags(began.argv)
    os.chdir(began.cwd)
    with _explained(flags.files):
        composed(flags)  # refuses what names code to run
    overrides = [word for word in flags.overrides if not word.lstrip("+").startswith("hydra.sweep.dir=")]
    try:
        with _explained(flags.files):
            goes_on = _command(began.argv, goes_on=True)
            _hydra_main(flags, goes_on, (*overrides, f"hydra.sweep.dir={quoted(began.path)}"))
    finally:
        code = sweep.finish(began.path)
    return code


def _folder(config: DictConfig, key: str, overrides: Sequence[str]) -> Folder:
    """Make the directory for a run or a sweep, the one that the user named or a new one."""
    wanted = Path(str(OmegaConf.select(config, key))).absolute()
    named = any(override.lstrip("+").startswith(f"{key}=") for override in overrides)
    return named_folder(wanted, key) if named else new_folder(wanted)


def _hydra_main(flags: Flags, command: Command, overrides: Sequence[str]) -> None:
    """Call Hydra as if it had been started with these flags and overrides, and get its errors as exceptions."""

    def task(config: DictConfig) -> float | None:
        return run_job(config, flags.files, command)

    task.__module__ = "tlcli.train"  # Hydra names the job after it
    argv, full_error = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = ["tlcli train", *flags.flags, *overrides]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # else Hydra prints errors in its own way and exits
    try:
        with sweep.composed_once():
            hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=flags.config_name)(task)()
    finally:
        sys.argv = argv
        if full_error is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = full_error


@contextmanager
def _explained(files: ConfFiles) -> Iterator[None]:
    """Turn Hydra's exceptions into usage errors, and an Abort into what it carries."""
    try:
        with composing(files):
            yield
    except Abort as abort:
        raise abort.cause from None


def _tidy(folder: Folder, exc: BaseException, sweeping: bool) -> None:
    """Remove the directory of a command that ended before its training began; rank what there is of a sweep."""
    began = any(folder.path.rglob("run.json"))
    if not sweeping:
        began = began and not (isinstance(exc, UsageError) and not RunDir(folder.path).metrics_file.exists())
    if not began:
        folder.discard()
    elif sweeping:
        sweep.finish(folder.path)
