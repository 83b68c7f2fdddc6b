"""Ranges found by trying candidates and keeping, per block, the one that scores best."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fewbits.formats.apply import expand_params
from fewbits.formats.base import Format, Params
from fewbits.formats.granularity import PerChannel
from fewbits.ranges.base import Range, ranges
from fewbits.ranges.candidates import Candidates, Quantiles, Shrink, candidates
from fewbits.ranges.scores import LpError, Score, scores

_ROWS = PerChannel(0)
# magnitudes inside this band keep every power of the error finite and normal, and are scored as they are
_LOUD, _QUIET = 2.0**20, 2.0**-20


def search_blocks(blocks: Tensor, fmt: Format, tried: Candidates, metric: Score) -> Params:
    """Parameters [..., n] of the best candidate of every block [n, values]; of equals the first.

    Blocks of extreme magnitude are scored after an exact division by a power of two, so that |error|**p neither
    overflows nor vanishes and a best candidate always exists.
    """
    unit = power_unit(blocks)
    scaled = blocks / unit
    best: Tensor | None = None
    kept: Params = {}
    for lo, hi in tried.bounds(blocks, fmt):
        params = fmt.from_range(lo, hi)
        # blocks are rows, so a parameter [..., n] expands like a per-row one
        rows = {
            spec.name: params[spec.name].unsqueeze(-1) if spec.per == "block" else params[spec.name]
            for spec in fmt.param_specs()
        }
        quantized = fmt.nearest(blocks, expand_params(fmt, _ROWS, rows, blocks.shape))[0]
        value = metric.score(scaled, quantized / unit)
        if best is None:
            best, kept = value, params
            continue
        better = value < best
        best = torch.where(better, value, best)
        for spec in fmt.param_specs():
            if spec.per == "block":
                kept[spec.name] = torch.where(better, params[spec.name], kept[spec.name])
    return kept


def power_unit(blocks: Tensor) -> Tensor:
    """[n, 1]: a power of two near the block's largest magnitude where that is extreme, else 1."""
    loud = blocks.abs().amax(dim=1, keepdim=True)
    _, exponent = torch.frexp(loud)
    # stay where the power itself, and the quotient, are normal numbers
    power = ((exponent.clamp(-125, 127) + 127) << 23).to(torch.int32).view(torch.float32)
    ordinary = (loud == 0) | ((loud <= _LOUD) & (loud >= _QUIET))
    return torch.where(ordinary, torch.ones_like(loud), power)


@ranges.register
@dataclass(frozen=True)
class Search(Range):
    """Any candidates with any score."""

    kind: ClassVar[str] = "search"
    candidates: Candidates = field(default_factory=Shrink)
    score: Score = field(default_factory=LpError)

    def __post_init__(self) -> None:
        # plain data, as read from a recipe, becomes objects here
        if isinstance(self.candidates, dict):
            object.__setattr__(self, "candidates", candidates.from_dict(self.candidates))
        if isinstance(self.score, dict):
            object.__setattr__(self, "score", scores.from_dict(self.score))

    def fit_blocks(self, blocks: Tensor, fmt: Format) -> Params:
        return search_blocks(blocks, fmt, self.candidates, self.score)


@ranges.register
@dataclass(frozen=True)
class ShrinkSearch(Range):
    """Both raw ends shrunk by `step`, `steps` times; least |error|**p wins, first of equals.

    BRECQ: the defaults with `raw_affine`. GPTQ's mse grid: reduction="sum" with `gptq_grid` (norm 2.4, 0.8 of grid
    100).
    """

    kind: ClassVar[str] = "shrink_search"
    steps: int = 80
    step: float = 0.01
    p: float = 2.4
    reduction: Literal["mean", "sum"] = "mean"

    def __post_init__(self) -> None:
        self._parts()

    def _parts(self) -> tuple[Candidates, Score]:
        return Shrink(self.steps, self.step), LpError(self.p, self.reduction)

    def fit_blocks(self, blocks: Tensor, fmt: Format) -> Params:
        return search_blocks(blocks, fmt, *self._parts())


@ranges.register
@dataclass(frozen=True)
class QuantileSearch(Range):
    """[quantile(1-p), quantile(p)] for each p; least mean |error|**power wins, first of equals (RepQ-ViT, with
    `raw_affine`).

    On a log grid only the upper quantile matters: it becomes the scale.
    """

    kind: ClassVar[str] = "quantile_search"
    probs: tuple[float, ...] = (0.999, 0.9999, 0.99999)
    power: float = 2.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "probs", self._parts()[0].probs)

    def _parts(self) -> tuple[Quantiles, Score]:
        return Quantiles(self.probs), LpError(self.power)

    def fit_blocks(self, blocks: Tensor, fmt: Format) -> Params:
        return search_blocks(blocks, fmt, *self._parts())
