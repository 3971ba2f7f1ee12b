"""Mounts of one's own, where the system allows them."""

import shutil
import subprocess
import sys
from functools import cache

UNSHARE = ("unshare", "-rm")
"""What makes a command root of a namespace of its own, in which it may mount."""


@cache
def can_mount() -> bool:
    """Whether this user may have mounts of his own."""
    if sys.platform != "linux" or shutil.which("unshare") is None:
        return False
    command = [*UNSHARE, "mount", "-t", "tmpfs", "none", "/mnt"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0
