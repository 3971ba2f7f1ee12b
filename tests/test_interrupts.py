"""An interrupt waits for the end of a step, and is never lost."""

import pytest

from tlcli.interrupts import steady


def test_it_comes_at_once_outside_of_a_step() -> None:
    with pytest.raises(KeyboardInterrupt):
        steady.interrupt(KeyboardInterrupt())


def test_it_waits_for_the_end_of_the_outermost_step() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt):
        with steady:
            with steady:
                steady.interrupt(KeyboardInterrupt())
                done.append("inner")
            done.append("outer")
        done.append("after")
    assert done == ["inner", "outer"]
    with steady:
        done.append("the next one is not interrupted")
    assert len(done) == 3


def test_a_step_that_fails_is_over() -> None:
    with pytest.raises(ValueError, match="broken"), steady:
        raise ValueError("broken")
    with pytest.raises(KeyboardInterrupt):
        steady.interrupt(KeyboardInterrupt())
