"""What a run looks like: on a terminal with colours and bars, elsewhere as plain lines; in run.log always."""

import io
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from tlcli.cli import tables
from tlcli.cli.logs import log
from tlcli.reporter import EpochRow, Reporter, RunPlan, RunResult
from tlcli.runs.leaderboard import Leaderboard

WORTH_A_LINE = 2.0  # seconds: what took less is not worth a line where there are no bars
LOG_WIDTH = 100


class Screen(Console):
    """stdout. Strings are shown as they are: a class may be called `[red]` or `:fire:`."""

    def __init__(self, width: int | None = None) -> None:
        terminal = sys.stdout.isatty()
        super().__init__(width=width, force_terminal=terminal, markup=False, emoji=False, highlight=False)
        self.live_bars = terminal and not self.is_dumb_terminal

    def on_broken_pipe(self) -> None:
        """The reader of stdout has gone. The run goes on: run.log has everything."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Speed(ProgressColumn):
    """Units a second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.0f} {task.fields['unit']}/s" if task.speed else "", style="dim")


class TerminalReporter(Reporter):
    """Shows a run on stdout and in the log.

    Args:
        backbone: the words of a command line that choose this run's backbone again.
        width: columns; the terminal's where None.
    """

    def __init__(self, backbone: str = "backbone=...", width: int | None = None) -> None:
        self._backbone = backbone
        self._screen = Screen(width)
        self._bars: Progress | None = None
        self._header_shown = False

    @property
    def _wrap(self) -> int | None:
        """Where lines are wrapped: nowhere when they go to a file, so that paths in it stay whole."""
        return self._screen.width if self._screen.is_terminal else None

    def heading(self, text: str) -> None:
        """A line above a job of a sweep."""
        self._header_shown = False
        self._say("")
        self._say(Text(text, style="bold"))

    def note(self, text: str) -> None:
        for line in tables.labelled("note", text, self._wrap):
            self._say(line)

    @contextmanager
    def track(self, label: str, total: int, unit: str = "images") -> Iterator[Callable[[int], None]]:
        """A bar on a terminal; elsewhere a line at the end of what took long."""
        started, done = time.perf_counter(), 0
        with self._bar(label, total, unit) as advance:

            def count(more: int) -> None:
                nonlocal done
                done += more
                advance(more)

            yield count
        seconds = time.perf_counter() - started
        line = f"{label}: {done:,} {unit} in {tables.duration(seconds)}"
        if seconds >= WORTH_A_LINE and not self._screen.live_bars:
            self._say(line)
        else:
            log.info(line)

    def plan(self, plan: RunPlan) -> None:
        for line in tables.plan_lines(plan, self._wrap):
            self._say(line)
        self._say("")
        counts = tables.counts_table(plan)
        if counts is None:
            for line in tables.labelled("a class", tables.counts_ranges(plan), self._wrap):
                self._say(line)
        else:
            self._say(counts)
        self._say("")
        self._say(tables.stages_table(plan.stages))
        self._say("")

    def epoch(self, row: EpochRow) -> None:
        columns = tables.epoch_columns(self._screen.width)
        if not self._header_shown:
            self._say(Text(tables.epoch_header(columns), style="dim"))
            self._header_shown = True
        self._say(Text(tables.epoch_line(row, columns), style="green" if row.best else ""))

    def outcome(self, outcome: RunResult) -> None:
        self._say("")
        for number, line in enumerate(tables.outcome_lines(outcome, self._backbone, self._wrap)):
            self._say(Text(line, style="bold" if number == 0 else ""))

    def leaderboard(self, board: Leaderboard) -> None:
        """The end of a sweep."""
        self._say("")
        self._say(tables.leaderboard_table(board))
        for line in tables.labelled("sweep", tables.shown_path(board.folder), self._wrap):
            self._say(line)

    def _say(self, what: RenderableType) -> None:
        """Print one thing, and write it to the log as plain text."""
        # lines are wrapped already where they can be; what is longer, a path or a command, has to stay whole
        self._screen.print(what, soft_wrap=isinstance(what, str | Text))
        self._screen.file.flush()  # a reader of a pipe follows the run too
        for line in _plain(what):
            log.info(line)

    @contextmanager
    def _bar(self, label: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        """A bar for as long as the block runs, below those that are there already; nothing without live bars."""
        if not self._screen.live_bars:
            yield lambda more: None
            return
        outermost = self._bars is None
        bars = self._bars = self._bars or self._new_bars()
        task = bars.add_task(label, total=total, unit=unit)
        try:
            if outermost:
                bars.start()
            yield lambda more: bars.advance(task, more)
        finally:
            bars.remove_task(task)
            if outermost:
                bars.stop()
                self._bars = None

    def _new_bars(self) -> Progress:
        """Bars that fit the width and vanish when they are done."""
        narrow = self._screen.width < 60
        return Progress(
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")),
            BarColumn(bar_width=6 if narrow else 20),
            TaskProgressColumn(),
            *([] if narrow else [Speed()]),
            TimeRemainingColumn(compact=True),
            console=self._screen,
            transient=True,
            refresh_per_second=4,  # drawing must not take time from two busy cores
        )


def _plain(what: RenderableType) -> list[str]:
    """The lines of something without colours, for the log."""
    if isinstance(what, str | Text):
        return [str(what).rstrip()] if str(what).strip() else []
    page = Console(file=io.StringIO(), width=LOG_WIDTH, color_system=None, markup=False, emoji=False, highlight=False)
    with page.capture() as capture:
        page.print(what)
    return [line.rstrip() for line in capture.get().splitlines() if line.strip()]
