"""Signals that end a run wait for the end of a step, so that what is saved afterwards is of whole steps."""

from types import TracebackType


class _DeferInterrupts:
    """A block at whose end pending signals are raised. Blocks may be nested: the outermost one raises."""

    def __init__(self) -> None:
        self._depth = 0
        self._pending: BaseException | None = None

    def __enter__(self) -> None:
        self._depth += 1

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._depth -= 1
        if self._depth == 0 and self._pending is not None:
            pending, self._pending = self._pending, None
            raise pending

    def interrupt(self, exc: BaseException) -> None:
        """Raise the exception of a signal: now, or at the end of the block."""
        if self._depth == 0:
            raise exc
        self._pending = exc


defer_interrupts = _DeferInterrupts()
"""`with defer_interrupts: ...` in the main thread, where Python runs the handlers of signals."""
