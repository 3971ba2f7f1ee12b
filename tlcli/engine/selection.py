"""Which epoch to keep, and when to stop looking for a better one."""

from dataclasses import dataclass

from tlcli.engine.metrics import Scores
from tlcli.specs import KeepBest


@dataclass
class BestEpochTracker:
    """The best epoch so far by one validation figure.

    Equal accuracy or F1 is decided by the lower loss: on a small validation set many epochs are equal. `early_stop`
    is the number of epochs without a better one after which `exhausted` is true; None is never.
    """

    by: KeepBest
    early_stop: int | None
    epoch: int | None = None
    scores: Scores | None = None
    last_epoch: int = 0

    def improves(self, epoch: int, scores: Scores) -> bool:
        """Take note of an epoch's validation scores; whether it is the best so far."""
        self.last_epoch = epoch
        better = self.scores is None or self._rank(scores) > self._rank(self.scores)
        if better:
            self.epoch, self.scores = epoch, scores
        return better

    @property
    def exhausted(self) -> bool:
        """Whether there was no better epoch for as long as early_stop allows."""
        return (
            self.early_stop is not None and self.epoch is not None and self.last_epoch - self.epoch >= self.early_stop
        )

    @property
    def value(self) -> float | None:
        """The figure that selects, of the best epoch."""
        return None if self.scores is None else float(getattr(self.scores, self.by.value))

    def _rank(self, scores: Scores) -> tuple[float, float]:
        if self.by is KeepBest.loss:
            return -scores.loss, 0.0
        return getattr(scores, self.by.value), -scores.loss
