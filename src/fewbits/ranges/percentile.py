"""Ranges that ignore a share of the extremes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.formats.base import Format, Params
from fewbits.ranges.base import Range, ranges
from fewbits.ranges.quantile import quantiles


@ranges.register
@dataclass(frozen=True)
class Percentile(Range):
    """The range is [quantile(lower), quantile(upper)]; lower=None means 1 - upper. Linear interpolation."""

    kind: ClassVar[str] = "percentile"
    upper: float = 0.9999
    lower: float | None = None

    def __post_init__(self) -> None:
        low = 1.0 - self.upper if self.lower is None else self.lower
        if not 0 <= low < self.upper <= 1:
            raise FewbitsError(f"percentile range: needs 0 <= lower < upper <= 1, got lower={low}, upper={self.upper}")

    def fit_blocks(self, blocks: Tensor, fmt: Format) -> Params:
        low = 1.0 - self.upper if self.lower is None else self.lower
        lo, hi = quantiles(blocks, [low, self.upper])
        return fmt.from_range(lo, hi)
