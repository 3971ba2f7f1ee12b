"""The reporter of a terminal: colors and progress bars there, plain lines elsewhere, and run.log always."""

import logging
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from tlcli.cli.table import number_text, table_lines
from tlcli.reporter import EpochRow, Reporter, RunPlan
from tlcli.text import duration_text, labelled, shown_path, strip_control_chars

log = logging.getLogger("tlcli")
log.setLevel(logging.INFO)

MIN_SHOWN_SECONDS = 2.0  # without bars, shorter work gets no line
MAX_CLASS_ROWS = 12  # with more classes, the plan shows the range of their counts

EPOCH_COLUMNS: dict[str, tuple[int, Callable[[EpochRow], str]]] = {  # width and text, by title
    "epoch": (6, lambda row: f"{row.epoch}/{row.epochs}"),
    "train loss": (10, lambda row: number_text(row.train_loss)),
    "train acc": (9, lambda row: number_text(row.train_accuracy)),
    "val loss": (8, lambda row: number_text(row.val_loss)),
    "val acc": (7, lambda row: number_text(row.val_accuracy)),
    "val f1": (6, lambda row: number_text(row.val_macro_f1)),
    "lr": (8, lambda row: number_text(row.lr, ".2g")),
    "img/s": (6, lambda r: number_text(r.images_per_second, ".1f" if (r.images_per_second or 0) < 10 else ",.0f")),
    "time": (6, lambda row: duration_text(row.seconds)),
    "": (4, lambda row: "best" if row.best else ""),
}
NARROW = ("lr", "img/s", "val f1", "train acc", "train loss", "val loss", "time")  # left out in this order


class Screen(Console):
    """The console on stdout, or on stderr. Strings are shown as they are: a class may be called `[red]` or `:fire:`."""

    def __init__(self, *, on_stderr: bool) -> None:
        terminal = (sys.stderr if on_stderr else sys.stdout).isatty()
        super().__init__(stderr=on_stderr, force_terminal=terminal, markup=False, emoji=False, highlight=False)
        self.live_bars = terminal and not self.is_dumb_terminal

    def on_broken_pipe(self) -> None:
        """Stop writing to a reader that has gone. The run continues: run.log has everything."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


class RateColumn(ProgressColumn):
    """Units per second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.0f} {task.fields['unit']}/s" if task.speed else "", style="dim")


class TerminalReporter(Reporter):
    """Shows a run on stdout or stderr, and in the log. `backbone` has the words that choose its backbone again.

    With `quiet` the log alone has it.
    """

    def __init__(self, backbone: str = "backbone=...", *, on_stderr: bool = False, quiet: bool = False) -> None:
        self._backbone = backbone
        self._screen = Screen(on_stderr=on_stderr)
        self._screen.quiet = quiet
        # lines in a file are not wrapped, so that paths stay whole
        self._wrap = self._screen.width if self._screen.is_terminal else None
        is_narrow = self._screen.width < 60
        self._bars = Progress(
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")),
            BarColumn(bar_width=6 if is_narrow else 20),
            TaskProgressColumn("{task.percentage:3.0f}%", "{task.completed:,.0f}", style="progress.percentage"),
            *([] if is_narrow else [RateColumn()]),
            TimeRemainingColumn(compact=True),
            console=self._screen,
            transient=True,
            refresh_per_second=4,  # drawing must not take time from two busy cores
            disable=quiet or not self._screen.live_bars,
        )
        self._header_shown = False

    def heading(self, text: str) -> None:
        """Show a line above a job of a sweep."""
        self._header_shown = False
        self.show("")
        self.show(Text(strip_control_chars(text), style="bold"))

    def note(self, text: str) -> None:
        self.show_labelled(("note", text))

    @contextmanager
    def track(self, label: str, total: int | None, unit: str = "images") -> Iterator[Callable[[int], None]]:
        """Show a bar on a terminal; elsewhere a line at the end of work that took long."""
        start = time.perf_counter()
        if not self._bars.task_ids:
            self._bars.start()
        task = self._bars.add_task(label, total=total, unit=unit)
        try:
            yield partial(self._bars.advance, task)
        finally:
            done = self._bars.tasks[-1].completed  # of this task: the latest ends first
            self._bars.remove_task(task)
            if not self._bars.task_ids:
                self._bars.stop()
        seconds = time.perf_counter() - start
        line = f"{label}: {done:,.0f} {unit} in {duration_text(seconds)}"
        if seconds >= MIN_SHOWN_SECONDS and not self._screen.live_bars:
            self.show(line)
        else:
            log.info(line)

    def plan(self, plan: RunPlan) -> None:
        sizes = ", ".join(f"{split} {sum(counts):,}" for split, counts in plan.counts.items())
        self.show_labelled(
            ("run", shown_path(plan.run)),
            ("data", f"{plan.dataset}: {len(plan.classes):,} classes; images: {sizes}"),
            ("model", plan.model),
            ("image", plan.image),
            ("training", plan.training),
            ("device", plan.device),
            *(("note", note) for note in plan.notes),
            ("activations: ", plan.activations),
        )
        self.show("")
        if len(plan.classes) > MAX_CLASS_ROWS:
            bounds = {split: (min(counts), max(counts)) for split, counts in plan.counts.items()}
            ranges = [f"{split} {a:,}" if a == b else f"{split} {a:,} to {b:,}" for split, (a, b) in bounds.items()]
            self.show_labelled(("per class", "; ".join(ranges)))
        else:
            numbers = [[f"{n:,}" for n in counts] for counts in plan.counts.values()]
            self.show_table(("<class", *plan.counts), zip(plan.classes, *numbers, strict=True))
        self.show("")
        stages = [(s.name, f"{s.parameters:,}", f"{s.trainable:,}", number_text(s.lr, ".2g")) for s in plan.stages]
        total, trainable = sum(s.parameters for s in plan.stages), sum(s.trainable for s in plan.stages)
        stages.append(("total", f"{total:,}", f"{trainable:,}", ""))
        self.show_table(("<stage", "parameters", "trainable", "lr"), stages)
        self.show("")

    def epoch(self, row: EpochRow) -> None:
        has_val = row.val_loss is not None
        columns = {title: c for title, c in EPOCH_COLUMNS.items() if has_val or not title.startswith("val")}
        for title in NARROW:
            if sum(width + 2 for width, _ in columns.values()) - 2 > (self._wrap or math.inf):
                columns.pop(title, None)
        if not self._header_shown:
            header = "  ".join(title.rjust(width) for title, (width, _) in columns.items())
            self.show(Text(header.rstrip(), style="dim"))
            self._header_shown = True
        line = "  ".join(text(row).rjust(width) for width, text in columns.values())
        self.show(Text(line.rstrip(), style="green" if row.best else ""))

    def outcome(self, run: Path, result: Mapping[str, Any]) -> None:
        self.show("")
        validation = "" if result["val_accuracy"] is None else f", validation accuracy {result['val_accuracy']:.4f}"
        if result["left_out"] is not None:
            validation += f" in the first fit, on {result['left_out']:,} images left out"
        if folds := result.get("cross_validation"):
            validation, (low, high) = "", folds["accuracy_ci95"]
            text = (
                f"accuracy {folds['accuracy']:.4f} on {folds['n']:,} images, 95 % interval {low:.4f} to {high:.4f} "
                f"(approximate: folds share training images), mean {folds['mean']:.4f} and standard deviation "
                f"{folds['standard_deviation']:.4f} of {folds['folds']} folds"
            )
            self.show_labelled(("folds", text), ("test", "" if "accuracy" in result else "no test split"), style="bold")
        if "accuracy" in result:
            low, high = result["accuracy_ci95"]
            test = f"accuracy {result['accuracy']:.4f}, 95 % interval {low:.4f} to {high:.4f}, n = {result['n']:,}"
            self.show_labelled(("test", test), style="bold")
            self.show_labelled(
                ("top-5", "" if result["top5"] is None else f"{result['top5']:.4f}"),
                ("confused", ", ".join(f"{true} taken for {wrong} ({n})" for true, wrong, n in result["confused"])),
            )
        self.show_labelled(
            ("kept", f"epoch {result['epoch']}{validation}"),
            ("took", duration_text(result["seconds"]) + (" for all folds and the refit" if folds else "")),
            ("checkpoint", shown_path(run / result["checkpoint"])),
        )
        if "accuracy" not in result and not folds:
            return  # a fold: the refit has the weights to transfer
        weights = f"backbone.weights={shlex.quote(shown_path(run))}"
        self.show(f"\nTo transfer from this run:\n  tlcli train {self._backbone} {weights} dataset=...")

    def leaderboard(self, folder: Path, board: Mapping[str, Any]) -> None:
        """Show the ranked jobs of sweep.json at the end of a sweep."""
        metric = board["figure"].replace("_", " ")
        titles = ["rank", "<job", *board["keys"], f"val {metric}", "test accuracy", "95 % interval", "status"]
        rows = []
        for job in board["jobs"]:
            values = [job["values"].get(key, "") for key in board["keys"]]
            interval = "{:.4f} to {:.4f}".format(*job["test_ci95"]) if job["test_ci95"] else None
            is_untested = job["status"] == "done" and job["test_accuracy"] is None
            test = "not tested" if is_untested else number_text(job["test_accuracy"])
            metrics = [number_text(job["validation"]), test, interval]
            rows.append([job["rank"], job["name"], *values, *metrics, job["status"]])
        self.show("")
        self.show_table(titles, rows)
        self.show_labelled(("sweep", shown_path(folder)))

    def show_labelled(self, *rows: tuple[str, str], style: str = "") -> None:
        """Show each value behind its label, without those that are empty. Classes may have names with control codes."""
        for label, value in rows:
            for line in labelled(label, value, self._wrap) if value else ():
                self.show(Text(strip_control_chars(line), style=style))

    def show_table(self, titles: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """Show a table, wrapped to the width of a terminal."""
        self.show("\n".join(table_lines(titles, rows, self._wrap, wrap=True)))

    def show(self, content: str | Text) -> None:
        """Print lines, and log them without colors. Files of someone else may hold control codes."""
        if isinstance(content, str):
            content = "\n".join(map(strip_control_chars, content.split("\n")))
        self._screen.print(content, soft_wrap=True)
        self._screen.file.flush()  # the reader of a pipe follows the run too
        for line in str(content).splitlines():
            if line.strip():
                log.info(line.rstrip())
