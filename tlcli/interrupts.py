"""Signals that end a run wait for the end of a step, so that what is saved afterwards is of whole steps."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Terminated(KeyboardInterrupt):
    """SIGTERM was received. It is a KeyboardInterrupt, so that `except Exception` does not catch it."""


class Preempted(Terminated):
    """SIGUSR2 was received, with which submitit tells that its scheduler needs the machine: the job is queued again."""


class _DeferInterrupts:
    """A block at whose end pending signals are raised. Blocks may be nested: the outermost one raises.

    A library may swallow the exception of a signal (a bare `except`). Then the end of the next block raises it again.
    """

    def __init__(self) -> None:
        self._depth = 0
        self.received: BaseException | None = None  # in the present block of handle_signals

    def __enter__(self) -> None:
        self._depth += 1

    def __exit__(self, *exc_info: object) -> None:
        self._depth -= 1
        if self._depth == 0 and self.is_pending:
            self.raise_pending()

    @property
    def is_pending(self) -> bool:
        """True if a signal was received and the present code does not handle it."""
        handled = sys.exc_info()[1]
        while handled is not None and handled is not self.received:
            handled = handled.__context__
        return handled is not self.received

    def raise_pending(self) -> None:
        """Raise what waits for the end of the block; KeyboardInterrupt if it waits in another process."""
        raise self.received or KeyboardInterrupt

    def interrupt(self, exc: BaseException) -> None:
        """Raise the exception of a signal: now, or at the end of the block."""
        self.received = exc
        if self._depth == 0:
            raise exc


defer_interrupts = _DeferInterrupts()  # for the main thread, where Python runs the handlers of signals


@contextmanager
def handle_signals(*, ignore_later: bool = False) -> Iterator[None]:
    """Raise KeyboardInterrupt for SIGINT, and Terminated for SIGTERM and SIGHUP, at the end of the present step.

    Raise Preempted for SIGUSR2 if a handler of submitit is there, which is for the caller to call.
    With `ignore_later` they are ignored after the block: torchrun may send them to a process that is about to end.
    SIGHUP is left alone if it is ignored (nohup). A second SIGINT ends the process at once.
    """
    import threading  # here: it takes a quarter of the time of `tlcli --help`

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set a handler
        return
    owner = os.getpid()

    def stop(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # a forked worker does not record the run; SIGINT reaches its parent too
            if number != signal.SIGINT:
                os._exit(128 + number)
            return
        if defer_interrupts.received is not None:
            if number == signal.SIGINT:
                os._exit(130)
            return  # the launcher of a sweep passes on what the terminal has sent
        kinds = {signal.SIGINT: KeyboardInterrupt, preemption: Preempted}
        defer_interrupts.interrupt(kinds.get(number, Terminated)())

    hangup = getattr(signal, "SIGHUP", signal.SIGTERM)  # Windows has none
    numbers = {signal.SIGINT, signal.SIGTERM, hangup}
    if (preemption := preemption_signal()) is not None:
        numbers.add(preemption)
    previous = {n: signal.signal(n, stop) for n in numbers if signal.getsignal(n) is not signal.SIG_IGN}
    try:
        yield
        if defer_interrupts.is_pending:
            defer_interrupts.raise_pending()
    finally:
        defer_interrupts.received = None
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_IGN if ignore_later else handler)


def preemption_signal() -> int | None:
    """Return the signal before a preemption, for which submitit has installed a handler; None if it has not."""
    number = getattr(signal, "SIG" + os.environ.get("SUBMITIT_PREEMPT_SIGNAL", "USR2"), None)
    return number if number is not None and callable(signal.getsignal(number)) else None
