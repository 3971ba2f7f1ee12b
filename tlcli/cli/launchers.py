"""Launchers of sweeps that run the jobs in other processes: Hydra's plugins for joblib and submitit, and Ray."""

import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, setup_globals

from tlcli.cli.view import TerminalReporter
from tlcli.errors import TlcliError, UsageError
from tlcli.interrupts import defer_interrupts
from tlcli.locks import observer, runs_on_this_machine
from tlcli.ray_tasks import ray_cluster, run_tasks
from tlcli.runs import leaderboard
from tlcli.runs.index import read_entry
from tlcli.runs.run_dir import SWEEP_FILE, RunDir, read_json
from tlcli.text import natural_order, one_line, shown_path

WATCH_SECONDS = 1.0


class RayLauncher(BasicLauncher):
    """Runs each job as a task of Ray, once: `--resume` is for jobs whose process was killed."""

    def __init__(self, cpus: float, gpus: float) -> None:
        super().__init__()
        self._resources = {"cpus": cpus, "gpus": gpus}

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs, and return their results. Raise TlcliError at the end if a process of one was killed."""
        shared = (self, Singleton.get_state(), str(Path.cwd()))
        arguments = [(initial_job_idx + i, list(words), *shared) for i, words in enumerate(job_overrides)]
        with ray_cluster():
            results = dict(run_tasks(run_ray_job, arguments, TerminalReporter(), **self._resources, retries=0))
        if errors := [result for result in results.values() if isinstance(result, BaseException)]:
            raise TlcliError(f"{len(errors)} jobs ended without a result: {one_line(errors[0])}")
        return [results[i] for i in sorted(results)]


def run_ray_job(
    number: int, overrides: list[str], launcher: BasicLauncher, singletons: Mapping[Any, Any], cwd: str
) -> JobReturn:
    """Run one job in a process of Ray, as Hydra's own launcher does in this one."""
    with suppress(OSError):  # another node may not have it
        os.chdir(cwd)
    setup_globals()
    Singleton.set_state(singletons)
    return BasicLauncher.launch(launcher, [overrides], number)[0]


# Hydra loads only launchers whose name starts with hydra_plugins
Plugins.instance().class_name_to_class["hydra_plugins.tlcli.RayLauncher"] = RayLauncher


@contextmanager
def other_processes(folder: Path, words: Sequence[str], *, is_joblib: bool) -> Iterator[None]:
    """Show a line per job that ends in the block, which runs the jobs of a sweep with these words in other processes.

    Raise TlcliError if one of these was killed, after the others have ended. Those of joblib end with this one: its
    first signal is passed on, and raised when they have saved their states.
    """
    reporter, is_over = TerminalReporter(), threading.Event()
    overrides = OverridesParser.create().parse_overrides([*words])
    swept = {override.key_or_group for override in overrides if override.is_sweep_override()}
    earlier = {(run.path, run.info.get("pid")) for run in running_jobs(folder)}  # not started by this command

    def ended_jobs() -> dict[str, list[Any]]:
        with suppress(OSError, ValueError):  # it is not there yet
            jobs = [job for job in read_json(folder / SWEEP_FILE)["jobs"] if job["status"] not in ("running", "died")]
            columns = ("status", "error", "seconds", "validation", "test_accuracy")
            return {job["name"]: [job[column] for column in columns] for job in jobs}
        return {}

    def watch(shown: dict[str, list[Any]]) -> None:
        is_last = False
        while not is_last:
            is_last, jobs = is_over.wait(WATCH_SECONDS), ended_jobs()
            for name in sorted((name for name in jobs if jobs[name] != shown.get(name)), key=natural_order):
                status, error, _, validation, accuracy = jobs[name]
                own = read_entry(folder / name)["overrides"]  # if its run.json is damaged, none
                title = " ".join([f"[{name}]", *(word for word in own if word.lstrip("+").partition("=")[0] in swept)])
                results = {"validation": validation, "test accuracy": accuracy}
                texts = [f"{label} {value:.4f}" for label, value in results.items() if value is not None]
                reporter.show(f"{title}: {', '.join([status, *texts])}{f': {error}' if error else ''}")
            shown = jobs
            for run in running_jobs(folder) if is_joblib and defer_interrupts.is_pending else ():
                if (run.path, run.info.get("pid")) not in earlier and runs_on_this_machine(run.info):
                    with suppress(OSError):  # it has just ended
                        os.kill(run.info["pid"], signal.SIGTERM)

    reporter.show_labelled(("sweep", f"{shown_path(folder)}: jobs run in other processes; a line for each that ends"))
    watcher = threading.Thread(target=watch, args=(ended_jobs(),), daemon=True)
    watcher.start()
    try:
        with defer_interrupts if is_joblib else nullcontext():
            yield
    except TlcliError:
        raise
    except Exception as exc:
        while living_jobs(folder):
            observer.sleep(WATCH_SECONDS)
        raise TlcliError(f"a job ended without a result: {one_line(exc) or type(exc).__name__}") from exc
    finally:
        leaderboard.write(folder)
        is_over.set()
        watcher.join()


def running_jobs(folder: Path) -> list[RunDir]:
    """Return the jobs whose run.json says that they are running, which may be wrong."""
    runs = []
    for file in folder.rglob("run.json"):
        with suppress(UsageError):
            if (run := RunDir(file.parent)).info.get("status") == "running":
                runs.append(run)
    return runs


def living_jobs(folder: Path) -> list[RunDir]:
    """Return the jobs at or under a folder that are running, here or elsewhere. It takes up to 60 s to know."""
    runs = running_jobs(folder)
    living = observer.living([run.info_file for run in runs])
    return [run for run in runs if run.info_file in living]
