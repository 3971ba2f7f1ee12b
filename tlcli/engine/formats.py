"""How a run computes, to the last bit: what has to stay the same for the same result."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tlcli.device import DTYPES, SHORT

SURELY = 10**9
"""Images that are said to be expected where the frozen part was compiled: compiling is to pay again."""
_DTYPES = {SHORT[dtype]: dtype for dtype in DTYPES.values()}


@dataclass(frozen=True)
class Decisions:
    """Number formats of training and evaluation, the memory format, which of train, probe, val and test are read from
    activations (`cached`), and whether the frozen part was compiled for them.

    Rounding differs from one format to the next and between activations and live images, so that only the same way
    gives the same figures to the last digit.
    """

    train_dtype: torch.dtype
    eval_dtype: torch.dtype
    memory_format: torch.memory_format
    cached: frozenset[str]
    compiled: bool

    @property
    def suffix_dtype(self) -> torch.dtype:
        """The format in which activations are read for evaluation: that of training, where it reads them too."""
        return self.train_dtype if "train" in self.cached else self.eval_dtype

    @property
    def expected(self) -> int:
        """How many images to tell an extractor of, so that it compiles where this run did."""
        return SURELY if self.compiled else 0

    def to_json(self) -> dict[str, Any]:
        return {
            "train": SHORT[self.train_dtype],
            "evaluate": SHORT[self.eval_dtype],
            "channels_last": self.memory_format == torch.channels_last,
            "cached": sorted(self.cached),
            "compiled": self.compiled,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Decisions":
        """What `to_json` gave. Raises KeyError or TypeError for anything else."""
        return cls(
            train_dtype=_DTYPES[value["train"]],
            eval_dtype=_DTYPES[value["evaluate"]],
            memory_format=torch.channels_last if value["channels_last"] else torch.contiguous_format,
            cached=frozenset(map(str, value["cached"])),
            compiled=bool(value["compiled"]),
        )


def recorded_decisions(info: Mapping[str, Any]) -> Decisions | None:
    """The formats that a run was tested in, from its run.json; None where it does not say."""
    precision, cache, extraction = (info.get(key) or {} for key in ("precision", "cache", "extraction"))
    try:
        train, evaluation = (_DTYPES[precision[use].removeprefix("torch.")] for use in ("train", "evaluate"))
        layout = "channels_last" in str(info.get("memory_format", info["numerics"]["device"]))
    except (KeyError, TypeError, AttributeError):
        return None
    roles = set(cache.get("entries") or {})
    return Decisions(
        train_dtype=train,
        eval_dtype=evaluation,
        memory_format=torch.channels_last if layout else torch.contiguous_format,
        cached=frozenset(roles if cache.get("used") else roles - {"train"}),
        compiled=str(extraction.get("why", "")).startswith("compiled"),
    )
