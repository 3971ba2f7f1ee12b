"""Out of memory: a hint with the largest batch that fits, where trying finds one, and nothing trained meanwhile."""

from collections.abc import Callable

import pytest
import torch

from tlcli.cli.endings import ending
from tlcli.engine.memory import batch_size_that_fits, largest_that_fits
from tlcli.errors import OutOfMemory, is_out_of_memory

KINDS: dict[str, Callable[[], Exception]] = {
    "a GPU": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "Python": MemoryError,
    "NumPy": lambda: type("_ArrayMemoryError", (MemoryError,), {})("Unable to allocate 3.00 TiB"),
    "PyTorch on a CPU": lambda: RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    "Apple": lambda: RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
}


def room_for(most: int, error: Callable[[], Exception], tried: list[int]) -> Callable[[int], None]:
    """An attempt that runs out of memory above so many images, and draws a random number."""

    def attempt(n: int) -> None:
        tried.append(n)
        torch.rand(1)
        if n > most:
            raise error()

    return attempt


@pytest.mark.parametrize("kind", KINDS)
def test_the_hint_names_the_largest_batch_that_fits(kind: str) -> None:
    error, tried = KINDS[kind], []
    assert is_out_of_memory(error())
    torch.manual_seed(3)
    with pytest.raises(OutOfMemory) as caught, batch_size_that_fits(room_for(9, error, tried), 64, accumulate=2):
        raise error()
    assert tried == [32, 16, 8]
    assert ending(caught.value) == (
        1, "out of memory with batch_size=64: 8 fits here; batch_size=8 accumulate=16 keeps the size of a step"
    )  # fmt: skip
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(1))


@pytest.mark.parametrize(("most", "wanted"), [(0, None), (1, 1), (2, 1), (49, 25), (100, 25)])
def test_a_batch_of_any_size_is_halved(most: int, wanted: int | None) -> None:
    assert largest_that_fits(room_for(most, MemoryError, []), 50) == wanted


def test_where_nothing_fits_it_is_the_images() -> None:
    with pytest.raises(OutOfMemory, match=r"no smaller batch was found to fit: try a smaller image\.size"):  # noqa: SIM117
        with batch_size_that_fits(room_for(0, MemoryError, []), 4, accumulate=1):
            raise MemoryError


def test_other_errors_pass_and_end_the_attempts() -> None:
    tried: list[int] = []
    with pytest.raises(ValueError, match="a bug"), batch_size_that_fits(tried.append, 8, accumulate=1):
        raise ValueError("a bug")
    assert tried == []
    with pytest.raises(OutOfMemory, match="no smaller batch"), batch_size_that_fits(_bug, 8, accumulate=1):
        raise MemoryError


def _bug(n: int) -> None:
    raise ValueError("one value a channel")


def test_what_failed_lets_go_of_its_memory_before_the_attempts() -> None:
    """Else the attempts would find less room than a run with a smaller batch."""

    class Large:
        there = 0

        def __init__(self) -> None:
            Large.there += 1

        def __del__(self) -> None:
            Large.there -= 1

    def step() -> None:
        large = Large()
        assert large is not None
        raise MemoryError

    def attempt(n: int) -> None:
        assert Large.there == 0

    with pytest.raises(OutOfMemory, match="8 fits here"), batch_size_that_fits(attempt, 16, accumulate=1):
        step()
