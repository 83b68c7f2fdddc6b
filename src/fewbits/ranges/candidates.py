"""What a range search tries: generators of candidate bounds, all blocks at once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.formats.base import Format
from fewbits.formats.registry import Described, Registry
from fewbits.ranges.base import extremes
from fewbits.ranges.quantile import quantiles


class Candidates(Described, ABC):
    """Candidate ranges of blocks [n, values], in the order in which the first of equals wins."""

    @abstractmethod
    def bounds(self, blocks: Tensor, fmt: Format) -> Iterator[tuple[Tensor, Tensor]]:
        """Pairs (lo, hi), each [n], for the parameters of `fmt`."""


candidates: Registry[Candidates] = Registry("candidates")


@candidates.register
@dataclass(frozen=True)
class Shrink(Candidates):
    """Both ends of [min, max] multiplied by 1 - i*step, i = 0 .. steps-1 (BRECQ, GPTQ, OMSE observers)."""

    kind: ClassVar[str] = "shrink"
    steps: int = 80
    step: float = 0.01

    def __post_init__(self) -> None:
        if self.steps < 1 or not self.step > 0 or (self.steps - 1) * self.step >= 1:
            raise FewbitsError(f"shrink candidates: {self.steps} steps of {self.step} do not stay inside (0, 1]")

    def bounds(self, blocks: Tensor, fmt: Format) -> Iterator[tuple[Tensor, Tensor]]:
        lo, hi = extremes(blocks)
        for index in range(self.steps):
            factor = 1.0 - index * self.step
            yield lo * factor, hi * factor


@candidates.register
@dataclass(frozen=True)
class Quantiles(Candidates):
    """[quantile(1-p), quantile(p)] for each p (RepQ-ViT)."""

    kind: ClassVar[str] = "quantiles"
    probs: tuple[float, ...] = (0.999, 0.9999, 0.99999)

    def __post_init__(self) -> None:
        object.__setattr__(self, "probs", tuple(float(p) for p in self.probs))
        if not self.probs or not all(0.5 < p <= 1 for p in self.probs):
            raise FewbitsError(f"quantile candidates: probabilities must lie in (0.5, 1], got {self.probs}")

    def bounds(self, blocks: Tensor, fmt: Format) -> Iterator[tuple[Tensor, Tensor]]:
        found = quantiles(blocks, [q for p in self.probs for q in (1.0 - p, p)])
        yield from zip(found[0::2], found[1::2], strict=True)


@candidates.register
@dataclass(frozen=True)
class WidthZeroPoint(Candidates):
    """Widths R i/num of a block's extent R (zero included), i = 1 .. num, and for each every place of zero on the grid.

    With L = levels - 1 and step d = width/L the ranges are [-k d, width - k d], k = 0 .. L: num * levels candidates
    (QDrop, OWQ). `JointSearch` finds the one of least power error among them faster.
    """

    kind: ClassVar[str] = "width_zero_point"
    num: int = 100

    def __post_init__(self) -> None:
        if self.num < 1:
            raise FewbitsError(f"width and zero-point candidates: num must be at least 1, got {self.num}")

    def bounds(self, blocks: Tensor, fmt: Format) -> Iterator[tuple[Tensor, Tensor]]:
        extent = extent_with_zero(blocks)
        for index in range(1, self.num + 1):
            for zero in range(fmt.levels):
                yield window(extent, self.num, index, zero, fmt.levels - 1)


def extent_with_zero(blocks: Tensor) -> Tensor:
    """[n]: max(x, 0) - min(x, 0) of every block."""
    lo, hi = extremes(blocks)
    return hi.clamp_min(0) - lo.clamp_max(0)


def window(extent: Tensor, num: int, index: int | Tensor, zero: int | Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """The range of width extent * index/num with `zero` of its `steps` steps below zero, each [n]."""
    width = extent / num * index
    below = width / steps * zero
    return -below, width - below
