"""An interrupt waits for the end of a step, and is never lost."""

import pytest

from tlcli.interrupts import defer_interrupts


def test_it_waits_for_the_end_of_the_outermost_step() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt):
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
    with pytest.raises(KeyboardInterrupt):
        defer_interrupts.interrupt(KeyboardInterrupt())
