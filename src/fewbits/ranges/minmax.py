"""Ranges read off the extremes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.formats.base import Format, Params
from fewbits.ranges.base import Range, extremes, ranges


@ranges.register
@dataclass(frozen=True)
class MinMax(Range):
    """The range is [min, max] of the values; the format's policies do the rest."""

    kind: ClassVar[str] = "minmax"

    def fit_blocks(self, blocks: Tensor, fmt: Format) -> Params:
        return fmt.from_range(*extremes(blocks))

    def fit_bounds(self, lo: Tensor, hi: Tensor, fmt: Format) -> Params:
        return fmt.from_range(lo, hi)


@ranges.register
@dataclass(frozen=True)
class AbsMax(Range):
    """The range is [-m, m] with m = max(|x|, floor). SmoothQuant's simulation uses floor 1e-5."""

    kind: ClassVar[str] = "absmax"
    floor: float = 1e-5

    def __post_init__(self) -> None:
        if self.floor < 0:
            raise FewbitsError(f"absmax range: floor must not be negative, got {self.floor}")

    def fit_blocks(self, blocks: Tensor, fmt: Format) -> Params:
        return self.fit_bounds(*extremes(blocks), fmt)

    def fit_bounds(self, lo: Tensor, hi: Tensor, fmt: Format) -> Params:
        bound = torch.maximum(lo.abs(), hi.abs()).clamp_min(self.floor)
        return fmt.from_range(-bound, bound)
