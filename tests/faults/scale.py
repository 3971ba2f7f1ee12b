"""How often the tests of faults try: a few times by default; with TLCLI_FAULTS=full as often as docs/reliability.md
says."""

import os

SIZES = ("quick", "full")


def scale(quick: int, full: int) -> int:
    """One number or the other. Raises ValueError for a TLCLI_FAULTS that is neither quick nor full."""
    wanted = os.environ.get("TLCLI_FAULTS") or "quick"
    if wanted not in SIZES:
        raise ValueError(f"TLCLI_FAULTS={wanted}: give one of {', '.join(SIZES)}")
    return full if wanted == "full" else quick
