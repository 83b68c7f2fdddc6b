"""What a layer's output is on average, from the statistics of its input alone (Nagel et al., ICCV 2019, section 4.2).

Rounding errors of a weight do not average out over its inputs: E[W~ x] - E[W x] = (W~ - W) E[x]. Behind a batch norm
and an activation E[x] is a moment of a clipped normal variable and needs no data.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def clipped_normal(mean: Tensor, std: Tensor, low: float = -math.inf, high: float = math.inf) -> tuple[Tensor, Tensor]:
    """Mean and variance of min(max(z, low), high) for normal z, elementwise, in float64 (the paper's appendix C).

    mean, std: any equal shape; the sign of std does not matter, 0 makes z a constant. ReLU is low=0. Either end may be
    infinite.
    """
    mean, std = mean.double(), std.double().abs()
    constant = std == 0
    sigma = torch.where(constant, torch.ones_like(std), std)
    below, dense_low = _tail(low, mean, sigma)
    under_high, dense_high = _tail(high, mean, sigma)
    inside, above = under_high - below, 1 - under_high
    bottom = 0.0 if math.isinf(low) else low
    top = 0.0 if math.isinf(high) else high
    first = sigma * (dense_low - dense_high) + mean * inside + bottom * below + top * above
    second = (mean.square() + sigma.square()) * inside + bottom**2 * below + top**2 * above
    second = second + sigma * ((mean + bottom) * dense_low - (mean + top) * dense_high)
    fixed = mean.clamp(low, high)
    variance = (second - first.square()).clamp_min(0)
    return torch.where(constant, fixed, first), torch.where(constant, torch.zeros_like(mean), variance)


def _tail(end: float, mean: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """P(z < end) and the standard normal density there."""
    t = (end - mean) / sigma
    return torch.special.ndtr(t), torch.exp(-t.square() / 2) / math.sqrt(2 * math.pi)


def mean_output(layer: Callable[[Tensor, Tensor], Tensor], weight: Tensor, mean: Tensor, axis: int) -> Tensor:
    """E[layer(x)] per output channel, float64 [out], averaged over samples and positions.

    layer: (input, weight) -> output, linear in both, with the bias that should count. mean: E[x] as an input of the
    layer. Where a convolution pads with zeros, its border outputs read less of E[x], which this includes. axis: the
    output's channel axis.
    """
    out = layer(mean.double(), weight.double())
    return out.movedim(axis, 0).flatten(1).mean(1)
