"""What the signals that end a process do to a run: it records its ending, and keeps what was done."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from tlcli.cli.endings import Terminated
from tlcli.interrupts import defer_interrupts


@contextmanager
def terminable() -> Iterator[None]:
    """Within the block SIGINT raises KeyboardInterrupt and SIGTERM (SIGHUP too, unless it is ignored) Terminated, each
    at the end of the step that is being made. A second SIGINT ends the process at once."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set a handler
        return
    owner, came = os.getpid(), False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal came
        if os.getpid() != owner:  # a forked worker: the run is not its to record
            if number != signal.SIGINT:  # which the terminal sends to all; this one's end is for its parent to see to
                os._exit(128 + number)
            return
        if came and number == signal.SIGINT:
            os._exit(130)
        came = True
        defer_interrupts.interrupt(KeyboardInterrupt() if number == signal.SIGINT else Terminated())

    hangup = getattr(signal, "SIGHUP", signal.SIGTERM)  # Windows has none
    wanted = {signal.SIGINT, signal.SIGTERM, hangup}
    caught = {number for number in wanted if signal.getsignal(number) is not signal.SIG_IGN}  # nohup stays nohup
    previous = {number: signal.signal(number, stop) for number in caught}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
