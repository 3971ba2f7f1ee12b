"""The end of a sweep: its leaderboard on the terminal, and its failed jobs."""

import sys
from pathlib import Path

from tlcli.cli.view import TerminalWatch
from tlcli.runs import leaderboard


def finish(folder: Path) -> int:
    """Write and show the leaderboard of a sweep; 0, or 1 where a job failed."""
    board = leaderboard.write(folder)
    TerminalWatch().leaderboard(board)
    failed = [job for job in board.jobs if job.status != "done"]
    if failed:
        print(f"tlcli train: {len(failed)} of {len(board.jobs)} jobs did not finish:", file=sys.stderr)
    for job in failed:
        print(f"  {job.name}  {job.status}: {job.error or 'no reason recorded'}", file=sys.stderr)
    return 1 if failed else 0
