"""Values counted in bins, for what a grid's error on all of them is at least."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

BINS = 1 << 16
#: Distances are off by a few units in the last place of the largest value.
_ROUNDING = 2.0**-20


@dataclass(frozen=True)
class Sample:
    """Blocks of values, and how much is known of them.

    x: float32 [n, v]. counts: float32 [n, v], how many values each entry stands for; None: one. radius: how far, at
    most, a value lies from the entry that stands for it. low, high: [n], smallest and largest value of every block.
    """

    x: Tensor
    low: Tensor
    high: Tensor
    counts: Tensor | None = None
    radius: float = 0.0

    def pieces(self, rows: Tensor, limit: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """(entries, counts) of the rows, which may come more than once; at most `limit` at a time, where that gives
        each row one."""
        width = max(1, limit // max(1, len(rows)))
        counts = None if self.counts is None else iter(_chosen(self.counts, rows).split(width, 1))
        for piece in _chosen(self.x, rows).split(width, 1):
            yield piece, None if counts is None else next(counts)


def total(errors: Tensor, counts: Tensor | None) -> Tensor:
    """[n]: the sum over each row of `errors` [n, v], each as often as `counts` says."""
    return errors.sum(1) if counts is None else errors.mul_(counts).sum(1, dtype=torch.float64)


def sketch(x: Tensor, low: Tensor, high: Tensor, limit: int, bins: int = BINS) -> Sample:
    """One block [1, v] in bins of equal width; `limit` values are looked at at a time.

    The distance of a value to a grid is at least that of its bin's centre less `radius`.
    """
    first, width = float(low), max(float(high) - float(low), 1e-30) / bins
    counts = torch.zeros(bins, dtype=torch.int64, device=x.device)
    for piece in x[0].split(limit):
        place = ((piece - first) * (1 / width)).long().clamp_(0, bins - 1)
        counts += torch.bincount(place, minlength=bins)
    centres = first + width * (torch.arange(bins, device=x.device, dtype=torch.float64) + 0.5)
    kept = counts > 0
    radius = width / 2 + max(abs(float(low)), abs(float(high))) * _ROUNDING
    return Sample(centres[kept][None].float(), low, high, counts[kept][None].float(), radius)


def _chosen(x: Tensor, rows: Tensor) -> Tensor:
    if len(x) == 1:
        return x.expand(len(rows), -1)
    if len(rows) == len(x) and torch.equal(rows, torch.arange(len(x), device=x.device)):
        return x
    return x[rows]
