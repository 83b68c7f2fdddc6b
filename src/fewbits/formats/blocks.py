"""Blocks of rows and columns of a matrix that share parameters: fused projections, sub-layerwise intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.formats.granularity import Granularity, granularities


@granularities.register
@dataclass(frozen=True)
class PerBlock(Granularity):
    """Row blocks times equal column blocks of a matrix [out, in]; param shape (row blocks, column blocks).

    rows: a number of equal contiguous blocks, or the lengths of a sequence of runs that repeats down the matrix, the
    i-th run of every repeat in block i: (d, d, d) are the q, k and v rows one after another, (w, w, w) with w rows a
    head the same head by head, (n, w, w) queries that share a head of keys and one of values.
    """

    kind: ClassVar[str] = "block"
    rows: int | tuple[int, ...] = 1
    columns: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.rows, list):
            object.__setattr__(self, "rows", tuple(self.rows))
        runs = self.rows if isinstance(self.rows, tuple) else (self.rows,)
        if not runs or any(not isinstance(run, int) or run < 1 for run in (*runs, self.columns)):
            raise FewbitsError(f"block granularity: rows={self.rows!r}, columns={self.columns!r} must be at least 1")

    def runs(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The lengths of the repeating runs of rows. Raises FewbitsError where the matrix does not divide into them."""
        if len(shape) != 2:
            raise FewbitsError(f"block granularity: needs a matrix, got a tensor of shape {tuple(shape)}")
        runs = self.rows if isinstance(self.rows, tuple) else (max(1, shape[0] // self.rows),) * self.rows
        whole = shape[0] % sum(runs) == 0 if isinstance(self.rows, tuple) else shape[0] == sum(runs)
        if not whole or shape[1] % self.columns:
            raise FewbitsError(f"block granularity: {tuple(shape)} does not divide into {self.describe()}")
        return runs

    def row_blocks(self, shape: Sequence[int]) -> Tensor:
        """int64 [out]: the block of every row."""
        runs = self.runs(shape)
        once = [block for block, run in enumerate(runs) for _ in range(run)]
        return torch.tensor(once * (shape[0] // len(once)))

    def param_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        return (len(self.runs(shape)), self.columns)

    def blocks(self, x: Tensor) -> list[Tensor]:
        runs = self.runs(x.shape)
        parts = x.reshape(-1, sum(runs), x.shape[1]).split(runs, 1)
        return [part.unflatten(-1, (self.columns, -1)).movedim(2, 0).flatten(1) for part in parts]

    def assemble(self, parts: list[Tensor], shape: Sequence[int]) -> Tensor:
        return torch.stack(parts, -2)

    def _expand(self, param: Tensor, lead: int, shape: Sequence[int]) -> Tensor:
        wide = param.index_select(lead, self.row_blocks(shape).to(param.device))
        return wide if self.columns == 1 else wide.repeat_interleave(shape[1] // self.columns, -1)
