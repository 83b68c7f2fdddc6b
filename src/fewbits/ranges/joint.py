"""Width and zero point searched together: every pair counts, few need to be visited.

QDrop (Wei et al., ICLR 2022), the range initialisation of its released code; OWQ (Lee et al., AAAI 2024) fits rows the
same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.formats.apply import expand_params
from fewbits.formats.base import Format, Params
from fewbits.formats.granularity import PerChannel
from fewbits.formats.uniform import Uniform
from fewbits.ranges.base import Range, extremes, ranges
from fewbits.ranges.candidates import WidthZeroPoint, window
from fewbits.ranges.scores import LpError
from fewbits.ranges.search import power_unit, search_blocks
from fewbits.ranges.sketch import BINS, Sample, sketch, total

_ROWS = PerChannel(0)
_AT_ONCE = {"cpu": 1 << 19, "cuda": 1 << 25}  # values per pass: what a cache holds, or enough to fill a device
_MARGIN = 1 + 1e-4  # float32 errors of a window must not rule it out
_MANY = 4 * BINS  # of a single block with more values than this, ranges are first tried on a sketch


@ranges.register
@dataclass(frozen=True)
class JointSearch(Range):
    """Least mean |error|**p over `num` widths and, where the grid has a free zero point, each of its places.

    A grid without one (or mirrored about zero): [-t, t], t = m i/num for i = 1 .. num, m the block's largest magnitude.
    A grid with one: [0, t] where no value of the tensor is negative, [-t, 0] where none is positive, else the num *
    2**b candidates of `WidthZeroPoint`. Which of the three is decided for all blocks together. Of equals the first
    wins, narrow before wide and few codes below zero before many.

    The answer is that of trying all. Windows whose clipping error alone exceeds the best error so far are left out:
    moving or narrowing a window can only let more be clipped at the same end. Of a single large block (an activation)
    the values are counted in bins first: what wins there is tried at once, and what must be worse than that, as the
    bins show, not at all. Memory does not grow with the blocks.
    """

    kind: ClassVar[str] = "joint_search"
    num: int = 100
    p: float = 2.4

    def __post_init__(self) -> None:
        if self.num < 1 or not self.p > 0:
            raise FewbitsError(f"joint search: needs num >= 1 and p > 0, got num={self.num}, p={self.p}")

    def fit_blocks(self, blocks: Tensor, fmt: Format) -> Params:
        free = isinstance(fmt, Uniform) and not fmt.symmetric and fmt.zero_point not in ("none", "middle")
        lo, hi = extremes(blocks)
        sides = (-1.0, 1.0)
        if free and bool((lo >= 0).all()):
            sides = (0.0, 1.0)
        elif free and bool((hi <= 0).all()):
            sides = (-1.0, 0.0)
        elif free and not _aligned(fmt):
            return search_blocks(blocks, fmt, WidthZeroPoint(self.num), LpError(self.p))
        rows = max(1, _limit(blocks) // blocks.shape[1])
        found = []
        for part in blocks.split(rows):
            search = _searched(part, fmt, self.num, self.p, None if free and sides == (-1.0, 1.0) else sides)
            found.append((search.lo, search.hi))
        return fmt.from_range(torch.cat([lo for lo, _ in found]), torch.cat([hi for _, hi in found]))


def _limit(x: Tensor) -> int:
    return _AT_ONCE.get(x.device.type, _AT_ONCE["cpu"])


def _searched(x: Tensor, fmt: Format, num: int, p: float, sides: tuple[float, float] | None) -> _Search:
    """The best thresholds of blocks on the given sides, or windows."""
    search = _Search(Sample(x, *extremes(x)), fmt, num, p)
    if len(x) == 1 and x.shape[1] > _MANY and search.ordinary and _nearest(fmt):
        bins = sketch(x, search.exact.low, search.exact.high, search.limit)
        rough = _Search(bins, fmt, num, p)
        rough.run(sides)
        search = _Search(search.exact, fmt, num, p, bins)
        search.start(rough)
    search.run(sides)
    return search


def _nearest(fmt: Format) -> bool:
    """Whether every value goes to the level nearest to it, so that how far it moves changes no faster than the
    value."""
    return type(fmt) is Uniform and not fmt.fractional and fmt.rounding != "floor"


def _aligned(fmt: Format) -> bool:
    """Whether a window of `WidthZeroPoint` becomes exactly the grid it stands for, so that its ends bound what it
    clips."""
    return type(fmt) is Uniform and fmt.zero_point in ("integer", "real") and fmt.step == "span" and fmt.min_span == 0


class _Search:
    """The best range so far of every block: its error (sum over the block), place in the order, and ends.

    Several tries of a block run at once where blocks are small: as many as `_AT_ONCE` values allow. `rough` tells what
    a range's error is at least, for less than trying it.
    """

    def __init__(self, exact: Sample, fmt: Format, num: int, p: float, rough: Sample | None = None) -> None:
        x = exact.x
        self.exact, self.fmt, self.num, self.p = exact, fmt, num, p
        self.rough = rough
        self.unit = power_unit(x)
        self.ordinary = bool((self.unit == 1).all())
        self.limit = _limit(x)
        self.best = torch.full((len(x),), torch.inf, dtype=torch.float64, device=x.device)
        self.place = torch.full((len(x),), torch.iinfo(torch.int64).max, device=x.device)
        self.lo, self.hi = torch.zeros(len(x), device=x.device), torch.zeros(len(x), device=x.device)
        self.all = torch.arange(len(x), device=x.device)

    # -- what is tried -----------------------------------------------------------------------------------------------

    def run(self, sides: tuple[float, float] | None) -> None:
        """Try thresholds on the given sides, or windows."""
        if sides is None:
            self.windows()
        else:
            self.thresholds(*sides)

    def start(self, found: _Search) -> None:
        """Try what another search found best."""
        tried = found.best.isfinite().nonzero().flatten()
        self._visit(tried, found.lo[tried], found.hi[tried], found.place[tried])

    def thresholds(self, below: float, above: float) -> None:
        """[below t, above t] for every t, wide to narrow."""
        largest = torch.maximum(self.exact.low.abs(), self.exact.high.abs())
        bounded = isinstance(self.fmt, Uniform) and not self.fmt.fractional

        def visit(rows: Tensor, indices: Tensor) -> Tensor:
            row, index = _pairs(rows, indices)
            threshold = largest[row] / self.num * index
            lo, hi = below * threshold, above * threshold
            if bounded:
                keep = self._clipped(lo, hi, row).sum(0) <= self.best[row] * _MARGIN
                rows = rows[keep[-len(rows) :]]
                row, index, lo, hi = row[keep], index[keep], lo[keep], hi[keep]
            self._visit(row, lo, hi, index)
            return rows

        for indices in self._groups(self.all, max(1, self.num // 10)):  # a good error to start from
            visit(self.all, indices)
        rows = self.all
        for indices in self._groups(rows):
            if len(rows):
                rows = visit(rows, indices)  # who clips too much at a width does at every smaller one

    def windows(self) -> None:
        """Every width and zero point, wide to narrow, between the zero points that clip too much at one end."""
        assert isinstance(self.fmt, Uniform)
        steps = self.fmt.levels - 1
        extent = self.exact.high.clamp_min(0) - self.exact.low.clamp_max(0)

        def visit(row: Tensor, index: Tensor, zero: Tensor) -> None:
            self._visit(row, *window(extent[row], self.num, index, zero, steps), index * (steps + 1) + zero)

        def fits(end: int, index: Tensor, row: Tensor, pair: Tensor, zero: Tensor) -> Tensor:
            row = row[pair]
            ends = window(extent[row], self.num, index[pair], zero, steps)
            return self._clipped(*ends, row)[end] <= self.best[row] * _MARGIN

        # where the smallest step allowed is too coarse for every window, all are equal and the first stays; where one
        # was found on bins, that one stays: tried again here, its error may come out larger
        new = self.best.isinf()
        lo, hi = window(extent, self.num, 1, 0, steps)
        self.lo, self.hi = torch.where(new, lo, self.lo), torch.where(new, hi, self.hi)
        rows = (extent / steps > self.fmt.eps).nonzero().flatten()
        # a good error to start from: windows over the data's own zero point
        zero = (-self.exact.low.clamp_max(0) / extent.clamp_min(self.fmt.eps) * steps).round().long().clamp(0, steps)
        for indices in self._groups(rows, max(1, self.num // 20)):
            row, index = _pairs(rows, indices)
            visit(row, index, zero[row])
        first, last = torch.zeros_like(self.all), torch.full_like(self.all, steps)
        for indices in self._groups(rows):
            if not len(rows):
                return
            row, index = _pairs(rows, indices)
            # A later zero point clips more above, an earlier one more below, and a narrower window more at both ends.
            latest = _outermost(partial(fits, 1, index, row), last[row], first[row] - 1)
            earliest = _outermost(partial(fits, 0, index, row), first[row], latest + 1)
            first[rows], last[rows] = earliest[-len(rows) :], latest[-len(rows) :]
            rows = rows[last[rows] >= first[rows]]
            many = (latest - earliest + 1).clamp_min(0)
            row, index = row.repeat_interleave(many), index.repeat_interleave(many)
            before = (many.cumsum(0) - many).repeat_interleave(many)
            tried = earliest.repeat_interleave(many) + torch.arange(len(row), device=row.device) - before
            visit(row, index, tried)

    def _groups(self, rows: Tensor, stride: int = 1) -> Iterator[Tensor]:
        """The widths, largest first, as many in one tensor as may be tried at once for `rows`, and few enough that
        what the wider ones showed spares the narrower ones."""
        indices = torch.arange(self.num, 0, -stride, device=rows.device)
        at_once = self._tries(self.rough or self.exact) // max(1, len(rows))
        return iter(indices.split(max(1, min(at_once, self.num // 12))))

    # -- how it does -------------------------------------------------------------------------------------------------

    def _visit(self, rows: Tensor, lo: Tensor, hi: Tensor, place: Tensor) -> None:
        """Try a range for each of `rows` unless it must be worse than the best; a row may come more than once."""
        if self.rough is not None:
            split = [chosen.split(self._tries(self.rough)) for chosen in (rows, lo, hi)]
            least = [self._least(*chosen) for chosen in zip(*split, strict=True)]
            kept = torch.cat(least) <= self.best[rows] * _MARGIN
            rows, lo, hi, place = rows[kept], lo[kept], hi[kept], place[kept]
        for chosen in torch.arange(len(rows), device=rows.device).split(self._tries(self.exact)):
            self._try(rows[chosen], lo[chosen], hi[chosen], place[chosen])

    def _tries(self, sample: Sample) -> int:
        """Of how many ranges a sample's errors are worked out at once."""
        return max(1, self.limit // sample.x.shape[1])

    def _try(self, rows: Tensor, lo: Tensor, hi: Tensor, place: Tensor) -> None:
        params = self.fmt.from_range(lo, hi)
        error = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
        for x, counts in self.exact.pieces(rows, self.limit):
            quantized = self.fmt.nearest(x, self._spread(params, x))[0]
            error += total(self._scaled(x - quantized, rows).abs_().pow_(self.p), counts)
            if x.shape[1] < self.exact.x.shape[1] and bool((error > self.best[rows]).all()):
                return
        best = self.best.scatter_reduce(0, rows, error, "amin")
        held = torch.where(self.best == best, self.place, torch.iinfo(torch.int64).max)
        self.place = held.scatter_reduce(0, rows, torch.where(error == best[rows], place, held[rows]), "amin")
        self.best = best
        won = (error == best[rows]) & (place == self.place[rows])
        self.lo[rows[won]], self.hi[rows[won]] = lo[won], hi[won]

    def _least(self, rows: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
        """[n]: what the error of ranges is at least."""
        assert self.rough is not None
        params = self.fmt.from_range(lo, hi)
        out = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
        for x, counts in self.rough.pieces(rows, self.limit):
            moved = (x - self.fmt.nearest(x, self._spread(params, x))[0]).abs_()
            out += total(moved.sub_(self.rough.radius).clamp_min_(0).pow_(self.p), counts)
        return out

    def _clipped(self, lo: Tensor, hi: Tensor, rows: Tensor) -> Tensor:
        """[2, n]: the least error of the values below the grid of a range, and of those above it."""
        assert isinstance(self.fmt, Uniform)
        params = self.fmt.from_range(lo, hi)
        zero = params.get("zero_point", torch.zeros_like(lo))
        ends = [((code - zero) * params["scale"]).unsqueeze(1) for code in (self.fmt.q_min, self.fmt.q_max)]
        out = torch.zeros(2, len(rows), dtype=torch.float64, device=rows.device)
        sample = self.rough or self.exact
        for x, counts in sample.pieces(rows, self.limit):
            out[0] += self._beyond(ends[0] - x, counts, sample.radius, rows)
            out[1] += self._beyond(x - ends[1], counts, sample.radius, rows)
        return out

    def _beyond(self, distance: Tensor, counts: Tensor | None, radius: float, rows: Tensor) -> Tensor:
        """[n]: the least error of values this far beyond an end, in place."""
        if radius:
            distance.sub_(radius)
        return total(self._scaled(distance, rows).clamp_min_(0).pow_(self.p), counts)

    def _scaled(self, error: Tensor, rows: Tensor) -> Tensor:
        """An error in place, in the block's unit, so that its power is a normal number."""
        return error if self.ordinary else error.div_(self.unit[rows])

    def _spread(self, params: Params, x: Tensor) -> Params:
        specs = self.fmt.param_specs()
        rows = {s.name: params[s.name].unsqueeze(-1) if s.per == "block" else params[s.name] for s in specs}
        return expand_params(self.fmt, _ROWS, rows, x.shape)


def _pairs(rows: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Every row with every index, [n k] each; the last index comes last, with the rows in order."""
    return rows.repeat(len(indices)), indices.repeat_interleave(len(rows))


def _outermost(fits: Callable[[Tensor, Tensor], Tensor], end: Tensor, beyond: Tensor) -> Tensor:
    """For every pair the zero point nearest to `end` that fits, on the way to `beyond`, which stands for none.

    `fits` takes numbers of pairs and a zero point for each. What fits is an interval that reaches as far as `beyond`
    where it is not empty.
    """
    found = end.clone()
    active = torch.arange(len(end), device=end.device)
    active = active[~fits(active, end)]
    bad, good = end[active], beyond[active]
    while len(active):
        found[active] = good
        wide = (bad - good).abs() > 1
        active, bad, good = active[wide], bad[wide], good[wide]
        if len(active):
            middle = torch.div(bad + good, 2, rounding_mode="floor")
            fit = fits(active, middle)
            bad, good = torch.where(fit, bad, middle), torch.where(fit, middle, good)
    return found
