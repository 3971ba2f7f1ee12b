"""The run directories that a command line may name, for completion."""

from collections.abc import Iterator
from pathlib import Path

PLACES = ("outputs/*/*/run.json", "outputs/*/*/*/run.json")
"""Where `tlcli train` leaves them: OUT/DATE/TIME, and below that the jobs of a sweep."""

MOST = 200


def run_folders() -> Iterator[str]:
    """The runs below outputs/, the newest first."""
    found = [path.parent.as_posix() for place in PLACES for path in Path().glob(place)]
    yield from sorted(found, reverse=True)[:MOST]
