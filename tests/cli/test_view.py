"""A run as the reporter shows it, on a terminal and elsewhere."""

import io
import logging
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.test_predict import Terminal
from tlcli.cli.view import TerminalReporter
from tlcli.reporter import EpochRow, RunPlan, StageRow

ESCAPE = "\x1b"
RUN = Path("outputs/2026-11-24/05-23-11")


def plan(classes: int = 10) -> RunPlan:
    return RunPlan(
        run=RUN,
        name="digits-efficientnet_lite0-none",
        dataset="digits",
        classes=tuple(f"[red]class {number}" for number in range(classes)),
        counts={split: tuple(range(low, low + classes)) for split, low in (("train", 1200), ("val", 140))},
        model="efficientnet_lite0 with ImageNet weights and a new head for 10 classes",
        image="96 px, squashed",
        stages=(StageRow("stem", 23_508_032, 0, None), StageRow("head", 12_810, 12_810, 3e-4)),
        training="adamw, lr 0.0003, cosine, batches of 32, 4 epochs, label smoothing of 0.1",
        device="cpu, float32, channels_last: bfloat16 is slower for depthwise convolutions here",
        activations="computed once and cached: 1,437 rows, 3.7 MB, about 4 s",
        notes=("val is held out of train, for the data has none",),
    )


def row(epoch: int = 1) -> EpochRow:
    return EpochRow(epoch, 100, 0.5, 0.9, 0.4, 0.91, 0.9, 3e-4, 12_345.6, 12.3, True)


def show(reporter: TerminalReporter, classes: int = 10) -> None:
    """Report a whole run."""
    with reporter.track("decoding", 3) as advance:
        advance(3)
    reporter.plan(plan(classes))
    with reporter.track("training", 10) as advance, reporter.track("inner", 5) as inner:
        advance(10)
        inner(5)
    reporter.epoch(EpochRow(0, 100, None, None, 0.4, 0.91, 0.9, None, None, 1.5, False))
    reporter.epoch(row())
    reporter.note("early stop: no better epoch since epoch 1")
    result = {"accuracy": 0.98333, "accuracy_ci95": [0.9641, 0.9924], "top5": 0.999, "n": 359, "epoch": 3}
    result |= {"seconds": 63.2, "val_accuracy": 0.9861, "left_out": None}
    result |= {"confused": [("[red]8", "1", 3), ("5", "9", 2)]}
    reporter.outcome(RUN, {**result, "checkpoint": "checkpoints/best.safetensors"})


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[[], io.StringIO]:
    """Return a function that replaces stdout by a terminal; pytest replaces stdout before the test."""
    for name in ("NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "FORCE_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")

    def attach() -> io.StringIO:
        monkeypatch.setattr(sys, "stdout", stdout := Terminal())
        return stdout

    return attach


def test_plain_lines_if_stdout_is_no_terminal(capsys, monkeypatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")  # of no terminal
    show(TerminalReporter("backbone=efficientnet_lite0"))
    out = capsys.readouterr().out
    assert ESCAPE not in out and "\r" not in out and out.isascii()
    assert "accuracy 0.9833, 95 % interval 0.9641 to 0.9924, n = 359" in out
    assert "activations: computed once and cached: 1,437 rows, 3.7 MB, about 4 s\n" in out
    assert f"tlcli train backbone=efficientnet_lite0 backbone.weights={RUN} dataset=..." in out
    assert "[red]class 3" in out and "[red]8 taken for 1 (3)" in out, "markup in names is text"
    lines = [line.split() for line in out.splitlines()]
    assert ["lr", "img/s", "time"] in [line[-3:] for line in lines if line[:1] == ["epoch"]], "a column is missing"
    assert ["stem", "23,508,032", "0", "-"] in lines
    assert ["head", "12,810", "12,810", "0.0003"] in lines
    assert ["total", "23,520,842", "12,810"] in lines


@pytest.mark.parametrize("classes", [2, 100])
@pytest.mark.parametrize("width", [40, 80])
def test_fits_the_terminal(width: int, classes: int, terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    stdout = terminal()
    monkeypatch.setenv("COLUMNS", str(width))
    show(TerminalReporter("backbone=efficientnet_lite0"), classes)
    assert ESCAPE in stdout.getvalue() and "decoding" in stdout.getvalue()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stdout.getvalue())
    shown = [line.split("\r")[-1].rstrip() for line in text.splitlines()]
    assert [line for line in shown if len(line) > width and "outputs/" not in line] == []
    assert (("train 1,200 to 1,299" in text), ("class 1 " in text)) == (classes == 100, classes == 2)


def test_everything_shown_is_logged(caplog, terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal()
    monkeypatch.setenv("COLUMNS", "80")
    caplog.set_level(logging.INFO, "tlcli")
    show(TerminalReporter())
    logged = "\n".join(record.message for record in caplog.records)
    assert ESCAPE not in logged
    for text in ("[red]class 3", "23,508,032", "best", "early stop", "95 % interval", "training: 10 images"):
        assert text in logged


@pytest.mark.parametrize(("closed", "other"), [("stdout", "stderr"), ("stderr", "stdout")])
def test_a_closed_pipe_stops_neither_the_run_nor_the_other_stream(closed, other, monkeypatch, caplog, tmp_path) -> None:
    caplog.set_level(logging.INFO, "tlcli")
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(sys, closed, os.fdopen(writer, "w"))
    monkeypatch.setattr(sys, other, (tmp_path / "other.txt").open("w"))
    show(TerminalReporter(on_stderr=closed == "stderr"))
    print("a row", file=getattr(sys, other))
    for name in (closed, other):
        getattr(sys, name).close()  # as Python does at exit: nothing is left that it could not write
    assert (tmp_path / "other.txt").read_text() == "a row\n"
    assert caplog.records[-1].message.strip().startswith("tlcli train ")


def test_control_codes_in_names_of_classes_reach_neither_the_terminal_nor_the_log(capsys, caplog) -> None:
    caplog.set_level(logging.INFO, "tlcli")
    names = f"{ESCAPE}[31mred taken for {ESCAPE}]0;title\abee (3)"
    TerminalReporter().show_labelled(("confused", names))
    TerminalReporter().show(names)
    TerminalReporter().heading(names)
    for text in (capsys.readouterr().out, *(record.message for record in caplog.records)):
        assert "red taken for" in text and not {ESCAPE, "\a"} & {*text}
