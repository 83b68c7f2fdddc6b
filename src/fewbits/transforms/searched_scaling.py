"""A scale per input channel from how loud the channel is, with the exponent searched on what the output loses.

AWQ (Lin et al., MLSys 2024), section 3.2: s = s_x^alpha, where s_x is the mean magnitude of the activation channel. The
weights' columns are multiplied by s before they are quantized and the activation divided by it. The fold itself is in
`fewbits.transforms.fold`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fewbits.errors import FewbitsError

FLOOR = 1e-4


class SearchedScale(NamedTuple):
    """scale: float32 [channels]. ratio: its exponent. losses: one per exponent tried, that of no scaling first."""

    scale: Tensor
    ratio: float
    losses: list[float]


@torch.no_grad()
def magnitude_scales(magnitude: Tensor, ratio: float, *, dead: Literal["keep", "clamp"] = "keep") -> Tensor:
    """magnitude^ratio, at least 1e-4, divided by sqrt(max * min): float32 [channels] with max * min = 1.

    magnitude: mean |x| of every channel. A channel that is zero on all calibration data keeps 1 and takes no part
    (`dead="keep"`). The released code lets the clamp decide (`dead="clamp"`), and so drags the normalisation of all
    others.
    """
    loud = magnitude.detach().float()
    scales = loud.pow(ratio).clamp(min=FLOOR)
    if dead == "clamp":
        return scales / (scales.max() * scales.min()).sqrt()
    live = loud > 0
    if not bool(live.any()):
        return torch.ones_like(scales)
    return torch.where(live, scales / (scales[live].max() * scales[live].min()).sqrt(), torch.ones_like(scales))


def search_scales(
    magnitude: Tensor,
    loss: Callable[[Tensor], float],
    *,
    grid: int = 20,
    dead: Literal["keep", "clamp"] = "keep",
) -> SearchedScale:
    """The scale of least loss among the exponents 0, 1/grid, ..., (grid-1)/grid; of equals the first.

    loss: what the output loses when the weights are quantized under these scales. The exponent 0 is no scaling at all,
    so the result is never worse than that. Raises FewbitsError where magnitudes are negative or not finite, or the loss
    without scaling is not finite; a scale whose loss is not finite is passed over.
    """
    if grid < 1:
        raise FewbitsError(f"scale search: grid={grid}; try at least one exponent")
    if not bool((magnitude.isfinite() & (magnitude >= 0)).all()):
        raise FewbitsError("scale search: activation magnitudes must be finite; check the calibration data and model")
    tried = [index / grid for index in range(grid)]
    scales = [magnitude_scales(magnitude, ratio, dead=dead) for ratio in tried]
    losses = [loss(scale) for scale in scales]
    if not math.isfinite(losses[0]):
        raise FewbitsError("scale search: the output is NaN or infinite even without scaling; run the model in float32")
    best = min(range(grid), key=lambda index: losses[index] if math.isfinite(losses[index]) else math.inf)
    return SearchedScale(scales[best], tried[best], losses)
