"""`tlcli train`: compose the config, check it, make the directory, and run once or as a sweep."""

import os
import shlex
import shutil
import sys
from contextlib import suppress
from itertools import chain
from pathlib import Path

import hydra
from hydra.types import RunMode
from omegaconf import OmegaConf

from tlcli.cli.compose import build_spec, compose_config, composing, parse_flags, resolve_paths
from tlcli.cli.conf_files import conf_dir
from tlcli.cli.job import Command, check_spec, finish_sweep, first_line
from tlcli.cli.launch import follow_main, launch, rank_and_size, with_processes
from tlcli.cli.resume import resume, resume_argument, resume_hint
from tlcli.errors import UsageError
from tlcli.files import expand_user
from tlcli.interrupts import handle_signals
from tlcli.runs.run_dir import JOURNAL_FILE, LEADERBOARD_FILE, RUN_FILES, STATE_FILE, SWEEP_FILES, RunDir


def run(argv: list[str]) -> int:
    """Run `tlcli train` and return the exit code. Each job of a sweep checks its own values."""
    rank, size = rank_and_size()
    if rank > 0:
        with suppress(UsageError):  # which rank 0 reports
            if resume_argument(argv)[0] is None and not parse_flags(argv).runs:
                return 0
        return follow_main()
    argv = with_processes(argv)
    path, words = resume_argument(argv)
    if path is not None:
        with handle_signals(ignore_later=size > 1):
            return resume(path, words)
    flags = parse_flags(argv)
    if not flags.runs:
        # Hydra prints the config or its help, as --cfg, --info and --hydra-help ask
        sys.argv = ["tlcli train", *flags.flags, *flags.overrides]
        os.environ["HYDRA_FULL_ERROR"] = "1"  # otherwise Hydra prints errors in its own way and exits
        with composing(flags.files):
            show = hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=flags.config_name)
            show(lambda _: None)()
        return 0
    with handle_signals(ignore_later=size > 1):
        with composing(flags.files):
            config, loader = compose_config(flags)
            is_sweep = flags.multirun or config.hydra.mode == RunMode.MULTIRUN
            key, other = ("hydra.sweep.dir", "hydra.run.dir") if is_sweep else ("hydra.run.dir", "hydra.sweep.dir")
            if other in flags.keys:
                raise UsageError(f"{other} has no effect on {'a sweep' if is_sweep else 'a single run'}: give {key}")
            if not (place := str(OmegaConf.select(config, key))):
                raise UsageError(f"{key} is empty: name a folder")
            path = expand_user(place).absolute()
            if config.hydra.job.chdir and not is_sweep:
                resolve_paths(config, Path.cwd())
        if is_sweep and size > 1:
            raise UsageError(f"a sweep runs its jobs with one process; these are {size}")
        spec = None if is_sweep else build_spec(config, flags.files)
        if spec:
            check_spec(spec)
            if spec.device.processes > size:
                return launch(spec.device.processes, argv)
        is_named, has_jobs = key in flags.keys, spec is None or spec.own_folds > 0
        path, made = make_folder(path, key if is_named else None, has_jobs=has_jobs)
        command = Command(shlex.join(["tlcli", "train", *argv]), flags.files, path if is_sweep else None, spec=spec)
        try:
            if spec:
                print(first_line(spec), flush=True)
            with composing(flags.files, runs=not is_sweep):
                command.launch(config, loader, path)
        except BaseException as exc:
            # a folder with this file is kept; a single run has run.json as soon as it starts, even if a value is wrong
            sign = "run.json" if is_sweep or not isinstance(exc, UsageError) else "metrics.jsonl"
            is_slurm = is_sweep and config.hydra.launcher._target_.endswith(".SlurmLauncher")
            is_queued = is_slurm and isinstance(exc, KeyboardInterrupt)
            found = path.rglob(sign) if has_jobs else path.glob(sign)  # other runs may be below it
            if not any(found) and not is_queued:
                if is_named:  # these did not exist, and would be in the way of the next try
                    run, of_sweep = RunDir(path), (path / name for name in (LEADERBOARD_FILE, *SWEEP_FILES))
                    for file in (run.log_file, run.config_file, run.info_file, *of_sweep):
                        file.unlink(missing_ok=True)
                    shutil.rmtree(path / ".hydra", ignore_errors=True)
                discard_folders(path, made)
            elif is_sweep:
                finish_sweep(path)
            if isinstance(exc, KeyboardInterrupt) and path.exists():
                exc.args = ("its jobs run as SLURM starts them; scancel ends them" if is_queued else resume_hint(path),)
            raise
    return finish_sweep(path) if is_sweep else 0


def make_folder(path: Path, key: str | None = None, *, has_jobs: bool = False) -> tuple[Path, list[Path]]:
    """Create the directory of one run or sweep. Return it and the folders that were created, outermost first.

    If the user named it with `key`, it may exist, but without files of a run, and if it will have jobs, without runs in
    its folders; otherwise a taken name gets -2, -3, ....
    """
    names = (*RUN_FILES, ".hydra", *SWEEP_FILES, STATE_FILE, JOURNAL_FILE, LEADERBOARD_FILE)
    files = (path / name for name in names)
    try:
        below = path.rglob("run.json") if has_jobs else ()  # they would be taken for its jobs
        if key and (existing := next(chain((file for file in files if file.exists()), below), None)):
            name = existing.relative_to(path)
            raise UsageError(f"{key}={path}: {name} already exists there; choose an empty directory")
        made = [parent for parent in reversed(path.parents) if not parent.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        n, numbered = 1, path
        while True:
            try:
                numbered.mkdir()  # atomic: of two runs that start in the same second only one creates it
                made.append(numbered)
            except FileExistsError:
                if not key:
                    n, numbered = n + 1, path.with_name(f"{path.name}-{n + 1}")
                    continue
                if not path.is_dir():
                    raise
            if key == "hydra.run.dir":
                RunDir(path).log_file.touch(exist_ok=False)  # atomic, too: another run of the same second may have it
            return numbered, made
    except OSError as exc:
        hint = f"choose another folder with {key or 'out'}=..."
        raise UsageError(f"cannot create {path}: {exc.strerror}; {hint}") from exc


def discard_folders(path: Path, made: list[Path]) -> None:
    """Remove the folders that were created for a run, and nothing else."""
    if path in made:
        shutil.rmtree(path, ignore_errors=True)
    for parent in reversed(made):
        with suppress(OSError):  # another run is in it, or it is gone already
            parent.rmdir()
