"""When a run's checkpoints are written, and what is in them."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from tlcli.engine.checkpoints import changeable, load_weights_into, save_state, save_weights, snapshot
from tlcli.engine.metrics import Scores
from tlcli.engine.trainer import Trainer
from tlcli.files import replace_with_hardlink
from tlcli.runs.restart import STATE_VERSION
from tlcli.runs.run_dir import RunDir

SHARE = 0.1
"""Of the time of training that writing checkpoints may take: an epoch of a small head takes less than its file."""

FIRST_SAVE = 0.1
"""Seconds that writing them is taken to need before it was done once."""


@dataclass(frozen=True, eq=False)
class _Best:
    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]


class CheckpointManager:
    """Keeps the best epoch's weights, the last one's, and the state from which training goes on.

    The state is in one file, written after the best weights, which know their own epoch and scores: a run that is
    killed between the two goes on from either.

    Args:
        facts: what a file of weights says of itself.
        origin: what the state says beside weights and training; asked once, when it is first written.
        seconds: between checkpoints within an epoch.
        epoch: the last one that was validated, where the run goes on.
    """

    def __init__(
        self,
        run: RunDir,
        network: nn.Module,
        trainer: Trainer,
        facts: Mapping[str, Any],
        origin: Callable[[], Mapping[str, Any]],
        *,
        seconds: float,
        epoch: int | None,
    ) -> None:
        self._run, self._network, self._trainer = run, network, trainer
        self._facts, self._origin, self._seconds = facts, origin, seconds
        self._epoch = epoch
        self._best: _Best | None = None
        self._written: Mapping[str, Any] = {}
        self._last_facts: Mapping[str, Any] = {}
        self._made: Mapping[str, Any] | None = None
        self._is_new = False
        self._saved_at, self._took = time.perf_counter(), FIRST_SAVE

    def epoch(self, epoch: int, validation: Scores, *, best: bool) -> None:
        """An epoch was validated (`best`: it is the best so far). Written now, unless that would take more than its
        share of the time."""
        self._epoch, self._is_new = epoch, True
        self._last_facts = {**self._facts, "epoch": epoch, "validation": asdict(validation)}
        if best:
            self._best = _Best(snapshot(self._network), self._last_facts)
        if time.perf_counter() - self._saved_at >= self._took / SHARE:
            self.save()

    def step(self) -> None:
        """A step was made. Written now, if the last checkpoint was long ago."""
        self._is_new = True
        if time.perf_counter() - self._saved_at >= self._seconds:
            self.save()

    def save(self) -> None:
        """Write what is not written yet. Between two steps alone."""
        if not self._is_new:
            return
        start = time.perf_counter()
        self._save_best()
        if self._last_facts and self._trainer.is_between_epochs(self._last_facts["epoch"]):
            self._save_last()
        save_state(self._run.state_file, self._state())
        self._is_new = False
        self._saved_at = time.perf_counter()
        self._took = self._saved_at - start

    def load_best(self) -> None:
        """The network as it was at the best epoch, from its checkpoint."""
        self.save()
        load_weights_into(self._run.best_checkpoint, self._network)

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """However training ends within, the best epoch so far is on the disk afterwards; where it is interrupted, all
        that was done."""
        try:
            yield
        except KeyboardInterrupt:
            with suppress(OSError):
                self.save()
            raise
        except BaseException:
            with suppress(OSError):
                self._save_best()
            raise

    def _save_best(self) -> None:
        if self._best is not None:
            save_weights(self._run.best_checkpoint, self._network, self._best.facts, instead=self._best.tensors)
            self._written, self._best = self._best.facts, None

    def _save_last(self) -> None:
        """A second name for the best weights' file, where they are those of the last epoch."""
        if self._last_facts != self._written or not replace_with_hardlink(
            self._run.best_checkpoint, self._run.last_checkpoint
        ):
            save_weights(self._run.last_checkpoint, self._network, self._last_facts)

    def _state(self) -> dict[str, Any]:
        self._made = self._made or self._origin()
        return {
            "version": STATE_VERSION,
            "epoch": self._epoch,
            "weights": changeable(self._network),
            "trainer": self._trainer.state(),
            "metrics_bytes": self._run.metrics_bytes(),
            **self._made,
        }
