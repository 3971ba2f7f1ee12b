"""`tlcli train device.processes=N`: start the processes of a run, and what each of them does.

torchrun's launcher starts them, watches them and ends all if one fails. `torchrun --nproc-per-node N -m tlcli train`
comes to the same: rank 0 runs the command, and the others follow it.
"""

import logging
import os
import signal
import sys
import tempfile
from collections.abc import Sequence

from tlcli.cli import exit_status, fast_imports
from tlcli.errors import TlcliError, UsageError


def rank_and_size() -> tuple[int, int]:
    """Return the number of this process, and how many torchrun or `launch` has started; (0, 1) by default."""
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if any(name not in os.environ for name in names):
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def with_processes(argv: Sequence[str]) -> list[str]:
    """Return the command line with the number of processes that have been started, as if it had been typed."""
    size = rank_and_size()[1]
    own = f"device.processes={size}"
    others = [word for word in argv if word.startswith("device.processes=") and word != own]
    if others and size > 1:
        raise UsageError(f"{others[-1]}: {size} processes have been started; leave it out")
    return [*argv] if size == 1 or own in argv else [*argv, own]


def launch(processes: int, argv: Sequence[str]) -> int:
    """Run `tlcli train` with these words in several processes, and return the exit code of rank 0."""
    with fast_imports():
        from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "120")  # seconds after a signal, to save the state
    debug = ["--debug"] if "--debug" in sys.argv else []
    words = [word.replace("$", "$$") for word in (*argv, *debug)]  # the launcher fills in its macros
    with tempfile.TemporaryDirectory() as folder:
        logs = DefaultLogsSpecs(log_dir=folder)
        config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=processes, logs_specs=logs, run_id="tlcli")
        config.rdzv_backend, config.rdzv_endpoint, config.local_addr = "c10d", "localhost:0", "localhost"
        config.max_restarts = 0
        ended_by = signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT
        handled = [number.name for number in ended_by if signal.getsignal(number) != signal.SIG_IGN]
        config.signals_to_handle = ",".join(handled)  # nohup ignores SIGHUP
        logging.disable()  # the launcher's: rank 0 reports what happens
        try:
            elastic_launch(config, sys.executable)("-P", "-m", "tlcli", "train", *words)
        except SignalException as error:
            return 130 if error.sigval == signal.SIGINT else 143
        except ChildFailedError as error:
            codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
            killed = {rank: code for rank, code in codes.items() if code < 0 and code != -signal.SIGTERM}
            if codes.get(0) in (1, 2) or (codes.get(0) in (130, 143) and not killed):
                return codes[0]  # rank 0 has said why
            rank, code = min((killed or codes).items())
            reason = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            raise TlcliError(f"process {rank} of the {processes} processes of the run {reason}") from error
        finally:
            logging.disable(logging.NOTSET)
    return 0


def follow_main() -> int:
    """Do the part of a rank other than 0, and return its exit code: 0 unless it failed by itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to all processes
    with fast_imports():
        from torch.distributed import destroy_process_group

        from tlcli.ranks import LostRankError, join, post_error
        from tlcli.train import train_with_rank_0
    ranks = join(*rank_and_size())
    for name in ("SIGTERM", "SIGHUP"):  # rank 0 handles them, and the other ranks follow it
        signal.signal(getattr(signal, name, signal.SIGTERM), signal.SIG_IGN)
    try:
        train_with_rank_0(ranks)
        destroy_process_group()
    except (KeyboardInterrupt, LostRankError):  # rank 0 stops, or has ended
        return 0
    except Exception as error:
        code, line = exit_status(error)
        if "--debug" in sys.argv:
            logging.exception("process %d", ranks.rank)
        post_error(code, line)
        return code
    return 0
