"""Quantiles of blocks of any size."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

# torch.quantile refuses larger inputs
_LIMIT = 1 << 24


def quantiles(blocks: Tensor, probs: Sequence[float]) -> list[Tensor]:
    """For every p in `probs` the p-quantile of each row of `blocks` [n, values], linear interpolation: tensors [n].

    Small inputs go through torch.quantile; large ones are selected exactly with the same interpolation. The position
    p * (values - 1) is computed in float32 as torch does, in float64 where float32 cannot count the values.
    """
    if blocks.numel() <= _LIMIT:
        return [torch.quantile(blocks, p, dim=1) for p in probs]
    return select_quantiles(blocks, probs)


def select_quantiles(blocks: Tensor, probs: Sequence[float]) -> list[Tensor]:
    """`quantiles` by selection: equal to torch.quantile in every bit where both are defined."""
    count = blocks.shape[1]
    real = np.float32 if count <= _LIMIT else np.float64
    places = [float(real(p) * real(count - 1)) for p in probs]
    needed = sorted({int(edge) for place in places for edge in (np.floor(place), np.ceil(place))})
    if blocks.device.type == "cpu":
        partial = np.partition(blocks.detach().numpy(), needed, axis=1)[:, needed]
        at = dict(zip(needed, torch.from_numpy(np.ascontiguousarray(partial)).unbind(1), strict=True))
    else:
        order = blocks.sort(dim=1).values
        at = {index: order[:, index] for index in needed}
    return [
        torch.lerp(at[int(np.floor(place))], at[int(np.ceil(place))], float(place - np.floor(place)))
        for place in places
    ]
