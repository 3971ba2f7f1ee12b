"""What the libraries beneath read from the environment when they are imported."""

import os
import sys


def quiet_libraries() -> None:
    """To be called before torch and tqdm are imported; the user's own settings stay."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads must not spin on a shared machine
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
