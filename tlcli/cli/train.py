"""`tlcli train`: compose the config, check it, make the directory, and run once or as a sweep."""

import os
import shlex
import sys
from pathlib import Path

import hydra
from hydra.types import RunMode
from omegaconf import OmegaConf

from tlcli.cli.compose import Flags, build_spec, compose_for_launch, composing, parse_flags
from tlcli.cli.conf_files import conf_dir
from tlcli.cli.folders import Folder, named_folder, new_folder
from tlcli.cli.job import Command, check, finish_sweep, first_line
from tlcli.cli.process import handle_signals
from tlcli.cli.resume import resume, resume_argument, resume_hint
from tlcli.errors import UsageError
from tlcli.runs.run_dir import RunDir


def run(argv: list[str]) -> int:
    """Run `tlcli train` and return the exit code. All that can be checked is checked before anything is written.

    Of a sweep, only what its jobs share is checked: each job checks its own values.
    """
    path, words = resume_argument(argv)
    if path is not None:
        with handle_signals():
            return resume(path, words)
    flags = parse_flags(argv)
    if not flags.runs:
        return _show(flags)
    with handle_signals():
        with composing(flags.files):
            config, loader = compose_for_launch(flags)
            is_sweep = flags.multirun or config.hydra.mode == RunMode.MULTIRUN
            key = "hydra.sweep.dir" if is_sweep else "hydra.run.dir"
            path = Path(str(OmegaConf.select(config, key))).absolute()
        spec = None if is_sweep else build_spec(config, flags.files)
        if spec:
            check(spec)
        is_named = any(override.lstrip("+").startswith(f"{key}=") for override in flags.overrides)
        folder = named_folder(path, key) if is_named else new_folder(path)
        command = Command(shlex.join(["tlcli", "train", *argv]), flags.files, folder.path if is_sweep else None)
        try:
            if spec:
                print(first_line(spec), flush=True)
            with composing(flags.files):
                command.launch(config, loader, folder.path)
        except BaseException as exc:
            _clean_up(folder, exc, is_sweep)
            if isinstance(exc, KeyboardInterrupt) and folder.path.exists():
                exc.args = (resume_hint(folder.path),)
            raise
    return finish_sweep(folder.path) if is_sweep else 0


def _show(flags: Flags) -> int:
    """Let Hydra print the config or its help, as --cfg, --info and --hydra-help ask."""
    argv, full_error = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = ["tlcli train", *flags.flags, *flags.overrides]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # otherwise Hydra prints errors in its own way and exits
    try:
        with composing(flags.files):
            hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=flags.config_name)(lambda _: None)()
    finally:
        sys.argv = argv
        if full_error is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = full_error
    return 0


def _clean_up(folder: Folder, exc: BaseException, is_sweep: bool) -> None:
    """Remove the directory of a command that ended before training started; rank the jobs of a sweep."""
    started = any(folder.path.rglob("run.json"))
    if not is_sweep:
        started = started and not (isinstance(exc, UsageError) and not RunDir(folder.path).metrics_file.exists())
    if not started:
        folder.discard()
    elif is_sweep:
        finish_sweep(folder.path)
