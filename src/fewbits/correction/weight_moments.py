"""Mean and deviation of quantized weights made those of the float ones, block by block, in scale and offset.

ACIQ (Banner, Nahshan, Soudry; NeurIPS 2019), section 5, equations 12 and 13: rounding shifts the mean of a channel of
weights and changes its norm about that mean; both differences are constants per channel and fold into its grid.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from fewbits.formats import ChannelBits, Format, Granularity, Params, Uniform

_SMALLEST = 1e-8  # deviations below it are those of a constant


def moment_correction(
    weight: Tensor, quantized: Tensor, granularity: Granularity, *, mean: bool = True, deviation: bool = False
) -> tuple[Tensor, Tensor]:
    """(factor, shift), of the granularity's param shape: the corrected weight is factor * quantized + shift.

    weight, quantized: one shape. With `deviation` the quantized block is stretched about its own mean until its
    unbiased standard deviation is that of the float block (a constant block stays one); with `mean` it is then moved
    onto the float block's mean.
    """
    weight, quantized = weight.float(), quantized.float()

    def moments(x: Tensor) -> tuple[Tensor, Tensor]:
        average = granularity.reduce(x, lambda block: block.mean(1))
        return average, granularity.reduce(x, lambda block: block.var(1, correction=min(1, block.shape[1] - 1)).sqrt())

    (centre, width), (moved, stretched) = moments(weight), moments(quantized)
    factor = torch.ones_like(centre)
    if deviation:
        # a block without extent cannot be stretched, nor may one whose float values are constant vanish
        usable = (stretched > _SMALLEST) & (width > _SMALLEST)
        factor = torch.where(usable, width / (stretched + _SMALLEST), factor)
    return factor, (centre if mean else moved) - factor * moved


def with_real_offset(fmt: Format) -> Format | None:
    """The same codes on a grid whose offset may be any real number; None for grids without one."""
    if isinstance(fmt, ChannelBits):
        return dataclasses.replace(fmt, zero_point="real")
    if type(fmt) is not Uniform or fmt.fractional:
        return None
    return dataclasses.replace(
        fmt, zero_point="real", order="shift_then_round", clamp_zero_point=False,
        step="span", symmetric=False, include_zero=False,
    )  # fmt: skip


def moved_grid(params: Mapping[str, Tensor], factor: Tensor, shift: Tensor) -> Params:
    """Parameters of the grid whose every level x became factor * x + shift (factor > 0); see `with_real_offset`."""
    scale = params["scale"] * factor
    zero = params.get("zero_point")
    moved = (torch.zeros_like(scale) if zero is None else zero) - shift / scale
    return {**params, "scale": scale, "zero_point": moved}
