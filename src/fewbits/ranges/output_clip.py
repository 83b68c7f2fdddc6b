"""How far to clip a weight so that the layer's output, not the weight itself, suffers least.

AWQ (Lin et al., MLSys 2024): per output row and group, the largest magnitude is shrunk step by step; the clamped and
quantized group is judged by what it adds to the layer's output on calibration tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.formats import Format, PerChannel, quantize
from fewbits.ranges.base import Range

_ROWS = PerChannel(0)
_ELEMENTS = 1 << 24  # of a weight that a GPU judges at once


@torch.no_grad()
def output_clip(
    weight: Tensor,
    inputs: Tensor,
    fmt: Format,
    range_: Range,
    *,
    group_size: int | None = None,
    steps: int = 20,
    max_shrink: float = 0.5,
    rows_at_once: int | None = None,
) -> Tensor:
    """The magnitude m to clamp every (row, group) of a weight to, so that W.clamp(-m, m) may be quantized.

    weight: [..., rows, columns]; inputs: [..., tokens, columns], what the layer multiplies it with (leading axes are
    layers side by side, as the groups of a convolution). fmt, range_: the grid and how it is fitted to one row's
    group; group_size columns share one (None: the whole row; the last group may be shorter). Returns float32 [...,
    rows, groups].

    Candidates are m = (1 - i / steps) max|w| for i = 0, 1, ... below max_shrink * steps. The error of one is the mean
    over tokens of (x (q(clamp(w)) - w))^2, x and w cut to the group; the first of the smallest wins, so that no group
    is ever clipped to its loss. Groups are judged one by one, as in the released code. `rows_at_once` only sets speed
    and memory: 256, or on a GPU as many as fill it.
    Raises FewbitsError where shapes differ, no token is given, or an input or weight is not finite.
    """
    columns = weight.shape[-1]
    if weight.dim() < 2 or inputs.shape[-1] != columns or inputs.shape[:-2] != weight.shape[:-2]:
        raise FewbitsError(
            f"output clip: weight {tuple(weight.shape)} cannot multiply inputs {tuple(inputs.shape)}; "
            "both need the same columns, and the same leading axes"
        )
    if not inputs.shape[-2]:
        raise FewbitsError("output clip: no token to judge the layer's output on")
    if steps < 1 or not 0 < max_shrink <= 1:
        raise FewbitsError(f"output clip: steps={steps}, max_shrink={max_shrink}; need steps >= 1, 0 < max_shrink <= 1")
    weight, inputs = weight.detach().float(), inputs.detach().float()
    if not bool(inputs.isfinite().all() & weight.isfinite().all()):
        raise FewbitsError("output clip: an input or weight is NaN or infinite; check the model in float32")
    size = columns if group_size is None else group_size
    if rows_at_once is None:
        rows_at_once = max(256, _ELEMENTS // columns) if weight.is_cuda else 256
    factors = [1 - step / steps for step in range(max(1, int(max_shrink * steps)))]
    full = columns // size * size
    pieces = [(0, full, size), (full, columns, columns - full)]  # whole groups, and a shorter last one
    found = [
        _clip(weight[..., start:stop], inputs[..., start:stop], width, fmt, range_, factors, rows_at_once)
        for start, stop, width in pieces
        if start < stop
    ]
    return torch.cat(found, -1)


def _clip(
    weight: Tensor, inputs: Tensor, size: int, fmt: Format, range_: Range, factors: list[float], at_once: int
) -> Tensor:
    """[..., rows, groups] for columns that divide into groups of one size."""
    *lead, rows, _ = weight.shape
    w = weight.unflatten(-1, (-1, size)).transpose(-3, -2).reshape(-1, rows, size)
    x = inputs.unflatten(-1, (-1, size)).transpose(-3, -2).reshape(-1, inputs.shape[-2], size)
    if x.shape[1] > size:
        x = _shorter(x)
    best = torch.cat([_best(part, x, fmt, range_, factors) for part in w.split(at_once, 1)], 1)
    return best.view(*lead, -1, rows).transpose(-1, -2)


def _shorter(x: Tensor) -> Tensor:
    """R [n, size, size] with ||R d|| = ||x d|| for every d; x [n, tokens, size] with more tokens than columns.

    On a GPU the Cholesky factor of x^T x, in float64, takes one call for all where QR takes one for each. It wants
    every direction to be there: QR for all where one is missing.
    """
    if x.is_cuda:
        wide = x.double()
        factor, failed = torch.linalg.cholesky_ex(wide.transpose(1, 2) @ wide, upper=True)
        if not bool(failed.any()):
            return factor.float()
    return torch.linalg.qr(x, mode="r").R


def _best(w: Tensor, x: Tensor, fmt: Format, range_: Range, factors: list[float]) -> Tensor:
    """w [n, rows, size], x [n, tokens, size] -> best magnitude [n, rows]."""
    top = w.abs().amax(-1)
    best, least = top, torch.full_like(top, torch.inf)
    for factor in factors:
        limit = (top * factor).unsqueeze(-1)
        clamped = w.clamp(-limit, limit).flatten(0, 1)
        quantized = quantize(clamped, fmt, _ROWS, range_.fit(clamped, fmt, _ROWS, check=False))
        error = ((quantized.view_as(w) - w) @ x.transpose(1, 2)).square().sum(-1)
        better = error < least
        best, least = torch.where(better, limit.squeeze(-1), best), torch.where(better, error, least)
    return best
