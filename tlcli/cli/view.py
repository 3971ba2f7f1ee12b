"""The reporter of a terminal: colors and progress bars there, plain lines elsewhere, and run.log always."""

import io
import logging
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from tlcli.cli.table import TableColumn, make_table
from tlcli.reporter import EpochRow, Reporter, RunPlan
from tlcli.text import duration_text, labelled, shown_path

log = logging.getLogger("tlcli")

MIN_SHOWN_SECONDS = 2.0  # without bars, shorter work gets no line
MAX_CLASS_ROWS = 12  # with more classes, the plan shows the range of their counts
LOG_WIDTH = 100

# title, width, priority (columns with a higher one go first if the terminal is narrow; 0 stays), text
EpochColumn = tuple[str, int, int, Callable[[EpochRow], str]]
EPOCH_COLUMNS: tuple[EpochColumn, ...] = (
    ("epoch", 6, 0, lambda row: f"{row.epoch}/{row.epochs}"),
    ("train loss", 10, 3, lambda row: _number(row.train_loss)),
    ("train acc", 9, 4, lambda row: _number(row.train_accuracy)),
    ("val loss", 8, 2, lambda row: _number(row.val_loss)),
    ("val acc", 7, 0, lambda row: _number(row.val_accuracy)),
    ("val f1", 6, 5, lambda row: _number(row.val_macro_f1)),
    ("rate", 8, 7, lambda row: _number(row.lr, ".2g")),
    (
        "img/s",
        6,
        6,
        lambda row: _number(row.images_per_second, ",.0f" if (row.images_per_second or 0) >= 10 else ".1f"),
    ),
    ("time", 6, 1, lambda row: duration_text(row.seconds)),
    ("", 4, 0, lambda row: "best" if row.best else ""),
)


class Screen(Console):
    """The console on stdout. Strings are shown as they are: a class may be called `[red]` or `:fire:`."""

    def __init__(self, width: int | None = None) -> None:
        terminal = sys.stdout.isatty()
        super().__init__(width=width, force_terminal=terminal, markup=False, emoji=False, highlight=False)
        self.live_bars = terminal and not self.is_dumb_terminal

    def on_broken_pipe(self) -> None:
        """Stop writing to stdout, whose reader has gone. The run continues: run.log has everything."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class RateColumn(ProgressColumn):
    """Units per second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.0f} {task.fields['unit']}/s" if task.speed else "", style="dim")


class TerminalReporter(Reporter):
    """Shows a run on stdout and in the log.

    Args:
        backbone: the words of a command line that choose the backbone of this run again.
        width: columns; the terminal's if None.
    """

    def __init__(self, backbone: str = "backbone=...", width: int | None = None) -> None:
        self._backbone = backbone
        self._screen = Screen(width)
        # lines in a file are not wrapped, so that paths stay whole
        self._wrap = self._screen.width if self._screen.is_terminal else None
        self._bars: Progress | None = None
        self._header_shown = False

    def heading(self, text: str) -> None:
        """Show a line above a job of a sweep."""
        self._header_shown = False
        self._say("")
        self._say(Text(text, style="bold"))

    def note(self, text: str) -> None:
        self._say_labelled(("note", text))

    @contextmanager
    def track(self, label: str, total: int, unit: str = "images") -> Iterator[Callable[[int], None]]:
        """Show a bar on a terminal; elsewhere a line at the end of work that took long."""
        start, done = time.perf_counter(), 0
        bars, outermost = self._bars, self._bars is None
        if bars is None and self._screen.live_bars:
            narrow = self._screen.width < 60
            self._bars = bars = Progress(
                TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")),
                BarColumn(bar_width=6 if narrow else 20),
                TaskProgressColumn(),
                *([] if narrow else [RateColumn()]),
                TimeRemainingColumn(compact=True),
                console=self._screen,
                transient=True,
                refresh_per_second=4,  # drawing must not take time from two busy cores
            )
        task = bars.add_task(label, total=total, unit=unit) if bars else None

        def count(more: int) -> None:
            nonlocal done
            done += more
            if bars and task is not None:
                bars.advance(task, more)

        try:
            if bars and outermost:
                bars.start()
            yield count
        finally:
            if bars and task is not None:
                bars.remove_task(task)
            if bars and outermost:
                bars.stop()
                self._bars = None
        seconds = time.perf_counter() - start
        line = f"{label}: {done:,} {unit} in {duration_text(seconds)}"
        if seconds >= MIN_SHOWN_SECONDS and not self._screen.live_bars:
            self._say(line)
        else:
            log.info(line)

    def plan(self, plan: RunPlan) -> None:
        sizes = ", ".join(f"{split} {sum(counts):,}" for split, counts in plan.counts.items())
        self._say_labelled(
            ("run", shown_path(plan.run)),
            ("data", f"{plan.dataset}: {len(plan.classes):,} classes; images: {sizes}"),
            ("model", plan.model),
            ("image", plan.image),
            ("training", plan.training),
            ("device", plan.device),
            *(("note", note) for note in plan.notes),
            ("activations: ", plan.activations),
        )
        self._say("")
        if len(plan.classes) > MAX_CLASS_ROWS:
            bounds = {split: (min(counts), max(counts)) for split, counts in plan.counts.items()}
            ranges = [f"{split} {a:,}" if a == b else f"{split} {a:,} to {b:,}" for split, (a, b) in bounds.items()]
            self._say_labelled(("per class", "; ".join(ranges)))
        else:
            columns = [TableColumn("class", left=True), *map(TableColumn, plan.counts)]
            rows = zip(plan.classes, *([f"{n:,}" for n in counts] for counts in plan.counts.values()), strict=True)
            self._say(make_table(columns, rows))
        self._say("")
        stages = [(s.name, f"{s.parameters:,}", f"{s.trainable:,}", _number(s.lr, ".2g")) for s in plan.stages]
        total, trainable = sum(s.parameters for s in plan.stages), sum(s.trainable for s in plan.stages)
        columns = [TableColumn("stage", left=True), *map(TableColumn, ("parameters", "trainable", "rate"))]
        self._say(make_table(columns, [*stages, ("total", f"{total:,}", f"{trainable:,}", "")]))
        self._say("")

    def epoch(self, row: EpochRow) -> None:
        columns = list(EPOCH_COLUMNS)
        while sum(column[1] + 2 for column in columns) - 2 > self._screen.width and any(c[2] for c in columns):
            columns.remove(max(columns, key=lambda column: column[2]))
        if not self._header_shown:
            header = "  ".join(title.rjust(width) for title, width, _, _ in columns)
            self._say(Text(header.rstrip(), style="dim"))
            self._header_shown = True
        line = "  ".join(text(row).rjust(width) for _, width, _, text in columns)
        self._say(Text(line.rstrip(), style="green" if row.best else ""))

    def outcome(self, run: Path, result: Mapping[str, Any]) -> None:
        low, high = result["accuracy_ci95"]
        confused = ", ".join(f"{true} taken for {predicted} ({n})" for true, predicted, n in result["confused"])
        rows = [
            ("top-5", "" if result["top5"] is None else f"{result['top5']:.4f}"),
            ("confused", confused),
            ("chosen", f"epoch {result['epoch']}, validation accuracy {result['val_accuracy']:.4f}"),
            ("took", duration_text(result["seconds"])),
            ("checkpoint", shown_path(run / result["checkpoint"])),
        ]
        self._say("")
        test = f"accuracy {result['accuracy']:.4f}, 95 % interval {low:.4f} to {high:.4f}, n = {result['n']:,}"
        self._say_labelled(("test", test), style="bold")
        self._say_labelled(*((label, text) for label, text in rows if text))
        weights = f"backbone.weights={shlex.quote(shown_path(run))}"
        words = ["tlcli train", *self._backbone.split(), weights, "dataset=..."]
        command = " ".join(words)
        if self._wrap is not None and len(command) + 2 > self._wrap:
            command = " \\\n    ".join(words)  # a shell reads both alike
        self._say(f"\nTo transfer from this run:\n  {command}")

    def leaderboard(self, folder: Path, board: Mapping[str, Any]) -> None:
        """Show the ranked jobs of sweep.json at the end of a sweep."""
        metric = board["figure"].replace("_", " ")
        titles = [*board["keys"], f"val {metric}", "test accuracy", "95 % interval", "status"]
        rows = [
            (
                job["rank"],
                job["name"],
                *(job["values"].get(key, "") for key in board["keys"]),
                _number(job["validation"]),
                _number(job["test_accuracy"]),
                "{:.4f} to {:.4f}".format(*job["test_ci95"]) if job["test_ci95"] else None,
                job["status"],
            )
            for job in board["jobs"]
        ]
        self._say("")
        self._say(make_table([TableColumn("rank"), TableColumn("job", left=True), *map(TableColumn, titles)], rows))
        self._say_labelled(("sweep", shown_path(folder)))

    def _say_labelled(self, *rows: tuple[str, str], style: str = "") -> None:
        for label, value in rows:
            for line in labelled(label, value, self._wrap):
                self._say(Text(line, style=style))

    def _say(self, content: RenderableType) -> None:
        """Print a line or a table, and log its lines without colors."""
        self._screen.print(content, soft_wrap=isinstance(content, str | Text))
        self._screen.file.flush()  # the reader of a pipe follows the run too
        text = str(content)
        if not isinstance(content, str | Text):
            page = Console(file=io.StringIO(), width=LOG_WIDTH, color_system=None)
            with page.capture() as capture:
                page.print(content)
            text = capture.get()
        for line in text.splitlines():
            if line.strip():
                log.info(line.rstrip())


def _number(value: float | None, form: str = ".4f") -> str:
    return "-" if value is None else format(value, form)
