"""What lasts as long as the process is no garbage: the collector need not look for it there."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def lasting() -> Iterator[None]:
    """For a block whose objects stay, as those of imports and of a compiled network do: Python's garbage collector
    looks through them neither within nor ever after. It would each time that their number has grown by a quarter,
    for a sixth of a second with the libraries of a training run."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()
