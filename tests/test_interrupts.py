"""An interrupt waits for the end of a step, and is never lost."""

import signal
from contextlib import suppress

import pytest

from tlcli.interrupts import Preempted, Terminated, defer_interrupts, handle_signals, preemption_signal


def test_it_waits_for_the_end_of_the_outermost_step() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), handle_signals():
        with defer_interrupts:
            with defer_interrupts:
                defer_interrupts.interrupt(KeyboardInterrupt())
                done.append("inner")
            done.append("outer")
        done.append("after")
    assert done == ["inner", "outer"]
    with defer_interrupts:
        done.append("the next one is not interrupted")
    assert len(done) == 3


def test_it_comes_at_once_outside_of_a_step_and_a_step_that_fails_is_over() -> None:
    with pytest.raises(ValueError, match="broken"), defer_interrupts:
        raise ValueError("broken")
    with pytest.raises(KeyboardInterrupt), handle_signals():
        defer_interrupts.interrupt(KeyboardInterrupt())


def test_one_that_a_library_swallows_comes_again_but_not_in_code_that_handles_it() -> None:
    done = []
    with pytest.raises(Terminated), handle_signals():
        with suppress(BaseException):
            signal.raise_signal(signal.SIGTERM)
        done.append("swallowed")
        try:
            with defer_interrupts:
                done.append("step")
        finally:
            with suppress(KeyError):
                with defer_interrupts:
                    done.append("saved")
                {}["an error while it is handled"]
            try:
                raise ValueError("another error while it is handled")
            except ValueError:
                with defer_interrupts:
                    done.append("saved")
        done.append("not reached")
    assert done == ["swallowed", "step", "saved", "saved"]
    with pytest.raises(KeyboardInterrupt), handle_signals(), suppress(BaseException):
        signal.raise_signal(signal.SIGINT)
    with handle_signals(), defer_interrupts:
        done.append("the next block is not interrupted")


def test_the_signal_of_a_pre_emption_counts_if_submitit_handles_it(monkeypatch: pytest.MonkeyPatch) -> None:
    handled: list[int] = []
    previous = signal.signal(signal.SIGUSR2, signal.SIG_DFL)
    try:
        assert preemption_signal() is None
        with handle_signals():
            assert signal.getsignal(signal.SIGUSR2) is signal.SIG_DFL
        signal.signal(signal.SIGUSR2, lambda number, frame: handled.append(number))
        assert preemption_signal() == signal.SIGUSR2
        monkeypatch.setenv("SUBMITIT_PREEMPT_SIGNAL", "WINCH")
        assert preemption_signal() is None
        monkeypatch.undo()
        with pytest.raises(Preempted), handle_signals(), defer_interrupts:
            signal.raise_signal(signal.SIGUSR2)
        assert handled == []
        signal.raise_signal(signal.SIGUSR2)
        assert handled == [signal.SIGUSR2]
    finally:
        signal.signal(signal.SIGUSR2, previous)


def test_a_second_sigterm_does_not_interrupt_what_the_first_one_began() -> None:
    with pytest.raises(Terminated), handle_signals():
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGTERM)
            done = "saved"
    assert done == "saved"
