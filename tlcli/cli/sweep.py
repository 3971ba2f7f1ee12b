"""A sweep beside its jobs: each one's config is composed once; at its end come the leaderboard and what failed."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.plugins.sweeper import Sweeper
from omegaconf import DictConfig, OmegaConf

from tlcli.cli.view import TerminalReporter
from tlcli.runs import leaderboard

KEPT = 100
"""Configs of jobs that wait which are held, at most: each takes 0.6 MB."""


@contextmanager
def composed_once() -> Iterator[None]:
    """Within, Hydra composes the config of a sweep's job once, when it looks whether all of them are legal, and not
    again when it starts that job: each time takes an eighth of a second."""
    compose, validate = ConfigLoaderImpl.load_sweep_config, Sweeper.validate_batch_is_legal
    waiting: dict[tuple[str, ...], DictConfig] = {}

    def keep(loader: ConfigLoaderImpl, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        found = compose(loader, master_config, sweep_overrides)
        if len(waiting) < KEPT:
            waiting[tuple(sweep_overrides)] = found
        return found

    def take(loader: ConfigLoaderImpl, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        found = waiting.pop(tuple(sweep_overrides), None)
        if found is None:
            return compose(loader, master_config, sweep_overrides)
        OmegaConf.copy_cache(from_config=master_config, to_config=found)  # of what was resolved since
        return found

    def look_at(sweeper: Sweeper, batch: Sequence[Sequence[str]]) -> None:
        with _replaced(ConfigLoaderImpl, "load_sweep_config", keep):
            validate(sweeper, batch)

    with (
        _replaced(Sweeper, "validate_batch_is_legal", look_at),
        _replaced(ConfigLoaderImpl, "load_sweep_config", take),
    ):
        yield


@contextmanager
def _replaced(owner: type, name: str, method: Callable[..., Any]) -> Iterator[None]:
    """Another method in the place of a class's own."""
    own = getattr(owner, name)
    setattr(owner, name, method)
    try:
        yield
    finally:
        setattr(owner, name, own)


def finish(folder: Path) -> int:
    """Write and show the leaderboard of a sweep; 0, or 1 where a job failed."""
    board = leaderboard.write(folder)
    TerminalReporter().leaderboard(board)
    failed = [job for job in board.jobs if job.status != "done"]
    if failed:
        print(f"tlcli train: {len(failed)} of {len(board.jobs)} jobs did not finish:", file=sys.stderr)
    for job in failed:
        print(f"  {job.name}  {job.status}: {job.error or 'no reason recorded'}", file=sys.stderr)
    return 1 if failed else 0
