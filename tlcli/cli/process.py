"""This process: signals that end a run, imports of heavy libraries, and run.log."""

import gc
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from tlcli.cli import Terminated
from tlcli.interrupts import defer_interrupts

log = logging.getLogger("tlcli")


@contextmanager
def handle_signals() -> Iterator[None]:
    """Raise KeyboardInterrupt for SIGINT, and Terminated for SIGTERM and SIGHUP, at the end of the present step.

    SIGHUP is left alone if it is ignored (nohup). A second SIGINT ends the process at once.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set a handler
        return
    owner, received = os.getpid(), False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal received
        if os.getpid() != owner:  # a forked worker does not record the run; SIGINT reaches its parent too
            if number != signal.SIGINT:
                os._exit(128 + number)
            return
        if received and number == signal.SIGINT:
            os._exit(130)
        received = True
        defer_interrupts.interrupt(KeyboardInterrupt() if number == signal.SIGINT else Terminated())

    hangup = getattr(signal, "SIGHUP", signal.SIGTERM)  # Windows has none
    numbers = {signal.SIGINT, signal.SIGTERM, hangup}
    previous = {n: signal.signal(n, stop) for n in numbers if signal.getsignal(n) is not signal.SIG_IGN}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def quiet_libraries() -> None:
    """Set environment variables that PyTorch and tqdm read at import, unless the user has set them."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads must not spin on a shared machine
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")


@contextmanager
def fast_imports() -> Iterator[None]:
    """Disable GC while PyTorch and libraries on top of it are imported, then call gc.freeze().

    Otherwise each collection scans objects that live as long as the process: a sixth of a second in all. If nothing
    new was imported, nothing is frozen, because there may be garbage by then.
    """
    quiet_libraries()
    n_modules, was_enabled = len(sys.modules), gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > n_modules:
            gc.freeze()
        if was_enabled:
            gc.enable()


@contextmanager
def log_to(file: Path) -> Iterator[None]:
    """Append the logs and warnings of this process to a file while the block runs."""
    handler = logging.FileHandler(file, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    root, level = logging.getLogger(), log.level
    root.addHandler(handler)
    log.setLevel(logging.INFO)
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        log.setLevel(level)
        root.removeHandler(handler)
        handler.close()
