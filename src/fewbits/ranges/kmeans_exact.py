"""The best k-means clustering of values on a line, by dynamic programming over sorted values.

In an optimal clustering of a line every cluster is an interval (Fisher, JASA 1958). With D_t(j) the least cost of the
first j values in t intervals, D_t(j) = min_i D_{t-1}(i) + cost(i, j), and the best i never falls as j grows, so halving
the range of j halves the work left (the divide and conquer of Wu, J. Algorithms 1991, and Ckmeans.1d.dp): O(k m log m)
a block. Blocks, and the places of one halving, are all worked on at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

_TINY = torch.finfo(torch.float64).tiny


def exact_centers(x: Tensor, w: Tensor, levels: int) -> Tensor:
    """Ascending centers [n, levels], float64, of least sum of w (x - center)^2 for every block.

    x: float64 [n, m], ascending in each block. w: float64, not negative. A center of no weight is the plain mean of
    its values, and of no value at all a repetition of its neighbour.
    """
    n, m = x.shape
    # about the block's own centre: the cost below is a difference of sums of squares
    middle = (w * x).sum(1, keepdim=True) / w.sum(1, keepdim=True).clamp_min(_TINY)
    x = x - middle
    sums = torch.nn.functional.pad(torch.stack([w, w * x, w * x * x]).cumsum(2), (1, 0))
    by_place = sums.transpose(1, 2).contiguous()  # [3, m + 1, n]: what is worked on at once lies together
    mass, moment, square = by_place
    least = (square - moment * moment / mass.clamp_min(_TINY)).clamp_min_(0)
    edges = [torch.full((n,), m, device=x.device)]
    starts = []
    for _ in range(1, levels):
        least, start = _stage(by_place, least)
        starts.append(start)
    for start in reversed(starts):
        edges.append(start.gather(0, edges[-1][None]).squeeze(0))
    edges.append(torch.zeros_like(edges[0]))
    return _means(x, sums, torch.stack(edges[::-1], 1)) + middle


def _stage(sums: Tensor, least: Tensor) -> tuple[Tensor, Tensor]:
    """One more cluster: least cost [m + 1, n] of every prefix, and where its last cluster starts.

    The places of a halving are gone through one by one, all blocks at once, over the starts that any block still has to
    try: plain slices, no gathering, at little more work than each block needs.
    """
    width, n = least.shape
    m = width - 1
    out = torch.zeros_like(least)
    start = torch.zeros(width, n, dtype=torch.int64, device=least.device)
    step = 1 << max(0, m.bit_length() - 1)
    while step:
        places = torch.arange(step, m + 1, 2 * step, device=least.device)
        above = places + step
        low = start[places - step].amin(1)
        high = torch.where(above <= m, start[above.clamp_max(m)].amax(1), m).minimum(places)
        for place, first, last in zip(places.tolist(), low.tolist(), high.tolist(), strict=True):
            mass, moment, square = sums[:, place : place + 1] - sums[:, first : last + 1]
            # no weight, no moment: the quotient's denominator only has to be something
            total = torch.addcdiv(square, moment.mul_(moment), mass.clamp_min_(_TINY), value=-1).clamp_min_(0)
            torch.min(total.add_(least[first : last + 1]), 0, out=(out[place], start[place]))
            start[place] += first
        step >>= 1
    return out, start


def _means(x: Tensor, sums: Tensor, bounds: Tensor) -> Tensor:
    """Weighted means of the intervals between `bounds` [n, levels + 1]."""
    mass, moment = (s.gather(1, bounds).diff(dim=1) for s in sums[:2])
    count = bounds.diff(dim=1)
    plain = torch.nn.functional.pad(x.cumsum(1), (1, 0)).gather(1, bounds).diff(dim=1) / count.clamp_min(1)
    means = torch.where(mass > 0, moment / torch.where(mass > 0, mass, 1.0), plain)
    # an empty interval repeats the value its end lies at
    edge = x.gather(1, bounds[:, 1:].sub(1).clamp_min(0))
    return torch.where(count > 0, means, edge).cummax(dim=1).values
