"""What a range search tries: generators of candidate bounds, all blocks at once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.formats.registry import Described, Registry
from fewbits.ranges.base import extremes
from fewbits.ranges.quantile import quantiles


class Candidates(Described, ABC):
    """Candidate ranges of blocks [n, values], in the order in which the first of equals wins."""

    @abstractmethod
    def bounds(self, blocks: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Pairs (lo, hi), each [n]."""


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

    def bounds(self, blocks: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
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

    def bounds(self, blocks: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        found = quantiles(blocks, [q for p in self.probs for q in (1.0 - p, p)])
        yield from zip(found[0::2], found[1::2], strict=True)
