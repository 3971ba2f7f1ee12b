"""Out of memory in a training step: the largest batch that fits, found by trying."""

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from tlcli.errors import OutOfMemory, is_out_of_memory


@contextmanager
def batch_size_that_fits(attempt: Callable[[int], None], size: int, accumulate: int) -> Iterator[None]:
    """Raises OutOfMemory, with the largest half, quarter ... of a batch that fits, where the block runs out of memory.

    Args:
        attempt: does what takes the memory for so many images, and changes nothing that lasts but random states.
        size: of the batch within the block.
        accumulate: so many batches make a step.
    """
    try:
        yield
        return
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # else what failed would keep its tensors during the attempts
        cause = error
    found = largest_that_fits(attempt, size)
    raise OutOfMemory(_words(size, found, accumulate)) from cause


def largest_that_fits(attempt: Callable[[int], None], size: int) -> int | None:
    """The largest of size/2, size/4, ... 1 for which `attempt` does not run out of memory; None where none is found."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):  # dropout draws random numbers
        while (size := size // 2) > 0:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            try:
                attempt(size)
            except Exception as error:
                if not is_out_of_memory(error):
                    return None  # one image under BatchNorm, say
                traceback.clear_frames(error.__traceback__)
            else:
                return size
    return None


def _words(size: int, found: int | None, accumulate: int) -> str:
    if found is None:
        return f"out of memory with batch_size={size}, and no smaller batch was found to fit: try a smaller image.size"
    times = -(-size // found) * accumulate
    return (
        f"out of memory with batch_size={size}: {found} fits here; "
        f"batch_size={found} accumulate={times} keeps the size of a step"
    )
