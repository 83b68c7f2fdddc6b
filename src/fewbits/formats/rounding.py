"""Rounding a real code to an integer: the tie rules papers use, exact in float32."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Rounding = Literal["half_even", "half_away", "half_up", "floor"]


def round_to_integer(x: Tensor, mode: Rounding) -> Tensor:
    """`x` rounded elementwise, as float. Ties: to even, away from zero, or up; "floor" always goes down.

    Adding 0.5 and truncating is wrong for 0.49999997 in float32, so the fraction is compared instead. For "floor" a
    value within a few ulp below an integer counts as that integer: (n * s) / s may fall just short of n, and a value on
    the grid must stay on it.
    """
    if mode == "half_even":
        return torch.round(x)
    if mode == "half_away":
        whole = torch.trunc(x)
        part = x - whole
        return torch.where(part.abs() >= 0.5, whole + torch.sign(part), whole)
    whole = torch.floor(x)
    part = x - whole
    if mode == "half_up":
        return torch.where(part >= 0.5, whole + 1, whole)
    close = torch.round(x)
    slack = 4 * torch.finfo(x.dtype).eps * x.abs()
    return torch.where((close - x).abs() <= slack, close, whole)
