"""Round to nearest: the baseline every solver is measured against."""

from __future__ import annotations

import torch
from torch import Tensor

from fewbits.formats import Format, Granularity, Params, decode, encode


@torch.no_grad()
def nearest(weight: Tensor, fmt: Format, granularity: Granularity, params: Params) -> tuple[Tensor, Tensor]:
    """(dequantized float32, codes) of a weight of any shape; params in the granularity's param shape."""
    codes = encode(weight.detach(), fmt, granularity, params)
    return decode(codes, fmt, granularity, params), codes
