"""What each way for a command to end comes down to: an exit code and one line."""

import errno

from tlcli.errors import TlcliError, UsageError, is_out_of_memory
from tlcli.text import one_line


class Terminated(KeyboardInterrupt):
    """SIGTERM came. A KeyboardInterrupt, so that nothing that catches Exception holds it up."""


class Abort(BaseException):
    """Carries an error of ours through Hydra, which catches Exception to print it in its own way."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


def ending(exc: BaseException) -> tuple[int, str]:
    """The exit code and the line for an exception that ended a command."""
    match exc:
        case Terminated():
            return 143, ": ".join(["terminated", *map(str, exc.args)])
        case KeyboardInterrupt():
            return 130, ": ".join(["interrupted", *map(str, exc.args)])
        case UsageError():
            return 2, one_line(str(exc))
        case TlcliError():
            return 1, one_line(str(exc))
        case OSError(errno=errno.ENAMETOOLONG | errno.ELOOP):
            return 2, one_line(f"{exc.filename}: {(exc.strerror or '').lower()}; name another")
        case OSError(errno=errno.EACCES | errno.EPERM | errno.EROFS) if exc.filename:
            return 1, one_line(f"{exc.filename}: {(exc.strerror or '').lower()}: tlcli may not read it or write there")
        case OSError(errno=errno.ENOSPC):
            where = f" for {exc.filename}" if exc.filename else ""
            return 1, f"the disk is full: no space left{where}"
    if is_out_of_memory(exc):
        return 1, "out of memory: try a smaller batch_size, with accumulate=2 or more to keep the size of a step"
    what = f"{type(exc).__name__}: {one_line(str(exc))}".rstrip(": ")
    return 1, f"internal error: {what} (rerun with --debug for the traceback)"
