"""A range that is known beforehand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.formats.base import Format, Params
from fewbits.ranges.base import Range, ranges


@ranges.register
@dataclass(frozen=True)
class Fixed(Range):
    """[low, high] whatever the values are: what a function can return, a sensor can give."""

    kind: ClassVar[str] = "fixed"
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise FewbitsError(f"fixed range: low must be below high, got {self.low} and {self.high}")

    def fit_blocks(self, blocks: Tensor, fmt: Format) -> Params:
        low = blocks.new_full((blocks.shape[0],), self.low)
        return fmt.from_range(low, torch.full_like(low, self.high))

    def fit_bounds(self, lo: Tensor, hi: Tensor, fmt: Format) -> Params:
        return fmt.from_range(torch.full_like(lo, self.low), torch.full_like(hi, self.high))
