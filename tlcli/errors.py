"""The exceptions that a user may see. The message of each is one line: what is wrong, where, what to do.

TlcliError            a run failed: exit code 1
├── UsageError        the command line, the config or what it names is wrong: exit code 2
├── BadImages         files of the data set do not decode
├── FrozenChanged     a tensor that was to stay frozen did not
├── NotFinite         the loss became NaN or infinite
└── OutOfMemory       a training step needs more memory than there is
"""

from collections.abc import Iterable


class TlcliError(Exception):
    """A run failed for a reason that the message gives; no traceback is needed to act on it."""


class UsageError(TlcliError):
    """The command line, a config, or a file that it names is wrong."""


class BadImagesError(TlcliError):
    """Some files of the data set are not images, or are damaged: `files` has (file, reason) of each."""

    def __init__(self, message: str, files: Iterable[tuple[str, str]] = ()) -> None:
        super().__init__(message)
        self.files = tuple(files)


class FrozenTensorError(TlcliError):
    """The freeze contract was broken: a frozen tensor differs from what it was before training."""


class NonFiniteLossError(TlcliError):
    """The training loss became NaN or infinite."""


class OutOfMemory(TlcliError):
    """A training step needs more memory than there is."""


def is_out_of_memory(exc: BaseException) -> bool:
    """Whether an accelerator or the machine ran out of memory. By name and text: torch is not imported here."""
    names = {kind.__name__ for kind in type(exc).__mro__}
    text = str(exc).lower()
    return bool(names & {"MemoryError", "OutOfMemoryError"}) or (
        isinstance(exc, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)
    )
