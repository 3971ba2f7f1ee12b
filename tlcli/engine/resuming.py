"""How a run that goes on reads its images: as it did before, so that its result is the one that it would have had."""

from collections.abc import Mapping
from typing import Any

import torch

from tlcli.device import Device
from tlcli.engine.activations import SplitActivations
from tlcli.engine.extraction import Extractor
from tlcli.engine.formats import Decisions
from tlcli.engine.inputs import CachedFeed
from tlcli.engine.numerics import ComputeFormat
from tlcli.engine.planning import Planner, Sources, unique
from tlcli.transfer.cut import Cut

BEFORE = "as before the run was interrupted"


class ResumePlanner(Planner):
    """A planner whose decisions were made: for a run that computed in these formats nothing is measured or reckoned."""

    def __init__(self, formats: Decisions, *arguments: Any) -> None:
        self.formats = formats
        super().__init__(*arguments)

    def _numerics(self, dtype: torch.dtype) -> ComputeFormat:
        return ComputeFormat(dtype, self.formats.memory_format, why=BEFORE)

    def _measured_extraction(self, cut: Cut) -> ComputeFormat:
        return self._numerics(self.formats.eval_dtype)

    def _measured_suffix(self, extractor: Extractor) -> ComputeFormat:
        return self._numerics(self.formats.train_dtype)

    def _measured_live(self) -> tuple[Device, ComputeFormat]:
        evaluation = self._numerics(self.formats.eval_dtype)
        return self._device(self._numerics(self.formats.train_dtype), evaluation), evaluation

    def _why_not_worth(self, extractor: Extractor, sources: Sources) -> str | None:
        return None if "train" in self.formats.cached else BEFORE

    def _val_source(self, extractor: Extractor) -> Sources:
        return super()._val_source(extractor) if "val" in self.formats.cached else {}

    def _test_source(self, extractor: Extractor) -> Sources:
        return super()._test_source(extractor) if "test" in self.formats.cached else {}

    def _is_worth(self, extractor: Extractor, source: SplitActivations, passes: int) -> bool:
        return True

    def _features(self, evaluation: ComputeFormat) -> dict[str, CachedFeed]:
        return {}  # the head has had its probe

    def _expect(self, cached: Mapping[str, CachedFeed]) -> None:
        for source in unique(cached):
            if not source.filled:
                source.extractor.expect(self.formats.expected)
