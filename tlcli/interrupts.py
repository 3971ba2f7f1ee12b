"""Signals that end a run, held back while a step is half done: what is written afterwards is of a whole step."""

from types import TracebackType


class _Steady:
    """A block that an interrupt waits for. Blocks may be nested; the outermost one lets it through."""

    def __init__(self) -> None:
        self._depth = 0
        self._waiting: BaseException | None = None

    def __enter__(self) -> None:
        self._depth += 1

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._depth -= 1
        if self._depth == 0 and self._waiting is not None:
            waiting, self._waiting = self._waiting, None
            raise waiting

    def interrupt(self, exc: BaseException) -> None:
        """Raise what a signal means: now, or at the end of the block."""
        if self._depth == 0:
            raise exc
        self._waiting = exc


defer_interrupts = _Steady()
"""`with defer_interrupts: ...` in the main thread, where Python runs the handlers of signals."""
