"""Arbitrary levels: a table per block, or one fixed shape with a scale per block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.formats.base import Format, Params, ParamSpec, formats


def locate(x: Tensor, table: Tensor) -> Tensor:
    """Index (int64) of the last entry of the ascending `table` (levels in the leading axis) that is <= x, at least 0.

    Binary search in the leading axis: log2(levels) gathers, whatever the number of blocks.
    """
    levels = table.shape[0]
    index = torch.zeros_like(x, dtype=torch.int64)
    stride = 1 << max(0, (levels - 1).bit_length() - 1) if levels > 1 else 0
    while stride:
        trial = (index + stride).clamp_max(levels - 1)
        reached = (look_up(table, trial) <= x) & (index + stride < levels)
        index = torch.where(reached, trial, index)
        stride >>= 1
    return index


def look_up(table: Tensor, index: Tensor) -> Tensor:
    """table[index] in the leading axis, the other axes of `table` broadcasting against `index`."""
    return torch.take_along_dim(table, index.unsqueeze(0), dim=0).squeeze(0)


def half(table: Tensor) -> Tensor:
    """A table's entries as float16 holds them, float32; what float16 cannot reach takes its largest value."""
    top = torch.finfo(torch.float16).max
    return table.clamp(-top, top).half().float()


def closest(x: Tensor, table: Tensor) -> Tensor:
    """Index of the entry of `table` nearest to every `x`; a tie goes to the lower one."""
    below = locate(x, table)
    above = (below + 1).clamp_max(table.shape[0] - 1)
    return torch.where(look_up(table, above) - x < x - look_up(table, below), above, below)


@formats.register
@dataclass(frozen=True)
class Codebook(Format):
    """Codes index levels in ascending order; the nearest level wins, ties go to the lower.

    bits: b. points: None for a free ascending table of 2^b values per block (param `table`, leading axis; from_range
    spreads it evenly, ranges such as k-means fill it); or up to 2^b fixed ascending numbers shared by all blocks and
    multiplied by a `scale` per block, absmax / max|level| (NF4, subset codebooks). table_bits: what one entry of a free
    table counts for, 16 or 32; entries are float32 numbers either way (`half` rounds them to what 16 bits hold).
    """

    kind: ClassVar[str] = "codebook"

    bits: int = 4
    points: tuple[float, ...] | None = None
    eps: float = 1e-20
    table_bits: int = 32

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int) or not 1 <= self.bits <= 12:
            raise FewbitsError(f"codebook format: bits must be an integer from 1 to 12, got {self.bits!r}")
        if self.table_bits not in (16, 32):
            raise FewbitsError(f"codebook format: table_bits must be 16 or 32, got {self.table_bits!r}")
        if self.points is None:
            return
        object.__setattr__(self, "points", tuple(float(level) for level in self.points))
        ordered = all(a < b for a, b in zip(self.points, self.points[1:], strict=False))
        if not 2 <= len(self.points) <= 2**self.bits or not ordered or not all(abs(v) < torch.inf for v in self.points):
            raise FewbitsError(f"codebook format: levels must be 2 to {2**self.bits} finite numbers in ascending order")

    @property
    def code_min(self) -> int:
        return 0

    @property
    def code_max(self) -> int:
        return (2**self.bits if self.points is None else len(self.points)) - 1

    def param_specs(self) -> tuple[ParamSpec, ...]:
        if self.points is None:
            return (ParamSpec("table", self.table_bits, learnable=True, width=self.levels),)
        return (
            ParamSpec("scale", 32, learnable=True, positive=True),
            ParamSpec("table", 0, width=self.levels, per="tensor"),
        )

    def from_range(self, lo: Tensor, hi: Tensor) -> Params:
        lo, hi = lo.float(), hi.float()
        if self.points is not None:
            table = torch.tensor(self.points, dtype=torch.float32, device=lo.device)
            bound = torch.maximum(lo.abs(), hi.abs())
            bound = torch.where(bound == 0, torch.ones_like(bound), bound)
            return {"scale": (bound / table.abs().max()).clamp_min(self.eps), "table": table}
        share = torch.linspace(0, 1, self.levels, device=lo.device).reshape(-1, *[1] * lo.ndim)
        # convex combination: no overflow where hi - lo would, and both ends are exact
        return {"table": lo * (1 - share) + hi * share}

    def _ratio(self, x: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        return x if self.points is None else x / params["scale"]

    def _value(self, index: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        value = look_up(params["table"], index)
        return value if self.points is None else value * params["scale"]

    def nearest(self, x: Tensor, params: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        ratio, table = self._ratio(x, params), params["table"]
        value = self._value(closest(ratio, table), params)
        return torch.where(torch.isnan(x), x, value), (ratio >= table[0]) & (ratio <= table[-1])

    def encode(self, x: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        ratio, table = self._ratio(x.to(torch.promote_types(x.dtype, torch.float32)), params), params["table"]
        ratio = torch.where(torch.isnan(ratio), torch.zeros_like(ratio), ratio)
        # equal entries of a table share one code, the last of them
        return locate(look_up(table, closest(ratio, table)), table).to(self.code_dtype)

    def decode(self, codes: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        return self._value(codes.long(), params)

    def surrogate(self, x: Tensor, params: Mapping[str, Tensor], value: Tensor, inside: Tensor) -> Tensor:
        out = super().surrogate(x, params, value, inside)
        table = params["table"]
        if self.points is None and table.requires_grad:
            chosen = look_up(table, closest(x.detach(), table.detach()))
            out = out + (chosen - chosen.detach())
        return out
