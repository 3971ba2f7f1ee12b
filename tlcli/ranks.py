"""The processes (ranks) of one run on several devices. Rank 0 decides, records and writes; all of them compute.

Whatever ranks tell each other goes through `Ranks`; with one process its methods exchange nothing. Gradients are summed
here and not by DistributedDataParallel, which averages over ranks, not images, and expects a backward pass of each
rank in each step. Messages are JSON and tensors, over gloo; tensors on CUDA are exchanged over NCCL.
"""

import json
import os
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from tlcli.errors import TlcliError, UsageError
from tlcli.text import one_line

TIMEOUT = timedelta(days=7)  # rank 0 measures, decides and saves while the others wait; a rank that dies is noticed
AHEAD = 4  # rounds of extraction by which a rank may be ahead of rank 0
ERROR_SECONDS = 5  # the time in which a rank that ends says why
_store: Store | None = None  # holds the error of the first rank that fails


class LostRankError(TlcliError):
    """Another rank of the run has ended."""


@dataclass(frozen=True)
class Ranks:
    """This process, number `rank` of `size`."""

    rank: int = 0
    size: int = 1
    _sent: deque[tuple[Any, Tensor]] = field(default_factory=deque, init=False, repr=False, compare=False)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def broadcast(self, value: Any = None) -> Any:
        """Return rank 0's value, which JSON can hold."""
        if self.size == 1:
            return value
        data = torch.tensor(list(json.dumps(value).encode()) if self.is_main else [], dtype=torch.uint8)
        length = torch.tensor(len(data))
        with _exchange():
            dist.broadcast(length, 0)
            dist.broadcast(data.resize_(int(length)), 0)
        return json.loads(bytes(data.tolist()))

    def copy_tensors(self, tensors: Iterable[Tensor]) -> None:
        """Replace tensors by those of rank 0, in place."""
        for tensor in tensors if self.size > 1 else ():
            own = tensor.detach().cpu().contiguous()  # gloo notices at once that a rank has ended
            with _exchange():
                dist.broadcast(own, 0)
            tensor.detach().copy_(own)

    def check_same(self, name: str, text: str) -> None:
        """Raise TlcliError on a rank that has another text than rank 0."""
        if self.broadcast(text) != text:
            problem = f"process {self.rank} of {self.size} sees other {name} than process 0"
            raise TlcliError(f"{problem}: all processes of a run must read the same files")

    def positions(self, n: int, batch_size: int) -> Tensor:
        """Return the positions of n rows that this rank reads in order: every size-th batch."""
        rows = torch.arange(n)
        return rows[rows // batch_size % self.size == self.rank] if self.size > 1 else rows

    def gather(self, batches: Sequence[Tensor], positions: Tensor, n: int) -> Tensor:
        """Return all n rows on the CPU, each at its position, on every rank. `batches` are those of this rank.

        Raise TlcliError if a row is missing or there twice.
        """
        if self.size == 1:
            return torch.cat(list(batches)).cpu()
        kind = (list(batches[0].shape[1:]), str(batches[0].dtype)) if self.is_main else None
        shape, dtype = self.broadcast(kind)
        rows = torch.zeros((n, *shape), dtype=getattr(torch, dtype.removeprefix("torch.")))
        counts = torch.bincount(positions, minlength=n)
        if batches:  # a rank may have none, but not rank 0
            rows[positions] = torch.cat(list(batches)).cpu()
        with _exchange():
            dist.all_reduce(rows)
            dist.all_reduce(counts)
        if not (counts == 1).all():
            raise TlcliError(f"{int((counts != 1).sum())} of {n} images were not evaluated exactly once")
        return rows

    def collect(self, own: Tensor, n: int, batch_size: int) -> Tensor:
        """Return all n rows on rank 0, given those at this rank's positions; other ranks send theirs and go on.

        Waiting for each other took about 4 % of the speed of two processes. Up to AHEAD messages may be on their way.
        """
        if not self.is_main:
            with _exchange():
                self._sent.append((dist.isend(own, 0), own))  # which must live until it has arrived
                while len(self._sent) > AHEAD:
                    self._sent.popleft()[0].wait()
        if not self.is_main or len(own) == n:
            return own
        rows = own.new_empty((n, *own.shape[1:]))
        rows[self.positions(n, batch_size)] = own
        for rank in range(1, self.size):
            positions = Ranks(rank, self.size).positions(n, batch_size)
            if len(positions):
                part = rows[positions]
                with _exchange():
                    dist.recv(part, rank)
                rows[positions] = part
        return rows

    def sum_gradients(self, parameters: Sequence[Tensor], values: Tensor, *, stop: bool) -> tuple[Tensor, bool]:
        """Replace gradients by their sums over ranks; return the sums of `values` (N), and `stop` of any rank.

        A parameter that has a gradient on no rank has none afterwards.
        """
        flags = torch.tensor([stop, *(p.grad is not None for p in parameters)], dtype=torch.int32)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([values, *(gradient.flatten() for gradient in gradients)])
        with _exchange():
            dist.all_reduce(flags)  # on the CPU: reading them does not wait for an accelerator
            dist.all_reduce(flat)
        total, *sums = torch.split(flat, [len(values), *map(torch.numel, gradients)])
        stops, *counts = flags.tolist()
        for parameter, gradient, part, count in zip(parameters, gradients, sums, counts, strict=True):
            parameter.grad = gradient.copy_(part.view_as(gradient)) if count else None
        return total, stops > 0


ALONE = Ranks()  # of a run with one process


def join(rank: int, size: int) -> Ranks:
    """Connect this process with the other ranks, as the environment variables of torchrun say."""
    global _store
    if os.environ.get("LOCAL_WORLD_SIZE") != str(size):
        raise UsageError(f"{size} processes on several machines: a run uses the devices of one machine")
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # else a host name that does not resolve is an error
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(rank % torch.cuda.device_count())  # `setup_process` refuses to share a device
    try:
        _store, _, _ = next(rendezvous("env://", rank, size, timeout=TIMEOUT))
        store = PrefixStore("tlcli", _store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise TlcliError(f"the {size} processes of the run cannot be connected: {error}") from error
    return Ranks(rank, size)


def post_error(code: int, line: str) -> None:
    """Tell rank 0 the error that ends this rank; of several errors the first counts."""
    assert _store is not None
    _store.compare_set("error", "", json.dumps([code, line]))


@contextmanager
def led_ranks(rank: int, size: int) -> Iterator[Ranks]:
    """Lead the ranks of a run, if there are several, in the block; raise the error of another one that ends it."""
    ranks = join(rank, size) if size > 1 else ALONE
    try:
        yield ranks
    except (LostRankError, KeyboardInterrupt) as error:
        if _store is None:
            raise
        # when a rank is lost the launcher sends SIGTERM, too
        lost = next((each for each in (error, error.__context__) if isinstance(each, LostRankError)), None)
        end = time.monotonic() + (ERROR_SECONDS if lost else 0)
        while not _store.check(["error"]):
            if time.monotonic() > end:
                if not lost:
                    raise
                reason = f"one of the {ranks.size} processes of the run was killed, or they cannot reach each other"
                raise TlcliError(f"{reason} ({one_line(lost.__cause__)})") from error
            time.sleep(0.05)
        code, line = json.loads(_store.get("error"))
        raise (UsageError if code == 2 else TlcliError)(line) from error
    if size > 1:
        dist.destroy_process_group()  # after the last exchange


@contextmanager
def _exchange() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # gloo has no class of errors
        raise LostRankError(f"another process of the run has ended ({error})") from error
