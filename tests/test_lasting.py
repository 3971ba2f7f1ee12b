"""What is made to last is left alone by the collector, which else goes on as before."""

import gc

import pytest

from tlcli.lasting import lasting


@pytest.fixture(autouse=True)
def as_before():
    """Nothing of these tests stays frozen."""
    yield
    gc.unfreeze()
    gc.enable()


def test_what_is_made_within_is_not_looked_through() -> None:
    with lasting():
        assert not gc.isenabled()
        made = [[] for _ in range(1000)]
    assert gc.isenabled()
    assert gc.get_freeze_count() >= len(made)
    young = {id(one) for one in gc.get_objects()}
    assert not any(id(one) in young for one in made)


def test_the_collector_goes_on_after_an_error() -> None:
    with pytest.raises(ValueError, match="oops"), lasting():
        raise ValueError("oops")
    assert gc.isenabled()


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    with lasting():
        pass
    assert not gc.isenabled()
