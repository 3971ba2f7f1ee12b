"""The test of a finished run once more: in its number formats, and from activations where the run read these."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from tlcli.data.dataset import Dataset, Split
from tlcli.device import Device
from tlcli.engine.formats import Decisions
from tlcli.engine.inputs import BatchLoader, InputPlan, LiveFeeds
from tlcli.engine.numerics import ComputeFormat
from tlcli.engine.planning import Planner
from tlcli.engine.session import Session
from tlcli.models.classifier import Classifier
from tlcli.reporter import Reporter
from tlcli.specs import TrainSpec
from tlcli.transfer.contract import FreezeContract
from tlcli.transfer.cut import Cut


@dataclass(frozen=True)
class Replay:
    """How one split is read for evaluation, as the run read its test set. `cached`: from activations."""

    device: Device
    cached: bool
    extracts: bool
    _open: Callable[[Reporter], BatchLoader]

    def open(self, reporter: Reporter) -> BatchLoader:
        """The split, with its activations computed where they are not in the cache."""
        return self._open(reporter)


def plan_replay(
    split: Split,
    model: Classifier,
    contract: FreezeContract,
    spec: TrainSpec,
    accelerator: torch.device,
    session: Session,
    formats: Decisions,
) -> Replay:
    """Read a split as a run of `spec` in these formats read its test set. `model` has the run's weights."""
    data = Dataset(spec.dataset.name, model.classes, split, split, split, notes=(), bad_files=())
    return _Replayer(data, model, contract, spec, accelerator, session, needs_probe=False).replay(formats)


class _Replayer(Planner):
    """A planner that decides nothing."""

    def replay(self, formats: Decisions) -> Replay:
        device = self._device(
            ComputeFormat(formats.train_dtype, formats.memory_format),
            ComputeFormat(formats.eval_dtype, formats.memory_format),
        )
        device.place(self.model.network)
        cached, extracts = {}, False
        if "test" in formats.cached and isinstance(self.cut, Cut):
            extractor = self._extractor(self.cut, self.measured[1])
            source = self._activations(self.cut, extractor, self.data.test, "test", None)
            extracts = not source.filled
            room = None if source.filled else self.store.no_room_reason(source.nbytes)
            if room is None:
                cached = self._feeds({"test": ((source,), self.data.test)}, formats.suffix_dtype)
                extractor.expect(formats.expected)
        live = LiveFeeds(self.data, self.model.network, self.spec, self.preprocessing, device)
        plan = InputPlan(device, self.preprocessing, "", {"used": False}, {}, live, cached)
        return Replay(
            device, bool(cached), extracts and bool(cached), lambda reporter: self._opened(plan, formats, reporter)
        )

    def _opened(self, plan: InputPlan, formats: Decisions, reporter: Reporter) -> BatchLoader:
        """The split; what the run compiled as a whole is compiled here."""
        feed = plan.open_test(reporter)
        if "train" in formats.cached or "test" not in plan.cached:
            plan.device.compile_where_asked(feed.network)
        return feed
