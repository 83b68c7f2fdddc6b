"""Which single values of a weight are moved out of the grid: the most sensitive ones, and outliers by quartiles.

SqueezeLLM (Kim, Hooper, Gholami, Dong, Li, Shen, Mahoney, Keutzer; ICML 2024), section 4.2, and its released code.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.ranges.quantile import quantiles


def sensitive_values(sensitivity: Tensor, percent: float) -> Tensor:
    """Bool, shape of `sensitivity`: values above the k-th largest, k = int(numel * percent / 100).

    Strictly above, as released, so that k - 1 values are marked where there are no ties, and none for k = 0 or 1.
    """
    if not 0 <= percent <= 100:
        raise FewbitsError(f"sensitive values: {percent} is not a percentage")
    k = int(sensitivity.numel() * percent / 100)
    if k == 0:
        return torch.zeros_like(sensitivity, dtype=torch.bool)
    return sensitivity > sensitivity.flatten().topk(k).values[-1]


def quartile_threshold(weight: Tensor, reach: float) -> Tensor:
    """max(|Q1 - reach IQR|, |Q3 + reach IQR|) over all values of a weight matrix, float32 [].

    Infinite where the quartiles coincide (a weight of nearly all zeros): no spread to measure outliers by.
    """
    first, third = _quartiles(weight)
    spread = third - first
    bound = torch.maximum((first - reach * spread).abs(), (third + reach * spread).abs())
    return torch.where(spread > 0, bound, torch.full_like(bound, torch.inf))


def outlying_values(weight: Tensor, threshold: Tensor | float) -> Tensor:
    """Bool, shape of `weight`: |w| >= threshold."""
    return weight.abs() >= threshold


def reach_for_share(weights: Iterable[Tensor], share: float, total: int) -> float:
    """The one reach at which `outlying_values` marks a `share` (0 to 1) of all values of a model's weights.

    Every value is an outlier up to a reach of its own; the answer is the K-th largest of those over the whole model, K
    = round(share * total), `total` the number of values that `weights` hold together. Weights are read one at a time,
    and only K numbers are held. Infinite for K = 0; 0 where fewer than K values can be outliers at a reach that is not
    negative.
    """
    if not 0 <= share <= 1:
        raise FewbitsError(f"outliers: a share of {share} is not between 0 and 1")
    wanted = round(share * total)
    if not wanted:
        return float("inf")
    held = torch.empty(0)
    for weight in weights:
        held = torch.cat([held.to(weight.device), _own_reach(weight)])
        if len(held) > wanted:
            held = held.topk(wanted).values
    return max(0.0, float(held.min())) if len(held) == wanted else 0.0


def _quartiles(weight: Tensor) -> list[Tensor]:
    return [value.squeeze(0) for value in quantiles(weight.detach().float().reshape(1, -1), (0.25, 0.75))]


def _own_reach(weight: Tensor) -> Tensor:
    """The largest reach at which each value is still marked: |w| >= |Q1 - r IQR| and |w| >= |Q3 + r IQR|."""
    first, third = _quartiles(weight)
    spread = third - first
    if not bool(spread > 0):
        return torch.empty(0, device=weight.device)
    size = weight.detach().float().flatten().abs()
    return torch.minimum(size + first, size - third) / spread
