"""Ranks of a run as forked processes of one thread each, which need not import torch again."""

import contextlib
import os
import signal
import socket
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from tlcli import device
from tlcli.cli import main
from tlcli.runs import checkpointing
from tlcli.runs.recorder import Recorder


def in_ranks(size: int, function: Callable[[int], int], folder: Path) -> list[tuple[int, str]]:
    """Call a function with each rank in a process of its own; return the exit code and the output of each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    pids = []
    for rank in range(size):
        if (pid := os.fork()) == 0:
            code = 70
            try:
                code = _run(rank, size, port, function, folder)
            finally:
                os._exit(code)
        pids.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    return [(code, (folder / f"rank{rank}.log").read_text()) for rank, code in enumerate(codes)]


def _run(rank: int, size: int, port: int, function: Callable[[int], int], folder: Path) -> int:
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    signal.alarm(300)  # seconds, in case a rank waits for one that has ended
    torch.set_num_threads(1)  # a forked process has no threads of its parent to wait for
    device.PROCESS_THREADS = 1
    Recorder._plot = lambda *args: None  # type: ignore[method-assign,assignment]
    checkpointing.MAX_TIME_SHARE = 1e9
    with (folder / f"rank{rank}.log").open("w") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            try:
                return function(rank)
            except BaseException:
                traceback.print_exc()
                raise


def train_in_ranks(size: int, argv: Sequence[str], folder: Path) -> tuple[int, str]:
    """Run `tlcli train` in ranks, as torchrun starts them; return the exit code and the output of rank 0.

    Assert that the others end without a word.
    """
    folder.mkdir(exist_ok=True)
    (code, text), *others = in_ranks(size, lambda rank: main(["train", *argv]), folder)
    assert all(not said for _, said in others), others
    return code, text
