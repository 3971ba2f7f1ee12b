"""How figures look as text: lines and tables that fit a width. No state, no terminal."""

import shlex
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from tlcli.reporter import EpochRow, RunPlan, RunResult, StageRow
from tlcli.runs.leaderboard import Job, Leaderboard

MANY_CLASSES = 12
"""With more classes than this a range stands for a row each."""

LABEL = 11  # columns of the labels on the left


@dataclass(frozen=True)
class Column:
    """A column of the epoch rows. Where the width is short, columns with a higher `drop` go first."""

    title: str
    width: int
    cell: Callable[[EpochRow], str]
    drop: int


COLUMNS = (
    Column("epoch", 6, lambda row: f"{row.epoch}/{row.epochs}", 0),
    Column("train loss", 10, lambda row: _fixed(row.train_loss), 3),
    Column("train acc", 9, lambda row: _fixed(row.train_accuracy), 4),
    Column("val loss", 8, lambda row: _fixed(row.val_loss), 2),
    Column("val acc", 7, lambda row: _fixed(row.val_accuracy), 0),
    Column("val f1", 6, lambda row: _fixed(row.val_macro_f1), 5),
    Column("rate", 8, lambda row: rate(row.lr), 7),
    Column("img/s", 6, lambda row: _speed(row.images_per_second), 6),
    Column("time", 6, lambda row: duration(row.seconds), 1),
    Column("", 4, lambda row: "best" if row.best else "", 0),
)


def epoch_columns(width: int) -> list[Column]:
    """The columns of the epoch rows that fit a width; the epoch, its validation accuracy and its mark always do."""
    columns = list(COLUMNS)
    while len(_joined(["x" * column.width for column in columns])) > width:
        first = max(columns, key=lambda column: column.drop)
        if first.drop == 0:
            break
        columns.remove(first)
    return columns


def epoch_header(columns: Sequence[Column]) -> str:
    """The titles above the epoch rows."""
    return _joined([column.title.rjust(column.width) for column in columns])


def epoch_line(row: EpochRow, columns: Sequence[Column]) -> str:
    """One epoch's figures under their titles."""
    return _joined([column.cell(row).rjust(column.width) for column in columns])


def plan_lines(plan: RunPlan, width: int | None) -> list[str]:
    """What stands above the tables of a plan, and the notes."""
    sizes = ", ".join(f"{split} {sum(counts):,}" for split, counts in plan.counts.items())
    rows = [
        ("run", shown_path(plan.run)),
        ("data", f"{plan.dataset}: {len(plan.classes):,} classes; images: {sizes}"),
        ("model", plan.model),
        ("image", plan.image),
        ("training", plan.training),
        ("device", plan.device),
        *(("note", note) for note in plan.notes),
    ]
    lines = [line for label, value in rows for line in labelled(label, value, width)]
    return [*lines, *wrapped(f"activations: {plan.activations}", width)]


def counts_table(plan: RunPlan) -> Table | None:
    """Images of each class in each split; None where the classes are too many for a row each."""
    if len(plan.classes) > MANY_CLASSES:
        return None
    table = figures_table("class", *plan.counts)
    for index, name in enumerate(plan.classes):
        table.add_row(name, *(f"{counts[index]:,}" for counts in plan.counts.values()))
    return table


def counts_ranges(plan: RunPlan) -> str:
    """The fewest and the most images of a class in each split."""
    ranges = []
    for split, counts in plan.counts.items():
        low, high = min(counts, default=0), max(counts, default=0)
        ranges.append(f"{split} {low:,}" if low == high else f"{split} {low:,} to {high:,}")
    return "; ".join(ranges)


def stages_table(stages: Sequence[StageRow]) -> Table:
    """Parameters in total, those that train and their rate, for each stage; a dash where nothing trains."""
    table = figures_table("stage", "parameters", "trainable", "rate")
    for stage in stages:
        table.add_row(stage.name, f"{stage.parameters:,}", f"{stage.trainable:,}", rate(stage.lr))
    parameters, trainable = sum(s.parameters for s in stages), sum(s.trainable for s in stages)
    table.add_row("total", f"{parameters:,}", f"{trainable:,}", "")
    return table


def outcome_lines(outcome: RunResult, backbone: str, width: int | None) -> list[str]:
    """The result of a run, where it is, and the command to use next."""
    low, high = outcome.ci95
    confused = ", ".join(f"{true} taken for {predicted} ({n})" for true, predicted, n in outcome.confused)
    rows = [
        ("test", f"accuracy {outcome.accuracy:.4f}, 95 % interval {low:.4f} to {high:.4f}, n = {outcome.n:,}"),
        ("top-5", _fixed(outcome.top5) if outcome.top5 is not None else ""),
        ("confused", confused),
        ("chosen", f"epoch {outcome.epoch}, validation accuracy {outcome.val_accuracy:.4f}"),
        ("took", duration(outcome.seconds)),
        ("checkpoint", shown_path(outcome.checkpoint)),
    ]
    lines = [line for label, value in rows if value for line in labelled(label, value, width)]
    words = [
        "tlcli train",
        *backbone.split(),
        f"backbone.weights={shlex.quote(shown_path(outcome.run))}",
        "dataset=...",
    ]
    command = "  " + " ".join(words)
    fits = width is None or len(command) <= width
    following = [command] if fits else ["  " + " \\\n    ".join(words)]  # a shell reads both alike
    return [*lines, "", "To transfer from this run:", *following]


def leaderboard_table(board: Leaderboard) -> Table:
    """The jobs of a sweep, the best one first."""
    figure = board.figure.replace("_", " ")
    table = figures_table("rank", "job", *board.keys, f"val {figure}", "test accuracy", "95 % interval", "status")
    for job in board.jobs:
        own = [job.values.get(key, "") for key in board.keys]
        rank = str(job.rank) if job.rank else "-"
        table.add_row(
            rank, job.name, *own, _fixed(job.validation), _fixed(job.test_accuracy), _interval(job), job.status
        )
    return table


def _interval(job: Job) -> str:
    return f"{job.test_ci95[0]:.4f} to {job.test_ci95[1]:.4f}" if job.test_ci95 else "-"


def labelled(label: str, value: str, width: int | None) -> list[str]:
    """A value behind its label, wrapped under itself; not wrapped where the width is None."""
    first = label.ljust(LABEL)
    if width is None:
        return [first + value]
    wrapper = textwrap.TextWrapper(max(width, LABEL + 8), break_on_hyphens=False, break_long_words=False)
    wrapper.initial_indent, wrapper.subsequent_indent = first, " " * LABEL
    return wrapper.wrap(value) or [first.rstrip()]


def wrapped(text: str, width: int | None) -> list[str]:
    """A sentence, wrapped under its second word where the width is not None."""
    return (
        [text] if width is None else textwrap.wrap(text, width, subsequent_indent=" " * LABEL, break_long_words=False)
    )


def duration(seconds: float) -> str:
    """Seconds for people: 0.42 s, 12.3 s, 4:05, 2:00:00."""
    if seconds < 60:
        return f"{seconds:.2f} s" if seconds < 1 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def rate(lr: float | None) -> str:
    """A learning rate in few characters; a dash where nothing trains."""
    return "-" if lr is None else f"{lr:.2g}"


def shown_path(path: Path) -> str:
    """A path from the working directory where it lies in that, so that it is short and can be typed."""
    try:
        return str(path.resolve().relative_to(Path.cwd().resolve()))
    except ValueError:
        return str(path)


def figures_table(name: str, *figures: str) -> Table:
    """A table without lines: names on the left, which wrap where the width is short, and figures, which do not."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=True, header_style="dim")
    table.add_column(name, overflow="fold")
    for figure in figures:
        table.add_column(figure, justify="right", overflow="fold")
    return table


def _joined(cells: Sequence[str]) -> str:
    return "  ".join(cells).rstrip()


def _fixed(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _speed(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if value >= 10 else f"{value:.1f}"
