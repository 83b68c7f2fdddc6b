"""Bits for the channels of one tensor under a mean: bins in proportion to the spread to the power 2/3.

ACIQ (Banner, Nahshan, Soudry; NeurIPS 2019), section 4, equations 10 and 11: the rounding errors of n channels that
share B = n 2^M bins sum up to least where channel i has B_i = B a_i^(2/3) / sum_j a_j^(2/3) of them.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fewbits.errors import FewbitsError

BitRounding = Literal["round", "ceil"]


def channel_bins(spread: Tensor, bits: Tensor | float) -> Tensor:
    """Real-valued bins of every channel: float32 [n] that sum to n 2^bits, for spreads [n] >= 0.

    Equal ones where no channel spreads; a spread that is NaN or infinite counts as none. Reads nothing back.
    """
    power = spread.float().pow(2.0 / 3.0)
    power = torch.where(torch.isfinite(power), power, torch.zeros_like(power))
    total = power.sum()
    power = torch.where(total > 0, power, torch.ones_like(power))
    return len(spread) * 2**bits * power / torch.where(total > 0, total, power.sum())


def bits_of_bins(bins: Tensor, rounding: BitRounding = "round", limits: tuple[int, int] = (0, 8)) -> Tensor:
    """Whole bits of every channel, float32 [n]: log2 of its bins rounded (ties to even) or up, inside `limits`."""
    exact = torch.log2(bins)
    return (torch.round(exact) if rounding == "round" else torch.ceil(exact)).clamp(*limits)


def allocate_bits(
    spread: Tensor, mean_bits: int, *, rounding: BitRounding = "round", limits: tuple[int, int] = (0, 8)
) -> Tensor:
    """Bits of n channels, float32 [n] of whole numbers inside `limits`, whose mean is `mean_bits`.

    spread: [n], a deviation of every channel, any scale. Rounding and limits move the mean away from the budget, so the
    budget that the bins are dealt from is moved, in logarithms, until the rounded bits meet it. Each value of that
    offset at which a channel gains a bit is known: the n `mean_bits` lowest are the answer, and where two channels gain
    theirs at the same one the earlier gets it. Channels without spread get no bits; the mean stays below `mean_bits`
    where the others have the most they may. Runs on the device of `spread`, reads nothing back. Raises FewbitsError for
    a mean outside `limits`.
    """
    low, high = _checked(mean_bits, limits)
    exact = torch.log2(channel_bins(spread, mean_bits)).unsqueeze(1)
    steps = torch.arange(low, high, device=spread.device, dtype=exact.dtype)
    gains = steps + (0.5 if rounding == "round" else 0.0) - exact
    order = gains.flatten().argsort(stable=True)[: len(spread) * (mean_bits - low)]
    gained = torch.zeros_like(gains).flatten().index_fill(0, order, 1.0).view_as(gains)
    return low + (gained * torch.isfinite(gains)).sum(1)


def allocate_bits_in_rounds(
    spread: Tensor,
    mean_bits: int,
    *,
    rounding: BitRounding = "round",
    limits: tuple[int, int] = (0, 8),
    tolerance: float = 0.01,
    rounds: int = 10,
) -> Tensor:
    """`allocate_bits` as the released code does it: it may end up short or beyond, where no better is possible or not.

    The budget is moved by half of the mean that is missing, until that is within `tolerance` or `rounds` allocations
    were tried; the last one counts.
    """
    _checked(mean_bits, limits)
    target = torch.tensor(float(mean_bits), dtype=torch.float64, device=spread.device)
    bits = torch.full_like(spread, float(mean_bits), dtype=torch.float32)
    done = torch.zeros((), dtype=torch.bool, device=spread.device)
    for _ in range(rounds):
        bits = torch.where(done, bits, bits_of_bins(channel_bins(spread, target), rounding, limits))
        missing = mean_bits - bits.mean()
        done = done | (missing.abs() <= tolerance)
        target = torch.where(done, target, target + missing.double() / 2)
    return bits


def _checked(mean_bits: int, limits: tuple[int, int]) -> tuple[int, int]:
    low, high = limits
    if not low <= mean_bits <= high:
        raise FewbitsError(f"channel bits: a mean of {mean_bits} bits is not within {low} to {high}")
    return low, high
