"""Learned step sizes: how large their gradients are, and that they stay positive.

LSQ (Esser et al., ICLR 2020), section 2.2: the gradient of a step size sums over every element it serves, so it is
scaled by 1/sqrt(N q_max) to be of the size of a weight's. What it sums is `Format.surrogate`'s.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from fewbits.formats import Format, Granularity, Params, quantize

SMALLEST = float(torch.finfo(torch.float32).eps)


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """`x`, exactly; its gradient times `factor`."""
    return x.detach() + (x - x.detach()) * factor


def lsq_factor(values: int, q_max: int) -> float:
    """1/sqrt(N q_max) for a step size that serves N values with codes up to q_max."""
    return 1.0 / math.sqrt(max(values, 1) * max(q_max, 1))


def lsq_quantize(x: Tensor, fmt: Format, gran: Granularity, params: Params) -> Tensor:
    """`formats.quantize` with the gradient of `scale` (param shape) scaled; N is counted per scale."""
    scale = params["scale"]
    factor = lsq_factor(x.numel() // max(scale.numel(), 1), fmt.code_max)
    return quantize(x, fmt, gran, {**params, "scale": scale_gradient(scale, factor)})


@torch.no_grad()
def keep_positive(scales: Iterable[Tensor], smallest: float = SMALLEST) -> None:
    """In place: the magnitude of every scale, at least `smallest`."""
    for scale in scales:
        scale.data.abs_().clamp_(min=smallest)
