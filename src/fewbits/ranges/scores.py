"""What a range search minimises."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.formats.registry import Described, Registry


class Score(Described, ABC):
    """One number per block, smaller is better."""

    @abstractmethod
    def score(self, x: Tensor, quantized: Tensor) -> Tensor:
        """[n] for blocks [n, values] and their quantized values."""


scores: Registry[Score] = Registry("score")


@scores.register
@dataclass(frozen=True)
class LpError(Score):
    """Sum or mean of |x - x_hat|**p over a block."""

    kind: ClassVar[str] = "lp"
    p: float = 2.0
    reduction: Literal["mean", "sum"] = "mean"

    def __post_init__(self) -> None:
        if not self.p > 0 or self.reduction not in ("mean", "sum"):
            raise FewbitsError(f"lp score: needs p > 0 and reduction mean or sum, got p={self.p}, {self.reduction!r}")

    def score(self, x: Tensor, quantized: Tensor) -> Tensor:
        error = (x - quantized).abs().pow(self.p)
        return error.mean(dim=1) if self.reduction == "mean" else error.sum(dim=1)
