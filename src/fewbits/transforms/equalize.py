"""Cross-layer equalization: how much of a channel's size two or three consecutive layers should each carry.

Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction (ICCV 2019), section 4.1. Where the
function between two layers is positively homogeneous per channel (ReLU, PReLU, identity), channel i of the first may be
divided by s_i if the second's input i is multiplied by it. Ranges are the largest absolute weight per channel; the
factor 2 of the paper cancels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewbits.errors import FewbitsError


def row_ranges(weight: Tensor) -> Tensor:
    """Largest |w| that makes each output channel: [out] of [out, in/groups, *kernel]."""
    return weight.abs().flatten(1).amax(1)


def column_ranges(weight: Tensor, groups: int = 1) -> Tensor:
    """Largest |w| that reads each input channel: [in] of [out, in/groups, *kernel] (depthwise: groups = in)."""
    matrix = weight.abs().flatten(2).amax(2) if weight.ndim > 2 else weight.abs()
    return matrix.unflatten(0, (groups, -1)).amax(1).flatten()


def pair_scales(first: Tensor, second: Tensor) -> Tensor:
    """s [C] = sqrt(first / second), after which both ranges are their geometric mean (equations 10 and 11).

    first: ranges of the first layer's output channels, second: of the second layer's input channels. Divide the first
    layer's row i and bias by s_i, multiply the second layer's column i by it. 1 where a channel is dead in either.
    """
    _same(first, second)
    return _usable((first.double() / second.double()).sqrt(), (first > 0) & (second > 0)).to(first.dtype)


def triple_scales(first: Tensor, middle: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """(s12, s23) [C] for a layer, a depthwise layer and a layer: all three ranges become their geometric mean t.

    s12 = first / t and s23 = t / last: divide the first layer's rows and bias by s12, multiply the depthwise layer by
    s12 / s23 and divide its bias by s23, multiply the last layer's columns by s23. 1 where a channel is dead in any.
    """
    _same(first, middle)
    _same(first, last)
    alive = (first > 0) & (middle > 0) & (last > 0)
    a, b, c = first.double(), middle.double(), last.double()
    mean = a.pow(1 / 3) * b.pow(1 / 3) * c.pow(1 / 3)  # the product itself could leave the range of floats
    return _usable(a / mean, alive).to(first.dtype), _usable(mean / c, alive).to(first.dtype)


def _usable(scales: Tensor, alive: Tensor) -> Tensor:
    return torch.where(alive & torch.isfinite(scales) & (scales > 0), scales, torch.ones_like(scales))


def _same(a: Tensor, b: Tensor) -> None:
    if a.dim() != 1 or a.shape != b.shape:
        raise FewbitsError(f"equalization: ranges {tuple(a.shape)} and {tuple(b.shape)} must be vectors of one length")
