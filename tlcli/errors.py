"""The exceptions that a user may see. The message of each is one line: what is wrong, where, what to do."""

from collections.abc import Iterable


class TlcliError(Exception):
    """A run failed for a reason that the message gives: exit code 1."""


class UsageError(TlcliError):
    """The command line, a config, or a file that it names is wrong: exit code 2."""


class BadImagesError(TlcliError):
    """Some files of the dataset are not images, or are damaged: `files` has (file, reason) of each."""

    def __init__(self, message: str, files: Iterable[tuple[str, str]] = ()) -> None:
        super().__init__(message)
        self.files = tuple(files)


class StoppedError(TlcliError):
    """A trial of a search was stopped, for the reason that the message gives."""


class FrozenTensorError(TlcliError):
    """A frozen tensor differs from what it was before training."""


# of one candidate among several: its config does not suit it, or memory is lacking (RuntimeError in torch)
CANDIDATE_ERRORS = (TlcliError, RuntimeError, MemoryError)


def is_out_of_memory(exc: BaseException) -> bool:
    """Return True if a device or the machine ran out of memory; torch's errors are known by their text."""
    text = str(exc).lower()
    words = ("out of memory", "can't allocate memory", "_status_alloc_failed")  # the last is of cuBLAS and cuDNN
    return isinstance(exc, MemoryError) or (isinstance(exc, RuntimeError) and any(word in text for word in words))
