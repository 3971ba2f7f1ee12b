"""How PyTorch and what builds on it are imported."""

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


def quiet_libraries() -> None:
    """Set what PyTorch and tqdm read from the environment when they are imported; the user's own settings stay."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads must not spin on a shared machine
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")


@contextmanager
def importing() -> Iterator[None]:
    """For the imports of PyTorch and of what builds on it: quiet, and without the garbage collector.

    What they make lasts as long as the process. The collector would look through it each time that its objects have
    grown by a quarter, for a sixth of a second with all that training imports: it does so neither within nor ever
    after. Where nothing is imported any more nothing changes, for there may be garbage by then.
    """
    quiet_libraries()
    modules, was_enabled = len(sys.modules), gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > modules:
            gc.freeze()
        if was_enabled:
            gc.enable()
